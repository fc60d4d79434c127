"""`moeref faults`: the kill matrix."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moeref.commands.common import EXIT_FAIL, EXIT_PASS, Debug, progress_bar, reported, usage


def faults(
    names: Annotated[list[str] | None, typer.Argument(help="Only these faults or legal variants.")] = None,
    stage: Annotated[str, typer.Option(help="Only faults of this stage.")] = "",
    processes: Annotated[int, typer.Option(help="Worker processes; 0: one a core.")] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Explain every one as a black box instead: the table of confusions.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the matrix to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Every planted fault and legal variant through all checks: which check kills which fault, and false alarms.

    Exit code 1 where a fault survives or a check fires on a legal variant; with --explain, where fewer stages or faults
    are named rightly than `moeref explain` promises, or a legal variant is said to be wrong.
    """
    if json is not None and not json.parent.is_dir():
        usage(f"--json {json}: the folder {json.parent} does not exist")
    with reported(debug):
        import os

        from moeref.diagnose.faults import FAULTS
        from moeref.diagnose.faults.registry import STAGES
        from moeref.diagnose.matrix import kill_matrix, lines, to_json, totals
        from moeref.diagnose.variants import VARIANTS

        if stage and stage not in STAGES:
            usage(f"--stage {stage}: expected one of {', '.join(STAGES)}")
        for name in names or []:
            if name not in FAULTS and name not in VARIANTS:
                usage(f"unknown fault '{name}': `moeref faults` without names lists all {len(FAULTS)}")
        chosen = names or [*(n for n, one in FAULTS.items() if not stage or one.stage == stage), *VARIANTS]
        console = Console(highlight=False, soft_wrap=True)
        if explain:
            raise typer.Exit(_confusion(chosen, processes or os.cpu_count() or 1, json, console))
        rows = []
        with progress_bar(console) as progress:
            task = progress.add_task("faults", total=len(chosen))
            for row in kill_matrix(chosen, processes or os.cpu_count() or 1):
                rows.append(row)
                progress.update(task, advance=1, description=row.name)
        lines(rows, lambda text: console.print(text, markup=False))
        if json is not None:
            json.write_text(json_format.dumps(to_json(rows), indent=1) + "\n")
            console.print(f"written: {json}", markup=False)
        found = totals(rows)
        raise typer.Exit(EXIT_FAIL if found.survivors or found.false_alarms else EXIT_PASS)


def _confusion(names: list[str], processes: int, json: Path | None, console: Console) -> int:
    from moeref.diagnose.explain.confusion import confusion, counts, lines, to_json

    told = []
    with progress_bar(console) as progress:
        task = progress.add_task("explaining", total=len(names))
        for one in confusion(names, min(processes, len(names))):
            told.append(one)
            progress.update(task, advance=1, description=one.name)
    lines(told, lambda text: console.print(text, markup=False))
    if json is not None:
        json.write_text(json_format.dumps(to_json(told), indent=1) + "\n")
        console.print(f"written: {json}", markup=False)
    return EXIT_PASS if counts(told).good else EXIT_FAIL
