"""Twins in torch of kernels/exact_order.py: the same operations in the same order, so the same bytes. No triton here.

What makes bytes equal on every device is that each operation is one that IEEE 754 defines: addition, subtraction and
multiplication of float32 and float64, float64 division and the casts between the two, each rounded to nearest even,
subnormals kept, none fused with another; and integers. Nothing is left to a library's exp, to the order of a reduction,
or to a device's own casts. The derivations are in docs/numerics.md, "Exact order".

Axes: T tokens, E experts, L local experts, K top_k, H hidden, I intermediate; R rows, one a local token-expert pair,
sorted by expert and then by token. Payloads are e4m3 as bytes (uint8), outputs bfloat16 as words (int16): casts are
integer arithmetic. Every NaN that is stored has one and the same bit pattern.
"""

from __future__ import annotations

import math

import torch

BLOCK = 128
FP8_MAX = 448.0
NAN32 = 0x7FC00000  # the float32 NaN
INF32 = 0x7F800000
ROWS_AT_ONCE = 1024  # bounds swiglu_quantize_torch's float64 intermediates: 16 KB a row each at the real geometry
DECODE = 2.0**120  # float32's exponent bias 127, less e4m3's 7

EXP_LIMIT = 110.0
"""exp(-110) rounds to 0 in float32 and exp(110) to inf: both ends lie past float32's range."""

LOG2E = 1.4426950408889634
LN2_HIGH = float.fromhex("0x1.62e42feep-1")  # ln 2 cut to 32 bits: times an integer up to 2**21 it is exact
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")  # ln 2 - LN2_HIGH, rounded
ROUND = 1.5 * 2.0**52  # added and taken off again, it rounds a float64 under 2**51 to an integer
TAYLOR = tuple(1.0 / math.factorial(k) for k in range(14))
"""exp(r) to r**13: for |r| <= ln(2)/2 what is left out is under 4.2e-18."""


def exp32(x: torch.Tensor) -> torch.Tensor:
    """exp of float32 x, to 0.5000001 units in the last place; overflow is inf, underflow 0, NaN stays NaN.

    In float64: x = n ln 2 + r with |r| <= ln(2)/2, the Taylor polynomial of r by Horner's rule, times 2**n.
    """
    wide = x.double()
    wide = torch.where(wide > EXP_LIMIT, EXP_LIMIT, wide)
    wide = torch.where(wide < -EXP_LIMIT, -EXP_LIMIT, wide)
    wide = torch.where(wide == wide, wide, 0.0)
    whole = (wide * LOG2E + ROUND) - ROUND
    r = (wide - whole * LN2_HIGH) - whole * LN2_LOW
    power = torch.full_like(r, TAYLOR[13])
    for k in range(12, -1, -1):
        power = power * r + TAYLOR[k]
    two_to = ((whole.long() + 1023) << 52).view(torch.float64)
    return torch.where(x == x, (power * two_to).float(), x)


def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b of float32, by way of float64: there `/` is rounded correctly on every device, in float32 it is not."""
    return (a.double() / b.double()).float()


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) in float32, each of the three steps rounded as in the definition."""
    return divide(torch.ones_like(x), 1.0 + exp32(-x))


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)) in float32; -inf gives NaN, as it does in torch."""
    return divide(x, 1.0 + exp32(-x))


def one_nan(x: torch.Tensor) -> torch.Tensor:
    """float32 x with every NaN replaced by the one of bits NAN32: which NaN comes out of an operation is undefined."""
    bits = x.view(torch.int32)
    return torch.where((bits & 0x7FFFFFFF) > INF32, NAN32, bits).to(torch.int32).view(torch.float32)


def decode_e4m3(octets: torch.Tensor) -> torch.Tensor:
    """e4m3 bytes -> the same numbers in float64: the bits moved to float32's places, times 2**120. Exact."""
    wide = octets.to(torch.int32)
    magnitude = wide & 0x7F
    moved = ((wide & 0x80) << 24) | (magnitude << 20)
    numbers = moved.view(torch.float32) * DECODE
    return torch.where(magnitude == 0x7F, torch.nan, numbers).double()


def encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float32 x, |x| <= 448 or NaN -> e4m3 bytes, rounded to nearest even.

    From 2**-6 on, 20 bits of the significand go, halves to even. Below, e4m3's numbers are multiples of 2**-9, which is
    float32's spacing at 2**14: the sum |x| + 2**14 rounds to one of them, and its low bits count them.
    """
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = (magnitude.view(torch.float32) + 16384.0).view(torch.int32) - 0x46800000
    code = torch.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return torch.where(magnitude > INF32, 0x7F, code).to(torch.uint8)


def encode_bf16(x: torch.Tensor) -> torch.Tensor:
    """float32 -> the bits of bfloat16 as int16, rounded to nearest even; every NaN becomes 0x7FC0."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.where((bits & 0x7FFFFFFF) > INF32, 0x7FC0, rounded).to(torch.int16)


def route(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    routed_scaling_factor: float,
    n_group: int,
    topk_group: int,
) -> None:
    """Fill topk_ids [T, K] int32 and topk_weights [T, K] float32: on a GPU too, since every operation is one of above.

    routing_logits [T, E] float32, routing_bias [E] bfloat16. Equal scores: the lower id first, by a stable sort. The
    weights are summed best first; the slots then stand in ascending order of experts, which is combine's order.
    """
    tokens, experts = routing_logits.shape
    top_k = topk_ids.shape[1]
    scores = one_nan(sigmoid(routing_logits))
    grouped = one_nan(scores + routing_bias.float()).view(tokens, n_group, experts // n_group)
    best = torch.sort(grouped, dim=2, descending=True, stable=True).values
    group_scores = best[..., 0] if best.shape[2] == 1 else one_nan(best[..., 0] + best[..., 1])
    groups = torch.sort(group_scores, dim=1, descending=True, stable=True).indices[:, :topk_group]
    kept = torch.zeros(tokens, n_group, dtype=torch.bool, device=scores.device).scatter_(1, groups, True)
    lowest = torch.finfo(torch.float32).min
    masked = torch.where(kept.unsqueeze(2), grouped, lowest).view(tokens, experts)
    ids = torch.sort(masked, dim=1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.gather(1, ids)
    total = torch.zeros_like(chosen[:, 0])
    for slot in range(top_k):
        total = total + chosen[:, slot]
    total = total + 1e-20
    weights = one_nan(divide(chosen, total.unsqueeze(1).expand_as(chosen)) * routed_scaling_factor)
    ascending, slots = torch.sort(ids, dim=1)
    topk_ids.copy_(ascending)
    topk_weights.copy_(weights.gather(1, slots))


def permute(
    topk_ids: torch.Tensor,
    token_rows: torch.Tensor,
    row_tokens: torch.Tensor,
    expert_offsets: torch.Tensor,
    local_expert_offset: int,
) -> None:
    """Give every local pair its row. Integers only, on a GPU too.

    topk_ids [T, K] int32 -> token_rows [T, K] int32 (-1: not local), row_tokens [R] int32, expert_offsets [L+1] int32.
    Example: ids [[2, 5], [4, 5]], offset 4, L 2 -> token_rows [[-1, 1], [0, 2]], row_tokens [1, 0, 1],
    expert_offsets [0, 1, 3].
    """
    top_k, local = topk_ids.shape[1], len(expert_offsets) - 1
    expert = topk_ids - local_expert_offset
    expert = torch.where((expert >= 0) & (expert < local), expert, local).flatten()  # L: not local, sorted last
    ordered, pairs = torch.sort(expert, stable=True)
    places = torch.empty_like(pairs).scatter_(0, pairs, torch.arange(len(pairs), device=pairs.device))
    token_rows.copy_(torch.where(expert < local, places, -1).view_as(token_rows))
    row_tokens.copy_(pairs[: len(row_tokens)] // top_k)
    bounds = torch.arange(local + 1, dtype=ordered.dtype, device=ordered.device)
    expert_offsets.copy_(torch.searchsorted(ordered, bounds))


def grouped_gemm_torch(
    rows: torch.Tensor,
    rows_scale: torch.Tensor,
    row_source: torch.Tensor | None,
    weights: torch.Tensor,
    weights_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    output: torch.Tensor,
    most_rows: int,
) -> None:
    """Each row times its expert's weights: output [R, N] float32, rows below expert_offsets[-1].

    rows [S, W] uint8 with rows_scale [W/128, S] float32; row_source [R] int32, the line of `rows` that each row reads,
    None: its own; weights [L, N, W] uint8 with weights_scale [L, N/128, W/128] float32; most_rows: no expert has more.

    Block by block of 128 of W, ascending: the dot product in float64, rounded once to float32, times (row's scale x
    weight's scale), added to a float32 sum. A product of two e4m3 numbers is a multiple of 2**-18 of at most 2**17.7;
    128 of them stay under 2**25: every partial sum, in any order, is a multiple of 2**-18 with at most 43 bits, so
    float64's 53 hold it exactly and no order of summation, and no fused multiply-add, can change the block's product.
    """
    local, columns, width = weights.shape
    bounds = expert_offsets.tolist()
    for expert in range(local):
        span = slice(bounds[expert], bounds[expert + 1])
        if span.stop == span.start:
            continue
        source = torch.arange(span.start, span.stop) if row_source is None else row_source[span].long()
        source = source.to(rows.device)
        mine, mine_scale = rows[source], rows_scale[:, source]
        total = torch.zeros(len(source), columns, device=rows.device)
        for step in range(width // BLOCK):
            block = slice(step * BLOCK, (step + 1) * BLOCK)
            product = decode_e4m3(mine[:, block]) @ decode_e4m3(weights[expert, :, block]).T
            scale = mine_scale[step].unsqueeze(1) * weights_scale[expert, :, step].repeat_interleave(BLOCK)
            total = total + product.float() * scale
        output[span] = one_nan(total)


def swiglu_quantize_torch(
    gemm1_out: torch.Tensor,
    expert_offsets: torch.Tensor,
    quantized: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """silu(gate) * up, then e4m3 with a scale a block of 128, for the rows below expert_offsets[-1].

    gemm1_out [R, 2I] float32, [up | gate]; quantized [R, I] uint8; scale [I/128, R] float32 = amax/448, 1 where that
    is 0.
    """
    count = int(expert_offsets[-1])
    for start in range(0, count, ROWS_AT_ONCE):
        span = slice(start, min(start + ROWS_AT_ONCE, count))
        up, gate = gemm1_out[span].chunk(2, dim=1)
        value = one_nan(silu(gate) * up)
        blocks = value.unflatten(1, (-1, BLOCK))
        amax = (
            (blocks.view(torch.int32) & 0x7FFFFFFF).amax(2).view(torch.float32)
        )  # as integers, so that NaN is largest
        step = one_nan(divide(amax, torch.full_like(amax, FP8_MAX)))
        step = torch.where(step > 0, step, 1.0)
        scaled = divide(blocks, step.unsqueeze(2).expand_as(blocks))
        scaled = torch.where(scaled > FP8_MAX, FP8_MAX, scaled)
        scaled = torch.where(scaled < -FP8_MAX, -FP8_MAX, scaled)
        quantized[span] = encode_e4m3(scaled).flatten(1)
        scale[:, span] = step.T


def combine_torch(
    gemm2_out: torch.Tensor,
    topk_weights: torch.Tensor,
    token_rows: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Each token's rows times their weights, added in float32 in the order of the slots; absent rows add nothing.

    gemm2_out [R, H] float32, topk_weights [T, K] float32, token_rows [T, K] int32; output [T, H] int16, a
    bfloat16's bits.
    """
    total = torch.zeros(output.shape, device=output.device)
    for slot in range(token_rows.shape[1]):
        tokens = torch.nonzero(token_rows[:, slot] >= 0).squeeze(1)
        product = topk_weights[tokens, slot].unsqueeze(1) * gemm2_out[token_rows[tokens, slot].long()]
        total[tokens] = total[tokens] + product
    output.copy_(encode_bf16(total))
