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
from moeref.spec import Problem

if TYPE_CHECKING:
    from moeref.spec import Geometry
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
        raise typer.Exit(_fuzz(candidate, options, count, minutes, seed, shape, tokens, database, debug))


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
) -> int:
    try:
        from moeref.testing.fuzz import FuzzResult, fuzz
    except ModuleNotFoundError as error:
        usage(f"fuzz needs {error.name}: pip install 'moeref[test]'")
    from moeref.report import text

    console = Console(highlight=False, soft_wrap=True)
    with progress_bar(console) as progress:
        task = progress.add_task("fuzz", total=examples)

        def show_progress(result: FuzzResult, problem: Problem) -> None:
            what = problem.name if result.failure is None else f"shrinking: {result.failure.label}"
            progress.update(task, completed=result.drawn, description=what)

        result = fuzz(
            candidate,
            options,
            examples=examples,
            minutes=minutes,
            seed=seed,
            geometry=geometry,
            most_tokens=tokens,
            database=database,
            progress=show_progress,
        )
    counts = ", ".join(f"{number} {status}" for status, number in result.statuses.most_common())
    rate = 60 * (result.drawn + result.shrink_steps) / max(result.seconds, 1e-9)
    console.print(
        f"{candidate} on {options.device}: {result.drawn} problems drawn ({counts}) in {result.seconds:.1f} s, "
        f"{rate:.0f} problems a minute, seed {seed}",
        markup=False,
    )
    if result.failure is not None:
        console.print(
            f"smallest failing problem after {result.shrink_steps} steps: {result.failure.label}", markup=False
        )
        for reason in text.reasons(result.failure):
            console.print(reason, markup=False)
        if debug and result.failure.traceback:
            console.print(result.failure.traceback, markup=False)
    return exit_code(list(result.statuses))
