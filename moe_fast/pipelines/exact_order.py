"""The ten-input function whose bytes do not depend on the device: route, permute, gemm1, SwiGLU, gemm2, combine.

Recipe 'requant': SwiGLU's output becomes e4m3 with a float32 scale per 1x128 block; everything else is float32 until
the final cast. On a GPU the stages are Triton kernels, on a CPU their twins in torch; route and permute are the same
torch operations on both. A token's bytes depend on nothing but its own inputs and the weights, so slicing changes none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_fast.kernels import exact_twins as twins

TOKENS_AT_ONCE = {"cuda": 512, "cpu": 4096}
"""Tokens of one slice: bounds the workspace. Every slice reads the weights again, which a CPU feels more."""


def stages(kernels: bool) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """grouped_gemm, swiglu_quantize and combine: Triton's kernels or their twins."""
    if kernels:
        from moe_fast.kernels import exact_order  # triton is imported only where it is used

        return exact_order.grouped_gemm, exact_order.swiglu_quantize, exact_order.combine
    return twins.grouped_gemm_torch, twins.swiglu_quantize_torch, twins.combine_torch


class Workspace:
    """Every intermediate of one slice; R is what any routing may need. A CPU touches only the rows that there are."""

    def __init__(
        self, tokens: int, local: int, top_k: int, hidden: int, intermediate: int, device: torch.device
    ) -> None:
        def ints(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        rows = tokens * min(top_k, local)
        self.topk_ids = ints(tokens, top_k)
        self.topk_weights = torch.empty(tokens, top_k, device=device)
        self.token_rows = ints(tokens, top_k)
        self.row_tokens = ints(rows)
        self.expert_offsets = ints(local + 1)
        self.gemm1_out = torch.empty(rows, 2 * intermediate, device=device)
        self.requantized = torch.empty(rows, intermediate, dtype=torch.uint8, device=device)
        self.requantized_scale = torch.empty(intermediate // 128, rows, device=device)
        self.gemm2_out = torch.empty(rows, hidden, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


def run(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    out: torch.Tensor | None = None,
    *,
    n_group: int = 8,
    topk_group: int = 4,
    top_k: int = 8,
    tokens_at_once: int | None = None,
    kernels: bool | None = None,
) -> torch.Tensor:
    """Output [T, H] bfloat16, written into `out` when given. The inputs are taken as checked.

    kernels: Triton's kernels or the twins; by default the kernels on a GPU. The bytes are the same.
    """
    tokens, hidden = hidden_states.shape
    local, intermediate = gemm2_weights.shape[0], gemm2_weights.shape[2]
    device = hidden_states.device
    if out is None:
        out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
    if tokens == 0:
        return out
    grouped_gemm, swiglu_quantize, combine = stages(device.type == "cuda" if kernels is None else kernels)
    octets = hidden_states.view(torch.uint8)
    weights1, weights2 = gemm1_weights.view(torch.uint8), gemm2_weights.view(torch.uint8)
    at_once = tokens_at_once or TOKENS_AT_ONCE["cuda" if device.type == "cuda" else "cpu"]
    for start in range(0, tokens, at_once):
        part = slice(start, min(start + at_once, tokens))
        count = part.stop - part.start
        space = Workspace(count, local, top_k, hidden, intermediate, device)
        twins.route(
            routing_logits[part],
            routing_bias,
            space.topk_ids,
            space.topk_weights,
            routed_scaling_factor,
            n_group,
            topk_group,
        )
        twins.permute(space.topk_ids, space.token_rows, space.row_tokens, space.expert_offsets, local_expert_offset)
        offsets = space.expert_offsets
        grouped_gemm(
            octets[part],
            hidden_states_scale[:, part],
            space.row_tokens,
            weights1,
            gemm1_weights_scale,
            offsets,
            space.gemm1_out,
            count,
        )
        swiglu_quantize(space.gemm1_out, offsets, space.requantized, space.requantized_scale)
        grouped_gemm(
            space.requantized,
            space.requantized_scale,
            None,
            weights2,
            gemm2_weights_scale,
            offsets,
            space.gemm2_out,
            count,
        )
        combine(space.gemm2_out, space.topk_weights, space.token_rows, out[part].view(torch.int16))
    return out
