"""Route: choose top_k experts a token, DeepSeek-V3's way. For few tokens, the same launch also permutes.

Where CUDA C++ can be compiled, `kernels.cuda_route_permute` writes the same in one launch, 1 to 5 us sooner.

Every choice is one maximum over 64-bit keys: the score's bits, mapped so that they order as integers, above the
complement of the id. So equal scores give the lower id, NaN counts as the largest (as torch sorts it), and no id can
leave 0 .. E-1. Axes: T tokens, E experts, L local experts, K top_k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from moe_fast.kernels.permute import load_slots, permute_chunk, store_offsets
from moe_fast.kernels.triton_launch import Launcher, cdiv, next_power_of_2

TOKENS_PER_PROGRAM = 1
"""One warp a token, so that no reduction crosses warps. Two tokens on two warps gave wrong ids on an H100 with Triton
3.6, though the interpreter is right about the same code; docs/h100.md has what is known."""

TOKENS_FUSED = 16
"""Up to so many tokens the last program to finish permutes too; more are too much for its one warp."""

LOWEST_KEY = tl.constexpr(-(2**63))
LOWEST_FINITE = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)); bit for bit torch's on the GPU unless FAST (the interpreter has no libdevice)."""
    e = tl.exp(-x) if FAST else libdevice.exp(-x)
    return tl.div_rn(tl.full(e.shape, 1.0, tl.float32), 1.0 + e)


@triton.jit
def _key(score, rank):
    """float32 scores -> int64 keys: larger score first, then larger rank (0 <= rank < 2**31)."""
    score = tl.where(score == 0.0, 0.0, score)  # -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score != score, 0x7FFFFFFF, bits)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | rank.to(tl.int64)


@triton.jit(do_not_specialize=["num_counters", "num_tokens", "local_expert_offset"])
def route_kernel(
    routing_logits,  # [T, E] float32
    routing_bias,  # [E] bfloat16
    topk_ids,  # [T, K] int32
    topk_weights,  # [T, K] float32
    local_slot,  # [T, L] int32
    token_rows,  # [T, K] int32
    expert_offsets,  # [L+1] int32
    tile_offsets,  # [L+1] int32
    permuted_idx_to_token_idx,  # [P] int32
    ticket,  # [1] int32, zero between calls
    counters,  # [num_counters] int32, zeroed here
    num_counters,
    num_tokens,
    local_expert_offset,
    routed_scaling_factor,
    E: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK_T: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PERMUTE: tl.constexpr,
    FAST_EXP: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    GROUP: tl.constexpr = E // N_GROUP
    GP: tl.constexpr = triton.next_power_of_2(N_GROUP)
    SP: tl.constexpr = triton.next_power_of_2(GROUP)
    KP: tl.constexpr = triton.next_power_of_2(K)
    LP: tl.constexpr = triton.next_power_of_2(L)

    for start in range(program * 1024, num_counters, tl.num_programs(0) * 1024):
        slot = start + tl.arange(0, 1024)
        tl.store(counters + slot, tl.zeros((1024,), tl.int32), mask=slot < num_counters)

    token = program * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.arange(0, GP)
    expert = group[:, None] * GROUP + tl.arange(0, SP)[None, :]  # [GP, SP]
    real = (group[:, None] < N_GROUP) & (tl.arange(0, SP)[None, :] < GROUP)
    live = (token < num_tokens)[:, None, None] & real[None, :, :]  # [BT, GP, SP]
    row = routing_logits + token.to(tl.int64)[:, None, None] * E
    logits = tl.load(row + expert[None, :, :], mask=live, other=0.0)
    bias = tl.load(routing_bias + expert, mask=real, other=0.0).to(tl.float32)
    biased = _sigmoid(logits, FAST_EXP) + bias[None, :, :]
    # rank 2**31-1-e: the lower id wins a tie
    key = tl.where(real[None, :, :], _key(biased, 0x7FFFFFFF - expert[None, :, :]), LOWEST_KEY)

    if TOPK_GROUP < N_GROUP:
        first = tl.max(key, axis=2)  # [BT, GP]
        # by key, not by value, so that NaN ranks as in the choice of experts
        is_first = key == first[:, :, None]
        group_score = tl.sum(tl.where(is_first & real[None, :, :], biased, 0.0), axis=2)
        if GROUP > 1:
            rest = tl.where(is_first, LOWEST_KEY, key)
            second = tl.max(rest, axis=2)
            group_score += tl.sum(tl.where((rest == second[:, :, None]) & real[None, :, :], biased, 0.0), axis=2)
        group_key = tl.where(group[None, :] < N_GROUP, _key(group_score, 0x7FFFFFFF - group[None, :]), LOWEST_KEY)
        kept = group_key < LOWEST_KEY  # [BT, GP], all false
        for _ in range(TOPK_GROUP):
            best = tl.max(group_key, axis=1)
            chosen = group_key == best[:, None]
            kept = kept | chosen
            group_key = tl.where(chosen, LOWEST_KEY, group_key)
        lowest = _key(tl.full((BLOCK_T, GP, SP), LOWEST_FINITE, tl.float32), 0x7FFFFFFF - expert[None, :, :])
        masked = tl.where(real[None, :, :], lowest, LOWEST_KEY)
        key = tl.where(kept[:, :, None], key, masked)

    flat = tl.reshape(key, (BLOCK_T, GP * SP))
    choice = tl.arange(0, KP)
    ids = tl.zeros((BLOCK_T, KP), tl.int32)
    for k in range(K):  # not unrolled: cold instructions come from memory too
        best = tl.max(flat, axis=1)  # [BT]
        flat = tl.where(flat == best[:, None], LOWEST_KEY, flat)
        best_id = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        ids = tl.where(choice[None, :] == k, best_id[:, None], ids)

    pair = (token < num_tokens)[:, None] & (choice < K)[None, :]  # [BT, KP]
    chosen_logits = tl.load(routing_logits + token.to(tl.int64)[:, None] * E + ids, mask=pair, other=0.0)
    scores = tl.where(pair, _sigmoid(chosen_logits, FAST_EXP), 0.0)
    total = tl.sum(scores, axis=1)[:, None] + 1e-20
    weights = tl.div_rn(scores, tl.broadcast_to(total, scores.shape)) * routed_scaling_factor
    at = token.to(tl.int64)[:, None] * K + choice[None, :]
    tl.store(topk_ids + at, ids, mask=pair)
    tl.store(topk_weights + at, weights, mask=pair)
    tl.store(token_rows + at, tl.full((BLOCK_T, KP), -1, tl.int32), mask=pair)

    local = tl.arange(0, LP)
    hit = (ids[:, :, None] - local_expert_offset == local[None, None, :]) & (
        (choice < K)[:, None] & (local < L)[None, :]
    )[None, :, :]
    slots = tl.max(tl.where(hit, choice[None, :, None], -1), axis=1)  # [BT, LP]
    inside = (token < num_tokens)[:, None] & (local < L)[None, :]
    tl.store(local_slot + token.to(tl.int64)[:, None] * L + local[None, :], slots, mask=inside)

    if PERMUTE:
        tl.debug_barrier()  # every thread's stores come before the ticket, and -1 in token_rows before a row
        if CHUNK_T <= BLOCK_T:  # one program has all tokens
            total = tl.sum((slots >= 0).to(tl.int32), axis=0)
            permute_chunk(slots, token, tl.zeros_like(total), total, token_rows, permuted_idx_to_token_idx, K)
            store_offsets(total, expert_offsets, tile_offsets, L, LP, TILE_ROWS)
        else:
            arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
            if arrived == tl.num_programs(0) - 1:
                tl.store(ticket, 0)
                every = tl.arange(0, CHUNK_T)
                chosen = load_slots(local_slot, every, num_tokens, L, LP)
                rows = tl.sum((chosen >= 0).to(tl.int32), axis=0)
                permute_chunk(chosen, every, tl.zeros_like(rows), rows, token_rows, permuted_idx_to_token_idx, K)
                store_offsets(rows, expert_offsets, tile_offsets, L, LP, TILE_ROWS)


launch = Launcher(route_kernel)


def route(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    local_slot: torch.Tensor,
    token_rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    ticket: torch.Tensor,
    counters: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    n_group: int,
    topk_group: int,
    tile_rows: int,
    fast_exp: bool = False,
    pdl: bool = False,
) -> bool:
    """Fill topk_ids, topk_weights and local_slot (slot of the choice that is local expert l, or -1); zero `counters`.

    Returns whether the permutation is done too (at most TOKENS_FUSED tokens); if not, `permute` must follow.
    """
    tokens, experts = routing_logits.shape
    fused = tokens <= TOKENS_FUSED
    block = TOKENS_PER_PROGRAM
    launch(
        (cdiv(tokens, block),),
        (
            routing_logits,
            routing_bias,
            topk_ids,
            topk_weights,
            local_slot,
            token_rows,
            expert_offsets,
            tile_offsets,
            permuted_idx_to_token_idx,
            ticket,
            counters,
        ),
        (counters.numel(), tokens, local_expert_offset, float(routed_scaling_factor)),
        {
            "E": experts,
            "L": local_slot.shape[1],
            "K": topk_ids.shape[1],
            "N_GROUP": n_group,
            "TOPK_GROUP": topk_group,
            "BLOCK_T": block,
            "CHUNK_T": next_power_of_2(tokens) if fused else 1,
            "TILE_ROWS": tile_rows,
            "PERMUTE": fused,
            "FAST_EXP": fast_exp,
            "PDL": pdl,
        },
        num_warps=block,
    )
    return fused


def route_torch(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    local_slot: torch.Tensor,
    token_rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    ticket: torch.Tensor,
    counters: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    n_group: int,
    topk_group: int,
    tile_rows: int,
    fast_exp: bool = False,
    pdl: bool = False,
) -> bool:
    """Twin of `route`: the same writes, except that it never permutes."""
    tokens, experts = routing_logits.shape
    local, top_k = local_slot.shape[1], topk_ids.shape[1]
    scores = 1.0 / (1.0 + torch.exp(-routing_logits))
    biased = scores + routing_bias.float()
    grouped = biased.view(tokens, n_group, experts // n_group)
    best_two = grouped.topk(min(2, experts // n_group), dim=-1).values.sum(-1)
    groups = torch.sort(best_two, dim=-1, descending=True, stable=True).indices[:, :topk_group]
    kept = torch.zeros(tokens, n_group, dtype=torch.bool, device=biased.device).scatter_(1, groups, True)
    masked = grouped.masked_fill(~kept.unsqueeze(-1), torch.finfo(torch.float32).min).view(tokens, experts)
    ids = torch.sort(masked, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.gather(1, ids)
    topk_ids.copy_(ids)
    topk_weights.copy_(chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * routed_scaling_factor)
    hit = (ids - local_expert_offset).unsqueeze(-1) == torch.arange(local, device=ids.device)  # [T, K, L]
    slots = torch.arange(top_k, device=ids.device).view(1, -1, 1)
    local_slot.copy_(torch.where(hit, slots, -1).amax(1))
    token_rows.fill_(-1)
    counters.zero_()
    return False
