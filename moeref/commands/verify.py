"""`moeref verify`."""

from __future__ import annotations

from dataclasses import replace
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
from moeref.commands.html import Html, check_html, write_html
from moeref.commands.ranks import ExpertParallel, RankLimit, Shards, verify_here, verify_over_ranks, world
from moeref.commands.select import check_kinds, select_problems
from moeref.spec import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moeref.verify import Diagnosis, Options, Outcome


def verify(
    candidate: Annotated[
        str,
        typer.Argument(
            help="file.py:function, package.module:function, a name of `moeref backends`, or a solution.json"
        ),
    ] = "moe_fast",
    workloads: Annotated[
        str, typer.Option(help="Only these published workloads: uuid prefixes, comma-separated.")
    ] = "",
    problem: Annotated[
        list[str] | None, typer.Option(help="A problem's printed name; may be given several times.")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="The small suite: every routing and value kind, in seconds.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="All 19 published workloads, the long ones too.")] = False,
    values: Annotated[str, typer.Option(help="Value kind of the published workloads, e.g. model_like.")] = "published",
    seed: Annotated[int, typer.Option(help="Seed of the published workloads and of the small suite.")] = 0,
    device: Device = "auto",
    recipe: Annotated[
        str,
        typer.Option(help="Judge under this recipe, e.g. requant; auto: the declared one, else found from the errors."),
    ] = "auto",
    criterion: Annotated[str, typer.Option(help="all: every check; matched-ratio: the published rule alone.")] = "all",
    preset: Annotated[
        str, typer.Option(help="Thresholds of the matched ratio: published, contest or default.")
    ] = "published",
    trials: Annotated[int, typer.Option(help="Run each problem this often; every output must pass.")] = 1,
    timeout: Annotated[
        float, typer.Option(help="Seconds for one call; the first one gets twice that, at least 30 more, to compile.")
    ] = 300.0,
    isolate: Isolate = True,
    routing_from: Annotated[
        Path | None,
        typer.Option(
            help="Where the routing of captured_... problems is: a FlashInfer-Bench data set, or safetensors."
        ),
    ] = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Run the laws and read-outs too; --small does so by itself.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Explain the first failure: as moeref explain on that problem.")
    ] = False,
    ep: ExpertParallel = False,
    shards: Shards = 0,
    rank_limit: RankLimit = 0,
    json: Annotated[Path | None, typer.Option(help="Write everything measured to this file.")] = None,
    html: Html = None,
    debug: Debug = False,
) -> None:
    """Judge a candidate on the published workloads, the small suite, or single problems."""
    if criterion not in ("all", "matched-ratio"):
        usage(f"--criterion {criterion}: expected all or matched-ratio")
    if sum((bool(workloads), bool(problem), small, everything)) > 1:
        usage("--workloads, --problem, --small and --all exclude each other: give one")
    if explain and ep:
        usage("--explain looks at one shard: it does not go with --ep")
    if shards and not ep:
        usage(f"--shards {shards}: it goes with --ep")
    if shards < 0 or rank_limit < 0:
        usage(f"--shards {shards}, --rank-limit {rank_limit:g}: expected 0 or more")
    if json is not None and not json.parent.is_dir():
        usage(f"--json {json}: the folder {json.parent} does not exist")
    check_html(html)
    with reported(debug):
        from moeref.interop.candidates import load
        from moeref.suites import DIAGNOSIS
        from moeref.verify import Options

        device = usable_device(device)
        problems, left_out = select_problems(workloads, problem or [], small, everything, values, seed, device)
        if routing_from is not None:
            from moeref.interop.flashinfer_bench import capture_routing

            capture_routing(routing_from)
        check_kinds([one for _, one in problems])
        cuts = shards if ep else None
        options = Options(device, recipe, preset, criterion == "matched-ratio", trials, timeout, isolate, shards=cuts)
        options = replace(options, routing_from=str(routing_from or ""), keep_detail=html is not None)
        probed = [Problem.parse(name) for name in DIAGNOSIS] if small or (diagnose and not problem) else []
        probed += [Problem.parse(name) for name in problem or []] if diagnose else []
        if ep:  # laws and read-outs look at one shard: that is for a run without --ep
            probed = []
        place = world()
        label = f"{place.size} rank{'s' * (place.size > 1)}" if place else ""

        def judge(outcomes: Iterator[Outcome], found: Iterator[Diagnosis]) -> int:
            why = explain and (place is None or place.rank == 0)
            return _verify(
                candidate, problems, probed, left_out, options, json, html, debug, outcomes, found, label, why
            )

        if not isolate and place is None:
            load(candidate)  # a wrong name is a usage error, said before anything is computed
        if place is None:
            raise typer.Exit(verify_here(candidate, problems, probed, options, judge))
        raise typer.Exit(verify_over_ranks(place, candidate, problems, probed, options, rank_limit, judge))


def _verify(
    candidate: str,
    problems: list[tuple[str, Problem]],
    probed: list[Problem],
    left_out: list[str],
    options: Options,
    json: Path | None,
    html: Path | None,
    debug: bool,
    judged: Iterator[Outcome],
    diagnosed: Iterator[Diagnosis],
    ranks: str,
    explain: bool,
) -> int:
    from moeref.report import machine, text

    console = Console(highlight=False, soft_wrap=True)
    width = max([len(label) for label, _ in problems] + [len("problem")])
    where = f"{options.device}, {ranks}" if ranks else options.device
    console.print(f"moeref verify {candidate} on {where}, {len(problems)} problems", markup=False)
    console.print(text.header(width), style="bold", markup=False)
    outcomes: list[Outcome] = []
    with progress_bar(console) as progress:
        task = progress.add_task(problems[0][0] if problems else "", total=len(problems))
        for outcome in judged:
            outcomes.append(outcome)
            console.print(text.line(outcome, width), style=text.STYLES[outcome.verdict.status], markup=False)
            for reason in text.reasons(outcome):
                console.print(reason, markup=False)
            if debug and outcome.traceback:
                console.print(outcome.traceback, markup=False)
            following = problems[len(outcomes)][0] if len(outcomes) < len(problems) else ""
            progress.update(task, advance=1, description=following)
        found = []
        if probed:
            progress.update(task, description="laws and read-outs")
            for diagnosis in diagnosed:
                found.append(diagnosis)
                console.print(text.diagnosis_line(diagnosis), style=text.STYLES[diagnosis.status], markup=False)
                if diagnosis.status == "FAIL":
                    console.print(f"    repeat: {diagnosis.repeat}", markup=False)
    console.print()
    for one in text.summary(outcomes, candidate, found):
        console.print(one, markup=False)
    if left_out:
        console.print(f"left for --all: {', '.join(left_out)}", markup=False)
    explanations = []
    failing = [o.verdict.problem for o in outcomes if o.verdict.status == "FAIL"]
    if explain and (failing or any(d.status == "FAIL" for d in found)):
        from moeref.commands.explain import explained, show

        asked = Problem.parse(failing[0]) if failing else probed[0]
        explanations.append(explained(candidate, asked, options, console))
        show(explanations[0], console)
    if json is not None:
        machine.write(json, outcomes, found, candidate, left_out)
        console.print(f"written: {json}", markup=False)
    if html is not None:
        write_html(html, console, candidate, outcomes, found, left_out, explanations)
    return exit_code([o.verdict.status for o in outcomes] + [d.status for d in found if d.status == "FAIL"])
