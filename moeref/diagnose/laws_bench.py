"""What the laws share: suitable inputs, and how strictly two answers of one candidate are compared.

Three grades of strictness:

BITS    The two calls have the same shapes and take the same path, and every rounding acts on the same number, or on
        that number times a power of two. A candidate that repeats bit for bit must give equal bits. Without a promise
        of that, a difference that ORDER allows is let go in up to FEW_ROWS rows (see there).
ORDER   The same roundings act on the same numbers, but a row may stand elsewhere in a tile, so float32 sums may be
        added in another order. Equal bits pass. Otherwise the difference is held to ORDER_Z (derived there).
        A candidate that does not repeat bit for bit (atomic additions) has this freedom everywhere.
NOISE   Shapes or run lengths differ, so another path, even another legal recipe, may be taken: the difference is held
        to what two independent sets of the recipe's roundings cost, with the gates of moeref.judge.noise.

A candidate may declare laws that it does not keep bit for bit (`inexact`): those are judged by NOISE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moeref.diagnose.result import Finding, Guarded
from moeref.inputs import Inputs
from moeref.judge.noise import Fit, Noise, fit, output_noise
from moeref.judge.recipes import emulate, nearest_recipes
from moeref.judge.ties import ambiguous_tokens
from moeref.make import make_inputs
from moeref.reference import Trace, moe, permute, route
from moeref.spec import DEFAULT_SCALING, Problem, Recipe

BITS, ORDER, NOISE = "bits", "order", "noise"

ORDER_Z = 0.5
"""Largest root mean square z of a difference that another order of additions explains, where z = 1 is two independent
sets of roundings.

Two orders move a number by d before it is cast with spacing u. The cast changes with probability |d|/u, and then by u:
mean square |d| u, against u**2 / 6 for two independent casts. The ratio is 6 |d| / u. Float32 sums of some thousand
terms differ by about 2**-20 of their size, and u is at least 2**-4 of it for e4m3 and 2**-8 for bfloat16, so the ratio
stays below 6 * 2**-12 and z below 0.04. Even accumulators of 13 fraction bits, if their order differed, would give
6 * 2**-13 * 2**4 for e4m3 and 6 * 2**-13 * 2**8 = 0.19 for bfloat16: z = 0.43. Faults that pick a wrong row, scale or
expert are of size 1 and more, and so is a cast with a scale that depends on other rows."""

FEW_ROWS = 3
"""Rows that may differ, as ORDER allows, though a candidate that promised nothing has repeated bit for bit so far.

Atomic additions change a number only where the sum lies next to the middle of two that its format holds, so at small
sizes some inputs have no such place and every call agrees. Where more rows differ, by no more than ORDER allows, MORE
calls with the very inputs decide: a place next to the middle goes either way, so four such rows agree in all of them
with probability 2**-28. A fault that changes three rows by so little is below what any other check sees."""

MORE = 8

MAX_BYTES = 2 << 30  # of weights drawn for every local expert; beyond, only those of experts that are hit


@dataclass(frozen=True)
class Law:
    """A relation between answers of one candidate that holds whatever its recipe is."""

    name: str
    stages: tuple[str, ...]  # suspects when it is broken, the likeliest first
    summary: str
    check: Callable[[Bench], Finding]


LAWS: dict[str, Law] = {}
"""Every law by name."""


def law(*stages: str) -> Callable[[Callable[[Bench], Finding]], Callable[[Bench], Finding]]:
    """Register the decorated function as the law of its own name; its docstring's first line is the summary."""

    def register(check: Callable[[Bench], Finding]) -> Callable[[Bench], Finding]:
        summary = (check.__doc__ or "").strip().splitlines()[0]
        LAWS[check.__name__] = Law(check.__name__, stages, summary, check)
        return check

    return register


def not_applicable(name: str, why: str) -> Finding:
    """A law that this geometry cannot test."""
    return Finding(name, None, why)


def not_finite(name: str, bench: Bench, answer: torch.Tensor) -> Finding | None:
    """A finding where zeros made NaN or inf that the base answer has not."""
    bad = ~torch.isfinite(answer).all(1)
    if not bool(bad.any()) or not bool(torch.isfinite(bench.answer).all()):
        return None
    detail = f"NaN or inf in {int(bad.sum())} of {len(bad)} rows (first: row {int(bad.nonzero()[0])})"
    return Finding(name, False, detail, LAWS[name].stages, exact=False)


class Bench:
    """One candidate on one geometry: base inputs, its answer to them, and comparisons. Figures come when asked for."""

    def __init__(
        self,
        call: Guarded,
        problem: Problem,
        device: str | torch.device = "cpu",
        recipe: str = "auto",
        inexact: frozenset[str] = frozenset(),
        deterministic: bool = False,
    ) -> None:
        self.call, self.device, self.inexact, self.deterministic = call, torch.device(device), inexact, deterministic
        self._recipe = recipe
        factor = problem.factor or DEFAULT_SCALING  # with factor 0 nothing could be told from nothing
        self.problem = replace(problem, routing="iid", values="heterogeneous", factor=factor)
        self.geometry = problem.geometry

    def make(self, seq_len: int, offset: int | None = None, values: str = "heterogeneous") -> Inputs:
        """Inputs of about seq_len tokens with some local work where possible, without tokens near a tie."""
        g = self.geometry
        size = g.num_local_experts * 3 * g.hidden_size * g.intermediate_size
        problem = replace(
            self.problem, seq_len=seq_len, values=values, offset=self.problem.offset if offset is None else offset
        )
        inputs = make_inputs(problem, "all" if size <= MAX_BYTES and offset is None else "hit")
        routing = route(inputs.routing_logits, inputs.routing_bias, g, problem.factor)
        clear = torch.ones(seq_len, dtype=torch.bool)
        clear[ambiguous_tokens(inputs, routing)] = False
        return inputs.take(clear.nonzero().squeeze(1)).to(self.device)

    @cached_property
    def inputs(self) -> Inputs:
        """Base inputs: some rows for every local expert, 8 to 64 tokens."""
        g = self.geometry
        few = g.num_local_experts * 3 * g.hidden_size * g.intermediate_size > MAX_BYTES
        seq_len = 8 if few else min(64, max(8, 3 * g.num_experts // g.top_k))
        inputs = self.make(seq_len)
        if not len(active_tokens(inputs)):  # a small shard of many: let every token want its first real expert
            logits = inputs.routing_logits.clone()
            logits[::2, max(inputs.local_expert_offset, 0)] += 8.0
            inputs = replace(inputs, routing_logits=logits)
        return inputs

    @cached_property
    def answers(self) -> list[torch.Tensor]:
        """Three answers to the base inputs."""
        return [self.call(self.inputs) for _ in range(3)]

    @property
    def answer(self) -> torch.Tensor:
        """The first answer to the base inputs, [T, H]."""
        return self.answers[0]

    @cached_property
    def repeats(self) -> bool:
        """Whether the candidate repeated bit for bit."""
        return all(_equal(self.answer, other) for other in self.answers[1:])

    def keeps_repeating(self, inputs: Inputs) -> bool:
        """Whether MORE calls with these inputs agree; `repeats` is False from here on where they don't."""
        first, *others = [self.call(inputs) for _ in range(MORE)]
        agree = all(_equal(first, other) for other in others)
        self.repeats = self.repeats and agree
        return agree

    @cached_property
    def trace(self) -> Trace:
        """The exact reference of the base inputs."""
        return moe(self.inputs)

    @cached_property
    def recipe(self) -> Recipe:
        """The declared recipe, or the legal one that the base answer comes nearest to.

        An answer that fits no recipe without re-quantisation is given the noise of one: it is told apart elsewhere.
        """
        if self._recipe != "auto":
            return Recipe.parse(self._recipe)
        active = active_tokens(self.inputs)
        found = nearest_recipes(self.answer, emulate(self.trace, self.inputs, active))[0].recipe
        if not found.requantize:
            noise = output_noise(self.trace, self.inputs, found)
            if not fit(self.answer, self.trace, noise, active).passed:
                return Recipe(requantize=1)
        return found

    @property
    def widest(self) -> Recipe:
        """The recipe, with bfloat16 weights unless declared: few base rows don't always tell whether they are."""
        return replace(self.recipe, topk_weights="bf16") if self._recipe == "auto" else self.recipe

    def trace_of(self, inputs: Inputs) -> Trace:
        """The exact reference of any inputs; kept for the base ones."""
        return self.trace if inputs is self.inputs else moe(inputs)

    def compare(
        self,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        grade: str = BITS,
        inputs: Inputs | None = None,
        tokens: torch.Tensor | None = None,
    ) -> Finding:
        """Hold two answers [n, H], brought to the same frame, to a grade of strictness.

        inputs: what they are answers to (default the base inputs); tokens: int64 [n], the row's token there.
        """
        differ = (got != want) & ~(torch.isnan(got) & torch.isnan(want))  # a NaN in both is for other checks
        if not bool(differ.any()):
            return Finding(name, True, f"equal bits in all {len(got)} rows", exact=True)
        stages = LAWS[name].stages
        rows = differ.any(1).nonzero().squeeze(1)
        column = int(differ[rows[0]].nonzero()[0])
        where = f"{len(rows)} of {len(got)} rows differ (first: row {int(rows[0])}, column {column})"
        if not (bool(torch.isfinite(got).all()) and bool(torch.isfinite(want).all())):
            return Finding(name, False, f"{where}; NaN or inf among them", stages, exact=False)
        if name in self.inexact:
            grade = NOISE
        elif grade == BITS and not self.repeats:
            grade = ORDER
        due = Finding(name, False, f"{where}, where equal bits are due", stages, exact=False)
        if grade == BITS and self.deterministic:
            return due
        inputs = self.inputs if inputs is None else inputs
        tokens = torch.arange(len(got), device=got.device) if tokens is None else tokens
        loose = NOISE if grade == NOISE else ORDER
        finding = self._judge_difference(name, got, want, loose, inputs, tokens, where)
        if grade != BITS:
            return finding
        let_go = finding.passed and (len(rows) <= FEW_ROWS or not self.keeps_repeating(inputs))
        return finding if let_go else replace(due, z=finding.z)

    def _judge_difference(
        self,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        grade: str,
        inputs: Inputs,
        tokens: torch.Tensor,
        where: str,
    ) -> Finding:
        stages = LAWS[name].stages
        trace = self.trace_of(inputs)
        active = torch.isin(tokens, trace.permutation.permuted_idx_to_token_idx)
        if bool((got != want)[~active].any()):
            return Finding(name, False, f"{where}, some of them without a local expert", stages, exact=False)
        if not bool(active.any()):
            return not_applicable(name, "no row has a local expert")
        found = difference_fit(got, want, trace, output_noise(trace, inputs, self.recipe), tokens, active)
        z = found.overall.value
        passed = found.passed and (grade == NOISE or z <= ORDER_Z)
        limit = f"{ORDER_Z}, another order of additions" if grade == ORDER else f"{found.overall.limit:.3g}, roundings"
        detail = f"{where}; z of the difference {z:.3g}, {limit} would explain"
        if not found.rows.passed:
            detail += f"; the worst row is {found.rows.value:.3g} times its limit"
        return Finding(name, passed, detail, () if passed else stages, exact=False, z=z)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal values; NaN equals NaN."""
    return bool(((one == other) | (torch.isnan(one) & torch.isnan(other))).all())


def active_tokens(inputs: Inputs) -> torch.Tensor:
    """Tokens [n] int64 that have a local expert."""
    g = inputs.geometry
    routing = route(inputs.routing_logits, inputs.routing_bias, g, inputs.routed_scaling_factor)
    rows = permute(routing.topk_ids, g, inputs.local_expert_offset).permuted_idx_to_token_idx
    found: torch.Tensor = torch.unique(rows)
    return found


def difference_fit(
    got: torch.Tensor, want: torch.Tensor, trace: Trace, noise: Noise, tokens: torch.Tensor, active: torch.Tensor
) -> Fit:
    """The noise gates for got - want [n, H]: two independent sets of roundings, hence twice the variance.

    Row i is an answer for token tokens[i]; active: bool [n]. A difference of two casts' errors is a sum of twice as
    many uniform ones.
    """
    doubled = Noise(
        variance=2 * noise.variance[tokens],
        shared=noise.shared[tokens],
        freedom=noise.freedom[tokens],
        largest=noise.largest[tokens],
        sources=2 * noise.sources,
    )
    rows = replace(trace, unrounded=want.float())
    return fit(got, rows, doubled, active.nonzero().squeeze(1), grouped=False)
