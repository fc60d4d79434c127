"""Gemm2: re-quantised rows [P, I] times their expert's gemm2_weights -> gemm2_out [P, H] float32, not yet weighted.

Operands are swapped as in gemm1: weights are M, rows are N. A part is MB of the H columns of gemm2_out.
"""

# ruff: noqa: E741 - I is the axis's name throughout the project
from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_fast.kernels.gemm1 import count_tiles, load_ends, load_scales, locate


@triton.jit
def gemm2_tile(
    item,
    requantized,
    requantized_scale,
    row_capacity,
    gemm2_weights,
    gemm2_weights_scale,
    tile_ends,
    row_ends,
    gemm2_out,
    done,
    H: tl.constexpr,
    I: tl.constexpr,
    BN: tl.constexpr,
    MB: tl.constexpr,
    STAGES: tl.constexpr,
    U: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One tile times one part. WAIT: only after all I/128 blocks of the tile's requantized rows are there."""
    expert, part, tile, row0, row_end = locate(item, tile_ends, row_ends, H // MB, BN)
    rows = row0 + tl.arange(0, BN)
    live = rows < row_end
    m = part * MB + tl.arange(0, MB)
    k = tl.arange(0, 128)
    weights = gemm2_weights + expert.to(tl.int64) * (H * I)
    if WAIT:
        while tl.atomic_add(done + tile, 0, sem="acquire") < I // 128:
            pass
    w_ptr = weights + (m[:, None] * I + k[None, :])
    x_ptr = requantized + (rows.to(tl.int64) * I)[None, :] + k[:, None]
    w_scale = gemm2_weights_scale + (expert.to(tl.int64) * (H // 128) + part * MB // 128) * (I // 128)
    x_scale = requantized_scale + rows
    w_upper = w_scale + (I // 128 if MB > 128 else 0)
    upper = tl.arange(0, MB) >= 128  # rows of the part's second scale block, if it has one

    s_w, s_upper, s_x = load_scales(w_scale, w_upper, x_scale, row_capacity, live, 0, U)
    acc = tl.zeros((MB, BN), tl.float32)
    for step in tl.range(0, I // 128 // U, num_stages=STAGES):
        following = tl.minimum(step + 1, I // 128 // U - 1) * U
        next_w, next_upper, next_x = load_scales(w_scale, w_upper, x_scale, row_capacity, live, following, U)
        for u in tl.static_range(U):
            w = tl.load(w_ptr + (step * U + u) * 128)  # [MB, 128]
            x = tl.load(x_ptr + (step * U + u) * 128, mask=live[None, :], other=0.0)  # [128, BN]
            product = tl.dot(w, x)
            if MB > 128:
                acc += product * (tl.where(upper, s_upper[u], s_w[u])[:, None] * s_x[u][None, :])
            else:
                acc += product * (s_w[u] * s_x[u])[None, :]
        s_w, s_upper, s_x = next_w, next_upper, next_x
    tl.store(gemm2_out + (rows.to(tl.int64) * H)[None, :] + m[:, None], acc, mask=live[None, :])


@triton.jit(do_not_specialize=["row_capacity"])
def gemm2_kernel(
    requantized,  # [P, I] e4m3
    requantized_scale,  # [I/128, row_capacity] float32
    row_capacity,
    gemm2_weights,  # [L, H, I] e4m3
    gemm2_weights_scale,  # [L, H/128, I/128] float32
    expert_offsets,  # [L+1] int32
    tile_offsets,  # [L+1] int32
    gemm2_out,  # [P, H] float32
    H: tl.constexpr,
    I: tl.constexpr,
    L: tl.constexpr,
    BN: tl.constexpr,
    MB: tl.constexpr,
    STAGES: tl.constexpr,
    U: tl.constexpr,
):
    tile_ends, row_ends = load_ends(tile_offsets, expert_offsets, L)
    items = count_tiles(tile_ends) * (H // MB)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        gemm2_tile(
            item, requantized, requantized_scale, row_capacity, gemm2_weights, gemm2_weights_scale,
            tile_ends, row_ends, gemm2_out, tile_offsets, H, I, BN, MB, STAGES, U, False,
        )  # fmt: skip


def gemm2(
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    gemm2_out: torch.Tensor,
    programs: int,
    tile_rows: int = 16,
    part: int = 128,
    warps: int = 8,
    stages: int = 4,
    unroll: int = 1,
) -> None:
    """Fill gemm2_out's rows below expert_offsets[-1]."""
    local, hidden, intermediate = gemm2_weights.shape
    gemm2_kernel[(programs,)](
        requantized,
        requantized_scale,
        requantized_scale.stride(0),
        gemm2_weights,
        gemm2_weights_scale,
        expert_offsets,
        tile_offsets,
        gemm2_out,
        H=hidden,
        I=intermediate,
        L=local,
        BN=tile_rows,
        MB=part,
        STAGES=stages,
        U=unroll,
        num_warps=warps,
    )


def gemm2_torch(
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    gemm2_out: torch.Tensor,
    programs: int,
    tile_rows: int = 16,
    part: int = 128,
    warps: int = 8,
    stages: int = 4,
    unroll: int = 1,
) -> None:
    """Twin of `gemm2`."""
    local, hidden, intermediate = gemm2_weights.shape
    bounds = expert_offsets.tolist()
    for expert in range(local):
        span = slice(bounds[expert], bounds[expert + 1])
        out = torch.zeros(bounds[expert + 1] - bounds[expert], hidden, device=requantized.device)
        for step in range(intermediate // 128):
            k = slice(step * 128, step * 128 + 128)
            product = requantized[span, k].float() @ gemm2_weights[expert, :, k].float().T
            w_scale = gemm2_weights_scale[expert, :, step].repeat_interleave(128)
            out += product * (requantized_scale[step, span][:, None] * w_scale)
        gemm2_out[span] = out
