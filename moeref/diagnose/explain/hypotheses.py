"""The catalogue as hypotheses: what each fault would answer to the same calls, computed when first asked for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeref.diagnose.explain.distance import live_rows, row_distance
from moeref.diagnose.explain.panel import Answer, LocalSubject, Prepared, ask
from moeref.diagnose.faults import FAULTS
from moeref.diagnose.kernel import USUAL, Kernel
from moeref.spec import EXACT, Recipe

RIGHT = ""
"""The hypothesis that nothing is wrong."""


@dataclass
class _Played:
    subject: LocalSubject
    answers: list[Answer]


class Hypotheses:
    """Answers of every catalogue entry and of the right kernel to one sequence of steps, in any recipe.

    takes_out: as the candidate, whether kernels are given an output buffer. A kernel that keeps nothing between calls
    runs only the steps that are asked for; one that does runs all before it too.
    """

    def __init__(self, prepared: Prepared, takes_out: bool = True) -> None:
        self.prepared = prepared
        self.takes_out = takes_out
        self._answers: dict[tuple[str, Recipe, int], Answer] = {}
        self._played: dict[tuple[str, Recipe], _Played] = {}  # kernels that keep something
        self._noise: dict[int, Tensor] = {}

    def answer(self, name: str, index: int, recipe: Recipe = USUAL) -> Answer:
        """The step's answer under the fault of that name, RIGHT for none."""
        key = (name, recipe, index)
        if key not in self._answers:
            self._answers[key] = self._ask(name, index, recipe)
        return self._answers[key]

    def rows(self, name: str, index: int, recipe: Recipe = USUAL) -> Tensor:
        """answer(...).rows: a kernel of ours always gives some."""
        rows = self.answer(name, index, recipe).rows
        assert rows is not None
        return rows

    def noise(self, index: int) -> float:
        """Mean squared distance that one re-quantisation makes at this step, at least that of a bfloat16 output."""
        if index not in self._noise:
            exact, usual = self.rows(RIGHT, index, EXACT), self.rows(RIGHT, index, USUAL)
            live = live_rows(exact, usual)
            self._noise[index] = row_distance(exact, usual)[live]
        rows = self._noise[index]
        return max(float(rows.mean()) if len(rows) else 0.0, OUTPUT_NOISE)

    def _ask(self, name: str, index: int, recipe: Recipe) -> Answer:
        def build() -> Kernel:
            return Kernel(recipe) if name == RIGHT else FAULTS[name].build(recipe)

        if (name, recipe) not in self._played:
            subject = LocalSubject(build, self.takes_out)
            alone = ask(subject, self.prepared, index)
            if not subject.kernel.memory:
                return alone.bare()
            subject.restart()
            self._played[name, recipe] = _Played(subject, [])
        played = self._played[name, recipe]
        while len(played.answers) <= index:
            played.answers.append(ask(played.subject, self.prepared, len(played.answers)).bare())
        return played.answers[index]


OUTPUT_NOISE = (2.0**-9) ** 2 / 3 / 2
"""Squared distance of two rows that differ by a rounding to bfloat16: relative errors of at most 2**-9, uniform, over
the sum of two equal squares."""


def step_distance(answer: Answer, other: Answer, right: Tensor) -> float:
    """Mean squared distance of two answers over the rows that are alive in the first or in the right kernel's.

    Inputs that one changed and the other did not count as one more unit; so does an answer of no comparable form.
    """
    changed = float(answer.changed != other.changed)
    if answer.rows is None or other.rows is None:
        return changed + float((answer.rows is None) != (other.rows is None))
    live = live_rows(answer.rows, right)
    count = max(int(live.sum()), 1)
    return changed + float(row_distance(answer.rows, other.rows).sum()) / count
