"""DeepGEMM's grouped FP8 GEMMs with this project's own steps around them. Two variants: contiguous and masked.

DeepGEMM has GEMMs alone: routing, permutation, SwiGLU with quantisation and combine are moe_fast's, so a figure of this
backend is not DeepGEMM's alone. Contiguous: experts one after the other, each padded to whole tiles. Masked: as many
rows for each expert as there are tokens, of which the library reads those that are used. gemm1's result is bfloat16 and
SwiGLU's is quantised, recipe 'bf16_gemm1+requant'. Source: deep_gemm 2 and sgl-deep-gemm 0.1, m_grouped_fp8_gemm_nt_*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from moe_fast.backends import Backend
from moe_fast.backends._adapter import Compute, Layer, Needs, backend, step
from moeref.spec import BLOCK

FP8 = torch.float8_e4m3fn
RECIPE = "bf16_gemm1+requant"
MASKED_NAMES = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked", "m_grouped_fp8_fp4_gemm_nt_masked")
ALIGNMENT_NAMES = ("get_mk_alignment_for_contiguous_layout", "get_m_alignment_for_contiguous_layout")
"""Names by release; newer ones keep some as aliases."""

FUNCTIONS = {
    "contiguous": ("deep_gemm.m_grouped_fp8_gemm_nt_contiguous", "deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous"),
    "masked": ("deep_gemm.m_grouped_fp8_gemm_nt_masked", "deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked"),
    "alignment": tuple(f"deep_gemm.{name}" for name in ALIGNMENT_NAMES),
}
"""What of the library is called, where releases have it; a test holds the calls to the real signatures."""


def load() -> SimpleNamespace:
    """The library's functions. Raises ImportError; AttributeError for a release without one of them."""
    import deep_gemm

    return SimpleNamespace(
        contiguous=deep_gemm.m_grouped_fp8_gemm_nt_contiguous,
        masked=_first(deep_gemm, MASKED_NAMES),
        alignment=_first(deep_gemm, ALIGNMENT_NAMES),
    )


def _first(module: Any, names: tuple[str, ...]) -> Callable[..., Any]:
    found = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if found is None:
        raise AttributeError(f"deep_gemm has none of {', '.join(names)}: install a release that has")
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Plan:
    """Routing, and where each local pair's row stands among the R padded ones."""

    topk_weights: torch.Tensor  # [T, K]
    placed_rows: torch.Tensor  # [T, K] int32, -1 where a choice is not local
    expert_offsets: torch.Tensor  # [L+1] int32, without padding
    row_expert: torch.Tensor  # [R] int32, -1 where a row is padding
    rows: torch.Tensor  # [R, H] e4m3
    rows_scale: torch.Tensor  # [R, H/128]


def plan_rows(layer: Layer, capacity: int, tile_rows: int, masked: bool) -> Plan:
    """Route, and copy each local pair's activations to its place among `capacity` rows.

    Expert e's rows start at the tiles of the experts before it times tile_rows, or, masked, at e * capacity / L.
    Nothing waits for the device.
    """
    from moe_fast.kernels import permute, routing

    on_gpu = layer.device.type == "cuda"
    tokens, top_k, local = layer.tokens, layer.top_k, layer.local

    def ints(*shape: int) -> torch.Tensor:
        return layer.empty(*shape, dtype=torch.int32)

    topk_ids, topk_weights, local_slot = ints(tokens, top_k), layer.empty(tokens, top_k), ints(tokens, local)
    token_rows, row_token = ints(tokens, top_k), ints(tokens * top_k)
    expert_offsets, tile_offsets = ints(local + 1), ints(local + 1)
    permuted = (routing.route if on_gpu else routing.route_torch)(
        layer.routing_logits, layer.routing_bias, topk_ids, topk_weights, local_slot, token_rows, expert_offsets,
        tile_offsets, row_token, ints(1).zero_(), ints(1), layer.local_expert_offset, layer.routed_scaling_factor,
        layer.n_group, layer.topk_group, tile_rows,
    )  # fmt: skip
    if not permuted:
        chunk_counts = ints(-(-tokens // permute.CHUNK), local)
        (permute.permute if on_gpu else permute.permute_torch)(
            local_slot, token_rows, expert_offsets, tile_offsets, row_token, chunk_counts, tile_rows
        )
    if masked:
        starts = torch.arange(0, capacity, capacity // local, dtype=torch.int32, device=layer.device)
    else:
        starts = tile_offsets[:-1] * tile_rows
    plan = Plan(
        topk_weights,
        placed_rows=ints(tokens, top_k),
        expert_offsets=expert_offsets,
        row_expert=torch.full((capacity,), -1, dtype=torch.int32, device=layer.device),
        rows=layer.empty(capacity, layer.hidden, dtype=FP8),
        rows_scale=layer.empty(capacity, layer.hidden // BLOCK),
    )
    step("place_rows", layer.device)(
        topk_ids, token_rows, expert_offsets, starts, layer.hidden_states, layer.hidden_states_scale, plan.rows,
        plan.rows_scale, plan.row_expert, plan.placed_rows, layer.local_expert_offset,
    )  # fmt: skip
    return plan


def compute_with(masked: bool) -> Compute:
    """compute(library, layer, out) of one variant."""

    def compute(library: SimpleNamespace, layer: Layer, out: torch.Tensor) -> None:
        from moe_fast.kernels import combine

        tile_rows = int(library.alignment())
        if masked:
            capacity = layer.local * -(-layer.tokens // tile_rows) * tile_rows
        else:
            pairs = layer.tokens * min(layer.top_k, layer.local)
            capacity = (pairs // tile_rows + min(layer.local, pairs)) * tile_rows
        plan = plan_rows(layer, capacity, tile_rows, masked)
        multiply = grouped(library, layer, plan, masked)
        gemm1_out = layer.empty(capacity, 2 * layer.intermediate, dtype=torch.bfloat16)
        multiply(plan.rows, plan.rows_scale, layer.gemm1_weights, layer.gemm1_weights_scale, gemm1_out)
        requantized = layer.empty(capacity, layer.intermediate, dtype=FP8)
        requantized_scale = layer.empty(capacity, layer.intermediate // BLOCK)
        step("swiglu_quantize", layer.device)(gemm1_out, plan.row_expert, requantized, requantized_scale)
        gemm2_out = layer.empty(capacity, layer.hidden, dtype=torch.bfloat16)
        multiply(requantized, requantized_scale, layer.gemm2_weights, layer.gemm2_weights_scale, gemm2_out)
        sum_up = combine.combine if layer.device.type == "cuda" else combine.combine_torch
        sum_up(gemm2_out, plan.topk_weights, plan.placed_rows, out)

    return compute


def grouped(library: SimpleNamespace, layer: Layer, plan: Plan, masked: bool) -> Callable[..., None]:
    """multiply(x [R, K] e4m3, x_scale [R, K/128], weight [L, N, K], weight_scale, out [R, N] bfloat16)."""
    counts = plan.expert_offsets[1:] - plan.expert_offsets[:-1] if masked else None
    expected_rows = max(1, layer.tokens * layer.top_k // layer.experts)  # a hint for the library's tiling

    def multiply(
        x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out: torch.Tensor
    ) -> None:
        if not masked:
            library.contiguous((x, x_scale), (weight, weight_scale), out, plan.row_expert)
            return
        x, x_scale, out = (each.unflatten(0, (layer.local, -1)) for each in (x, x_scale, out))
        library.masked((x, x_scale), (weight, weight_scale), out, counts, expected_rows)

    return multiply


NEEDS = Needs(("deep_gemm", "triton"), "pip install 'moeref[deep_gemm]'", (9,))
"""Hopper alone: on Blackwell DeepGEMM rounds scales to powers of two, which this layer's are not."""

_OWN = "routing, permutation, SwiGLU and combine are moe_fast's"

VARIANTS: dict[str, tuple[bool, str]] = {
    "deep_gemm": (False, f"DeepGEMM, Hopper: grouped GEMMs over contiguous, padded experts; {_OWN}"),
    "deep_gemm_masked": (True, f"DeepGEMM, Hopper: grouped GEMMs over a masked block of rows an expert; {_OWN}"),
}

BACKENDS: tuple[Backend, ...] = tuple(
    backend(name, load, compute_with(masked), RECIPE, NEEDS, summary) for name, (masked, summary) in VARIANTS.items()
)
