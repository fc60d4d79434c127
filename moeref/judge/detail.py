"""Where an output's error lies: small tables of z by token, block, expert and size, for a report to draw.

z = error / standard deviation of the recipe's noise (moeref.judge.noise). Everything is binned while the output is at
hand: what stays is at most some hundred kilobytes, whatever seq_len is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch

from moeref.judge.compare import chunks
from moeref.judge.noise import Fit, Gate, Noise
from moeref.judge.verdict import Known
from moeref.quant import spacing_bf16
from moeref.spec import BLOCK, Recipe

Array = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float64]]

MOST_ROWS = 256
"""Rows of the error map. More tokens than that share rows: the worst token of each row is kept."""

EDGES = tuple(2.0 ** (half / 2) for half in range(-14, 41))
"""Bounds of the histogram's bins of |z|: half octaves from 2**-7 to 2**20."""

SHARES = 64
"""Bins of the share of an element's variance that is not its own bf16 rounding, for the expected histogram."""

SAMPLE, WORST = 192, 16
"""Active tokens whose routing weights are estimated: spread over the batch, and those furthest out."""


@dataclass(frozen=True)
class TokenWeights:
    """Routing weights of one token, as the output shows them.

    The output's row is taken as a combination of the reference's gemm2_out of the token's own local experts; the
    coefficients are found by least squares in units of the noise. What is left over did not come from weights alone.
    """

    token: int
    experts: tuple[int, ...]  # global ids
    due: tuple[float, ...]  # topk_weights of the reference
    seen: tuple[float, ...]  # coefficients; NaN where the row does not determine them
    z: float  # root mean square z of the row as it is
    z_left: float  # the same after the best coefficients; at most z


@dataclass(frozen=True)
class Detail:
    """The error of one output on one problem, binned."""

    block_z: Array  # [rows, H/128] root mean square z; NaN: idle and zero, as due; inf: NaN, inf, or not zero where due
    tokens_per_row: int  # 1, or more tokens of which the worst one is shown in each block
    expert_z: tuple[Gate, ...]  # one a hit local expert: root mean square z of its tokens, its limit, its global id
    expert_rows: tuple[int, ...]  # tokens of each of these
    counts: Array  # [bins + 2] active elements by |z| in EDGES, those below and above at the ends; NaN counts as above
    expected: Array  # [bins + 2] what the noise model expects of the same elements
    tokens: tuple[TokenWeights, ...]  # at most SAMPLE + WORST of them, the furthest out first
    rows_out: int  # active tokens over their own limit


def detail(output: torch.Tensor, known: Known, recipe: str, fit: Fit | None) -> Detail:
    """Bin the error of output [T, H], a floating tensor, that was judged under this recipe with this fit.

    fit: None where no token is active.
    """
    noise = known.noise(Recipe.parse(recipe)) if recipe else None
    active = torch.zeros(len(output), dtype=torch.bool, device=output.device)
    active[known.active] = True
    block_z, counts, shares = _bin(output, known.trace.unrounded, noise, active)
    rows, per_row = _fold(block_z)
    offset, runs = known.inputs.local_expert_offset, known.trace.permutation.expert_offsets.diff()
    by_expert = fit.by_expert if fit else ()
    return Detail(
        block_z=rows,
        tokens_per_row=per_row,
        expert_z=tuple(Gate(gate.value, gate.limit, gate.where + offset) for gate in by_expert),
        expert_rows=tuple(int(runs[gate.where]) for gate in by_expert),
        counts=counts,
        expected=_expected(shares),
        tokens=_tokens(output, known, noise, fit) if noise and fit else (),
        rows_out=int((~(fit.row_excess <= 1)).sum()) if fit else 0,
    )


def _bin(
    output: torch.Tensor, reference: torch.Tensor, noise: Noise | None, active: torch.Tensor
) -> tuple[torch.Tensor, Array, Array]:
    """(root mean square z [T, H/128] as Detail.block_z, counts of |z|, counts of the share that is not bf16's)."""
    edges = torch.tensor(EDGES, device=output.device)
    counts = torch.zeros(len(EDGES) + 1, dtype=torch.int64, device=output.device)
    shares = torch.zeros(SHARES, dtype=torch.int64, device=output.device)
    maps = []
    for out, ref, at, on in zip(
        chunks(output), chunks(reference), chunks(torch.arange(len(output))), chunks(active), strict=True
    ):
        variance = noise.variance[at.to(output.device)] if noise else torch.zeros_like(ref)
        error = out.float() - ref
        size = torch.where(error == 0, torch.zeros_like(error), error / variance.sqrt()).abs()
        size = size.nan_to_num(nan=math.inf, posinf=math.inf)
        square = size.double().square().reshape(len(size), -1, BLOCK).mean(2)
        maps.append(torch.where(on[:, None] | (square > 0), square.sqrt(), math.nan))
        counts += torch.bincount(torch.bucketize(size[on], edges).flatten(), minlength=len(counts))
        rest = 1 - spacing_bf16(ref[on]).square() / 12 / variance[on]
        rest = (rest[variance[on] > 0].clamp(0, 1) * SHARES).long().clamp(max=SHARES - 1)
        shares += torch.bincount(rest, minlength=SHARES)
    empty = torch.zeros(0, output.shape[1] // BLOCK, dtype=torch.float64)
    return torch.cat(maps) if maps else empty, counts.double().cpu().numpy(), shares.double().cpu().numpy()


def _fold(block_z: torch.Tensor) -> tuple[Array, int]:
    """At most MOST_ROWS rows, each the largest value of as many tokens; NaN only where all of them are."""
    per_row = max(1, -(-len(block_z) // MOST_ROWS))
    padded = torch.full((-(-len(block_z) // per_row) * per_row, block_z.shape[1]), -1.0, dtype=torch.float64)
    padded[: len(block_z)] = block_z.cpu().nan_to_num(nan=-1.0, posinf=math.inf)
    folded = padded.reshape(-1, per_row, block_z.shape[1])
    largest = folded.amax(1) if len(folded) else folded[:, 0]
    return torch.where(largest < 0, math.nan, largest).numpy(), per_row


def _expected(shares: Array) -> Array:
    """Counts of |z| by the noise model: what comes through gemm2 is a sum of many errors, hence normal, with share s
    of the variance; the rest is one bf16 rounding, uniform over its spacing. So z = sqrt(s) N + sqrt(1 - s) U with U
    uniform within sqrt(3), whose distribution function is an integral of the normal one."""
    share = torch.from_numpy((numpy.arange(SHARES) + 0.5) / SHARES)[:, None]  # [SHARES, 1]
    width, sigma = (3 * (1 - share)).sqrt(), share.sqrt()
    edges = torch.tensor(EDGES, dtype=torch.float64)

    def integral(x: torch.Tensor) -> torch.Tensor:
        """Of the normal distribution function, from -inf to x."""
        whole: torch.Tensor = x * torch.special.ndtr(x) + torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return whole

    below = sigma / (2 * width) * (integral((edges + width) / sigma) - integral((edges - width) / sigma))
    inside = (2 * below - 1).clamp(0, 1)  # P(|z| < edge), [SHARES, edges]
    bounds = torch.cat([torch.zeros(SHARES, 1), inside, torch.ones(SHARES, 1)], dim=1)
    result: Array = shares @ bounds.diff(dim=1).numpy()
    return result


def _tokens(output: torch.Tensor, known: Known, noise: Noise, fit: Fit) -> tuple[TokenWeights, ...]:
    """Weights seen in a sample of the active tokens, the furthest out first."""
    order = fit.row_excess.nan_to_num(nan=math.inf).argsort(descending=True, stable=True)
    spread = torch.linspace(0, len(order) - 1, min(SAMPLE, len(order)), device=order.device).round().long()
    chosen = torch.unique(torch.cat([order[:WORST], spread]))
    chosen = chosen[fit.row_excess[chosen].nan_to_num(nan=math.inf).argsort(descending=True, stable=True)]
    permutation, routing = known.trace.permutation, known.trace.routing
    by_token = permutation.permuted_idx_to_token_idx.argsort(stable=True)
    sorted_tokens = permutation.permuted_idx_to_token_idx[by_token]
    found = []
    for token in known.active[chosen].tolist():
        low, high = torch.searchsorted(sorted_tokens, torch.tensor([token, token + 1], device=order.device)).tolist()
        rows = by_token[low:high]
        slots = permutation.permuted_idx_to_slot[rows]
        deviation = noise.variance[token].sqrt().double().cpu().numpy()
        seen, z, left = _solve(
            known.trace.gemm2_out[rows].double().cpu().numpy(),
            output[token].double().cpu().numpy(),
            known.trace.unrounded[token].double().cpu().numpy(),
            deviation,
        )
        ids, due = routing.topk_ids[token, slots].tolist(), routing.topk_weights[token, slots].tolist()
        found.append(TokenWeights(token, tuple(ids), tuple(due), seen, z, left))
    return tuple(found)


def _solve(results: Array, row: Array, reference: Array, deviation: Array) -> tuple[tuple[float, ...], float, float]:
    """(coefficients, root mean square z before, after). results: [k, H]; the others [H]. Coefficients that the data do
    not determine, of results that are zero or multiples of each other, are NaN."""
    nothing = (math.nan,) * len(results)
    usable = deviation > 0
    if not numpy.isfinite(row).all() or bool((row[~usable] != reference[~usable]).any()):
        return nothing, math.inf, math.inf
    if not usable.any():
        return nothing, 0.0, 0.0
    matrix, target = (results[:, usable] / deviation[usable]).T, row[usable] / deviation[usable]
    shown = matrix.any(0)  # [k]
    coefficients = numpy.full(len(results), math.nan)
    found, _, rank, _ = numpy.linalg.lstsq(matrix[:, shown], target, rcond=None)
    before = (row - reference)[usable] / deviation[usable]
    left = target - matrix[:, shown] @ found
    if rank == shown.sum():
        coefficients[shown] = found
    mean = math.sqrt(float((before**2).mean())), math.sqrt(float((left**2).mean()))
    return tuple(coefficients.tolist()), mean[0], min(mean)
