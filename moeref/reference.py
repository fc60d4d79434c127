"""DeepSeek-V3's MoE layer with FP8 block scales: the definition, one pure function a stage.

Sources: DeepSeek-V3 Technical Report (arXiv:2412.19437), section 2.1.2, for the routing; FlashInfer-Bench's definition
moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048 for the inputs, their scales and the expert-parallel shard.

Axes: T tokens, E experts, L local experts, K top_k, H hidden, I intermediate, P permuted rows (local token-expert
pairs, sorted by expert, then by token). Stages in order:

    route -> permute -> gemm1 -> swiglu -> requantize -> gemm2 -> combine

Everything is computed in `dtype` (float32 is the definition, float64 an oracle); the one rounding of the definition
is the final cast of the output to bfloat16. A Recipe adds the roundings that real kernels have.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import silu

from moeref.inputs import Inputs
from moeref.quant import dequantize_1x128, quantize_1x128, weight_slices
from moeref.spec import EXACT, Geometry, Recipe

NORMALISER_EPSILON = 1e-20
"""Added to the sum of the chosen scores, as the definition does."""


@dataclass(frozen=True)
class Routing:
    """What `route` decides for each token."""

    topk_ids: torch.Tensor  # [T, K] int64, best first; equal scores: the lower id first
    topk_weights: torch.Tensor  # [T, K], times routed_scaling_factor
    expert_margin: torch.Tensor  # [T] last chosen biased score minus the best one left out; inf if none is left out
    group_margin: torch.Tensor  # [T] the same for group scores


@dataclass(frozen=True)
class Permutation:
    """Local token-expert pairs, sorted by local expert, then by token."""

    expert_offsets: torch.Tensor  # [L+1] int64, [0] + cumsum: expert e owns rows expert_offsets[e] .. [e+1]-1
    permuted_idx_to_token_idx: torch.Tensor  # [P] int64
    permuted_idx_to_slot: torch.Tensor  # [P] int64: which of the token's K choices


@dataclass(frozen=True)
class Trace:
    """Every stage of one call."""

    routing: Routing
    permutation: Permutation
    gemm1_out: torch.Tensor  # [P, 2I], [up | gate]
    swiglu_out: torch.Tensor  # [P, I], before re-quantisation
    requantized: torch.Tensor  # [P, I], what gemm2 reads
    gemm2_out: torch.Tensor  # [P, H], not yet weighted
    output: torch.Tensor  # [T, H] bfloat16
    unrounded: torch.Tensor  # [T, H] output before its cast


def route(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    geometry: Geometry,
    routed_scaling_factor: float,
    recipe: Recipe = EXACT,
    dtype: torch.dtype = torch.float32,
) -> Routing:
    """Choose top_k experts a token. routing_logits [T, E], routing_bias [E].

    s = sigmoid(logits); the choice is made on s + bias, within the topk_group groups whose two best members have the
    largest sum; the weights are s of the chosen (without bias), normalised over all K, local or not.
    """
    g = geometry
    tokens = routing_logits.shape[0]
    scores = 1.0 / (1.0 + torch.exp(-routing_logits.to(dtype)))  # [T, E]
    biased = scores + routing_bias.to(dtype)
    grouped = biased.view(tokens, g.n_group, g.group_size)
    best_two = grouped.topk(min(2, g.group_size), dim=-1).values
    group_ids, group_margin = _best(best_two.sum(-1), g.topk_group)  # [T, topk_group], [T]
    kept = torch.zeros(tokens, g.n_group, dtype=torch.bool, device=biased.device)
    kept.scatter_(1, group_ids, True)
    lowest = torch.finfo(dtype).min  # not 0: a valid biased score may be negative
    masked = grouped.masked_fill(~kept.unsqueeze(-1), lowest).view(tokens, g.num_experts)
    topk_ids, expert_margin = _best(masked, g.top_k)  # [T, K], [T]
    chosen = scores.gather(1, topk_ids)
    topk_weights = chosen / (chosen.sum(-1, keepdim=True) + NORMALISER_EPSILON) * routed_scaling_factor
    if recipe.topk_weights == "bf16":
        topk_weights = topk_weights.to(torch.bfloat16).to(dtype)
    return Routing(topk_ids, topk_weights, expert_margin, group_margin)


def _best(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the `count` largest of each row, the lower id first among equals; and the margin at the cut, [T]."""
    values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    if count == scores.shape[-1]:
        return ids, torch.full_like(values[:, 0], torch.inf)
    return ids[:, :count], values[:, count - 1] - values[:, count]


def permute(topk_ids: torch.Tensor, geometry: Geometry, local_expert_offset: int) -> Permutation:
    """Sort the pairs (token, slot) whose expert is one of offset .. offset+L-1. topk_ids [T, K] global ids.

    Example: ids [[5, 2], [4, 5]], offset 4, L 2 -> local pairs (token 0, expert 1), (1, 0), (1, 1);
    expert_offsets [0, 1, 3], permuted_idx_to_token_idx [1, 0, 1], permuted_idx_to_slot [0, 0, 1].
    """
    local = topk_ids - local_expert_offset  # [T, K]
    tokens, slots = torch.nonzero((local >= 0) & (local < geometry.num_local_experts), as_tuple=True)  # by token
    experts = local[tokens, slots]
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=geometry.num_local_experts)
    expert_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Permutation(expert_offsets, tokens[order], slots[order])


def gemm1(
    inputs: Inputs, permutation: Permutation, recipe: Recipe = EXACT, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Each permuted row times its expert's gemm1_weights -> [P, 2I], columns [up | gate]."""
    scale = inputs.hidden_states_scale.T.to(dtype)  # [T, H/128]
    rows = permutation.permuted_idx_to_token_idx
    out = torch.empty(len(rows), inputs.gemm1_weights.shape[1], dtype=dtype, device=rows.device)
    for expert, span in expert_spans(permutation.expert_offsets):
        tokens = rows[span]
        hidden = dequantize_1x128(inputs.hidden_states[tokens], scale[tokens])  # [rows, H]
        for columns, weight in weight_slices(inputs.gemm1_weights[expert], inputs.gemm1_weights_scale[expert], dtype):
            out[span, columns] = hidden @ weight.T
    return out.to(torch.bfloat16).to(dtype) if recipe.gemm1_out == "bf16" else out


def swiglu(gemm1_out: torch.Tensor, recipe: Recipe = EXACT) -> torch.Tensor:
    """silu(gate) * up: gemm1_out [P, 2I] holds [up | gate] -> [P, I]."""
    if recipe.requantize == 2:
        gemm1_out = dequantize_1x128(*quantize_1x128(gemm1_out, recipe.scale))
    up, gate = gemm1_out.chunk(2, dim=-1)
    return silu(gate) * up


def requantize(swiglu_out: torch.Tensor, recipe: Recipe = EXACT) -> torch.Tensor:
    """What gemm2 reads: swiglu_out [P, I] itself, or after an e4m3 cast with a scale per 1x128 block."""
    if recipe.requantize == 0:
        return swiglu_out
    return dequantize_1x128(*quantize_1x128(swiglu_out, recipe.scale))


def gemm2(requantized: torch.Tensor, inputs: Inputs, permutation: Permutation) -> torch.Tensor:
    """Each row [P, I] times its expert's gemm2_weights -> [P, H], in requantized's dtype."""
    dtype = requantized.dtype
    out = torch.empty(len(requantized), inputs.gemm2_weights.shape[1], dtype=dtype, device=requantized.device)
    for expert, span in expert_spans(permutation.expert_offsets):
        for columns, weight in weight_slices(inputs.gemm2_weights[expert], inputs.gemm2_weights_scale[expert], dtype):
            out[span, columns] = requantized[span] @ weight.T
    return out


def combine(gemm2_out: torch.Tensor, routing: Routing, permutation: Permutation) -> torch.Tensor:
    """Weighted sum of each token's rows, experts in ascending order -> [T, H]; tokens without a row stay 0."""
    tokens, slots = permutation.permuted_idx_to_token_idx, permutation.permuted_idx_to_slot
    weights = routing.topk_weights[tokens, slots]  # [P]
    out = gemm2_out.new_zeros(len(routing.topk_ids), gemm2_out.shape[1])
    for _, span in expert_spans(permutation.expert_offsets):
        out[tokens[span]] += weights[span, None] * gemm2_out[span]  # a token stands once in an expert's run
    return out


def expert_spans(expert_offsets: torch.Tensor) -> list[tuple[int, slice]]:
    """(local expert, its rows) of every expert that has rows, ascending."""
    bounds: list[int] = expert_offsets.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]


def moe(inputs: Inputs, recipe: Recipe = EXACT, dtype: torch.dtype = torch.float32) -> Trace:
    """The whole layer. The inputs are taken as checked (Inputs.check)."""
    routing = route(
        inputs.routing_logits, inputs.routing_bias, inputs.geometry, inputs.routed_scaling_factor, recipe, dtype
    )
    return experts(inputs, routing, recipe, dtype)


def experts(inputs: Inputs, routing: Routing, recipe: Recipe = EXACT, dtype: torch.dtype = torch.float32) -> Trace:
    """The layer from a given routing on."""
    permutation = permute(routing.topk_ids, inputs.geometry, inputs.local_expert_offset)
    gemm1_out = gemm1(inputs, permutation, recipe, dtype)
    swiglu_out = swiglu(gemm1_out, recipe)
    requantized = requantize(swiglu_out, recipe)
    gemm2_out = gemm2(requantized, inputs, permutation)
    unrounded = combine(gemm2_out, routing, permutation)
    output = unrounded.to(torch.bfloat16)
    return Trace(routing, permutation, gemm1_out, swiglu_out, requantized, gemm2_out, output, unrounded)
