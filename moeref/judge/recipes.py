"""Which legal recipe an output comes nearest to, found from the output itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moeref.inputs import Inputs
from moeref.judge.compare import row_errors
from moeref.reference import Permutation, Routing, Trace, combine, gemm2, requantize, swiglu
from moeref.spec import Recipe

SAMPLE = 32  # tokens on which the recipes are told apart
TIE = 0.98  # a recipe with more roundings must come nearer than this share of the simpler one's distance

_ROUNDINGS = ("exact", "bf16_gemm1", "requant", "bf16_gemm1+requant", "requant+ue8m0", "bf16_gemm1+requant+ue8m0")
LEGAL: tuple[Recipe, ...] = tuple(
    replace(Recipe.parse(name), topk_weights=weights)
    for weights in ("fp32", "bf16")
    for name in (*_ROUNDINGS, "requant2", "requant2+ue8m0")
)
"""What `auto` chooses from, plainer ones first."""


@dataclass(frozen=True)
class Nearest:
    """A legal recipe and how far the output lies from it: median relative row error over the sample."""

    recipe: Recipe
    distance: float


@dataclass(frozen=True)
class Emulations:
    """A sample of tokens under every legal recipe; nothing of it depends on a candidate."""

    sample: torch.Tensor  # int64 [n] active tokens, ascending
    outputs: tuple[torch.Tensor, ...]  # [n, H] bfloat16 each, in the order of LEGAL


def emulate(trace: Trace, inputs: Inputs, active: torch.Tensor) -> Emulations:
    """Run each recipe through the reference's stages from gemm1's exact result on. active: int64 [n], n > 0, ascending.

    At most SAMPLE active tokens are taken, spread over the batch. Every weight is dequantised once for all recipes.
    """
    picks = torch.linspace(0, len(active) - 1, min(SAMPLE, len(active)), device=active.device).round().long()
    sample = active[picks]
    rows = torch.isin(trace.permutation.permuted_idx_to_token_idx, sample).nonzero().squeeze(1)  # [R]
    gemm1_out = trace.gemm1_out[rows]
    variants = list(dict.fromkeys(replace(recipe, topk_weights="fp32") for recipe in LEGAL))
    read = [requantize(swiglu(_round_gemm1(gemm1_out, recipe), recipe), recipe) for recipe in variants]
    results = _gemm2_stacked(read, inputs, trace.permutation, rows)
    permutation = _subset(trace.permutation, rows)
    outputs = []
    for recipe in LEGAL:
        weights = trace.routing.topk_weights
        if recipe.topk_weights == "bf16":
            weights = weights.to(torch.bfloat16).float()
        result = results[variants.index(replace(recipe, topk_weights="fp32"))]
        emulated = _combine_sample(result, replace(trace.routing, topk_weights=weights), permutation, sample)
        outputs.append(emulated.to(torch.bfloat16))
    return Emulations(sample, tuple(outputs))


def nearest_recipes(output: torch.Tensor, emulations: Emulations) -> list[Nearest]:
    """All legal recipes, nearest first. output: [T, H].

    A median over the sample's rows is used, so that some wrong rows do not decide.
    """
    taken = output[emulations.sample]
    ranked: list[Nearest] = []
    for recipe, emulated in zip(LEGAL, emulations.outputs, strict=True):
        one = Nearest(recipe, float(row_errors(taken, emulated).nan_to_num(nan=torch.inf).median()))
        # plainer recipes come first in LEGAL: they stay before those that are not clearly nearer
        place = next((i for i, other in enumerate(ranked) if one.distance < TIE * other.distance), len(ranked))
        ranked.insert(place, one)
    return ranked


def _round_gemm1(gemm1_out: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    return gemm1_out.to(torch.bfloat16).float() if recipe.gemm1_out == "bf16" else gemm1_out


def _subset(permutation: Permutation, rows: torch.Tensor) -> Permutation:
    """The permutation of some of its rows (ascending)."""
    offsets = torch.searchsorted(rows, permutation.expert_offsets)
    return Permutation(offsets, permutation.permuted_idx_to_token_idx[rows], permutation.permuted_idx_to_slot[rows])


def _gemm2_stacked(
    read: list[torch.Tensor], inputs: Inputs, permutation: Permutation, rows: torch.Tensor
) -> list[torch.Tensor]:
    """gemm2 of every variant [R, I] -> [R, H] each, with every weight dequantised once for all."""
    count = len(read)
    subset = _subset(permutation, rows)
    stacked = Permutation(
        subset.expert_offsets * count,
        subset.permuted_idx_to_token_idx.repeat_interleave(count),
        subset.permuted_idx_to_slot.repeat_interleave(count),
    )
    result = gemm2(torch.stack(read, 1).flatten(0, 1), inputs, stacked)  # row-major: variants of a row side by side
    return list(result.view(-1, count, result.shape[1]).unbind(1))


def _combine_sample(
    gemm2_out: torch.Tensor, routing: Routing, permutation: Permutation, sample: torch.Tensor
) -> torch.Tensor:
    """combine for the sampled tokens alone -> [len(sample), H]. sample ascending."""
    local = Permutation(
        permutation.expert_offsets,
        torch.searchsorted(sample, permutation.permuted_idx_to_token_idx),
        permutation.permuted_idx_to_slot,
    )
    chosen = Routing(
        routing.topk_ids[sample],
        routing.topk_weights[sample],
        routing.expert_margin[sample],
        routing.group_margin[sample],
    )
    return combine(gemm2_out, chosen, local)
