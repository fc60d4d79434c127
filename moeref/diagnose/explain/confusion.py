"""How well faults are told from each other: every fault explained as a black box, the confusions counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch

from moeref.diagnose.explain.case import ASKED, Case, Library
from moeref.diagnose.explain.engine import explain
from moeref.diagnose.explain.panel import LocalSubject
from moeref.diagnose.explain.result import Explanation
from moeref.diagnose.faults import FAULTS
from moeref.diagnose.kernel import USUAL
from moeref.diagnose.result import LocalCall
from moeref.diagnose.variants import VARIANTS
from moeref.spec import Problem, Recipe

LEGAL = "legal"


@dataclass(frozen=True)
class Told:
    """One fault or legal variant, and what was said of it."""

    name: str
    stage: str  # the true one; 'legal' for a variant
    correct: bool
    recipe: str | None
    suspects: tuple[tuple[str, str | None], ...]  # (stage, fault), best first

    @property
    def first_stage(self) -> str:
        """The stage named first; 'nothing' where none was."""
        return self.suspects[0][0] if self.suspects else "nothing"

    @property
    def within_three(self) -> bool:
        """The true stage is among the first three different ones named."""
        return self.stage in list(dict.fromkeys(stage for stage, _ in self.suspects))[:3]

    @property
    def exact(self) -> bool:
        """The very fault is named first."""
        return bool(self.suspects) and self.suspects[0][1] == self.name

    @property
    def misnamed(self) -> bool:
        """Another fault is named first."""
        return bool(self.suspects) and self.suspects[0][1] not in (None, self.name)


@cache
def shared_library() -> Library:
    """One for all that this process explains."""
    return Library()


def tell(name: str, recipe: Recipe = USUAL) -> Told:
    """Explain one fault or variant of that name. recipe: what a fault's kernel rounds."""
    if name in FAULTS:
        fault = FAULTS[name]
        found = _explain(name, lambda: fault.build(recipe))
        stage = fault.stage
    else:
        found, stage = _explain(name, VARIANTS[name].build), LEGAL
    said = tuple((one.stage, one.fault) for one in found.suspects)
    return Told(name, stage, found.correct, found.recipe, said)


def _explain(name: str, build: Callable[[], Any]) -> Explanation:
    case = Case(name, Problem.parse(ASKED), shrink_seconds=0)
    return explain(LocalSubject(build), LocalCall(build()), case, shared_library())


def _tell_by_name(name_and_recipe: tuple[str, str]) -> Told:
    torch.set_num_threads(1)
    name, recipe = name_and_recipe
    return tell(name, Recipe.parse(recipe))


def confusion(
    names: Sequence[str] | None = None, processes: int = 2, recipe: str = USUAL.name, progress: int = 4
) -> Iterator[Told]:
    """What is said of these faults and variants (default: all), in order, as they come.

    processes: each computes the hypotheses' answers once. progress: how many are handed to a process at a time.
    """
    wanted = [(name, recipe) for name in (names if names is not None else [*FAULTS, *VARIANTS])]
    if processes < 2:
        yield from map(_tell_by_name, wanted)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_tell_by_name, wanted, chunksize=progress)


@dataclass(frozen=True)
class Counts:
    """Sums over a table."""

    faults: int
    stage_first: int
    stage_within_three: int
    exact: int
    misnamed: tuple[str, ...]  # faults of which another is named
    variants: int
    accused: tuple[str, ...]  # variants of which something is said to be wrong

    @property
    def good(self) -> bool:
        """The promised shares are kept: 90 % stage first, 98 % within three, 75 % exact, no variant accused."""
        return (
            self.stage_first >= 0.9 * self.faults
            and self.stage_within_three >= 0.98 * self.faults
            and self.exact >= 0.75 * self.faults
            and not self.accused
        )


def counts(told: Sequence[Told]) -> Counts:
    """Count."""
    faults = [one for one in told if one.stage != LEGAL]
    variants = [one for one in told if one.stage == LEGAL]
    return Counts(
        faults=len(faults),
        stage_first=sum(one.first_stage == one.stage for one in faults),
        stage_within_three=sum(one.within_three for one in faults),
        exact=sum(one.exact for one in faults),
        misnamed=tuple(one.name for one in faults if one.misnamed),
        variants=len(variants),
        accused=tuple(one.name for one in variants if not one.correct),
    )


def lines(told: Sequence[Told], write: Callable[[str], None]) -> None:
    """Those that were not named exactly, the table of stages, then the shares."""
    for one in told:
        if one.stage != LEGAL and not one.exact:
            said = ", ".join(f"{stage} {fault or '(no entry)'}" for stage, fault in one.suspects) or "nothing is wrong"
            write(f"{one.name} ({one.stage}): {said}")
    stages = list(dict.fromkeys(one.stage for one in told))
    table = Counter((one.stage, LEGAL if one.correct else one.first_stage) for one in told)
    named = [stage for stage in (*stages, "nothing") if any(table[true, stage] for true in stages)]
    marks = {stage: str(place) for place, stage in enumerate(named, start=1)}
    write("")
    write(f"{'true stage':<20} {'faults':>6}  named first: " + ", ".join(f"{marks[s]} {s}" for s in named))
    for stage in stages:
        row = "".join(f"{table[stage, other] or '.':>4}" for other in named)
        write(f"{stage:<20} {sum(table[stage, other] for other in named):>6}  {row}")
    write(f"{'':<20} {'':>6}  " + "".join(f"{marks[stage]:>4}" for stage in named))
    found = counts(told)
    write("")
    for text, number in (
        ("true stage named first", found.stage_first),
        ("true stage within the first three", found.stage_within_three),
        ("the very fault named first", found.exact),
        ("another fault named first", len(found.misnamed)),
    ):
        write(f"{text:<36} {number:>4} of {found.faults}  {number / max(found.faults, 1):6.1%}")
    write(f"{'legal variants said to be wrong':<36} {len(found.accused):>4} of {found.variants}")
    if found.accused:
        write(f"accused: {', '.join(found.accused)}")


def to_json(told: Sequence[Told]) -> dict[str, Any]:
    """{rows: [{name, stage, correct, recipe, suspects}], totals: {...}}."""
    return {"rows": [vars(one) for one in told], "totals": vars(counts(told))}
