"""Faults of the two matrix products: K that is not summed, short accumulators, wrong weights, lost columns."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moeref.diagnose.faults.registry import fault
from moeref.diagnose.kernel import Kernel
from moeref.inputs import FP8, Inputs
from moeref.quant import ldexp
from moeref.reference import Permutation, expert_spans
from moeref.spec import BLOCK


def short_accumulator(x: Tensor, weight: Tensor, bits: int = 14, step: int = 32) -> Tensor:
    """x @ weight.T, `step` products at a time; the running sum keeps `bits` bits below its larger operand, cut off."""
    total = x.new_zeros(len(x), len(weight))
    for start in range(0, x.shape[1], step):
        part = x[:, start : start + step] @ weight[:, start : start + step].T
        exponent = torch.frexp(torch.maximum(total.abs(), part.abs()))[1]
        unit = ldexp(torch.ones_like(total), exponent - bits)
        total = torch.trunc((total + part) / unit) * unit
    return total


def bf16_accumulator(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, a block of 128 at a time, the running sum kept in bfloat16."""
    total = x.new_zeros(len(x), len(weight))
    for start in range(0, x.shape[1], BLOCK):
        part = x[:, start : start + BLOCK] @ weight[:, start : start + BLOCK].T
        total = (total + part).bfloat16().float()
    return total


def _weights_of(weights: Tensor, experts: Tensor) -> Tensor:
    """weights[experts], as bytes: not every device gathers e4m3."""
    return weights.view(torch.uint8)[experts].view(FP8)


def _next_expert(weights: Tensor) -> Tensor:
    return _weights_of(weights, torch.arange(1, len(weights) + 1, device=weights.device) % len(weights))


def _first_expert(weights: Tensor) -> Tensor:
    return _weights_of(weights, torch.zeros(len(weights), dtype=torch.long, device=weights.device))


# gemm1


@fault(stage="gemm1", hook="dot1", source="synthetic", summary="the last K block is not summed")
def gemm1_lacks_last_block(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x[:, :-BLOCK] @ weight[:, :-BLOCK].T


@fault(stage="gemm1", hook="dot1", source="synthetic", summary="the last 32 of K are not summed")
def gemm1_lacks_last_32(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x[:, :-32] @ weight[:, :-32].T


@fault(stage="gemm1", hook="dot1", source="synthetic", summary="the last element of K is not summed")
def gemm1_lacks_last_element(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x[:, :-1] @ weight[:, :-1].T


@fault(stage="gemm1", hook="dot1", source="triton #2300", summary="the accumulator keeps 14 bits over all of K")
def gemm1_accumulator_of_14_bits(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return short_accumulator(x, weight)


@fault(stage="gemm1", hook="dot1", source="synthetic", summary="blocks of K are summed in bfloat16")
def gemm1_accumulator_in_bf16(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return bf16_accumulator(x, weight)


@fault(stage="gemm1", hook="dot1", source="synthetic", summary="odd experts leave out the last K block")
def gemm1_odd_experts_lack_last_block(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x[:, :-BLOCK] @ weight[:, :-BLOCK].T if expert % 2 else x @ weight.T


@fault(stage="gemm1", hook="dot1", source="synthetic", summary="past 64 tokens the last 32 of K are not summed")
def gemm1_long_batches_lack_last_32(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x[:, :-32] @ weight[:, :-32].T if inputs.seq_len > 64 else x @ weight.T


@fault(stage="gemm1", hook="dot1", source="aiter #4032", summary="NaN where there is a single token")
def gemm1_single_token_is_nan(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T * (float("nan") if inputs.seq_len == 1 else 1.0)


@fault(stage="gemm1", hook="dot1", source="synthetic", summary="the last 64 rows of the gate are never computed: zero")
def gemm1_last_columns_zero(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    out = x @ weight.T
    out[:, -64:] = 0
    return out


@fault(
    stage="gemm1", hook="dot1", source="synthetic", summary="rows past 16 of an expert repeat its row 16 places before"
)
def gemm1_second_tile_repeats_first(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.T)[torch.arange(len(x), device=x.device) % 16]


@fault(stage="gemm1", hook="gemm1", source="synthetic", summary="each expert uses the weights of the next one")
def gemm1_weights_of_next_expert(
    self: Kernel, inputs: Inputs, hidden: Tensor, scale: Tensor, permutation: Permutation
) -> Tensor:
    other = replace(inputs, gemm1_weights=_next_expert(inputs.gemm1_weights))
    return Kernel.gemm1(self, other, hidden, scale, permutation)


@fault(stage="gemm1", hook="gemm1", source="synthetic", summary="every expert uses the weights of the first one")
def gemm1_weights_of_first_expert(
    self: Kernel, inputs: Inputs, hidden: Tensor, scale: Tensor, permutation: Permutation
) -> Tensor:
    other = replace(inputs, gemm1_weights=_first_expert(inputs.gemm1_weights))
    return Kernel.gemm1(self, other, hidden, scale, permutation)


# gemm2


@fault(stage="gemm2", hook="dot2", source="synthetic", summary="the last I block is not summed")
def gemm2_lacks_last_block(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x[:, :-BLOCK] @ weight[:, :-BLOCK].T


@fault(stage="gemm2", hook="dot2", source="synthetic", summary="the last 32 of I are not summed")
def gemm2_lacks_last_32(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x[:, :-32] @ weight[:, :-32].T


@fault(stage="gemm2", hook="dot2", source="synthetic", summary="the last element of I is not summed")
def gemm2_lacks_last_element(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x[:, :-1] @ weight[:, :-1].T


@fault(stage="gemm2", hook="dot2", source="triton #2300", summary="the accumulator keeps 14 bits over all of I")
def gemm2_accumulator_of_14_bits(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return short_accumulator(x, weight)


@fault(stage="gemm2", hook="dot2", source="synthetic", summary="blocks of I are summed in bfloat16")
def gemm2_accumulator_in_bf16(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return bf16_accumulator(x, weight)


@fault(
    stage="gemm2",
    hook="dot2",
    source="megablocks e74bc20",
    summary="wrong index in the last block: one column is another",
)
def gemm2_last_column_is_another(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    out = x @ weight.T
    out[:, -1] = out[:, 0]
    return out


@fault(stage="gemm2", hook="dot2", source="synthetic", summary="the last 64 columns are never computed: zero")
def gemm2_last_columns_zero(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    out = x @ weight.T
    out[:, -64:] = 0
    return out


@fault(stage="gemm2", hook="dot2", source="synthetic", summary="neighbouring columns exchanged")
def gemm2_columns_swapped(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    out = x @ weight.T
    return out.view(len(x), -1, 2).flip(2).reshape(out.shape)


@fault(stage="gemm2", hook="dot2", source="synthetic", summary="odd experts leave out the last I block")
def gemm2_odd_experts_lack_last_block(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return x[:, :-BLOCK] @ weight[:, :-BLOCK].T if expert % 2 else x @ weight.T


@fault(stage="gemm2", hook="gemm2", source="synthetic", summary="each expert uses the weights of the next one")
def gemm2_weights_of_next_expert(
    self: Kernel, inputs: Inputs, requantized: Tensor, scale: Tensor, permutation: Permutation
) -> Tensor:
    other = replace(inputs, gemm2_weights=_next_expert(inputs.gemm2_weights))
    return Kernel.gemm2(self, other, requantized, scale, permutation)


@fault(stage="gemm2", hook="gemm2", source="synthetic", summary="the last row of a run keeps the row before it")
def gemm2_last_row_repeats(
    self: Kernel, inputs: Inputs, requantized: Tensor, scale: Tensor, permutation: Permutation
) -> Tensor:
    out = Kernel.gemm2(self, inputs, requantized, scale, permutation)
    for _, span in expert_spans(permutation.expert_offsets):
        if span.stop - span.start > 1:
            out[span.stop - 1] = out[span.stop - 2]
    return out
