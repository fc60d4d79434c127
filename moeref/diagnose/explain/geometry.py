"""The geometry of an error: which rows, columns and experts are wrong, and by what, in sentences with numbers.

Each fact names the stages that it points to, the likeliest first. Nothing here runs a candidate or a hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeref.diagnose.explain.distance import row_distance
from moeref.diagnose.explain.mixture import Mixture, dense_results, mixture
from moeref.inputs import Inputs
from moeref.judge.noise import fit
from moeref.judge.verdict import Known
from moeref.reference import Trace
from moeref.spec import BLOCK, Recipe


@dataclass(frozen=True)
class Fact:
    """One thing that an error's geometry shows."""

    text: str
    stages: tuple[str, ...] = ()  # that it points to, the likeliest first


@dataclass(frozen=True)
class Wrong:
    """Where an output [T, H] is wrong."""

    rows: Tensor  # [T] bool
    broken: Tensor  # [T] bool, rows that hold NaN or inf
    stray: Tensor  # [T] bool, rows that should be zero and are not
    elements: Tensor  # [T, H] bool: off by more than ELEMENT standard deviations, or not finite
    active: Tensor  # [T] bool


ELEMENT = 6.0
"""|z| beyond which an element counts as wrong: none in 1e8 of a right kernel's (docs/numerics.md)."""

RULE = 0.95
"""Share (F1) of the wrong rows that a rule must name to be told."""


def find_wrong(output: Tensor, known: Known, recipe: Recipe) -> Wrong:
    """Rows outside of what the recipe costs. output [T, H]."""
    trace, noise = known.trace, known.noise(recipe)
    active = torch.zeros(len(output), dtype=torch.bool, device=output.device)
    active[known.active] = True
    rows = torch.zeros_like(active)
    broken = ~torch.isfinite(output).all(1)
    if len(known.active):
        rows[known.active] = ~(fit(output, trace, noise, known.active).row_excess <= 1)
    stray = ~active & (output != 0).any(1)
    error = (output.float() - trace.unrounded).abs()
    elements = ~(error <= ELEMENT * noise.variance.sqrt())
    return Wrong(rows | broken | stray, broken, stray, elements, active)


def error_geometry(output: Tensor, known: Known, recipe: Recipe) -> list[Fact]:
    """Facts of one output [T, H] beside the reference, the plainest first; empty where no row is wrong."""
    inputs, trace = known.inputs, known.trace
    wrong = find_wrong(output, known, recipe)
    if not bool(wrong.rows.any()):
        return []
    facts = [*_amount(output, wrong), *_not_finite(wrong, trace), *_stray(wrong)]
    finite = wrong.rows & ~wrong.broken
    if bool((output[known.active] == 0).all()) and len(known.active):
        return [*facts, Fact("every active row is all zero", ("output", "combine", "gemm2"))]
    constant = _constant(output, trace, finite, inputs.routed_scaling_factor)
    facts += constant
    facts += _other_rows(output, trace, finite, wrong.active)
    if not constant:
        facts += _mixture(output, inputs, trace, finite)
    facts += _which_rows(wrong, trace)
    facts += _which_columns(wrong, finite)
    facts += _follows(output, wrong, known)
    return facts


def _amount(output: Tensor, wrong: Wrong) -> Iterator[Fact]:
    active = int(wrong.active.sum())
    hit = int((wrong.rows & wrong.active).sum())
    if hit:
        share = int(wrong.elements[wrong.rows & wrong.active].sum())
        width = output.shape[1]
        yield Fact(
            f"{hit} of {active} active rows are wrong, {share} of their {hit * width} elements by 6 sigma or more"
        )


def _not_finite(wrong: Wrong, trace: Trace) -> Iterator[Fact]:
    if not bool(wrong.broken.any()):
        return
    rows = wrong.broken.nonzero().squeeze(1)
    experts = _experts_of(trace)
    tokens = trace.permutation.permuted_idx_to_token_idx
    guilty = [e for e in sorted(set(experts.tolist())) if bool(wrong.broken[tokens[experts == e]].all())]
    partial = int((wrong.elements[rows].sum(1) < wrong.elements.shape[1]).sum())
    text = f"{len(rows)} rows hold NaN or inf, the first is token {int(rows[0])}"
    if guilty and len(guilty) < len(set(experts.tolist())):
        text += f"; every token of local experts {guilty} is among them"
    text += f"; in {partial} of them only some columns" if partial else "; they do so in every column"
    stages = ("requantize", "swiglu", "weights", "gemm1", "combine") if not partial else ("output", "gemm2")
    yield Fact(text, stages)


def _stray(wrong: Wrong) -> Iterator[Fact]:
    count = int(wrong.stray.sum())
    if count:
        idle = int((~wrong.active).sum())
        first = int(wrong.stray.nonzero()[0])
        text = f"{count} of {idle} rows without a local expert are not zero, the first is token {first}"
        yield Fact(text, ("offset", "output", "topk", "permute"))


def common_factors(factor: float) -> dict[str, float]:
    """Constants that a wrong gain may be, by name. factor: routed_scaling_factor."""
    named = {
        "-1": -1.0,
        f"1 / routed_scaling_factor = 1 / {factor:g}": 1 / factor if factor else math.inf,
        f"routed_scaling_factor = {factor:g}": factor,
        f"routed_scaling_factor squared = {factor * factor:g}": factor * factor,
        "2.5 / routed_scaling_factor": 2.5 / factor if factor else math.inf,
        "8/7": 8 / 7,
        "7/8": 7 / 8,
        "448/240": 448 / 240,
        "240/448": 240 / 448,
    }
    return named | {f"2**{power}": 2.0**power for power in (*range(-8, 0), *range(1, 9))}


def _constant(output: Tensor, trace: Trace, finite: Tensor, factor: float) -> list[Fact]:
    """A factor that all rows have in common, or each row its own."""
    rows = finite & (trace.output != 0).any(1)
    if not bool(rows.any()):
        return []
    x, r = output[rows].double(), trace.unrounded[rows].double()
    size = r.square().sum(1)
    gains = (x * r).sum(1) / size
    left = (x - gains[:, None] * r).square().sum(1) / x.square().sum(1).clamp(min=1e-300)
    if float(left.median()) > SCALED or float((left <= SCALED).double().mean()) < RULE:
        return []
    low, middle, high = (float(q) for q in torch.quantile(gains, torch.tensor([0.05, 0.5, 0.95], dtype=gains.dtype)))
    if high - low <= 0.02 * abs(middle):
        near = [name for name, value in common_factors(factor).items() if abs(middle / value - 1) < 0.004]
        named = f", which is {near[0]}" if near else ""
        return [Fact(f"wrong rows are {middle:.4g} times the right ones{named}", ("weights", "output", "combine"))]
    text = f"each wrong row is a multiple of the right one, by {low:.3g} to {high:.3g}"
    return [Fact(text, ("weights", "combine", "routing"))]


SCALED = 0.003
"""Share of a row's square that may be left where it is taken as a multiple of the right one: the noise of two
re-quantisations is about 0.0015 of it."""


def _other_rows(output: Tensor, trace: Trace, finite: Tensor, active: Tensor) -> Iterator[Fact]:
    """Rows that are another token's."""
    wrong = finite.nonzero().squeeze(1)
    others = active.nonzero().squeeze(1)
    if not len(wrong) or len(others) < 2 or len(wrong) > 512 or len(others) > 4096:
        return
    found = []
    for token in wrong.tolist():
        far = row_distance(output[token].expand(len(others), -1), trace.output[others])
        best = int(far.argmin())
        if float(far[best]) < SCALED and int(others[best]) != token and bool((output[token] != 0).any()):
            found.append((token, int(others[best])))
    if len(found) * 2 >= len(wrong) and found:
        steps = {source - token for token, source in found}
        text = f"{len(found)} of {len(wrong)} wrong rows are the right row of another token"
        text += f", {steps.pop():+d} places away" if len(steps) == 1 else f", e.g. token {found[0][0]} of {found[0][1]}"
        yield Fact(text, ("combine", "permute", "output"))


def _mixture(output: Tensor, inputs: Inputs, trace: Trace, finite: Tensor) -> Iterator[Fact]:
    dense = dense_results(inputs)
    rows = finite & (output != 0).any(1)
    if dense is None or not bool(rows.any()):
        return
    found = mixture(output, inputs, trace.routing, dense)
    step = _shift(found, trace, inputs, rows & (found.residual <= SCALED), dense)
    if step:
        text = f"wrong rows hold the experts of a shard that begins {abs(step)} {'later' if step > 0 else 'earlier'}"
        yield Fact(f"{text}: local_expert_offset {inputs.local_expert_offset + step}", ("offset",) * 2)
        return
    yield from read_mixture(found, rows, dense)


def _shift(found: Mixture, trace: Trace, inputs: Inputs, rows: Tensor, dense: Tensor) -> int:
    """By how many experts the ids are off in all of these rows [T] bool, 0 where no one step explains them."""
    count, tokens = inputs.geometry.num_local_experts, int(rows.sum())
    if tokens < 2:
        return 0
    everyone = torch.zeros(len(rows), inputs.geometry.num_experts, dtype=torch.float64, device=rows.device)
    everyone.scatter_(1, trace.routing.topk_ids, trace.routing.topk_weights.double())
    there = (dense[rows] != 0).any(2)
    for step in sorted(range(-inputs.geometry.num_experts, inputs.geometry.num_experts), key=abs):
        ids = torch.arange(count, device=rows.device) + inputs.local_expert_offset + step
        real = (ids >= 0) & (ids < inputs.geometry.num_experts)
        due = torch.zeros(tokens, count, dtype=torch.float64, device=rows.device)
        due[:, real] = everyone[rows][:, ids[real]]
        near = (found.weights[rows] - due).abs() <= 0.1 * due.abs().amax(1, keepdim=True)
        if step and bool((near | ~there).all(1).double().mean() >= RULE) and bool((due * there != 0).any(1).all()):
            return step
    return 0


INSIDE = "the fault lies inside of the experts"


def read_mixture(found: Mixture, rows: Tensor, dense: Tensor) -> Iterator[Fact]:
    """What the weights in effect say of these wrong rows [T] bool."""
    there = (dense != 0).any(2)  # experts whose result is zero have no weight that could be read
    inside = rows & (found.residual > SCALED)
    count, bad = int(rows.sum()), int(inside.sum())
    if 2 * bad > count:
        text = f"{bad} of {count} wrong rows are no sum of right experts' results: {INSIDE}"
        yield Fact(text, ("gemm1_scale", "gemm2_scale", "gemm1", "gemm2", "activation_scale", "requantize", "swiglu"))
        return
    outside = rows & ~inside
    got, want = found.weights[outside], found.wanted[outside]
    there = there[outside]
    floor = 0.05 * want.abs().amax(1, keepdim=True).clamp(min=1e-30)
    extra = (got.abs() > 3 * floor) & (want == 0) & there
    lost = (got.abs() < floor) & (want.abs() > floor) & there
    other = ((got - want).abs() > 0.1 * want.abs() + floor) & ~extra & ~lost & there
    lead = f"{count - bad} of {count} wrong rows are sums of right experts' results"
    if bool(extra.any()) and bool(lost.any()):
        text = f"{lead}, but of other experts than were due in {int((extra.any(1) | lost.any(1)).sum())}"
        yield Fact(text, ("topk", "groups", "bias", "routing", "offset"))
    elif bool(extra.any()):
        yield Fact(f"{lead}, with experts beyond those due in {int(extra.any(1).sum())}", ("offset", "topk", "groups"))
    elif bool(lost.any()):
        which = sorted(set(lost.nonzero()[:, 1].tolist()))
        yield Fact(
            f"{lead}, but {int(lost.sum())} rows of local experts {which} are missing", ("permute", "combine", "offset")
        )
    elif bool(other.any()):
        yield Fact(f"{lead}, with other weights in {int(other.any(1).sum())}", ("weights", "combine", "routing"))


def _experts_of(trace: Trace) -> Tensor:
    counts = trace.permutation.expert_offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def row_rules(trace: Trace) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Rules of permuted rows: name -> ([P] bool, stages)."""
    permutation = trace.permutation
    tokens, slots = permutation.permuted_idx_to_token_idx, permutation.permuted_idx_to_slot
    experts = _experts_of(trace)
    place = torch.arange(len(experts), device=experts.device) - permutation.expert_offsets[experts]
    length = permutation.expert_offsets.diff()[experts]
    last = len(permutation.expert_offsets) - 2
    seq_len = len(trace.output)
    tiles, inner = ("permute", "gemm1", "gemm2"), ("gemm1", "gemm2", "permute")
    rules: dict[str, tuple[Tensor, tuple[str, ...]]] = {
        "have an odd local expert": (experts % 2 == 1, inner),
        "have an even local expert": (experts % 2 == 0, inner),
        "have local expert 0": (experts == 0, ("offset", "permute")),
        f"have local expert {last}, the last one": (experts == last, ("offset", "permute")),
        "stand last in an expert's run": (place == length - 1, tiles),
        "stand first in an expert's run": (place == 0, tiles),
        "are alone in an expert's run": (length == 1, tiles),
        "are in their expert's last choice of top_k": (slots == slots.max() if len(slots) else slots > 0, ("combine",)),
        "are in their token's first choice": (slots == 0, ("topk", "weights")),
        "are odd tokens": (tokens % 2 == 1, ("combine", "output")),
        "are even tokens": (tokens % 2 == 0, ("combine", "output")),
        "are the last token": (tokens == seq_len - 1, ("permute", "output")),
        "are token 0": (tokens == 0, ("combine", "output")),
    }
    for size in (16, 32, 64, 128):
        rules[f"stand at or past row {size} of an expert's run"] = (place >= size, tiles)
        rules[f"stand at row {size} k + {size - 1} of an expert's run"] = (place % size == size - 1, tiles)
        rules[f"stand at row {size} k > 0 of an expert's run"] = ((place % size == 0) & (place > 0), tiles)
        rules[f"are tokens from {size} on"] = (tokens >= size, ("permute", "activation_scale", "routing"))
    for expert in sorted(set(experts.tolist())):
        rules.setdefault(f"have local expert {expert}", (experts == expert, inner))
    return rules


def _which_rows(wrong: Wrong, trace: Trace) -> Iterator[Fact]:
    """The plainest rule that names the wrong active rows and no others."""
    guilty = wrong.rows & wrong.active
    count, active = int(guilty.sum()), int(wrong.active.sum())
    if not count or count == active:
        return
    tokens = trace.permutation.permuted_idx_to_token_idx
    best: tuple[float, str, tuple[str, ...]] = (0.0, "", ())
    for name, (rows, stages) in row_rules(trace).items():
        named = torch.zeros_like(guilty)
        named[tokens[rows]] = True
        both = int((named & guilty).sum())
        score = 2 * both / max(int(named.sum()) + count, 1)
        if score > best[0]:
            best = (score, name, stages)
    if best[0] >= RULE:
        yield Fact(f"the {count} wrong rows are those that {best[1]}", best[2])
        return
    several = torch.bincount(tokens, minlength=len(guilty))
    mean_wrong, mean_right = (
        float(several[guilty].double().mean()),
        float(several[wrong.active & ~guilty].double().mean()),
    )
    if mean_right and not 0.67 < mean_wrong / mean_right < 1.5:
        text = f"wrong rows have {mean_wrong:.2g} local experts on average, right ones {mean_right:.2g}"
        yield Fact(text, ("combine", "permute") if mean_wrong > mean_right else ("weights", "permute"))


def _which_columns(wrong: Wrong, finite: Tensor) -> Iterator[Fact]:
    """Which columns are wrong in the wrong rows, where it is not all of them."""
    rows = finite & wrong.active
    if not bool(rows.any()):
        return
    share = wrong.elements[rows].double().mean(0)  # [H]
    bad = share > 0.25 * float(share.max())
    width, count = len(share), int(bad.sum())
    if not count or float(share.max()) < 0.1 or count > 0.9 * width:
        return
    first = int(bad.nonzero()[0])
    blocks = sorted({int(c) // BLOCK for c in bad.nonzero().squeeze(1).tolist()})
    if bool(bad[first:].all()):
        text, stages = f"only the last {width - first} of {width} columns are wrong", ("output", "gemm2")
    elif (
        all(bool(bad[b * BLOCK : (b + 1) * BLOCK].double().mean() > 0.5) for b in blocks)
        and len(blocks) * 2 <= width // BLOCK + 1
    ):
        text, stages = f"only columns of 128-blocks {blocks} are wrong", ("gemm2_scale", "gemm2")
    else:
        return
    yield Fact(text, stages)


def _follows(output: Tensor, wrong: Wrong, known: Known) -> Iterator[Fact]:
    """Whether the error grows with the gate, with the spread of the scales, or with the number of local experts."""
    rows = wrong.rows & wrong.active & ~wrong.broken
    if int(rows.sum()) < 8:
        return
    trace, inputs = known.trace, known.inputs
    tokens = trace.permutation.permuted_idx_to_token_idx
    far = row_distance(output, trace.output)
    gate = trace.gemm1_out.chunk(2, dim=-1)[1].abs().mean(1)
    per_token = torch.zeros(len(output), device=output.device).scatter_reduce_(
        0, tokens, gate, "mean", include_self=False
    )
    spread = inputs.hidden_states_scale.abs()
    spread_of = (spread.amax(0) / spread.amin(0).clamp(min=1e-30)).log()
    figures = {
        "the size of the gate": (per_token, ("swiglu",)),
        "the spread of its hidden_states_scale": (spread_of, ("activation_scale",)),
        "its number of local experts": (torch.bincount(tokens, minlength=len(output)).float(), ("combine", "weights")),
    }
    for name, (figure, stages) in figures.items():
        rank = _rank_correlation(far[rows], figure[rows])
        if abs(rank) >= FOLLOWS:
            yield Fact(f"a row's error follows {name}: rank correlation {rank:.2f} over {int(rows.sum())} rows", stages)


FOLLOWS = 0.75
"""Rank correlation from which on an error is said to follow a figure: for 8 rows chance passes it once in 60 times."""


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    if float(one.max()) == float(one.min()) or float(other.max()) == float(other.min()):
        return 0.0
    ranks = torch.stack([one.argsort().argsort(), other.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])
