"""The whole layer for at most 8 tokens in one CUDA C++ launch (cuda/few_tokens.cu), and its twin.

Axes: T tokens, E experts, L local experts, H hidden, I intermediate.
"""

from __future__ import annotations

import functools
import struct

import torch

from moe_fast.kernels.cuda_build import PreparedLaunch, load
from moe_fast.kernels.cuda_route import choice_defines, clamp_offset, mask_words, route_torch
from moe_fast.target import target_of

TOKENS = 8
"""Most tokens of one launch: the columns of the matrix instruction."""

COUNTERS = 4
THREADS = 384
SHARED_BYTES = 227 * 1024
UNDER_WAY = 3
"""Slots of the ring that are asked for and have not come, at most: whatever else is asked for queues behind them. Two
do not fill the memory's pipe; with four the H200's is slower, and by another amount in every call (docs/h200.md)."""

LAYOUT = struct.Struct("11P2ifi")
"""Params of few_tokens.cu: eleven pointers, tokens, offset, factor, scale_stride."""


def rows_kept(top_k: int, local: int) -> int:
    """Most experts that TOKENS tokens can hit."""
    return min(TOKENS * top_k, local)


def ring(hidden: int, inter: int, local: int, top_k: int) -> tuple[int, int]:
    """(slots, bytes of one): as many as shared memory holds beside what the kernel keeps there itself."""
    slot = max(2 * hidden, 8 * inter) + 64
    own = (
        512
        + 8 * 1024
        + 36 * mask_words(local)
        + rows_kept(top_k, local) * (8 + 4 * TOKENS)
        + hidden // 128 * 4 * TOKENS
    )
    return min(24, (SHARED_BYTES - own) // slot), slot


def unfit(experts: int, local: int, hidden: int, inter: int, top_k: int, sm_count: int) -> str | None:
    """Why the kernel can't have these sizes, or None."""
    part2 = -(-inter // 128 // 8)
    if hidden > 8192:
        return f"hidden_size is at most 8192, got {hidden}"
    if 2 * -(-hidden // 16 // sm_count) * part2 > 32:
        return f"intermediate_size {inter} is too large beside hidden_size {hidden}"
    slots, slot = ring(hidden, inter, local, top_k)
    if slots < 12:
        return f"twelve slots for intermediate_size {inter} do not fit shared memory"
    if TOKENS * experts * 8 > (slots - TOKENS // 2) * slot:
        return f"the scores of {experts} experts do not fit beside hidden_size {hidden}"
    return None


def defines(
    experts: int, n_group: int, topk_group: int, top_k: int, local: int, hidden: int, inter: int, sm_count: int
) -> tuple[tuple[str, int], ...]:
    """What a variant of few_tokens.cu is compiled with."""
    return (
        *choice_defines(experts, n_group, topk_group, top_k, local),
        ("HIDDEN", hidden),
        ("INTER", inter),
        ("STAGES", ring(hidden, inter, local, top_k)[0]),
        ("ITEMS", -(-hidden // 8 // sm_count)),
        ("UNDER_WAY", UNDER_WAY),
    )


@functools.cache
def prepare(
    experts: int, n_group: int, topk_group: int, top_k: int, local: int, hidden: int, inter: int, device: int
) -> PreparedLaunch:
    """The launch for one geometry on one device: compiled, loaded, with its grid."""
    count = target_of(torch.device("cuda", device)).sm_count
    variant = defines(experts, n_group, topk_group, top_k, local, hidden, inter, count)
    slots, slot = ring(hidden, inter, local, top_k)
    return PreparedLaunch(
        load("few_tokens.cu", variant, "few_tokens_kernel", THREADS, slots * slot, device), count, LAYOUT
    )


def few_tokens(
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
    output: torch.Tensor,
    swiglu_out: torch.Tensor,
    counters: torch.Tensor,
    launch: PreparedLaunch,
    stream: int,
) -> None:
    """Fill output [T, H] bfloat16, 0 < T <= 8, by a launch of `prepare`, on a stream of the tensors' current device.

    The ten inputs, of which hidden_states_scale [H/128, T] may be a slice of columns. swiglu_out: scratch of
    rows_kept * 8 * I float32; counters: COUNTERS int32, zero, and zero again afterwards.
    """
    launch(
        stream,
        routing_logits.data_ptr(),
        routing_bias.data_ptr(),
        hidden_states.data_ptr(),
        hidden_states_scale.data_ptr(),
        gemm1_weights.data_ptr(),
        gemm1_weights_scale.data_ptr(),
        gemm2_weights.data_ptr(),
        gemm2_weights_scale.data_ptr(),
        output.data_ptr(),
        swiglu_out.data_ptr(),
        counters.data_ptr(),
        hidden_states.shape[0],
        clamp_offset(local_expert_offset),
        routed_scaling_factor,
        hidden_states_scale.stride(0),
    )


def few_tokens_torch(
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
    output: torch.Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
) -> None:
    """Twin of `few_tokens`, which has the routing groups compiled in."""
    tokens, local = len(hidden_states), len(gemm2_weights)
    device = hidden_states.device

    def ints(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    topk_ids, topk_weights = ints(tokens, top_k), torch.empty(tokens, top_k, device=device)
    route_torch(
        routing_logits, routing_bias, ints(tokens, top_k), torch.empty_like(topk_weights),
        ints(mask_words(local), tokens), local, local_expert_offset, routed_scaling_factor, n_group, topk_group,
        choices=(topk_ids, topk_weights),
    )  # fmt: skip
    x = hidden_states.float() * hidden_states_scale.t().repeat_interleave(128, dim=1)
    total = torch.zeros(output.shape, device=device)
    for expert in range(local):
        token, slot = (topk_ids - local_expert_offset == expert).nonzero(as_tuple=True)
        if len(token):
            up, gate = (x[token] @ _dequantized(gemm1_weights[expert], gemm1_weights_scale[expert]).t()).chunk(2, dim=1)
            blocks = (up * torch.nn.functional.silu(gate)).unflatten(1, (-1, 128))
            scale = blocks.abs().amax(dim=2, keepdim=True) / 448.0
            scale = torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(scale))
            payload = (blocks / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
            rows = (payload * scale).flatten(1) @ _dequantized(gemm2_weights[expert], gemm2_weights_scale[expert]).t()
            total[token] += topk_weights[token, slot, None] * rows
    output.copy_(total)


def _dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight [N, K] e4m3, scale [N/128, K/128] -> float32 [N, K]."""
    return weight.float() * scale.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
