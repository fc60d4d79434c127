"""Route and permute in one CUDA C++ launch, for few tokens (cuda/route_permute.cu), and its twin.

Axes: T tokens, E experts, L local experts, K top_k, P permuted rows. What is written is what the Triton pipeline's
`route` and `permute` write, so that `experts` and `combine` of that pipeline can follow.
"""

from __future__ import annotations

import ctypes

import torch

from moe_fast.current import current_stream
from moe_fast.kernels.cuda_build import load
from moe_fast.kernels.cuda_route import choice_defines, clamp_offset, mask_words, route_torch

MAX_TOKENS = 160
"""Most tokens: a warp each, in one cluster."""

CTAS = 8
"""Of the cluster: the most that every GPU with clusters takes."""


class Params(ctypes.Structure):
    """Params of route_permute.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "routing_logits",
                "routing_bias",
                "topk_ids",
                "topk_weights",
                "token_rows",
                "expert_offsets",
                "tile_offsets",
                "permuted_idx_to_token_idx",
                "counters",
            )
        ),
        ("num_counters", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("offset", ctypes.c_int),
        ("tile_rows", ctypes.c_int),
        ("factor", ctypes.c_float),
    )


def defines(experts: int, n_group: int, topk_group: int, top_k: int, local: int) -> tuple[tuple[str, int], ...]:
    """What a variant of route_permute.cu is compiled with."""
    chosen = choice_defines(experts, n_group, topk_group, top_k, local)
    return (*chosen, ("MAX_TOKENS", MAX_TOKENS), ("CTAS", CTAS))


def route_permute(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    token_rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    counters: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    n_group: int,
    topk_group: int,
    tile_rows: int,
) -> None:
    """Fill topk_ids [T, K] int32 and topk_weights [T, K] float32, best first; token_rows [T, K] int32 beside them: the
    row of a choice that is local, or -1; expert_offsets and tile_offsets [L+1] int32; permuted_idx_to_token_idx [P]
    int32, rows sorted by expert, then by token. Zero `counters`, any number of int32.

    routing_logits [T, E] float32, routing_bias [E] bfloat16, both at a multiple of 16 bytes. 0 < T <= MAX_TOKENS,
    E <= 1024, K <= 32, L <= 512. Raises ValueError for another number of tokens.
    """
    tokens, experts = routing_logits.shape
    if not 0 < tokens <= MAX_TOKENS:
        raise ValueError(
            f"routing_logits: expected 1 to {MAX_TOKENS} tokens, got {tokens}; cuda_route.route and place take more"
        )
    index = routing_logits.device.index or 0
    params = Params(
        routing_logits.data_ptr(),
        routing_bias.data_ptr(),
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
        token_rows.data_ptr(),
        expert_offsets.data_ptr(),
        tile_offsets.data_ptr(),
        permuted_idx_to_token_idx.data_ptr(),
        counters.data_ptr(),
        counters.numel(),
        tokens,
        clamp_offset(local_expert_offset),
        tile_rows,
        routed_scaling_factor,
    )
    variant = defines(experts, n_group, topk_group, topk_ids.shape[1], expert_offsets.shape[0] - 1)
    warps = -(-tokens // CTAS)  # of a CTA
    kernel = load("route_permute.cu", variant, "route_permute_kernel", 32 * warps, 0, index)
    kernel.launch(CTAS, (params,), current_stream(index))


def route_permute_torch(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    token_rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    counters: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    n_group: int,
    topk_group: int,
    tile_rows: int,
) -> None:
    """Twin of `route_permute`."""
    tokens, device = len(routing_logits), topk_ids.device
    local = expert_offsets.shape[0] - 1
    route_torch(
        routing_logits, routing_bias, torch.empty_like(token_rows), torch.empty_like(topk_weights),
        torch.empty(mask_words(local), tokens, dtype=torch.int32, device=device), local, local_expert_offset,
        routed_scaling_factor, n_group, topk_group, choices=(topk_ids, topk_weights),
    )  # fmt: skip
    chosen = topk_ids.long() - local_expert_offset
    chosen = torch.where((chosen >= 0) & (chosen < local), chosen, local)  # [T, K], `local` where it is not local
    by_expert = torch.sort(chosen.flatten(), stable=True).indices  # a token chooses an expert once: tokens ascend, too
    rows = int((chosen < local).sum())
    numbers = torch.arange(rows, dtype=torch.int32, device=device)
    token_rows.fill_(-1)
    token_rows.view(-1)[by_expert[:rows]] = numbers
    permuted_idx_to_token_idx[:rows] = (by_expert[:rows] // topk_ids.shape[1]).to(torch.int32)
    counts = torch.bincount(chosen.flatten(), minlength=local + 1)[:local]
    for offsets, sizes in ((expert_offsets, counts), (tile_offsets, (counts + tile_rows - 1) // tile_rows)):
        offsets.zero_()
        offsets[1:] = sizes.cumsum(0)
    counters.zero_()
