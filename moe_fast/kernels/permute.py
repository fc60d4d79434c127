"""Permute: give every local token-expert pair its row, sorted by expert, then by token.

Worked example, T = 3, L = 2, K = 2: local_slot [[-1, 1], [0, -1], [1, 0]] says that token 0 chose local expert 1 in
slot 1, token 1 expert 0 in slot 0, token 2 both. Then expert_offsets [0, 2, 4], permuted_idx_to_token_idx [1, 2, 0, 2],
token_rows [[-1, 2], [0, -1], [3, 1]]. With tiles of 16 rows tile_offsets are [0, 1, 2].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_fast.kernels.triton_launch import Launcher, cdiv, next_power_of_2

CHUNK = 128
"""Tokens that one program permutes."""


@triton.jit
def load_slots(local_slot, token, num_tokens, L: tl.constexpr, LP: tl.constexpr):
    """local_slot [T, L] at tokens [CT] -> [CT, LP], -1 outside. Past the L1 cache: other programs wrote it."""
    local = tl.arange(0, LP)
    inside = (token < num_tokens)[:, None] & (local < L)[None, :]
    at = token.to(tl.int64)[:, None] * L + local[None, :]
    return tl.load(local_slot + at, mask=inside, other=-1, cache_modifier=".cg")


@triton.jit
def permute_chunk(
    slot,  # [CT, LP] int32, -1 where the token did not choose the expert
    token,  # [CT]
    before,  # [LP] rows of each expert in earlier chunks
    total,  # [LP] rows of each expert in all chunks
    token_rows,  # [T, K] int32, -1 where a choice is not local
    permuted_idx_to_token_idx,  # [P] int32
    K: tl.constexpr,
):
    """Place one chunk's pairs."""
    chosen = (slot >= 0).to(tl.int32)
    starts = tl.cumsum(total, axis=0) - total  # [LP]
    rows = (starts + before)[None, :] + tl.cumsum(chosen, axis=0) - chosen
    tl.store(permuted_idx_to_token_idx + rows, tl.broadcast_to(token[:, None], rows.shape), mask=slot >= 0)
    tl.store(token_rows + token.to(tl.int64)[:, None] * K + slot, rows, mask=slot >= 0)


@triton.jit
def store_offsets(
    total,  # [LP]
    expert_offsets,  # [L+1] int32
    tile_offsets,  # [L+1] int32, [0] + cumsum of ceil(rows / TILE_ROWS)
    L: tl.constexpr,
    LP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Both offset arrays from the rows of each expert."""
    local = tl.arange(0, LP)
    tiles = (total + TILE_ROWS - 1) // TILE_ROWS
    tl.store(expert_offsets + 1 + local, tl.cumsum(total, axis=0), mask=local < L)
    tl.store(tile_offsets + 1 + local, tl.cumsum(tiles, axis=0), mask=local < L)
    tl.store(expert_offsets, 0)
    tl.store(tile_offsets, 0)


@triton.jit(do_not_specialize=["num_tokens"])
def count_kernel(local_slot, chunk_counts, num_tokens, L: tl.constexpr, LP: tl.constexpr, CHUNK_T: tl.constexpr):
    """chunk_counts [chunks, L]: rows of each expert in each chunk."""
    chunk = tl.program_id(0)
    slot = load_slots(local_slot, chunk * CHUNK_T + tl.arange(0, CHUNK_T), num_tokens, L, LP)
    local = tl.arange(0, LP)
    tl.store(chunk_counts + chunk * L + local, tl.sum((slot >= 0).to(tl.int32), axis=0), mask=local < L)


@triton.jit(do_not_specialize=["num_tokens"])
def permute_kernel(
    local_slot,
    token_rows,
    expert_offsets,
    tile_offsets,
    permuted_idx_to_token_idx,
    chunk_counts,
    num_tokens,
    L: tl.constexpr,
    LP: tl.constexpr,
    K: tl.constexpr,
    CHUNK_T: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ALONE: tl.constexpr,
):
    """One program a chunk; each adds up the counts of all chunks for itself. ALONE: one chunk, nothing to read."""
    chunk = tl.program_id(0)
    local = tl.arange(0, LP)
    token = chunk * CHUNK_T + tl.arange(0, CHUNK_T)
    slot = load_slots(local_slot, token, num_tokens, L, LP)
    before = tl.zeros((LP,), tl.int32)
    total = tl.zeros((LP,), tl.int32)
    if ALONE:
        total = tl.sum((slot >= 0).to(tl.int32), axis=0)
    else:
        for other in range(0, tl.num_programs(0)):
            counts = tl.load(chunk_counts + other * L + local, mask=local < L, other=0)
            total += counts
            before += tl.where(other < chunk, counts, 0)
    permute_chunk(slot, token, before, total, token_rows, permuted_idx_to_token_idx, K)
    if chunk == 0:
        store_offsets(total, expert_offsets, tile_offsets, L, LP, TILE_ROWS)


launch_count, launch = Launcher(count_kernel), Launcher(permute_kernel)


def permute(
    local_slot: torch.Tensor,
    token_rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    chunk_counts: torch.Tensor,
    tile_rows: int,
) -> None:
    """Fill token_rows (where a choice is local), the offsets and permuted_idx_to_token_idx.

    One launch up to CHUNK tokens, two beyond.
    """
    tokens, local = local_slot.shape
    padded = next_power_of_2(local)
    grid = (cdiv(tokens, CHUNK),)
    alone = tokens <= CHUNK
    if not alone:
        counting = {"L": local, "LP": padded, "CHUNK_T": CHUNK}
        launch_count(grid, (local_slot, chunk_counts), (tokens,), counting, num_warps=4)
    launch(
        grid,
        (local_slot, token_rows, expert_offsets, tile_offsets, permuted_idx_to_token_idx, chunk_counts),
        (tokens,),
        {
            "L": local,
            "LP": padded,
            "K": token_rows.shape[1],
            "CHUNK_T": CHUNK,
            "TILE_ROWS": tile_rows,
            "ALONE": alone,
        },
        num_warps=4,
    )


def permute_torch(
    local_slot: torch.Tensor,
    token_rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    chunk_counts: torch.Tensor,
    tile_rows: int,
) -> None:
    """Twin of `permute`."""
    expert, token = torch.nonzero(local_slot.T >= 0, as_tuple=True)  # by expert, then by token
    rows = torch.arange(len(token), device=token.device)
    permuted_idx_to_token_idx[: len(token)] = token.to(torch.int32)
    token_rows[token, local_slot[token, expert].long()] = rows.to(torch.int32)
    counts = (local_slot >= 0).sum(0)
    expert_offsets.zero_()
    tile_offsets.zero_()
    expert_offsets[1:] = counts.cumsum(0)
    tile_offsets[1:] = ((counts + tile_rows - 1) // tile_rows).cumsum(0)
