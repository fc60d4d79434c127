"""What a recipe's roundings cost at each output element, and how far an output lies outside of that.

Every rounding is taken as an independent error, uniform over one spacing of its format: variance spacing**2 / 12.
Errors of gemm1's result and of SwiGLU's output pass through gemm2 by its squared weights. z = error / standard
deviation is scale-free: an honest kernel has a root mean square z near 1 at any output size. docs/numerics.md derives
the model and the gates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from moeref.inputs import Inputs
from moeref.judge.compare import chunks
from moeref.quant import FP8_MAX, power_of_two_ceil, spacing_bf16, spacing_e4m3, weight_slices
from moeref.reference import Trace, expert_spans
from moeref.spec import BLOCK, Recipe

ACCUMULATOR = 2.0**-13
"""Error of a matrix product's accumulation, relative to the root mean square of the result over a 128-block: Hopper's
FP8 tensor cores keep 13 fraction bits inside a 128-block; float32 lies far below."""

SIGMAS = 6.0
"""Width of the gates in standard deviations of the judged statistic: exp(-SIGMAS**2 / 2) = 1.5e-8 by Bernstein."""


@dataclass(frozen=True)
class Noise:
    """The model's figures for one problem and one recipe."""

    variance: torch.Tensor  # [T, H] float32, of output minus unrounded reference
    shared: torch.Tensor  # [T] share of the variance that columns have in common (it comes through gemm2)
    freedom: torch.Tensor  # [T] effective number of independent errors behind that share
    largest: torch.Tensor  # [T] share that the largest single one of them has
    sources: int  # uniform errors that add up in one of them: 1 for a cast, 3 for a cast of a product of two casts


@dataclass(frozen=True)
class Gate:
    """One statistic beside its limit."""

    value: float
    limit: float
    where: int = -1  # the token, local expert or 128-block that is furthest out, where the gate has several

    @property
    def passed(self) -> bool:
        """False for NaN as well."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Fit:
    """How an output lies in the noise of a recipe. `rows`, `experts` and `blocks` are in units of their own limits."""

    rows: Gate  # largest root mean square z of a token, over its own limit; the limit is 1
    experts: Gate  # the same over the tokens of one local expert
    blocks: Gate  # the same over one 128-block of output columns, all active tokens
    overall: Gate  # root mean square z over all active elements
    peak: Gate  # largest |z|
    gain: Gate  # |regression of the error on the reference|
    by_expert: tuple[Gate, ...]  # root mean square z of each hit local expert's tokens beside its limit
    row_z: torch.Tensor  # [active] root mean square z of each active token
    row_excess: torch.Tensor  # [active] row_z over its limit

    @property
    def passed(self) -> bool:
        """All gates."""
        return all(gate.passed for gate in vars(self).values() if isinstance(gate, Gate))


def _block_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Mean square over each 128-block of the last axis, expanded back to x's shape."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    return blocks.square().mean(-1, keepdim=True).expand_as(blocks).reshape(x.shape)


def _cast_variance(x: torch.Tensor, scale_format: str) -> torch.Tensor:
    """Variance of an e4m3 cast with a scale per 1x128 block of the last axis."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / FP8_MAX
    if scale_format == "ue8m0":
        scale = power_of_two_ceil(scale)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((spacing_e4m3(blocks / scale) * scale).square() / 12 * (blocks != 0)).reshape(x.shape)


def swiglu_variance(gemm1_out: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Variance of what gemm2 reads, [rows, I], from exact gemm1_out [rows, 2I]."""
    before = ACCUMULATOR**2 * _block_mean_square(gemm1_out)
    if recipe.gemm1_out == "bf16":
        before = before + spacing_bf16(gemm1_out).square() / 12 * (gemm1_out != 0)
    if recipe.requantize == 2:
        before = before + _cast_variance(gemm1_out, recipe.scale)
    up, gate = gemm1_out.chunk(2, dim=-1)
    up_variance, gate_variance = before.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))  # d silu / d gate
    variance = (slope * up).square() * gate_variance + silu(gate).square() * up_variance
    if recipe.requantize:
        variance = variance + _cast_variance(silu(gate) * up, recipe.scale)
    return variance


def output_noise(trace: Trace, inputs: Inputs, recipe: Recipe) -> Noise:
    """The noise of `recipe` around an exact float32 trace of the same inputs. Memory: about two [T, H] tensors."""
    tokens = trace.permutation.permuted_idx_to_token_idx
    weights = trace.routing.topk_weights[tokens, trace.permutation.permuted_idx_to_slot]  # [P]
    seq_len, hidden = trace.unrounded.shape
    variance = torch.zeros(seq_len, hidden, device=tokens.device)
    shared = torch.zeros(seq_len, hidden // BLOCK, device=tokens.device)  # by column block, summed over its columns
    columns_square = {}  # expert -> [H/128, I]: squared weights summed over each block of output columns
    for expert, span in expert_spans(trace.permutation.expert_offsets):
        where, square = tokens[span], weights[span, None].square()
        source = square * swiglu_variance(trace.gemm1_out[span], recipe)  # [rows, I]
        sums = []
        for columns, weight in weight_slices(
            inputs.gemm2_weights[expert], inputs.gemm2_weights_scale[expert], torch.float32
        ):
            squared = weight.square_()
            variance[where, columns] += source @ squared.T
            sums.append(squared.reshape(-1, BLOCK, squared.shape[1]).sum(1))
        columns_square[expert] = torch.cat(sums)
        shared[where] += source @ columns_square[expert].T
        result = trace.gemm2_out[span]  # [rows, H]
        if recipe.topk_weights == "bf16":
            rounding = spacing_bf16(weights[span, None]).square() / 12 * result.square()
            variance[where] += rounding
            shared[where] += rounding.reshape(len(result), -1, BLOCK).sum(-1)
        variance[where] += ACCUMULATOR**2 * square * _block_mean_square(result)
    for chunk, unrounded in zip(chunks(variance), chunks(trace.unrounded), strict=True):
        chunk += spacing_bf16(unrounded).square() / 12 * (unrounded != 0)
    return Noise(variance, *_freedom(trace, recipe, variance, shared, columns_square, weights), _sources(recipe))


def _sources(recipe: Recipe) -> int:
    """Uniform errors that add up in one value of SwiGLU's output: its own cast, those of up and of gate."""
    rounded_gemm1 = recipe.gemm1_out == "bf16" or recipe.requantize == 2
    return max(1, 2 * rounded_gemm1 + (recipe.requantize > 0))


def _freedom(
    trace: Trace,
    recipe: Recipe,
    variance: torch.Tensor,
    shared: torch.Tensor,
    columns_square: dict[int, torch.Tensor],
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Share of z**2 that columns have in common, independent errors behind it, and the largest one's share; all [T].

    The mean of z**2 over a row is sum_k c_k u_k**2 plus cross terms, u_k the k-th error in units of its deviation; c_k
    is what error k adds to the row. The effective number is (sum c)**2 / sum c**2.
    """
    tokens = trace.permutation.permuted_idx_to_token_idx
    seq_len, blocks = shared.shape
    total = variance.reshape(seq_len, blocks, BLOCK).sum(-1)  # [T, H/128]
    inverse = torch.where(total > 0, 1 / total, torch.zeros_like(total)) / blocks
    first = torch.zeros(seq_len, device=variance.device)
    second, largest = torch.zeros_like(first), torch.zeros_like(first)
    for expert, span in expert_spans(trace.permutation.expert_offsets):
        where, square = tokens[span], weights[span, None].square()
        part = square * swiglu_variance(trace.gemm1_out[span], recipe) * (inverse[where] @ columns_square[expert])
        parts = [part]
        if recipe.topk_weights == "bf16":  # one error moves the whole row of the expert
            size = spacing_bf16(weights[span, None]).square() / 12 * trace.gemm2_out[span].square()
            parts.append((size / variance[where]).nan_to_num(nan=0.0).mean(1, keepdim=True))
        for part in parts:
            first[where] += part.sum(1)
            second[where] += part.square().sum(1)
            largest[where] = torch.maximum(largest[where], part.amax(1))
    freedom = torch.where(second > 0, first.square() / second, torch.ones_like(first))
    return first.clamp(max=1.0), freedom.clamp(min=1.0), largest


def fit(output: torch.Tensor, trace: Trace, noise: Noise, active: torch.Tensor, grouped: bool = True) -> Fit:
    """Judge output [T, H] on the active tokens (int64 [n], n > 0, ascending) by the noise model.

    grouped: False where the rows are not those of the trace's tokens: then experts and blocks are not gated.
    """
    hidden = output.shape[1]
    by_block, peak, error_on_reference, reference_on_itself = [], 0.0, [], []
    for chunk in chunks(active):
        reference, variance = trace.unrounded[chunk], noise.variance[chunk]
        error = output[chunk].float() - reference
        deviation = variance.sqrt()
        # zero variance: a zero reference element, where any error at all is infinitely far out
        z = torch.where(error == 0, torch.zeros_like(error), error / deviation)
        peak = max(peak, float(z.abs().max())) if bool(torch.isfinite(z).all()) else math.inf
        by_block.append(z.double().square().reshape(len(z), hidden // BLOCK, BLOCK).mean(2))
        scaled = torch.where(variance > 0, reference / deviation, torch.zeros_like(reference)).double()
        error_on_reference.append((z.double() * scaled).sum(1))
        reference_on_itself.append(scaled.square().sum(1))
    block_square = torch.cat(by_block)  # [n, H/128]
    square = block_square.mean(1)  # [n]
    share, freedom = noise.shared[active].double(), noise.freedom[active].double()
    spread = share.square() * (_square_variance(noise.sources) / freedom + 2 / hidden)
    spread = spread + (1 - share).square() * _square_variance(1) / hidden
    # Bernstein's second term: u**2 - 1 is at most 3 * sources - 1
    heavy = (3 * noise.sources - 1) * SIGMAS**2 / 6 * noise.largest[active].double()
    # and no row can lie above the bound of all its errors at once, but for the cross terms
    bound = 3 * noise.sources + SIGMAS * (2 / hidden) ** 0.5
    limit = (1 + SIGMAS * spread.sqrt() + heavy).clamp(max=bound) * (1 + MODEL_SLACK)
    excess = (square / limit).sqrt()
    overall_limit = _mean_limit(spread, heavy, bound)
    norm = torch.cat(reference_on_itself)
    gain = float(torch.cat(error_on_reference).sum() / norm.sum()) if float(norm.sum()) > 0 else 0.0
    per_row = norm * (1 - share + share * hidden / freedom)  # variance of each row's regression numerator
    gain_limit = SIGMAS * float(per_row.sum().sqrt() / norm.sum()) if float(norm.sum()) > 0 else 0.0
    gain_limit += 3 * ACCUMULATOR + GAIN_BIAS * hidden * len(square) / max(float(norm.sum()), 1e-300)
    by_expert = _experts(square, spread, heavy, bound, trace, active) if grouped else ()
    return Fit(
        rows=_worst(excess, active),
        experts=_worst_of(by_expert) if grouped else Gate(0.0, 1.0),
        blocks=_blocks(block_square, noise, trace, active, bound) if grouped else Gate(0.0, 1.0),
        overall=Gate(math.sqrt(float(square.mean())), math.sqrt(overall_limit)),
        peak=Gate(peak, PEAK),
        gain=Gate(abs(gain), gain_limit),
        by_expert=by_expert,
        row_z=square.sqrt(),
        row_excess=excess,
    )


def _mean_limit(spread: torch.Tensor, heavy: torch.Tensor, bound: float) -> float:
    """Limit of the mean of independent mean squares with these variances and heaviest terms, both [n]."""
    count = len(spread)
    limit = 1 + SIGMAS * float(spread.sum().sqrt()) / count + float(heavy.max()) / count
    return min(limit, bound) * (1 + MODEL_SLACK)


def _worst(excess: torch.Tensor, names: torch.Tensor) -> Gate:
    """The largest excess, NaN above all, as a gate with limit 1 and the name beside it."""
    worst = int(excess.nan_to_num(nan=math.inf).argmax())
    return Gate(float(excess[worst]), 1.0, int(names[worst]))


def _worst_of(gates: tuple[Gate, ...]) -> Gate:
    """The gate whose value is the most times its limit, in units of that limit."""
    times = torch.tensor([gate.value / gate.limit for gate in gates], dtype=torch.float64)
    return _worst(times, torch.tensor([gate.where for gate in gates]))


def _experts(
    square: torch.Tensor, spread: torch.Tensor, heavy: torch.Tensor, bound: float, trace: Trace, active: torch.Tensor
) -> tuple[Gate, ...]:
    """Mean square z over each local expert's tokens. Tokens are independent, so limits tighten with their number."""
    gates = []
    for expert, span in expert_spans(trace.permutation.expert_offsets):
        tokens = trace.permutation.permuted_idx_to_token_idx[span]
        at = torch.searchsorted(active, tokens[torch.isin(tokens, active)])
        if len(at):
            limit = _mean_limit(spread[at], heavy[at], bound)
            gates.append(Gate(math.sqrt(float(square[at].mean())), math.sqrt(limit), expert))
    return tuple(gates)


def _blocks(block_square: torch.Tensor, noise: Noise, trace: Trace, active: torch.Tensor, bound: float) -> Gate:
    """Mean square z over each 128-block of columns.

    Scales that differ may leave one 128-block of I, of one expert, behind a block of columns: the errors that are
    effective there are taken as that many times fewer, and the largest one as that many times larger.
    """
    rows = torch.bincount(trace.permutation.permuted_idx_to_token_idx, minlength=len(trace.unrounded))[active]
    fewer = (rows * trace.swiglu_out.shape[1] // BLOCK).clamp(min=1)
    freedom = (noise.freedom[active].double() / fewer).clamp(min=1)
    spread = _square_variance(noise.sources) / freedom + 2 / BLOCK
    heavy = (3 * noise.sources - 1) * SIGMAS**2 / 6 * (noise.largest[active].double() * fewer).clamp(max=1)
    limit = _mean_limit(spread, heavy, bound + SIGMAS * (2 / BLOCK) ** 0.5)
    excess = (block_square.mean(0) / limit).sqrt()
    return _worst(excess, torch.arange(len(excess)))


def _square_variance(sources: int) -> float:
    """Variance of u**2 for u the sum of that many equal uniform errors, scaled to variance 1: 9/5 - 1 for one."""
    return 2 - 1.2 / sources


MODEL_SLACK = 0.1
"""Share by which a mean square z may pass its statistical limit: within one spacing the density of the rounded values
is not flat, which moves spacing**2 / 12 by up to a tenth."""

PEAK = 8.0
"""Largest |z|: a sum of many uniform errors is close to normal, and 1e8 normal draws stay below 5.8."""

GAIN_BIAS = 2.0
"""Rounding to the middle of a cell shrinks the regression of the result on the true value by variance / signal, once
for each of the at most two casts in line."""
