"""Which stage is to blame when no catalogue entry fits: partial matches, findings and the error's geometry vote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeref.diagnose.explain.distance import direction, live_rows, row_distance
from moeref.diagnose.explain.geometry import Fact
from moeref.diagnose.explain.hypotheses import RIGHT, Hypotheses
from moeref.diagnose.explain.panel import Answer
from moeref.diagnose.explain.rank import FIT
from moeref.diagnose.faults import FAULTS, STAGES
from moeref.diagnose.laws import LAWS
from moeref.diagnose.result import Finding
from moeref.spec import Recipe

LIKE = 1.0
READ = 0.8
BROKEN = 0.2
SHOWN = 0.6
"""Weights of a partial match, of a failed read-out, of a broken law (laws see that, rarely where), and of a geometric
fact that names the stage first; the second stage that it names gets half, the third a third."""

DECIDED = 1.2
"""Weight of what the routing matrix, or gemm2's inverted weights, say: both look at one step alone."""

NOTHING_READ = "nothing could be read"
"""A read-out that came to nothing says only that something before it is wrong."""


@dataclass(frozen=True)
class Partial:
    """How much of an error one catalogue entry shares."""

    name: str
    step: int
    rows: int  # wrong rows of the step
    taken: float  # share of them that are as the entry makes them
    along: float  # mean squared cosine between the error and the entry's, over the wrong rows
    clean: bool  # rows that are not wrong are as the right kernel makes them

    @property
    def share(self) -> float:
        """The larger of both."""
        return max(self.taken, self.along)


def partial_matches(
    answers: Sequence[Answer], hypotheses: Hypotheses, steps: Iterable[int], recipe: Recipe
) -> list[Partial]:
    """Every entry at these steps, the largest share first; steps without a comparable answer are left out."""
    found = []
    for k in steps:
        rows = answers[k].rows
        if rows is None:
            continue
        right = hypotheses.rows(RIGHT, k, recipe)
        live = live_rows(rows, right)
        limit = FIT * hypotheses.noise(k)
        off = (row_distance(rows, right) > limit) & live
        count = int(off.sum())
        if not count:
            continue
        error = rows[off].double() - right[off].double()
        for name in FAULTS:
            other = hypotheses.rows(name, k, recipe)[off]
            taken = float((row_distance(rows[off], other) <= limit).double().mean())
            along = float(direction(error, other.double() - right[off].double()).mean())
            found.append(Partial(name, k, count, taken, along, count < int(live.sum())))
    return sorted(found, key=lambda one: -one.share)


def stage_votes(
    partial: Sequence[Partial], findings: Iterable[Finding], facts: Iterable[Fact], decisive: Iterable[Fact] = ()
) -> list[tuple[str, float, str]]:
    """(stage, votes, the strongest reason) of every stage that has any, most votes first."""
    votes = dict.fromkeys(STAGES, 0.0)
    reasons: dict[str, tuple[float, str]] = {}

    def vote(stage: str, weight: float, reason: str) -> None:
        votes[stage] += weight
        if weight > 0 and weight > reasons.get(stage, (0.0, ""))[0]:
            reasons[stage] = (weight, reason)

    decisive = list(decisive)
    like = LIKE / 2 if decisive else LIKE  # a row that is lost looks like many things
    for stage in STAGES:
        best = next((one for one in partial if FAULTS[one.name].stage == stage), None)
        if best is not None and best.share > LEAST:
            vote(stage, like * best.share, describe(best))
    for kind, weight, suspects in (
        *((f"{one.name}: {one.detail}", _weight(one), one.suspects) for one in findings if one.passed is False),
        *((one.text, SHOWN, one.stages) for one in facts),
        *((one.text, DECIDED, one.stages) for one in decisive),
    ):
        for place, stage in enumerate(suspects):
            vote(stage, weight / (1 + place), kind)
    ranked = sorted((stage for stage in STAGES if votes[stage] > 0), key=lambda stage: -votes[stage])
    return [(stage, votes[stage], reasons[stage][1]) for stage in ranked]


def _weight(one: Finding) -> float:
    if NOTHING_READ in one.detail:
        return 0.0
    return BROKEN if one.name in LAWS else READ


LEAST = 0.3
"""A smaller share of the error is chance: errors of unrelated entries that lose the same rows have a part in common."""


def describe(one: Partial) -> str:
    """As one sentence."""
    if one.taken >= one.along:
        text = f"{one.taken:.0%} of {one.rows} wrong rows are as under {one.name}"
        return text + ", but not the others" if one.taken < 1 else text + ", but other rows or problems are not"
    return f"{one.along:.0%} of the error of {one.rows} wrong rows lies in the direction of {one.name}"
