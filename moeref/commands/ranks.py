"""Commands under torchrun: the same problems dealt to all ranks, or every problem by all of them (--ep)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from moeref.commands.common import EXIT_PASS
from moeref.spec import Problem

if TYPE_CHECKING:
    from moeref.ranks.board import Failed
    from moeref.ranks.sweep import Sweep
    from moeref.ranks.watch import Job
    from moeref.ranks.world import World
    from moeref.verify import Diagnosis, Options, Outcome

ExpertParallel = Annotated[
    bool,
    typer.Option(
        "--ep", help="Run all expert-parallel shards and judge their sum too; under torchrun each rank runs its own."
    ),
]
Shards = Annotated[int, typer.Option(help="With --ep: cut the experts into this many shards (0: E / L).")]
RankLimit = Annotated[
    float,
    typer.Option(
        help="Under torchrun: seconds that a rank may take for one problem, with --ep for each of its shards "
        "(0: four times --timeout). A rank that takes longer is killed."
    ),
]

Judge = Callable[["Iterator[Outcome]", "Iterator[Diagnosis]"], int]
"""Prints outcomes and findings as they come; returns the exit code."""


def world() -> World | None:
    """This process's place among torchrun's ranks, or None."""
    from moeref.ranks.world import World

    return World.of()


def verify_here(
    candidate: str, problems: Sequence[tuple[str, Problem]], probed: Sequence[Problem], options: Options, judge: Judge
) -> int:
    """All problems in this process; with options.shards all shards of each, one after the other."""
    from moeref.ranks.layer import verify_layers
    from moeref.verify import diagnose, verify

    run = verify if options.shards is None else verify_layers
    return judge(run(candidate, problems, options), diagnose(candidate, probed, options))


def verify_over_ranks(
    place: World,
    candidate: str,
    problems: Sequence[tuple[str, Problem]],
    probed: Sequence[Problem],
    options: Options,
    limit: float,
    judge: Judge,
) -> int:
    """The same over all ranks. The exit code on the one that reports, 0 on the others."""
    from moeref.interop.candidates import locate
    from moeref.ranks.shards import cut, dealt
    from moeref.ranks.watch import Job

    locate(candidate)
    items = [(label, problem, False) for label, problem in problems] + [(p.name, p, True) for p in probed]
    settings = {"candidate": candidate, "items": items, "options": options}
    limit = limit or 4 * options.timeout
    joint = options.shards is not None
    if joint:
        held = [len(dealt(cut(p.geometry, options.shards or 0), 0, place.size)) for _, p in problems]
        limit *= max(held, default=1)
    task = "moeref.ranks.tasks:adding" if joint else "moeref.ranks.tasks:judging"

    def report(sweep: Sweep) -> int:
        results = sweep.results()
        outcomes = (_outcome(next(results), one, candidate, options) for one in problems)
        found = (diagnosis for one, result in zip(probed, results, strict=False) for diagnosis in _found(result, one))
        return judge(outcomes, found)

    return over_ranks(place, Job(task, settings, len(items), limit, joint=joint), report)


def over_ranks(place: World, job: Job, report: Callable[[Sweep], int]) -> int:
    """Do a job on all ranks and report on one: what `report` returns there, 0 on the others.

    report   goes through Sweep.results(): in the items' order, a moeref.ranks.board.Failed for one that was lost.
    """
    from moeref.ranks.sweep import Over, Sweep

    try:
        with Sweep(place, job) as sweep:
            sweep.attend()
            code = report(sweep)
            sweep.finish(code)
            return code
    except Over:
        return EXIT_PASS


def _outcome(result: Outcome | Failed, one: tuple[str, Problem], candidate: str, options: Options) -> Outcome:
    """The result, or an ERROR that names the rank which had the problem."""
    from moeref.judge.verdict import ERROR, Figures, Verdict
    from moeref.ranks.board import Failed
    from moeref.verify import Outcome

    if not isinstance(result, Failed):
        return result
    label, problem = one
    figures = Figures(problem.seq_len, problem.offset, 0, 0, 0)
    verdict = Verdict(problem.name, ERROR, (), "", False, figures, result.sentence)
    return Outcome(
        label, verdict, options.preset, 0.0, (), options.repeat(candidate, problem), traceback=result.printed
    )


def _found(result: list[Diagnosis] | Failed, problem: Problem) -> list[Diagnosis]:
    from moeref.diagnose.result import Finding
    from moeref.ranks.board import Failed
    from moeref.verify import Diagnosis

    if not isinstance(result, Failed):
        return result
    return [Diagnosis("law", Finding("not run", False, result.sentence), f"moeref verify --problem {problem.name}")]
