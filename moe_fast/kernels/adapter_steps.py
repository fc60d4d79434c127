"""What stands between the ten inputs and another library's functions: one launch a step, each with its twin in torch.

dequantize        e4m3 activations with 1x128 scales -> bfloat16, for libraries that quantise them again themselves
localize          global expert ids and weights -> this rank's ids; what is not local gets an id of its own, weight 0
place_rows        every local token-expert pair's row, copied to where a grouped GEMM wants it
swiglu_quantize   gemm1's halves in bfloat16 -> e4m3 with 1x128 scales
Axes: T tokens, K top_k, L local experts, H hidden, I intermediate, R rows of the grouped GEMM, padding included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FP8 = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def dequantize_kernel(
    hidden_states,  # [T, H] e4m3
    hidden_states_scale,  # [H/128, T] float32
    output,  # [T, H] bfloat16
    num_tokens,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < H
    payload = tl.load(hidden_states + token * H + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(hidden_states_scale + (column // 128).to(tl.int64) * num_tokens + token, mask=inside, other=0.0)
    tl.store(output + token * H + column, (payload * scale).to(tl.bfloat16), mask=inside)


def dequantize(hidden_states: torch.Tensor, hidden_states_scale: torch.Tensor, output: torch.Tensor) -> None:
    """output [T, H] bfloat16 = hidden_states [T, H] e4m3 * hidden_states_scale [H/128, T], rounded once."""
    tokens, hidden = hidden_states.shape
    block = 1024
    dequantize_kernel[(tokens, triton.cdiv(hidden, block))](
        hidden_states, hidden_states_scale, output, tokens, H=hidden, BLOCK_H=block, num_warps=4
    )


def dequantize_torch(hidden_states: torch.Tensor, hidden_states_scale: torch.Tensor, output: torch.Tensor) -> None:
    """Twin of `dequantize`."""
    output.copy_(hidden_states.float() * hidden_states_scale.t().repeat_interleave(128, dim=1))


@triton.jit(do_not_specialize=["local_expert_offset", "pairs"])
def localize_kernel(
    topk_ids,  # [T, K] int32, global
    topk_weights,  # [T, K] float32
    local_ids,  # [T, K] int32
    local_weights,  # [T, K]
    local_expert_offset,
    pairs,
    L: tl.constexpr,
    ABSENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pairs
    local = tl.load(topk_ids + at, mask=inside, other=0) - local_expert_offset
    is_local = (local >= 0) & (local < L)
    weight = tl.load(topk_weights + at, mask=inside, other=0.0)
    tl.store(local_ids + at, tl.where(is_local, local, ABSENT), mask=inside)
    tl.store(local_weights + at, tl.where(is_local, weight, 0.0).to(local_weights.dtype.element_ty), mask=inside)


def localize(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    local_ids: torch.Tensor,
    local_weights: torch.Tensor,
    local_expert_offset: int,
    num_local_experts: int,
    absent: int = -1,
) -> None:
    """local_ids [T, K] = topk_ids - local_expert_offset where that is 0 .. L-1, else `absent`, with weight 0.

    topk_ids and local_ids int32, topk_weights float32; local_weights float32 or bfloat16.
    """
    pairs, block = topk_ids.numel(), 512
    localize_kernel[(triton.cdiv(pairs, block),)](
        topk_ids, topk_weights, local_ids, local_weights, local_expert_offset, pairs,
        L=num_local_experts, ABSENT=absent, BLOCK=block, num_warps=4,
    )  # fmt: skip


def localize_torch(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    local_ids: torch.Tensor,
    local_weights: torch.Tensor,
    local_expert_offset: int,
    num_local_experts: int,
    absent: int = -1,
) -> None:
    """Twin of `localize`."""
    local = topk_ids - local_expert_offset
    is_local = (local >= 0) & (local < num_local_experts)
    local_ids.copy_(torch.where(is_local, local, absent))
    local_weights.copy_(torch.where(is_local, topk_weights, 0.0))


@triton.jit(do_not_specialize=["local_expert_offset", "num_tokens"])
def place_rows_kernel(
    topk_ids,  # [T, K] int32, global
    token_rows,  # [T, K] int32: row in expert order without padding, -1 where a choice is not local
    expert_offsets,  # [L+1] int32
    starts,  # [L] int32: first row of each expert in the padded order
    hidden_states,  # [T, H] uint8, the payload's bytes
    hidden_states_scale,  # [H/128, T] float32
    rows,  # [R, H] uint8
    rows_scale,  # [R, H/128] float32
    row_expert,  # [R] int32
    placed_rows,  # [T, K] int32
    local_expert_offset,
    num_tokens,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pair = tl.program_id(0)
    row = tl.load(token_rows + pair)
    if row < 0:
        tl.store(placed_rows + pair, -1)
    else:
        token = (pair // K).to(tl.int64)
        expert = tl.load(topk_ids + pair) - local_expert_offset
        place = tl.load(starts + expert) + row - tl.load(expert_offsets + expert)
        tl.store(placed_rows + pair, place)
        tl.store(row_expert + place, expert)
        place = place.to(tl.int64)
        for start in range(0, H, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)
            inside = column < H
            payload = tl.load(hidden_states + token * H + column, mask=inside, other=0)
            tl.store(rows + place * H + column, payload, mask=inside)
        block = tl.arange(0, BLOCK_S)
        real = block < H // 128
        scale = tl.load(hidden_states_scale + block.to(tl.int64) * num_tokens + token, mask=real, other=0.0)
        tl.store(rows_scale + place * (H // 128) + block, scale, mask=real)


def place_rows(
    topk_ids: torch.Tensor,
    token_rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    starts: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    rows: torch.Tensor,
    rows_scale: torch.Tensor,
    row_expert: torch.Tensor,
    placed_rows: torch.Tensor,
    local_expert_offset: int,
) -> None:
    """Copy each local pair's activations to row starts[e] + (its position among expert e's rows).

    rows [R, H] e4m3, rows_scale [R, H/128], row_expert [R] get the pair's; other rows are left alone.
    placed_rows [T, K]: where each pair went, -1 where it is not local.
    """
    tokens, hidden = hidden_states.shape
    place_rows_kernel[(token_rows.numel(),)](
        topk_ids, token_rows, expert_offsets, starts, hidden_states.view(torch.uint8), hidden_states_scale,
        rows.view(torch.uint8), rows_scale, row_expert, placed_rows, local_expert_offset, tokens,
        H=hidden, K=token_rows.shape[1], BLOCK_H=2048, BLOCK_S=triton.next_power_of_2(hidden // 128), num_warps=4,
    )  # fmt: skip


def place_rows_torch(
    topk_ids: torch.Tensor,
    token_rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    starts: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    rows: torch.Tensor,
    rows_scale: torch.Tensor,
    row_expert: torch.Tensor,
    placed_rows: torch.Tensor,
    local_expert_offset: int,
) -> None:
    """Twin of `place_rows`."""
    placed_rows.fill_(-1)
    token, slot = torch.nonzero(token_rows >= 0, as_tuple=True)
    expert = topk_ids[token, slot] - local_expert_offset
    place = (starts[expert.long()] + token_rows[token, slot] - expert_offsets[expert.long()]).long()
    placed_rows[token, slot] = place.to(torch.int32)
    row_expert[place] = expert.to(torch.int32)
    rows.view(torch.uint8)[place] = hidden_states.view(torch.uint8)[token]
    rows_scale[place] = hidden_states_scale[:, token].t()


@triton.jit
def swiglu_quantize_kernel(
    gemm1_out,  # [R, 2I] bfloat16, [up | gate], or [gate | up] with GATE_FIRST
    row_expert,  # [R] int32, -1 where a row is padding; or None: no row is
    quantized,  # [R, I] e4m3
    scale,  # [R, I/128] float32
    I: tl.constexpr,  # noqa: E741
    BLOCKS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    real = True
    if row_expert is not None:
        real = tl.load(row_expert + row) >= 0
    if real:
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < I // 128
        column = block[:, None] * 128 + tl.arange(0, 128)[None, :]  # [BLOCKS, 128]
        first = tl.load(gemm1_out + row * (2 * I) + column, mask=inside[:, None], other=0.0).to(tl.float32)
        second = tl.load(gemm1_out + row * (2 * I) + I + column, mask=inside[:, None], other=0.0).to(tl.float32)
        gate = first if GATE_FIRST else second
        value = gate / (1.0 + tl.exp(-gate)) * (second if GATE_FIRST else first)
        largest = tl.max(tl.abs(value), axis=1) / FP8_MAX
        largest = tl.where(largest > 0.0, largest, 1.0)  # [BLOCKS]
        value = tl.minimum(tl.maximum(value / largest[:, None], -FP8_MAX), FP8_MAX)
        tl.store(quantized + row * I + column, value.to(tl.float8e4nv), mask=inside[:, None])
        tl.store(scale + row * (I // 128) + block, largest, mask=inside)


def swiglu_quantize(
    gemm1_out: torch.Tensor,
    row_expert: torch.Tensor | None,
    quantized: torch.Tensor,
    scale: torch.Tensor,
    gate_first: bool = False,
) -> None:
    """quantized [R, I] e4m3 and scale [R, I/128] of silu(gate) * up; rows with row_expert -1 are left alone.

    gemm1_out [R, 2I] bfloat16, [up | gate] or, with gate_first, [gate | up]; computed in float32. A block of zeros has
    scale 1. row_expert None: every row is computed.
    """
    rows, intermediate = quantized.shape
    blocks = min(8, triton.next_power_of_2(intermediate // 128))
    swiglu_quantize_kernel[(rows, triton.cdiv(intermediate // 128, blocks))](
        gemm1_out, row_expert, quantized, scale, I=intermediate, BLOCKS=blocks, GATE_FIRST=gate_first, num_warps=4
    )


def swiglu_quantize_torch(
    gemm1_out: torch.Tensor,
    row_expert: torch.Tensor | None,
    quantized: torch.Tensor,
    scale: torch.Tensor,
    gate_first: bool = False,
) -> None:
    """Twin of `swiglu_quantize`."""
    real = row_expert >= 0 if row_expert is not None else torch.ones(len(scale), dtype=torch.bool, device=scale.device)
    first, second = gemm1_out[real].float().chunk(2, dim=1)
    gate, up = (first, second) if gate_first else (second, first)
    blocks = (torch.nn.functional.silu(gate) * up).unflatten(1, (-1, 128))
    largest = blocks.abs().amax(dim=2) / 448.0
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    payload = (blocks / largest.unsqueeze(2)).clamp(-448.0, 448.0).to(FP8).flatten(1)
    quantized.view(torch.uint8)[real] = payload.view(torch.uint8)
    scale[real] = largest
