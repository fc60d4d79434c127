"""`moeref golden check|write|show|diff`: recorded cases."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moeref.commands.common import (
    EXIT_FAIL,
    EXIT_PASS,
    Debug,
    Device,
    Isolate,
    exit_code,
    progress_bar,
    reported,
    usable_device,
    usage,
)

if TYPE_CHECKING:
    from moeref.golden import Case, CaseResult
    from moeref.verify import Options

golden = typer.Typer(
    help="Recorded cases: hold the reference, or a candidate, to what was once right.", no_args_is_help=True
)

Folder = Annotated[Path | None, typer.Option("--dir", help="Golden folder; default: the project's own.")]
STYLES = {
    "PASS": "green",
    "FAIL": "bold red",
    "ERROR": "bold magenta",
    "UNSUPPORTED": "yellow",
    "INCONCLUSIVE": "yellow",
}


@golden.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Only these cases; without: see --all.")] = None,
    folder: Folder = None,
    candidate: Annotated[str, typer.Option(help="Judge this candidate on the recorded traces, as verify does.")] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="The long published cases too: minutes, and 3.5 GB of memory.")
    ] = False,
    device: Device = "auto",
    recipe: Annotated[str, typer.Option(help="Judge the candidate under this recipe, as verify does.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds that one call of the candidate may take.")] = 300.0,
    isolate: Isolate = True,
    json: Annotated[Path | None, typer.Option(help="Write every stage of every case to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Hold the reference, or a candidate, to the recorded cases: each divergent stage is named, the first one first.

    Without names: all small cases, and the published ones up to seq_len 16. Exit codes as for verify.
    """
    if json is not None and not json.parent.is_dir():
        usage(f"--json {json}: the folder {json.parent} does not exist")
    if names and everything:
        usage("--all and names of cases exclude each other: give one")
    with reported(debug):
        from moeref.golden import cases, find
        from moeref.verify import Options

        known = find(names, folder) if names else cases(folder, everything=True)
        chosen = [case for case in known if names or everything or case.spec.short]
        chosen = [case for case in chosen if names or not candidate or case.judges_candidates]
        left_out = [case for case in known if case not in chosen]
        options = Options(usable_device(device) if candidate else "cpu", recipe, timeout=timeout, isolate=isolate)
        raise typer.Exit(_check(chosen, candidate, options, left_out, json))


def _check(chosen: list[Case], candidate: str, options: Options, left_out: list[Case], json: Path | None) -> int:
    from contextlib import nullcontext

    from moeref.golden import check_case, text
    from moeref.interop.candidates import load

    if candidate and not options.isolate:
        load(candidate)  # a wrong name is a usage error, said before anything is computed
    console = Console(highlight=False, soft_wrap=True)
    who = f"{candidate} on {options.device}" if candidate else "the reference"
    width = max(len(case.name) for case in chosen)
    console.print(f"moeref golden check: {who} on {len(chosen)} cases", markup=False)
    console.print(text.header(width, bool(candidate)), style="bold", markup=False)
    results: list[CaseResult] = []
    with (
        options.runner(candidate) if candidate else nullcontext() as runner,
        progress_bar(console) as progress,
    ):
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.name)
            result = check_case(case, runner, options)
            results.append(result)
            console.print(text.line(result, width, bool(candidate)), style=STYLES[result.status], markup=False)
            for reason in text.reasons(result):
                console.print(reason, markup=False)
            progress.update(task, advance=1)
    console.print()
    for one in text.summary(results, who, left_out):
        console.print(one, markup=False)
    if json is not None:
        json.write_text(json_format.dumps([_plain(result) for result in results], indent=1) + "\n")
        console.print(f"written: {json}", markup=False)
    return exit_code([result.status for result in results])


def _plain(result: CaseResult) -> dict[str, object]:
    """A result for other programs; an infinite difference as a string, since JSON has none."""
    stages = []
    for stage in result.stages:
        worst = stage.worst if stage.worst is None or stage.worst < float("inf") else str(stage.worst)
        stages.append({**asdict(stage), "worst": worst})
    failed = list(result.verdict.failed) if result.verdict else []
    return {
        "case": result.case,
        "status": result.status,
        "message": result.message,
        "diverged": [stage.stage for stage in result.diverged],
        "failed": failed,
        "stages": stages,
        "seconds": result.seconds,
        "repeat": result.repeat,
    }


@golden.command()
def write(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Cases; a new one is named PROBLEM or PROBLEM@RECIPE. Without: all that check looks at."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why the recorded values change: kept in the manifest.")] = "",
    folder: Folder = None,
    everything: Annotated[bool, typer.Option("--all", help="The long published cases too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also record anew what still holds.")] = False,
    debug: Debug = False,
) -> None:
    """Record cases from this machine's reference. A case that still holds is left as it is."""
    if not reason.strip():
        usage('golden write needs --reason "why the recorded values change": it is kept in the manifest')
    if names and everything:
        usage("--all and names of cases exclude each other: give one")
    with reported(debug):
        from moeref.golden import DEFAULT_FOLDER, Case, write_case
        from moeref.golden.catalogue import NAMES, spec_of

        specs = [spec_of(name) for name in names or NAMES]
        chosen = [Case(spec, folder or DEFAULT_FOLDER) for spec in specs if names or everything or spec.short]
        console = Console(highlight=False, soft_wrap=True)
        recorded = 0
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(chosen))
            for case in chosen:
                progress.update(task, description=case.name)
                new = write_case(case, reason, force)
                recorded += new
                console.print(f"{case.name}: {'recorded' if new else 'still holds, left as it is'}", markup=False)
                progress.update(task, advance=1)
        console.print(f"{recorded} of {len(chosen)} cases recorded in {folder or DEFAULT_FOLDER}", markup=False)


@golden.command()
def show(
    name: Annotated[str, typer.Argument(help="A case; without: lists all.")] = "",
    folder: Folder = None,
    debug: Debug = False,
) -> None:
    """What a case holds, for reading; without a name, all cases."""
    with reported(debug):
        from moeref.golden import GoldenError, cases, find, text

        if not name:
            for one in text.listing(cases(folder, everything=True)):
                typer.echo(one)
            return
        case = find([name], folder)[0]
        try:
            for one in text.describe(case, case.manifest()):
                typer.echo(one)
        except GoldenError as error:
            typer.echo(f"moeref: {error}", err=True)
            raise typer.Exit(EXIT_FAIL) from None


@golden.command()
def diff(
    old: Annotated[str, typer.Argument(help="A golden folder, or a git revision of the project.")],
    new: Annotated[str, typer.Argument(help="The same; without: the project's folder as it is.")] = "",
    debug: Debug = False,
) -> None:
    """What moved between two versions of the golden files, stage by stage. Exit code 1 where anything did."""
    with reported(debug):
        from moeref.golden.diff import differences, opened

        with opened(old) as first, opened(new) as second:
            lines, moved = differences(first, second)
        for one in lines:
            typer.echo(one)
        raise typer.Exit(EXIT_FAIL if moved else EXIT_PASS)
