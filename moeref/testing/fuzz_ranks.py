"""`moeref fuzz` under torchrun: the problems that one process would draw, judged by all ranks, reported by one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeref.ranks.board import Failed
from moeref.ranks.sweep import Sweep
from moeref.ranks.tasks import on_this_rank
from moeref.ranks.watch import Job
from moeref.spec import Problem
from moeref.testing.fuzz import FuzzResult, drawn, kept_names, shrink_failure
from moeref.verify import Options, Outcome, judge_one


def fuzz_job(
    candidate: str,
    options: Options,
    drawing: dict[str, Any],
    database: Path | None,
    minutes: float | None,
    limit: float,
) -> Job:
    """Judging problem after problem. drawing: the arguments of moeref.testing.fuzz.drawn but `kept`."""
    kept = kept_names(database, candidate)
    count = None if drawing["examples"] is None else max(drawing["examples"], len(kept))
    settings = {"candidate": candidate, "options": options, "drawing": drawing, "kept": kept}
    seconds = None if minutes is None else 60 * minutes
    return Job("moeref.testing.fuzz_ranks:fuzzing", settings, count, limit, seconds)


def _in_order(drawing: dict[str, Any], kept: list[str]) -> Iterator[Problem]:
    return itertools.chain(map(Problem.parse, kept), drawn(**drawing, kept=len(kept)))


@contextmanager
def fuzzing(
    candidate: str, options: Options, drawing: dict[str, Any], kept: list[str]
) -> Iterator[Callable[[int], Outcome]]:
    """The task of a rank: judge the index-th problem that is drawn. Ranks draw all, which costs little."""
    here = on_this_rank(options)
    source, known = _in_order(drawing, kept), list[Problem]()
    with here.runner(candidate) as runner:

        def do(index: int) -> Outcome:
            known.extend(itertools.islice(source, max(0, index + 1 - len(known))))
            problem = known[index]
            repeat = options.repeat(candidate, problem)
            return judge_one(runner, candidate, problem.name, problem, here, repeat=repeat)

        yield do


def gather(
    sweep: Sweep,
    candidate: str,
    options: Options,
    drawing: dict[str, Any],
    database: Path | None,
    progress: Callable[[FuzzResult, Problem], None],
) -> FuzzResult:
    """What moeref.testing.fuzz.fuzz returns: results up to the first failing problem, which is shrunk in this process.

    Results come in the order in which the problems are drawn, so the first failing one does not depend on which rank
    was how fast.
    """
    start, result = time.monotonic(), FuzzResult()
    kept = kept_names(database, candidate)
    for index, one in enumerate(sweep.results()):
        if isinstance(one, Failed):
            problem = next(itertools.islice(_in_order(drawing, kept), index, None))
            result.statuses["ERROR"] += 1
            result.lost.append(f"{problem.name} ERROR {one.sentence}")
            continue
        result.statuses[one.verdict.status] += 1
        progress(result, Problem.parse(one.label))
        if one.verdict.status in ("FAIL", "ERROR"):
            sweep.stop()
            result.failure = one
            shrink_failure(candidate, on_this_rank(options), result, database, progress)
            break
    result.seconds = time.monotonic() - start
    return result
