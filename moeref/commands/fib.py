"""`moeref fib verify|export|show`: FlashInfer-Bench data sets."""

from __future__ import annotations

from dataclasses import replace
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
    from moeref.interop.flashinfer_bench import DataSet, Workload
    from moeref.verify import Options, Outcome
    from moeref.verify_data_set import Job, Judged

fib = typer.Typer(help="FlashInfer-Bench data sets: verify, export, show.", no_args_is_help=True)

DataSetFolder = Annotated[
    Path, typer.Argument(help="A data-set folder, with definitions/, workloads/ and perhaps solutions/ and blob/.")
]


@fib.command()
def verify(
    data_set: DataSetFolder,
    solution: Annotated[
        list[str] | None, typer.Option(help="Only this solution; may be given several times. Default: all.")
    ] = None,
    candidate: Annotated[
        str, typer.Option(help="Judge this candidate, named as for `moeref verify`, instead of the solutions.")
    ] = "",
    definition: Annotated[list[str] | None, typer.Option(help="Only definitions whose name holds this.")] = None,
    workload: Annotated[list[str] | None, typer.Option(help="Only workloads whose uuid starts so.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Long workloads too, also on a CPU.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of inputs of type 'random'.")] = 0,
    device: Device = "auto",
    recipe: Annotated[str, typer.Option(help="As for verify.")] = "auto",
    criterion: Annotated[str, typer.Option(help="all: every check; matched-ratio: the published rule alone.")] = "all",
    preset: Annotated[str, typer.Option(help="As for verify.")] = "published",
    trials: Annotated[int, typer.Option(help="As for verify.")] = 1,
    timeout: Annotated[float, typer.Option(help="As for verify.")] = 300.0,
    isolate: Isolate = True,
    traces: Annotated[
        Path | None, typer.Option(help="Append the verdicts to this JSONL file, as the benchmark's traces.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything measured to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Judge a data set's MoE solutions, or a candidate, on its workloads.

    A solution's code is run, in a process of its own. Files that can't be used are named as ERROR; the rest is judged.
    """
    if criterion not in ("all", "matched-ratio"):
        usage(f"--criterion {criterion}: expected all or matched-ratio")
    if candidate and solution:
        usage("--candidate and --solution exclude each other: give one")
    for option, path in (("--traces", traces), ("--json", json)):
        if path is not None and not path.parent.is_dir():
            usage(f"{option} {path}: the folder {path.parent} does not exist")
    with reported(debug):
        from moeref.interop.candidates import load, locate
        from moeref.interop.flashinfer_bench import read_data_set
        from moeref.suites import CPU_SEQ_LEN
        from moeref.verify import Options
        from moeref.verify_data_set import jobs

        device = usable_device(device)
        options = Options(device, recipe, preset, criterion == "matched-ratio", trials, timeout, isolate)
        if candidate:
            locate(candidate)
            if not isolate:
                load(candidate)
        data = read_data_set(data_set)
        longest = CPU_SEQ_LEN if device == "cpu" and not everything else None
        wanted = solution or [], candidate, definition or [], workload or []
        chosen, left_out = jobs(data, *wanted, longest)
        if not chosen and not data.broken:
            usage(_nothing(data, left_out))
        judged = _judge(data, chosen, options, seed, debug)
        if left_out:
            print(f"left for --all: {', '.join(f'{one.short} (seq_len {one.seq_len})' for one in left_out)}")
        _write(traces, json, judged, data_set, device)
        statuses = [one.outcome.verdict.status for one in judged] + ["ERROR"] * len(data.broken)
        raise typer.Exit(exit_code(statuses))


def _nothing(data: DataSet, left_out: list[Workload]) -> str:
    if not data.definitions:
        return f"{data.root} has no definition of DeepSeek-routing MoE, moe_fp8_block_scale_ds_routing_..."
    if left_out:
        return f"all {len(left_out)} workloads are long for a CPU: give --all"
    if not data.workloads:
        return f"{data.root} has MoE definitions but no workloads of them"
    return f"{data.root} has workloads but no MoE solutions of them: name one with --candidate"


def counted(number: int, noun: str) -> str:
    """'1 workload', '2 workloads'."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _judge(data: DataSet, chosen: list[Job], options: Options, seed: int, debug: bool) -> list[Judged]:
    from moeref.report import text
    from moeref.verify_data_set import judge_job

    console = Console(highlight=False, soft_wrap=True)
    for broken in data.broken:
        console.print(f"ERROR {broken.message}", style=text.STYLES["ERROR"], markup=False)
    done: list[Judged] = []
    width = 10
    with progress_bar(console) as progress:
        task = progress.add_task("", total=sum(len(job.workloads) for job in chosen))
        for job in chosen:
            console.print(
                f"\n{' '.join(part for part in (job.name, job.about) if part)} on {options.device}", markup=False
            )
            console.print(f"{job.definition}, {counted(len(job.workloads), 'workload')}", markup=False)
            console.print(text.header(width), style="bold", markup=False)
            progress.update(task, description=job.name)
            outcomes: list[Outcome] = []
            for one in judge_job(data, job, options, seed):
                done.append(one)
                outcomes.append(one.outcome)
                style = text.STYLES[one.outcome.verdict.status]
                console.print(text.line(one.outcome, width), style=style, markup=False)
                for reason in text.reasons(one.outcome):
                    console.print(reason, markup=False)
                if debug and one.outcome.traceback:
                    console.print(one.outcome.traceback, markup=False)
                progress.update(task, advance=1)
            for line in text.summary(outcomes, job.name):
                console.print(line, markup=False)
    if data.broken:
        console.print(
            f"\n{counted(len(data.broken), 'part')} of the data set can't be used: see ERROR above", markup=False
        )
    return done


def _write(traces: Path | None, json: Path | None, judged: list[Judged], data_set: Path, device: str) -> None:
    from moeref.interop.flashinfer_bench import append_traces
    from moeref.report import machine

    if traces is not None:
        lines = [line for one in judged if (line := one.trace(device)) is not None]
        append_traces(traces, lines)
        without = len(judged) - len(lines)
        note = f"; {without} UNSUPPORTED or INCONCLUSIVE have no counterpart there" if without else ""
        print(f"appended {counted(len(lines), 'trace')}: {traces}{note}")
    if json is not None:
        named = [replace(one.outcome, label=f"{one.job.name}/{one.outcome.label}") for one in judged]
        machine.write(json, named, [], str(data_set), [])
        print(f"written: {json}")


@fib.command()
def export(
    problem: Annotated[str, typer.Argument(help="A problem's printed name.")],
    data_set: Annotated[Path, typer.Argument(help="The data-set folder to add to; made where there is none.")],
    only_routing: Annotated[
        bool, typer.Option("--only-routing", help="Write logits and bias alone; the benchmark draws the rest.")
    ] = False,
    experts: Annotated[
        str, typer.Option(help="hit: experts that no token chose keep zero weights; all: draw every expert's.")
    ] = "hit",
    routing_from: Annotated[
        Path | None, typer.Option(help="Where the routing of a captured_... problem is read from.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a problem as a workload, with its inputs as safetensors, that FlashInfer-Bench can run."""
    if experts not in ("hit", "all"):
        usage(f"--experts {experts}: expected hit or all")
    with reported(debug):
        from moeref.interop.flashinfer_bench import capture_routing, export_size
        from moeref.interop.flashinfer_bench import export as write
        from moeref.spec import Problem

        one = Problem.parse(problem)
        if routing_from is not None:
            capture_routing(routing_from)
        print(f"writing {export_size(one, only_routing):,} bytes of tensors to {data_set} ...", flush=True)
        done = write(one, data_set, only_routing=only_routing, experts=experts)
        print(f"workload {done.uuid}")
        for path in (done.definition, done.workload, done.blob):
            print(f"  {path}")
        print(f"judge a candidate on it: moeref fib verify {data_set} --workload {done.uuid[:8]} --candidate CANDIDATE")


@fib.command()
def show(
    path: Annotated[
        Path, typer.Argument(help="A data-set folder, a definition or solution JSON, workloads JSONL, or safetensors.")
    ],
    debug: Debug = False,
) -> None:
    """What a data set, or one of its files, holds of MoE, and what of it can't be used. Runs nothing."""
    with reported(debug):
        from moeref.report.show_fib import describe

        broken = False
        for line in describe(path):
            broken |= line.startswith("ERROR ")
            typer.echo(line)
        raise typer.Exit(EXIT_FAIL if broken else EXIT_PASS)
