"""`moeref fuzz`: Hypothesis outside pytest draws problems; the first failure is shrunk by moeref.diagnose.shrink."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moeref.diagnose.shrink import shrink
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
    lost: list[str] = field(default_factory=list)  # under torchrun: a sentence for each problem that a rank lost

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
    database   folder that keeps the names of failing problems, a file a candidate: the next run tries them first
    progress   called after each problem
    Raises what Runner raises for a candidate that can't be found.
    """
    if (examples is None) == (minutes is None):
        raise ValueError("fuzz: give examples or minutes, one of the two")
    start = time.monotonic()
    deadline = None if minutes is None else start + 60 * minutes
    result = FuzzResult()
    kept = database / f"{_file_name(candidate)}.txt" if database else None
    strategy = problems(None if geometry is None else st.just(geometry), most_tokens)
    with options.runner(candidate) as runner:
        _try_again(runner, candidate, options, kept, result, progress)
        batch = 0
        while result.failure is None and not _over(result, examples, deadline):
            left = BATCH if examples is None else min(BATCH, examples - result.drawn)
            own = batch_seed(seed, batch)
            one_batch = _batch(runner, candidate, options, strategy, left, own, deadline, result, progress)
            with contextlib.suppress(_Failing):  # kept in result.failure
                one_batch()
            batch += 1
        if result.failure is not None:
            _shrink(runner, candidate, options, result, progress)
            _keep(kept, result.failure.label)
    result.seconds = time.monotonic() - start
    return result


def batch_seed(seed: int, batch: int) -> int:
    """Hypothesis's seed of a run's batch. Not seed + batch: runs of neighbouring seeds would share most problems."""
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:4], "big")


def drawn(examples: int | None, seed: int, geometry: Geometry | None, most_tokens: int, kept: int) -> Iterator[Problem]:
    """The problems that `fuzz` judges where none fails, in its order; without end where examples is None.

    kept: failing problems of earlier runs, which are tried first and count as examples.
    """
    strategy = problems(None if geometry is None else st.just(geometry), most_tokens)
    done, batch = kept, 0
    while examples is None or done < examples:
        count = BATCH if examples is None else min(BATCH, examples - done)
        found = _some(strategy, count, batch_seed(seed, batch))
        yield from found
        done, batch = done + len(found), batch + 1


def _some(strategy: st.SearchStrategy[Problem], count: int, seed: int) -> list[Problem]:
    found: list[Problem] = []

    def keep(problem: Problem) -> None:
        found.append(problem)

    _over_problems(strategy, count, seed, keep)()
    return found


def kept_names(database: Path | None, candidate: str) -> list[str]:
    """Names of the problems that failed in earlier runs of this candidate."""
    file = database / f"{_file_name(candidate)}.txt" if database else None
    return file.read_text().split() if file is not None and file.exists() else []


def shrink_failure(
    candidate: str,
    options: Options,
    result: FuzzResult,
    database: Path | None,
    progress: Callable[[FuzzResult, Problem], None],
) -> None:
    """Shrink result.failure and keep its name, as `fuzz` does at its end."""
    with options.runner(candidate) as runner:
        _shrink(runner, candidate, options, result, progress)
    assert result.failure is not None
    _keep(database / f"{_file_name(candidate)}.txt" if database else None, result.failure.label)


def _file_name(candidate: str) -> str:
    """A candidate's own file in the database: failures of one say nothing about another."""
    return "".join(letter if letter.isalnum() else "_" for letter in candidate)


def _keep(kept: Path | None, name: str) -> None:
    """Add a problem's name to the database, once."""
    if kept is None or (kept.exists() and name in kept.read_text().split()):
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        file.write(name + "\n")


def _try_again(
    runner: Runner,
    candidate: str,
    options: Options,
    kept: Path | None,
    result: FuzzResult,
    progress: Callable[[FuzzResult, Problem], None],
) -> None:
    """Judge the problems that failed in earlier runs, until one fails again."""
    for name in kept.read_text().split() if kept is not None and kept.exists() else ():
        outcome = judge_one(runner, candidate, name, Problem.parse(name), options)
        result.statuses[outcome.verdict.status] += 1
        progress(result, Problem.parse(name))
        if outcome.verdict.status in ("FAIL", "ERROR"):
            result.failure = outcome
            return


def _over(result: FuzzResult, examples: int | None, deadline: float | None) -> bool:
    if deadline is not None:
        return time.monotonic() >= deadline
    return examples is not None and result.drawn >= examples


def _shrink(
    runner: Runner,
    candidate: str,
    options: Options,
    result: FuzzResult,
    progress: Callable[[FuzzResult, Problem], None],
) -> None:
    assert result.failure is not None

    def fails(problem: Problem) -> bool:
        outcome = judge_one(runner, candidate, problem.name, problem, options)
        result.shrink_steps += 1
        progress(result, problem)
        failed = outcome.verdict.status == kind
        if failed:
            result.failure = outcome
        return failed

    kind = result.failure.verdict.status  # a FAIL is not shrunk to an ERROR
    shrink(Problem.parse(result.failure.label), fails)


def _batch(
    runner: Runner,
    candidate: str,
    options: Options,
    strategy: st.SearchStrategy[Problem],
    count: int,
    seed: int,
    deadline: float | None,
    result: FuzzResult,
    progress: Callable[[FuzzResult, Problem], None],
) -> Callable[[], None]:
    """A Hypothesis test over `count` problems."""

    def attempt(problem: Problem) -> None:
        if result.failure is None and deadline is not None and time.monotonic() >= deadline:
            return
        outcome = judge_one(runner, candidate, problem.name, problem, options)
        if result.failure is not None and outcome.verdict.problem == result.failure.verdict.problem:
            raise _Failing(problem.name)  # Hypothesis looks at it once more
        result.statuses[outcome.verdict.status] += 1
        progress(result, problem)
        if outcome.verdict.status in ("FAIL", "ERROR"):
            result.failure = outcome
            raise _Failing(problem.name)

    return _over_problems(strategy, count, seed, attempt)


def _over_problems(
    strategy: st.SearchStrategy[Problem], count: int, seed: int, attempt: Callable[[Problem], None]
) -> Callable[[], None]:
    """A Hypothesis test that draws `count` problems and calls `attempt` with each."""
    configured = settings(
        max_examples=count,
        deadline=None,
        database=None,  # failing problems are kept by their names
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    return hypothesis.seed(seed)(configured(given(strategy)(attempt)))
