"""Which catalogue entries a candidate behaves like: entries dropped step by step, then told apart in its own recipe."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moeref.diagnose.explain.hypotheses import RIGHT, Hypotheses, step_distance
from moeref.diagnose.explain.panel import Answer
from moeref.diagnose.faults import FAULTS
from moeref.diagnose.kernel import USUAL
from moeref.judge.recipes import LEGAL
from moeref.spec import Recipe

FIT = 4.0
"""Squared distance, in units of one re-quantisation's, within which an answer is the hypothesis'. Two kernels that
re-quantise in ways of their own differ by 2 such units, and both casts of a twice re-quantised one by as many again."""

SAME = 0.05
"""Below this share of one re-quantisation's noise two answers round alike: the recipe is settled."""

KEEP = 6
"""Entries that stay in the race however far they lie, so that there is something to report."""

HOPELESS = 4
"""Steps after which the race ends where every entry is far off on one of them."""

FEW = 4
"""Entries whose own recipe is looked for, where no entry rounds as the candidate does."""

BETTER = 0.5
"""An entry is named only if it leaves at most half of the squared distance that the right kernel leaves."""


@dataclass
class Score:
    """One catalogue entry beside a candidate's answers."""

    name: str
    recipe: Recipe
    distances: dict[int, float]  # step -> mean squared row distance
    right: dict[int, float]  # the right kernel's, in its own nearest recipe
    noise: dict[int, float]

    @property
    def units(self) -> float:
        """Mean over the steps of the distance in units of one re-quantisation's noise."""
        return sum(d / self.noise[k] for k, d in self.distances.items()) / max(len(self.distances), 1)

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max((d / self.noise[k] for k, d in self.distances.items()), default=0.0)

    @property
    def match(self) -> float:
        """1 - sum of squared distances over that of the right kernel."""
        total = sum(self.right[k] for k in self.distances)
        return 1 - sum(self.distances.values()) / total if total > 0 else 0.0

    @property
    def fits(self) -> bool:
        """Within the noise on every step, and much nearer than the right kernel."""
        return self.worst <= FIT and self.match >= 1 - BETTER


class Search:
    """The race of all entries on one sequence of answers."""

    def __init__(self, answers: Sequence[Answer], hypotheses: Hypotheses) -> None:
        self.answers = answers
        self.hypotheses = hypotheses
        self._distances: dict[tuple[str, Recipe, int], float] = {}

    def distance(self, name: str, index: int, recipe: Recipe) -> float:
        """From the candidate's answer to the hypothesis' at one step."""
        key = (name, recipe, index)
        if key not in self._distances:
            right = self.hypotheses.rows(RIGHT, index, recipe)
            other = self.hypotheses.answer(name, index, recipe)
            self._distances[key] = step_distance(self.answers[index], other, right)
        return self._distances[key]

    def nearest_recipe(self, name: str, steps: Collection[int], hint: Recipe) -> Recipe:
        """The legal recipe in which the hypothesis lies nearest over these steps; the hint where it does well."""

        def far(recipe: Recipe) -> float:
            return sum(self.distance(name, k, recipe) / self.hypotheses.noise(k) for k in steps) / max(len(steps), 1)

        if far(hint) <= SAME:
            return hint
        return min(dict.fromkeys((hint, *LEGAL)), key=far)

    def score(self, name: str, steps: Collection[int], recipe: Recipe, right: Recipe) -> Score:
        """Over these steps."""
        return Score(
            name,
            recipe,
            {k: self.distance(name, k, recipe) for k in steps},
            {k: self.distance(RIGHT, k, right) for k in steps},
            {k: self.hypotheses.noise(k) for k in steps},
        )

    def run(self, wrong: Sequence[int], hint: Recipe = USUAL, names: Collection[str] = ()) -> list[Score]:
        """Scores of the entries that stayed in the race, best first.

        wrong: steps where the judge fails the candidate; where there is none, those that lie furthest from the right
        kernel come first. Every entry runs the first of them; only those that are near enough run on.
        """
        every = [k for k in range(len(self.answers)) if self.answers[k].rows is not None or k in wrong]
        right = self.nearest_recipe(RIGHT, [k for k in every if k not in wrong][:3] or every[:2], hint)
        by_size = sorted(every, key=lambda k: -self.distance(RIGHT, k, right) / self.hypotheses.noise(k))
        order = list(dict.fromkeys((*wrong, *by_size)))
        pool = list(names or FAULTS)
        seen: list[int] = []
        for k in order:
            seen.append(k)
            pool = self._near(pool, seen, hint)
            if len(seen) == HOPELESS and not self._promising(pool, seen, hint):
                every = seen
                break
        scores = [self.score(name, every, hint, right) for name in pool]
        if scores and min(one.units for one in scores) > SAME:
            scores.sort(key=lambda one: one.units)
            scores[:FEW] = [self._in_own_recipe(one, order[:3], every, right) for one in scores[:FEW]]
        return sorted(scores, key=lambda one: (round(one.units, 3), one.units * (one.recipe != hint), one.units))

    def _near(self, pool: list[str], seen: list[int], recipe: Recipe) -> list[str]:
        """The entries that explain the steps seen so far, and KEEP more."""
        far = {name: sum(self.distance(name, k, recipe) for k in seen) for name in pool}
        ranked = sorted(pool, key=far.__getitem__)
        noise = sum(self.hypotheses.noise(k) for k in seen)
        right = sum(self.distance(RIGHT, k, recipe) for k in seen)
        limit = max(3 * min(far[ranked[0]], noise), min(2 * FIT * noise, BETTER * right)) if ranked else 0.0
        kept = [name for name in ranked if far[name] <= limit]
        return kept if len(kept) >= KEEP else ranked[:KEEP]

    def _promising(self, pool: list[str], seen: list[int], recipe: Recipe) -> bool:
        """Whether an entry may still fit, in another recipe if need be."""
        noise = self.hypotheses.noise
        return any(all(self.distance(name, k, recipe) <= 3 * FIT * noise(k) for k in seen) for name in pool)

    def _in_own_recipe(self, score: Score, steps: Collection[int], every: Collection[int], right: Recipe) -> Score:
        recipe = self.nearest_recipe(score.name, steps, right)
        return self.score(score.name, every, recipe, right)
