"""How far two right machines may lie apart at each stage: float32 sums in other orders, other exponentials.

docs/numerics.md ("Golden files") derives every number. Integer stages, casts and inputs are equal everywhere.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import silu

from moeref.judge.noise import PEAK
from moeref.reference import Trace, expert_spans
from moeref.spec import BLOCK

U = 2.0**-24
"""Half a unit in the last place of float32: the largest relative error of one rounding."""

TINY = 2.0**-118
"""Absolute part of SwiGLU's tolerance: below it exponentials meet float32's smallest numbers, which some machines flush
to zero."""

SWIGLU_ROUNDINGS = 7
"""exp (two units in the last place: 4 U), 1 + exp, the division, the product with up."""


def product_deviation(result: torch.Tensor, length: int) -> torch.Tensor:
    """Standard deviation of the difference of two float32 matrix products summed in any order, [rows, N].

    result [rows, N] their common value, `length` the number of products in each sum. Every partial sum is rounded,
    with variance at most (U S)**2 / 3, and no partial sum of products of random sign is larger, in the mean square,
    than the whole: hence sqrt(length / 3) U times the result's root mean square over its 128-block; sqrt(2) for two
    machines.
    """
    blocks = result.double().reshape(len(result), result.shape[1] // BLOCK, BLOCK)
    size = blocks.square().mean(-1, keepdim=True).sqrt().expand_as(blocks).reshape(result.shape)
    return math.sqrt(2 * length / 3) * U * size


def weights_tolerance(topk_weights: torch.Tensor) -> torch.Tensor:
    """Bound for topk_weights [T, K]: 6 U a score, K - 1 sums, the epsilon, the division, the factor; two machines."""
    return 2 * (14 + topk_weights.shape[1]) * U * topk_weights.abs()


def gemm1_tolerance(gemm1_out: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """For gemm1_out [P, 2I]: PEAK deviations of a sum of H products."""
    return PEAK * product_deviation(gemm1_out, hidden_size)


def swiglu_tolerance(gemm1_out: torch.Tensor, swiglu_out: torch.Tensor) -> torch.Tensor:
    """Bound for swiglu_out [P, I] computed from the same gemm1_out [P, 2I]."""
    up = gemm1_out.chunk(2, dim=-1)[0]
    return 2 * SWIGLU_ROUNDINGS * U * swiglu_out.abs() + TINY * up.abs().clamp(min=1.0)


def gemm2_tolerance(gemm2_out: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """For gemm2_out [P, H] computed from the same rows: PEAK deviations of a sum of I products."""
    return PEAK * product_deviation(gemm2_out, intermediate_size)


def combine_tolerance(trace: Trace) -> torch.Tensor:
    """Bound for the unrounded output [T, H] from the same gemm2_out: K products, K sums; two machines."""
    top_k = trace.routing.topk_weights.shape[1]
    return 2 * (top_k + 1) * U * _weighted_sum(trace, trace.gemm2_out.double().abs(), 1)


def _weighted_sum(trace: Trace, rows: torch.Tensor, power: int) -> torch.Tensor:
    """Sum over each token's rows [P, H] times |weight|**power -> [T, H]."""
    tokens, slots = trace.permutation.permuted_idx_to_token_idx, trace.permutation.permuted_idx_to_slot
    weights = trace.routing.topk_weights[tokens, slots].abs() ** power
    out = rows.new_zeros(trace.unrounded.shape)
    for _, span in expert_spans(trace.permutation.expert_offsets):
        out[tokens[span]] += weights[span, None] * rows[span]
    return out


def through(trace: Trace, hidden_size: int, intermediate_size: int) -> dict[str, torch.Tensor]:
    """Tolerances stage by stage where each one also carries the stages before it: for recipes that round nowhere.

    Deviations of up and gate reach SwiGLU's output by its derivatives. Those of SwiGLU's output reach gemm2's in
    proportion, at most by the worst ratio of a 128-block of the row; a token's rows add up with squared weights.
    """
    gemm1_out, swiglu_out = trace.gemm1_out.double(), trace.swiglu_out.double()  # squares of tiny numbers stay numbers
    deviation1 = product_deviation(gemm1_out, hidden_size)
    up, gate = gemm1_out.chunk(2, dim=-1)
    up_deviation, gate_deviation = deviation1.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))  # d silu / d gate
    own = swiglu_tolerance(gemm1_out, swiglu_out)
    deviation = ((slope * up * gate_deviation).square() + (silu(gate) * up_deviation).square()).sqrt()
    swiglu = PEAK * deviation + own
    error = _blocks(deviation.square() + own.square())
    share = (error / _blocks(swiglu_out.square())).nan_to_num(nan=0.0, posinf=0.0).amax(1, keepdim=True)  # [P, 1]
    size = product_deviation(trace.gemm2_out, intermediate_size)
    relative = size / (math.sqrt(2 * intermediate_size / 3) * U)  # the result's root mean square over its 128-block
    deviation2 = (size.square() + share * relative.square()).sqrt()
    weights = trace.routing.topk_weights.shape[1]
    carried = PEAK * _weighted_sum(trace, deviation2.square(), 2).sqrt()
    own_weight = 2 * (14 + weights) * U * _weighted_sum(trace, trace.gemm2_out.double().abs(), 1)
    return {
        "gemm1_out": PEAK * deviation1,
        "swiglu_out": swiglu,
        "requantized": swiglu,
        "gemm2_out": PEAK * deviation2,
        "unrounded": carried + own_weight + combine_tolerance(trace),
    }


def norm_tolerance(hidden_size: int) -> float:
    """Relative difference of a stage's norm over one expert's rows: at most the norm of the difference.

    Through SwiGLU it grows by less than 1.5, with gemm2's own part by less than 1.6; 4, since a run may be one row.
    """
    return 4 * math.sqrt(2 * hidden_size / 3) * U


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """Sum over each 128-block of the last axis, [rows, N/128]."""
    return x.reshape(len(x), x.shape[1] // BLOCK, BLOCK).sum(-1)
