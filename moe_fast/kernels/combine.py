"""Combine: weighted sum of each token's rows in float32, experts in ascending order, one final cast to bfloat16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_fast.kernels.triton_launch import Launcher, cdiv

BIG = tl.constexpr(2147483647)


@triton.jit
def combine_kernel(
    gemm2_out,  # [P, H] float32
    topk_weights,  # [T, K] float32
    token_rows,  # [T, K] int32, -1 where a choice is not local
    output,  # [T, H] bfloat16
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    choice = tl.arange(0, triton.next_power_of_2(K))
    # Of routing, which has ended when `experts` lets this kernel start. Past the L1, which may hold older ones.
    row = tl.load(token_rows + token * K + choice, mask=choice < K, other=-1, cache_modifier=".cg")
    weight = tl.load(topk_weights + token * K + choice, mask=choice < K, other=0.0, cache_modifier=".cg")
    row = tl.where(row < 0, BIG, row)
    count = tl.sum((row < BIG).to(tl.int32), axis=0)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for _ in range(count):  # rows ascend as experts do
        this = tl.min(row, axis=0)
        w = tl.sum(tl.where(row == this, weight, 0.0), axis=0)
        row = tl.where(row == this, BIG, row)
        acc += w * tl.load(gemm2_out + this.to(tl.int64) * H + column, mask=column < H, other=0.0)
    tl.store(output + token * H + column, acc.to(tl.bfloat16), mask=column < H)


launch = Launcher(combine_kernel)


def combine(
    gemm2_out: torch.Tensor,
    topk_weights: torch.Tensor,
    token_rows: torch.Tensor,
    output: torch.Tensor,
    block: int = 1024,
    pdl: bool = False,
) -> None:
    """Fill output [T, H]; tokens without a row become zero.

    pdl: the kernel before wrote gemm2_out alone, and let this one start when all that came before it had ended, as
    `experts` does.
    """
    tokens, hidden = output.shape
    options = {"launch_pdl": True} if pdl else {}
    launch(
        (tokens, cdiv(hidden, block)),
        (gemm2_out, topk_weights, token_rows, output),
        (),
        {"H": hidden, "K": topk_weights.shape[1], "BLOCK_H": block, "PDL": pdl},
        num_warps=4,
        **options,
    )


def combine_torch(
    gemm2_out: torch.Tensor,
    topk_weights: torch.Tensor,
    token_rows: torch.Tensor,
    output: torch.Tensor,
    block: int = 1024,
    pdl: bool = False,
) -> None:
    """Twin of `combine`."""
    acc = torch.zeros(output.shape, device=output.device)
    rows, order = torch.sort(token_rows, dim=-1)  # absent ones, -1, first
    weights = topk_weights.gather(1, order)
    for slot in range(rows.shape[1]):
        present = rows[:, slot] >= 0
        acc[present] += weights[present, slot, None] * gemm2_out[rows[present, slot].long()]
    output.copy_(acc)
