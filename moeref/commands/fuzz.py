"""`moeref fuzz`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moeref.commands.common import (
    Debug,
    Device,
    Isolate,
    exit_code,
    progress_bar,
    reported,
    usable_device,
    usage,
)
from moeref.commands.ranks import RankLimit, over_ranks, world
from moeref.spec import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from moeref.ranks.world import World
    from moeref.spec import Geometry
    from moeref.testing.fuzz import FuzzResult
    from moeref.verify import Options


def fuzz(
    candidate: Annotated[str, typer.Argument(help="As for verify.")] = "moe_fast",
    minutes: Annotated[float | None, typer.Option(help="Draw problems for this long.")] = None,
    examples: Annotated[int | None, typer.Option(help="Draw this many problems (default 200).")] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other problems.")] = 0,
    geometry: Annotated[str, typer.Option(help="Only this geometry, e.g. dsv3; default: drawn small ones.")] = "",
    tokens: Annotated[int, typer.Option(help="Largest seq_len.")] = 80,
    device: Device = "auto",
    recipe: Annotated[str, typer.Option(help="As for verify.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds that one call may take.")] = 60.0,
    isolate: Isolate = True,
    rank_limit: RankLimit = 0,
    database: Annotated[Path, typer.Option(help="Folder that keeps failing examples between runs.")] = Path(
        ".moeref/fuzz"
    ),
    debug: Debug = False,
) -> None:
    """Judge a candidate on drawn problems; a failure is shrunk to the smallest problem that still fails."""
    if minutes is not None and examples is not None:
        usage("--minutes and --examples exclude each other: give one")
    if (minutes is not None and not minutes > 0) or (examples is not None and examples < 1) or tokens < 0:
        usage("--minutes, --examples: expected more than 0; --tokens: expected 0 or more")
    with reported(debug):
        from moeref.spec import Geometry
        from moeref.verify import Options

        options = Options(usable_device(device), recipe, timeout=timeout, isolate=isolate)
        shape = Geometry.parse(geometry) if geometry else None
        count = None if minutes is not None else examples or 200
        place = world()
        if place is not None and rank_limit == 0:
            rank_limit = 4 * timeout
        raise typer.Exit(
            _fuzz(candidate, options, count, minutes, seed, shape, tokens, database, debug, place, rank_limit)
        )


def _fuzz(
    candidate: str,
    options: Options,
    examples: int | None,
    minutes: float | None,
    seed: int,
    geometry: Geometry | None,
    tokens: int,
    database: Path,
    debug: bool,
    place: World | None,
    rank_limit: float,
) -> int:
    try:
        from moeref.testing.fuzz import fuzz
    except ModuleNotFoundError as error:
        usage(f"fuzz needs {error.name}: pip install 'moeref[test]'")

    console = Console(highlight=False, soft_wrap=True)

    def run(judge: Callable[[Callable[[FuzzResult, Problem], None]], FuzzResult]) -> int:
        return _shown(console, judge, candidate, options, examples, seed, debug, place)

    if place is None:
        return run(
            lambda show: fuzz(
                candidate,
                options,
                examples=examples,
                minutes=minutes,
                seed=seed,
                geometry=geometry,
                most_tokens=tokens,
                database=database,
                progress=show,
            )
        )
    from moeref.testing.fuzz_ranks import fuzz_job, gather

    drawing = {"examples": examples, "seed": seed, "geometry": geometry, "most_tokens": tokens}
    job = fuzz_job(candidate, options, drawing, database, minutes, rank_limit)
    return over_ranks(
        place, job, lambda sweep: run(lambda show: gather(sweep, candidate, options, drawing, database, show))
    )


def _shown(
    console: Console,
    judge: Callable[[Callable[[FuzzResult, Problem], None]], FuzzResult],
    candidate: str,
    options: Options,
    examples: int | None,
    seed: int,
    debug: bool,
    place: World | None,
) -> int:
    """Run `judge` below a progress bar and print what it found; the exit code."""
    from moeref.report import text

    with progress_bar(console) as progress:
        task = progress.add_task("fuzz", total=examples)

        def show_progress(result: FuzzResult, problem: Problem) -> None:
            what = problem.name if result.failure is None else f"shrinking: {result.failure.label}"
            progress.update(task, completed=result.drawn, description=what)

        result = judge(show_progress)
    counts = ", ".join(f"{number} {status}" for status, number in result.statuses.most_common())
    rate = 60 * (result.drawn + result.shrink_steps) / max(result.seconds, 1e-9)
    ranks = f", {place.size} rank{'s' * (place.size > 1)}" if place else ""
    console.print(
        f"{candidate} on {options.device}{ranks}: {result.drawn} problems drawn ({counts}) in {result.seconds:.1f} s, "
        f"{rate:.0f} problems a minute, seed {seed}",
        markup=False,
    )
    for sentence in result.lost:
        console.print(sentence, style=text.STYLES["ERROR"], markup=False)
    if result.failure is not None:
        console.print(
            f"smallest failing problem after {result.shrink_steps} steps: {result.failure.label}", markup=False
        )
        for reason in text.reasons(result.failure):
            console.print(reason, markup=False)
        if debug and result.failure.traceback:
            console.print(result.failure.traceback, markup=False)
    return exit_code(list(result.statuses))
