"""`moeref bench` under torchrun: each problem timed on one rank, rows gathered on the one that reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from moeref.bench.ceilings import Ceilings
from moeref.bench.result import Row
from moeref.bench.run import Bench, Options, work_of
from moeref.judge.verdict import ERROR
from moeref.ranks.board import Failed
from moeref.ranks.sweep import Sweep
from moeref.ranks.tasks import read_routing
from moeref.ranks.watch import Job
from moeref.ranks.world import World
from moeref.spec import Problem
from moeref.verify import Options as VerifyOptions

Timed = tuple[Ceilings, list[Row], list[str]]
"""A rank's ceilings, the rows of one problem, and tracebacks."""


def bench_job(names: Sequence[str], problems: Sequence[tuple[str, Problem]], options: Options, limit: float) -> Job:
    """Timing each problem on one rank."""
    settings = {"names": list(names), "problems": list(problems), "options": options}
    return Job("moeref.bench.ranks:timing", settings, len(problems), limit)


@contextmanager
def timing(names: list[str], problems: list[tuple[str, Problem]], options: Options) -> Iterator[Callable[[int], Timed]]:
    """The task of a rank: on its own device, beside ceilings that it measured there."""
    world = World.of()
    read_routing(options.routing_from)
    here = options if world is None else replace(options, device=world.device(options.device))
    with Bench(names, here) as running:
        ceilings = running.ceilings()

        def do(index: int) -> Timed:
            rows = running.run(*problems[index], ceilings)
            return ceilings, rows, running.tracebacks

        yield do


class Gathered:
    """Stands where Bench does, over results that come from the ranks in the problems' order; a context manager."""

    def __init__(self, sweep: Sweep, names: Sequence[str], options: Options) -> None:
        self.names, self.options = names, options
        self.size = sweep.world.size
        self.tracebacks: list[str] = []
        self._results = sweep.results()
        self._first: list[Timed | Failed] = []

    def __enter__(self) -> Gathered:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def ceilings(self) -> Ceilings:
        """Those of the first rank that timed anything. Every row's own floor is its rank's."""
        for result in self._results:
            self._first.append(result)
            if not isinstance(result, Failed):
                found: Ceilings = result[0]
                return found
        return Ceilings(math.nan, math.nan, math.nan, "no rank measured any", {})

    def run(self, label: str, problem: Problem, ceilings: Ceilings) -> list[Row]:
        """The next problem's rows; an ERROR for each candidate where the rank that had it was lost."""
        result = self._first.pop(0) if self._first else next(self._results)
        if not isinstance(result, Failed):
            self.tracebacks = result[2]
            return result[1]
        self.tracebacks = [result.printed] if result.printed else []
        work = work_of(problem)
        repeat = VerifyOptions(self.options.device, self.options.recipe, timeout=self.options.timeout).repeat
        return [
            Row(
                label=label,
                problem=problem.name,
                candidate=name,
                status=ERROR,
                message=result.sentence,
                repeat=repeat(name, problem),
                seq_len=problem.seq_len,
                offset=problem.offset,
                **vars(work),
                floor=ceilings.floor(work),
                bound=ceilings.bound(work),
                reference=None,
            )
            for name in self.names
        ]
