"""`moeref explain`."""

from __future__ import annotations

import json as json_format
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moeref.commands.common import EXIT_FAIL, EXIT_PASS, Debug, Device, Isolate, reported, usable_device, usage
from moeref.commands.html import Html, check_html, write_html
from moeref.commands.select import check_kinds
from moeref.spec import Problem

if TYPE_CHECKING:
    from moeref.diagnose.explain.result import Explanation
    from moeref.verify import Options, Outcome

SHRINK_SECONDS = 6.0

MOST_FACTS = 14
"""Facts printed; --json holds all."""

FACT_LENGTH = 300


def explain(
    candidate: Annotated[str, typer.Argument(help="As for verify.")] = "moe_fast",
    problem: Annotated[str, typer.Option(help="A problem's printed name; default: a small one.")] = "",
    device: Device = "auto",
    recipe: Annotated[str, typer.Option(help="As for verify.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds that one call may take.")] = 60.0,
    isolate: Isolate = True,
    shrink: Annotated[float, typer.Option(help="Seconds for looking for a smaller problem; 0: none.")] = SHRINK_SECONDS,
    json: Annotated[Path | None, typer.Option(help="Write everything found to this file.")] = None,
    html: Html = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Write inputs, both outputs and a script that needs torch alone to this folder.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Why a candidate is wrong: the stage, the known bug that it looks like, and the smallest problem that shows it.

    Exit code 0 where nothing is wrong, 1 where something is.
    """
    if json is not None and not json.parent.is_dir():
        usage(f"--json {json}: the folder {json.parent} does not exist")
    check_html(html)
    with reported(debug):
        from moeref.verify import Options

        asked = Problem.parse(problem) if problem else None
        if asked is not None:
            check_kinds([asked])
        options = Options(usable_device(device), recipe, timeout=timeout, isolate=isolate)
        console = Console(highlight=False, soft_wrap=True)
        found = explained(candidate, asked, options, console, shrink)
        show(found, console)
        if json is not None:
            json.write_text(json_format.dumps(found.to_json(), indent=1) + "\n")
            console.print(f"written: {json}", markup=False)
        if html is not None:
            write_html(html, console, candidate, _pictured(candidate, options, found), explanations=[found])
        if bundle is not None:
            from moeref.explain import bundle as write

            kept = Problem.parse(found.shrunk or found.problem)
            paths = write(candidate, kept, options, bundle)
            console.print(f"written: {', '.join(str(path) for path in paths)}", markup=False)
        raise typer.Exit(EXIT_PASS if found.correct else EXIT_FAIL)


def explained(
    candidate: str, problem: Problem | None, options: Options, console: Console, shrink_seconds: float = SHRINK_SECONDS
) -> Explanation:
    """The explanation, with what is being done on a terminal."""
    from moeref.explain import explain_candidate
    from moeref.interop.candidates import load

    if not options.isolate:
        load(candidate)  # a wrong name is a usage error, said before anything is computed
    with console.status(f"explaining {candidate}") as status:
        return explain_candidate(
            candidate,
            problem,
            options,
            shrink_seconds=shrink_seconds,
            say=lambda text: status.update(f"explaining {candidate}: {text}"),
        )


def _pictured(candidate: str, options: Options, found: Explanation) -> list[Outcome]:
    """Verdicts on the problem asked about and on the smallest one, with what a report draws."""
    from moeref.verify import verify

    names = list(dict.fromkeys([found.problem, *([found.shrunk] if found.shrunk else [])]))
    return list(verify(candidate, [(name, Problem.parse(name)) for name in names], replace(options, keep_detail=True)))


def show(found: Explanation, console: Console) -> None:
    """The explanation as text, suspects first."""
    console.print(escape(found.headline), style="bold green" if found.correct else "bold red")
    if not found.correct and not found.suspects:
        console.print("no stage can be named")
    for place, one in enumerate(found.suspects, start=1):
        match = "" if one.match is None else f", explains {one.match:.1%} of the error"
        name = one.fault or "no catalogue entry fits"
        console.print(f"{place}. [bold]{escape(one.stage)}[/bold]: {escape(name)}{match}")
        console.print(f"   {_short(one.evidence)}", markup=False)
        if one.source:
            console.print(f"   seen in: {one.source}", markup=False)
        console.print(f"   repeat: {one.replay}", style="dim", markup=False)
    for title, sentences in (("what was seen", found.facts), ("ruled out", found.ruled_out)):
        if sentences:
            console.print(title, style="bold")
        for sentence in sentences[:MOST_FACTS]:
            console.print(f"   {_short(sentence)}", markup=False)
        if len(sentences) > MOST_FACTS:
            console.print(f"   and {len(sentences) - MOST_FACTS} more: --json holds all", markup=False)
    if found.recipe and not found.correct:
        console.print(f"nearest recipe: {found.recipe}", markup=False)
    if found.shrunk:
        console.print(f"smallest failing problem: {found.shrunk}", markup=False)


def _short(text: str) -> str:
    return text if len(text) <= FACT_LENGTH else text[:FACT_LENGTH] + " ..."
