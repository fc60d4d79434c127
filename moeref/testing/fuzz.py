"""`moeref fuzz`: Hypothesis outside pytest. Draws problems, judges a candidate on each, shrinks the first failure."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

from moeref.interop.runner import Runner
from moeref.spec import Geometry, Problem
from moeref.testing.strategies import problems
from moeref.verify import Options, Outcome, judge_one

BATCH = 100
"""Examples between two looks at the clock."""


@dataclass
class FuzzResult:
    """What a fuzz run did."""

    statuses: Counter[str] = field(default_factory=Counter)  # of drawn problems, shrinking not counted
    shrink_steps: int = 0
    seconds: float = 0.0
    failure: Outcome | None = None  # of the smallest failing problem

    @property
    def drawn(self) -> int:
        """Problems judged, those of shrinking not counted."""
        return sum(self.statuses.values())


class _Failing(AssertionError):
    """Raised inside Hypothesis to say that a problem fails."""


def fuzz(
    candidate: str,
    options: Options,
    *,
    examples: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    geometry: Geometry | None = None,
    most_tokens: int = 80,
    database: Path | None = None,
    progress: Callable[[FuzzResult, Problem], None] = lambda result, problem: None,
) -> FuzzResult:
    """Judge drawn problems until `examples` are done or `minutes` are over, or one fails; then shrink that one.

    geometry   None: drawn small ones; else this one
    database   folder in whose sub-folder of the candidate's name Hypothesis keeps failing examples:
               the next run tries them first
    progress   called after each problem
    Raises what Runner raises for a candidate that can't be found.
    """
    if (examples is None) == (minutes is None):
        raise ValueError("fuzz: give examples or minutes, one of the two")
    start = time.monotonic()
    deadline = None if minutes is None else start + 60 * minutes
    result = FuzzResult()
    store = DirectoryBasedExampleDatabase(database / _folder_name(candidate)) if database else None
    strategy = problems(None if geometry is None else st.just(geometry), most_tokens)
    with Runner(candidate, device=options.device, timeout=options.timeout, isolate=options.isolate) as runner:
        batch = 0
        while result.failure is None and not _over(result, examples, deadline):
            left = BATCH if examples is None else min(BATCH, examples - result.drawn)
            one_batch = _batch(
                runner, candidate, options, strategy, left, seed + batch, store, deadline, result, progress
            )
            with contextlib.suppress(_Failing):  # kept in result.failure; Hypothesis ends on the smallest one
                one_batch()
            batch += 1
    result.seconds = time.monotonic() - start
    return result


def _folder_name(candidate: str) -> str:
    """A candidate's own folder in the database: failures of one say nothing about another."""
    return "".join(letter if letter.isalnum() else "_" for letter in candidate)


def _over(result: FuzzResult, examples: int | None, deadline: float | None) -> bool:
    if deadline is not None:
        return time.monotonic() >= deadline
    return examples is not None and result.drawn >= examples


def _batch(
    runner: Runner,
    candidate: str,
    options: Options,
    strategy: st.SearchStrategy[Problem],
    count: int,
    seed: int,
    store: DirectoryBasedExampleDatabase | None,
    deadline: float | None,
    result: FuzzResult,
    progress: Callable[[FuzzResult, Problem], None],
) -> Callable[[], None]:
    """A Hypothesis test over `count` problems."""

    def attempt(problem: Problem) -> None:
        if result.failure is None and deadline is not None and time.monotonic() >= deadline:
            return
        outcome = judge_one(runner, candidate, problem.name, problem, options)
        failed = outcome.verdict.status in ("FAIL", "ERROR")
        if result.failure is None:
            result.statuses[outcome.verdict.status] += 1
        else:
            result.shrink_steps += 1
        if failed:
            result.failure = outcome
        progress(result, problem)
        if failed:
            raise _Failing(problem.name)

    configured = settings(
        max_examples=count,
        deadline=None,
        database=store,
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    return hypothesis.seed(seed)(configured(given(strategy)(attempt)))
