"""Gemm1: gathered fp8 rows times their expert's gemm1_weights, SwiGLU and the 1x128 re-quantisation in its epilogue.

Operands are swapped: the weights are the matrix unit's M side and the tokens its N side, because a wgmma has 64 rows
at least and an expert often has fewer than 16 tokens. Each 128-wide step of K is one matrix product from zero,
promoted into the fp32 accumulator with scale_weight * scale_token. Axes: T, L, H, I as everywhere; P permuted rows;
a tile is up to BN rows of one expert; a part is NB of the I columns of swiglu_out.

A part narrower than a re-quantisation block goes through swiglu_out in fp32, and whoever completes the block of 128
quantises it: which program that is changes no value.
"""

# ruff: noqa: E741 - I is the axis's name throughout the project
from __future__ import annotations

import torch
import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
BIG = tl.constexpr(2147483647)


@triton.jit
def quantize_columns(x):
    """x [128, BN] float32 -> (e4m3 [128, BN], scale [BN]); a zero column has scale 1, NaN stays NaN."""
    amax = tl.max(tl.abs(x), axis=0)
    scale = tl.div_rn(amax, tl.full(amax.shape, FP8_MAX, tl.float32))
    scale = tl.where(scale > 0, scale, 1.0)
    scaled = tl.div_rn(x, tl.broadcast_to(scale[None, :], x.shape))
    scaled = tl.clamp(scaled, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(tl.float8e4nv), scale


@triton.jit
def load_ends(tile_offsets, expert_offsets, L: tl.constexpr):
    """Each expert's end among the tiles and among the rows, for `locate`: two of [next_power_of_2(L)] int32, BIG behind
    the last expert."""
    slot = tl.arange(0, triton.next_power_of_2(L))
    tile_ends = tl.load(tile_offsets + 1 + slot, mask=slot < L, other=BIG)
    row_ends = tl.load(expert_offsets + 1 + slot, mask=slot < L, other=BIG)
    return tile_ends, row_ends


@triton.jit
def count_tiles(tile_ends):
    """Tiles of all experts."""
    return tl.max(tl.where(tile_ends < BIG, tile_ends, 0), axis=0)


@triton.jit
def locate(item, tile_ends, row_ends, PARTS: tl.constexpr, BN: tl.constexpr):
    """Item -> (expert, part, tile, first row, end of the expert's rows). Items: by expert, then part, then tile."""
    # Reductions of what is loaded once, where looking the expert up would be a chain of loads.
    before = tile_ends <= item // PARTS  # experts before this item's
    expert = tl.sum(before.to(tl.int32), axis=0)
    first_tile = tl.max(tl.where(before, tile_ends, 0), axis=0)
    next_tile = tl.min(tl.where(before, BIG, tile_ends), axis=0)
    first_row = tl.max(tl.where(before, row_ends, 0), axis=0)
    row_end = tl.min(tl.where(before, BIG, row_ends), axis=0)
    inner = item - first_tile * PARTS
    tiles = next_tile - first_tile
    nth = inner % tiles
    return expert, inner // tiles, first_tile + nth, first_row + nth * BN, row_end


@triton.jit
def load_scales(first, second, rows, stride, live, step, U: tl.constexpr):
    """Scales of U steps of K from `step` on: two of the weights (scalars) and one a row [BN], as three tuples of U."""
    firsts, seconds, row_scales = (), (), ()
    for u in tl.static_range(U):
        firsts = firsts + (tl.load(first + (step + u)),)  # noqa: RUF005 - Triton knows no unpacking
        seconds = seconds + (tl.load(second + (step + u)),)  # noqa: RUF005
        at = rows + stride.to(tl.int64) * (step + u)
        loaded = tl.load(at, mask=live, other=0.0, cache_modifier=".cg")
        row_scales = row_scales + (loaded,)  # noqa: RUF005
    return firsts, seconds, row_scales


@triton.jit
def gemm1_tile(
    item,
    hidden_states,
    hidden_states_scale,
    scale_stride,
    gemm1_weights,
    gemm1_weights_scale,
    permuted_idx_to_token_idx,
    tile_ends,
    row_ends,
    swiglu_out,
    requantized,
    requantized_scale,
    row_capacity,
    arrivals,
    H: tl.constexpr,
    I: tl.constexpr,
    BN: tl.constexpr,
    NB: tl.constexpr,
    STAGES: tl.constexpr,
    U: tl.constexpr,
):
    """One tile times one part. Returns (tile, whether a block of 128 columns of requantized is complete now)."""
    expert, part, tile, row0, row_end = locate(item, tile_ends, row_ends, I // NB, BN)
    rows = row0 + tl.arange(0, BN)
    live = rows < row_end
    token = tl.load(permuted_idx_to_token_idx + rows, mask=live, other=0).to(tl.int64)
    # Up and gate rows alternate in eights: wgmma gives one thread the rows i and i + 8, so a pair never leaves it.
    m = tl.arange(0, 2 * NB)
    is_gate = (m // 8) % 2 == 1
    weight_row = (m // 16) * 8 + m % 8 + part * NB + tl.where(is_gate, I, 0)
    k = tl.arange(0, 128)
    w_ptr = gemm1_weights + expert.to(tl.int64) * (2 * I * H) + (weight_row[:, None] * H + k[None, :])
    x_ptr = hidden_states + (token * H)[None, :] + k[:, None]
    up_scale = gemm1_weights_scale + (expert.to(tl.int64) * (2 * I // 128) + part * NB // 128) * (H // 128)
    gate_scale = up_scale + (I // 128) * (H // 128)
    x_scale = hidden_states_scale + token

    # U steps of K in one iteration: 128*U consecutive bytes of each weight row are asked for together, which DRAM likes
    # better, and the scales are loaded an iteration ahead, so that no step waits for them.
    s_up, s_gate, s_x = load_scales(up_scale, gate_scale, x_scale, scale_stride, live, 0, U)
    acc = tl.zeros((2 * NB, BN), tl.float32)
    for step in tl.range(0, H // 128 // U, num_stages=STAGES):
        following = tl.minimum(step + 1, H // 128 // U - 1) * U
        next_up, next_gate, next_x = load_scales(up_scale, gate_scale, x_scale, scale_stride, live, following, U)
        for u in tl.static_range(U):
            w = tl.load(w_ptr + (step * U + u) * 128)  # [2NB, 128]
            x = tl.load(x_ptr + (step * U + u) * 128, mask=live[None, :], other=0.0)  # [128, BN]
            product = tl.dot(w, x)
            acc += product * (tl.where(is_gate, s_gate[u], s_up[u])[:, None] * s_x[u][None, :])
        s_up, s_gate, s_x = next_up, next_gate, next_x

    pairs = tl.permute(tl.reshape(acc, (NB // 8, 2, 8, BN)), (0, 2, 3, 1))
    up, gate = tl.split(pairs)
    swiglu = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (NB, BN))
    block = part * NB // 128
    if NB == 128:
        complete = True
        values = swiglu
    else:
        column = part * NB + tl.arange(0, NB)
        tl.store(swiglu_out + (rows.to(tl.int64) * I)[None, :] + column[:, None], swiglu, mask=live[None, :])
        tl.debug_barrier()  # every thread's stores come before the arrival
        complete = tl.atomic_add(arrivals + tile * (I // 128) + block, 1, sem="acq_rel") == 128 // NB - 1
    if complete:
        at = (rows.to(tl.int64) * I)[None, :] + (block * 128 + k)[:, None]  # [128, BN]
        if NB < 128:
            values = tl.load(swiglu_out + at, mask=live[None, :], other=0.0, cache_modifier=".cg")
        quantized, scale = quantize_columns(values)
        tl.store(requantized + at, quantized, mask=live[None, :])
        tl.store(requantized_scale + block.to(tl.int64) * row_capacity + rows, scale, mask=live)
        tl.debug_barrier()
    return tile, complete


@triton.jit(do_not_specialize=["scale_stride", "row_capacity"])
def gemm1_kernel(
    hidden_states,  # [T, H] e4m3
    hidden_states_scale,  # [H/128, >= T] float32, rows scale_stride apart
    scale_stride,
    gemm1_weights,  # [L, 2I, H] e4m3, rows [up ; gate]
    gemm1_weights_scale,  # [L, 2I/128, H/128] float32
    permuted_idx_to_token_idx,  # [P] int32
    expert_offsets,  # [L+1] int32
    tile_offsets,  # [L+1] int32
    swiglu_out,  # [P, I] float32, written when NB < 128
    requantized,  # [P, I] e4m3
    requantized_scale,  # [I/128, row_capacity] float32
    row_capacity,
    arrivals,  # [tiles, I/128] int32, zero
    H: tl.constexpr,
    I: tl.constexpr,
    L: tl.constexpr,
    BN: tl.constexpr,
    NB: tl.constexpr,
    STAGES: tl.constexpr,
    U: tl.constexpr,
):
    tile_ends, row_ends = load_ends(tile_offsets, expert_offsets, L)
    items = count_tiles(tile_ends) * (I // NB)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        gemm1_tile(
            item, hidden_states, hidden_states_scale, scale_stride, gemm1_weights, gemm1_weights_scale,
            permuted_idx_to_token_idx, tile_ends, row_ends, swiglu_out, requantized, requantized_scale, row_capacity,
            arrivals, H, I, BN, NB, STAGES, U,
        )  # fmt: skip


def gemm1(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    swiglu_out: torch.Tensor,
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    arrivals: torch.Tensor,
    programs: int,
    tile_rows: int = 16,
    part: int = 128,
    warps: int = 8,
    stages: int = 4,
    unroll: int = 1,
) -> None:
    """Fill requantized and requantized_scale for the rows below expert_offsets[-1]; `arrivals` must be zero."""
    local, double, hidden = gemm1_weights.shape
    gemm1_kernel[(programs,)](
        hidden_states,
        hidden_states_scale,
        hidden_states_scale.stride(0),
        gemm1_weights,
        gemm1_weights_scale,
        permuted_idx_to_token_idx,
        expert_offsets,
        tile_offsets,
        swiglu_out,
        requantized,
        requantized_scale,
        requantized_scale.stride(0),
        arrivals,
        H=hidden,
        I=double // 2,
        L=local,
        BN=tile_rows,
        NB=part,
        STAGES=stages,
        U=unroll,
        num_warps=warps,
    )


def gemm1_torch(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    swiglu_out: torch.Tensor,
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    arrivals: torch.Tensor,
    programs: int,
    tile_rows: int = 16,
    part: int = 128,
    warps: int = 8,
    stages: int = 4,
    unroll: int = 1,
) -> None:
    """Twin of `gemm1`; always writes swiglu_out too."""
    local, double, hidden = gemm1_weights.shape
    bounds = expert_offsets.tolist()
    for expert in range(local):
        span = slice(bounds[expert], bounds[expert + 1])
        token = permuted_idx_to_token_idx[span].long()
        out = torch.zeros(len(token), double, device=hidden_states.device)
        for step in range(hidden // 128):
            k = slice(step * 128, step * 128 + 128)
            x = hidden_states[:, k].float()[token]
            product = x @ gemm1_weights[expert, :, k].float().T
            w_scale = gemm1_weights_scale[expert, :, step].repeat_interleave(128)
            out += product * (hidden_states_scale[step, token][:, None] * w_scale)
        up, gate = out.chunk(2, dim=-1)
        swiglu = torch.nn.functional.silu(gate) * up
        swiglu_out[span] = swiglu
        blocks = swiglu.unflatten(1, (-1, 128))
        scale = blocks.abs().amax(-1) / 448.0
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        scaled = (blocks / scale.unsqueeze(-1)).clamp(-448.0, 448.0)
        requantized[span] = scaled.to(torch.float8_e4m3fn).flatten(1)
        requantized_scale[:, span] = scale.T
