"""Entries that a candidate's answers do not tell apart are told apart by a sequence built for that.

Sequences of other offsets, sizes, group counts, factors and orders of calls are played with the hypotheses alone; the
one on which they disagree most is asked of the candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from moeref.diagnose.explain.hypotheses import RIGHT, Hypotheses, step_distance
from moeref.diagnose.explain.panel import Prepared, Step, Steps, Subject, ask, regrouped_steps
from moeref.diagnose.explain.rank import FIT, Score, Search
from moeref.spec import Geometry

BANK: tuple[Steps, ...] = (
    (Step("small-t24-o16-iid-heterogeneous-s31-f0.5"),),
    (Step("e64l16h256i128k8g4t2-t48-o20-iid-heterogeneous-s32"),),
    (Step("e16l16h128i384k2g2t1-t40-o0-iid-heterogeneous-s33"),),
    (Step("small_kimi-t36-o12-iid-heterogeneous-s34"),),
    (Step("small-t129-o8-balanced-heterogeneous-s35"),),
    (Step("small-t33-o8-one_expert-published-s36"),),
    (Step("small-t20-o-5-iid-heterogeneous-s37"),),
    (Step("small-t22-o9-ties-heterogeneous-s38"),),
    (Step("small-t21-o8-near_ties-heterogeneous-s39"),),
    (Step("small-t24-o16-all_negative-heterogeneous-s40"),),
    (Step("e16l8h384i384k4g4t2-t30-o4-iid-outlier-s41"),),
    (Step("small-t24-o8-iid-zero_block-s42"),),
    (Step("small-t9-o8-iid-heterogeneous-s43-f0.5"), Step("small-t30-o0-iid-heterogeneous-s44")),
    (Step("small-t24-o8-iid-heterogeneous-s45", "small-t24-o16-skewed-heterogeneous-s46-f1.5"),),
)
"""What may be asked beyond the panel, shortest first."""


@dataclass(frozen=True)
class Separation:
    """What one further sequence said."""

    steps: Steps
    kept: tuple[Score, ...]  # best first
    dropped: tuple[Score, ...]


class Bank:
    """The sequences with their hypotheses, kept for a caller who explains many candidates."""

    def __init__(self, device: str = "cpu", like: Geometry | None = None) -> None:
        self.device = device
        self.sequences = tuple(regrouped_steps(steps, like) for steps in BANK)
        self._made: dict[tuple[int, bool], Hypotheses] = {}

    def hypotheses(self, index: int, takes_out: bool) -> Hypotheses:
        """Of the sequence of that index."""
        if (index, takes_out) not in self._made:
            self._made[index, takes_out] = Hypotheses(Prepared(self.sequences[index], self.device), takes_out)
        return self._made[index, takes_out]


def separate(subject: Subject, tied: Sequence[Score], bank: Bank, takes_out: bool) -> Separation | None:
    """Ask the sequence on which the tied entries differ most; None where no sequence tells any two apart."""
    best, widest = None, FIT
    for index in range(len(BANK)):
        gap = _gap(tied, bank.hypotheses(index, takes_out))
        if gap > widest:
            best, widest = index, gap
        if gap > CLEAR:
            break
    if best is None:
        return None
    hypotheses = bank.hypotheses(best, takes_out)
    subject.restart()
    prepared = hypotheses.prepared
    answers = [ask(subject, prepared, k) for k in range(prepared.length)]
    search = Search(answers, hypotheses)
    scores = [search.score(one.name, range(prepared.length), one.recipe, one.recipe) for one in tied]
    pairs = sorted(zip(scores, tied, strict=True), key=lambda pair: pair[0].units)
    nearest = pairs[0][0].units
    kept = [one for found, one in pairs if found.worst <= FIT and found.units <= nearest + 1]
    dropped = [one for found, one in pairs if one not in kept]
    return Separation(bank.sequences[best], tuple(kept or [one for _, one in pairs]), tuple(dropped if kept else ()))


CLEAR = 100.0
"""Squared distance, in units of one re-quantisation's noise, that leaves no doubt: no wider gap is looked for."""


def _gap(tied: Sequence[Score], hypotheses: Hypotheses) -> float:
    """The largest distance between two of the entries, over the steps, in units of one re-quantisation's noise."""

    def apart(one: Score, other: Score, k: int) -> float:
        right = hypotheses.rows(RIGHT, k, one.recipe)
        first, second = hypotheses.answer(one.name, k, one.recipe), hypotheses.answer(other.name, k, other.recipe)
        return step_distance(first, second, right) / hypotheses.noise(k)

    steps = range(hypotheses.prepared.length)
    return max((apart(a, b, k) for a, b in combinations(tied, 2) for k in steps), default=0.0)
