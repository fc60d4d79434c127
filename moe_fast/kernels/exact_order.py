"""Triton kernels whose bytes their twins (kernels/exact_twins.py) reproduce; what is computed is written there.

Compiled without fused multiply-add (enable_fp_fusion=False): each addition and multiplication is rounded on its own, as
the twins' are. For sm_100 that is not enough: triton 3.6's ptxas (CUDA 12.9) joins `mul.rn.f32x2` and `add.rn.f32x2`
all the same, so a float32 product that is added to something first goes through integers (one_nan).

Blocks of 128 are summed in float64, where any order gives the same number, so tl.sum may take its own. Matrix units are
left alone: for Hopper triton 3.6 can't build a float64 tl.dot of operands that were decoded from bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_fast.kernels import exact_twins as twins

OPTIONS = {"enable_fp_fusion": False}
"""How every kernel here is compiled; without it the bytes are not the twins'."""

FP8_MAX = tl.constexpr(twins.FP8_MAX)
NAN32 = tl.constexpr(twins.NAN32)
INF32 = tl.constexpr(twins.INF32)
DECODE = tl.constexpr(twins.DECODE)
EXP_LIMIT = tl.constexpr(twins.EXP_LIMIT)
LOG2E = tl.constexpr(twins.LOG2E)
LN2_HIGH = tl.constexpr(twins.LN2_HIGH)
LN2_LOW = tl.constexpr(twins.LN2_LOW)
ROUND = tl.constexpr(twins.ROUND)
TAYLOR = tl.constexpr(twins.TAYLOR)


@triton.jit
def exp32(x):
    wide = x.to(tl.float64)
    wide = tl.where(wide > EXP_LIMIT, tl.full(x.shape, EXP_LIMIT, tl.float64), wide)
    wide = tl.where(wide < -EXP_LIMIT, tl.full(x.shape, -EXP_LIMIT, tl.float64), wide)
    wide = tl.where(wide == wide, wide, tl.zeros(x.shape, tl.float64))
    whole = (wide * LOG2E + ROUND) - ROUND
    r = (wide - whole * LN2_HIGH) - whole * LN2_LOW
    power = tl.full(x.shape, TAYLOR[13], tl.float64)
    for k in tl.static_range(13):
        power = power * r + TAYLOR[12 - k]
    two_to = ((whole.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(x == x, (power * two_to).to(tl.float32), x)


@triton.jit
def divide(a, b):
    return (a.to(tl.float64) / b.to(tl.float64)).to(tl.float32)


@triton.jit
def silu(x):
    return divide(x, 1.0 + exp32(-x))


@triton.jit
def one_nan(x):
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > INF32, NAN32, bits).to(tl.float32, bitcast=True)


@triton.jit
def decode_e4m3(octets):
    wide = octets.to(tl.int32)
    magnitude = wide & 0x7F
    moved = ((wide & 0x80) << 24) | (magnitude << 20)
    numbers = moved.to(tl.float32, bitcast=True) * DECODE
    return tl.where(magnitude == 0x7F, float("nan"), numbers).to(tl.float64)


@triton.jit
def encode_e4m3(x):
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(magnitude > INF32, 0x7F, code).to(tl.uint8)


@triton.jit
def encode_bf16(x):
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > INF32, 0x7FC0, rounded).to(tl.int16)


@triton.jit(do_not_specialize=["scale_stride"])
def grouped_gemm_kernel(
    rows,  # [S, W] uint8
    rows_scale,  # [W/128, S] float32, lines scale_stride apart
    scale_stride,
    row_source,  # [R] int32
    weights,  # [L, N, W] uint8
    weights_scale,  # [L, N/128, W/128] float32
    expert_offsets,  # [L+1] int32
    output,  # [R, N] float32
    N: tl.constexpr,
    W: tl.constexpr,
    GATHER: tl.constexpr,  # whether row_source is there
    BM: tl.constexpr,  # rows a program
    BN: tl.constexpr,  # columns a program, within one block of 128
    BK: tl.constexpr,  # bytes of W at once, a divisor of 128
):
    expert = tl.program_id(2)
    first = tl.load(expert_offsets + expert) + tl.program_id(1) * BM
    end = tl.load(expert_offsets + expert + 1)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    weight_line = expert.to(tl.int64) * N + column
    weight_at = weights + (weight_line * W)[None, :, None] + k[None, None, :]
    scale_at = weights_scale + (expert.to(tl.int64) * (N // 128) + tl.program_id(0) * BN // 128) * (W // 128)
    while first < end:
        row = first + tl.arange(0, BM)
        live = row < end
        source = row
        if GATHER:
            source = tl.load(row_source + row, mask=live, other=0)
        source = tl.where(live, source, 0).to(tl.int64)
        row_at = rows + (source * W)[:, None, None] + k[None, None, :]
        total = tl.zeros((BM, BN), tl.float32)
        for step in range(W // 128):
            products = tl.zeros((BM, BN, BK), tl.float64)
            for part in tl.static_range(128 // BK):
                x = decode_e4m3(tl.load(row_at + (step * 128 + part * BK)))  # [BM, 1, BK]
                w = decode_e4m3(tl.load(weight_at + (step * 128 + part * BK)))  # [1, BN, BK]
                products += x * w
            product = tl.sum(products, axis=2).to(tl.float32)
            row_scale = tl.load(rows_scale + scale_stride.to(tl.int64) * step + source)
            scale = row_scale * tl.load(scale_at + step)
            total = total + one_nan(product * scale[:, None])
        output_at = output + (row.to(tl.int64) * N)[:, None] + column[None, :]
        tl.store(output_at, one_nan(total), mask=live[:, None])
        first += tl.num_programs(1) * BM


def grouped_gemm(
    rows: torch.Tensor,
    rows_scale: torch.Tensor,
    row_source: torch.Tensor | None,
    weights: torch.Tensor,
    weights_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    output: torch.Tensor,
    most_rows: int,
) -> None:
    """Each row times its expert's weights: see grouped_gemm_torch."""
    local, columns, width = weights.shape
    block_rows, block_columns = 4, 32
    grouped_gemm_kernel[(columns // block_columns, min(triton.cdiv(most_rows, block_rows), 8), local)](
        rows,
        rows_scale,
        rows_scale.stride(0),
        expert_offsets if row_source is None else row_source,
        weights,
        weights_scale,
        expert_offsets,
        output,
        N=columns,
        W=width,
        GATHER=row_source is not None,
        BM=block_rows,
        BN=block_columns,
        BK=32,
        num_warps=4,
        **OPTIONS,
    )


@triton.jit(do_not_specialize=["row_capacity"])
def swiglu_quantize_kernel(
    gemm1_out,  # [R, 2I] float32
    expert_offsets,  # [L+1] int32
    quantized,  # [R, I] uint8
    scale,  # [I/128, R] float32, lines row_capacity apart
    row_capacity,
    I: tl.constexpr,  # noqa: E741 - the axis's name
    L: tl.constexpr,
    BM: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < tl.load(expert_offsets + L)
    block = tl.program_id(1)
    column = block * 128 + tl.arange(0, 128)
    at = gemm1_out + (row.to(tl.int64) * (2 * I))[:, None] + column[None, :]
    up = tl.load(at, mask=live[:, None], other=0.0)
    gate = tl.load(at + I, mask=live[:, None], other=0.0)
    value = one_nan(silu(gate) * up)
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)  # as integers, so that NaN is largest
    step = one_nan(divide(amax, tl.full(amax.shape, FP8_MAX, tl.float32)))
    step = tl.where(step > 0, step, 1.0)
    scaled = divide(value, tl.broadcast_to(step[:, None], value.shape))
    scaled = tl.where(scaled > FP8_MAX, FP8_MAX, scaled)
    scaled = tl.where(scaled < -FP8_MAX, -FP8_MAX, scaled)
    code = encode_e4m3(scaled)
    tl.store(quantized + (row.to(tl.int64) * I)[:, None] + column[None, :], code, mask=live[:, None])
    tl.store(scale + block.to(tl.int64) * row_capacity + row, step, mask=live)


def swiglu_quantize(
    gemm1_out: torch.Tensor,
    expert_offsets: torch.Tensor,
    quantized: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """silu(gate) * up, then e4m3 with a scale a block of 128: see swiglu_quantize_torch."""
    rows, intermediate = quantized.shape
    block_rows = 4
    swiglu_quantize_kernel[(triton.cdiv(rows, block_rows), intermediate // 128)](
        gemm1_out,
        expert_offsets,
        quantized,
        scale,
        scale.stride(0),
        I=intermediate,
        L=len(expert_offsets) - 1,
        BM=block_rows,
        num_warps=4,
        **OPTIONS,
    )


@triton.jit
def combine_kernel(
    gemm2_out,  # [R, H] float32
    topk_weights,  # [T, K] float32
    token_rows,  # [T, K] int32
    output,  # [T, H] int16
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < H
    total = tl.zeros((BLOCK_H,), tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(token_rows + token * K + slot)
        if row >= 0:
            weight = tl.load(topk_weights + token * K + slot)
            value = tl.load(gemm2_out + row.to(tl.int64) * H + column, mask=inside, other=0.0)
            total = total + one_nan(weight * value)
    tl.store(output + token * H + column, encode_bf16(total), mask=inside)


def combine(
    gemm2_out: torch.Tensor,
    topk_weights: torch.Tensor,
    token_rows: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Each token's rows times their weights, added in the order of the slots: see combine_torch."""
    tokens, hidden = output.shape
    block = 1024
    combine_kernel[(tokens, triton.cdiv(hidden, block))](
        gemm2_out,
        topk_weights,
        token_rows,
        output,
        H=hidden,
        K=topk_weights.shape[1],
        BLOCK_H=block,
        num_warps=4,
        **OPTIONS,
    )
