"""`moeref bench`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moeref.commands.common import Debug, Device, exit_code, progress_bar, reported, usable_device, usage
from moeref.commands.ranks import RankLimit, over_ranks, world
from moeref.commands.select import check_kinds, select_problems
from moeref.spec import Problem

if TYPE_CHECKING:
    from moeref.bench.ranks import Gathered
    from moeref.bench.result import Result, Row
    from moeref.bench.run import Options
    from moeref.ranks.sweep import Sweep
    from moeref.ranks.world import World

MODES = {"graph": ("graph",), "eager": ("eager",), "both": ("graph", "eager")}
CACHES = {"cold": ("cold",), "warm": ("warm",), "both": ("cold", "warm")}
REFERENCES = ("moeref", "published", "none")
PLOTS = (".png", ".svg", ".pdf")


def bench(
    candidates: Annotated[
        list[str] | None, typer.Argument(help="One or more, as for verify; timed in turn. Default: moe_fast.")
    ] = None,
    workloads: Annotated[
        str, typer.Option(help="Only these published workloads: uuid prefixes, comma-separated.")
    ] = "",
    problem: Annotated[
        list[str] | None, typer.Option(help="A problem's printed name; may be given several times.")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="The small suite.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All 19 published workloads, the long ones too.")] = False,
    values: Annotated[str, typer.Option(help="Value kind of the published workloads, e.g. model_like.")] = "published",
    seed: Annotated[int, typer.Option(help="Seed of the published workloads and of the small suite.")] = 0,
    device: Device = "auto",
    recipe: Annotated[str, typer.Option(help="As for verify.")] = "auto",
    mode: Annotated[str, typer.Option(help="graph, eager or both; auto: both on a GPU, eager on a CPU.")] = "auto",
    cache: Annotated[str, typer.Option(help="cold, warm or both; auto: both on a GPU, cold on a CPU.")] = "auto",
    repeat: Annotated[int, typer.Option(help="Timed calls of each mode and cache; 0: 30 on a GPU, 10 on a CPU.")] = 0,
    seconds: Annotated[float, typer.Option(help="Timing of one candidate on one problem ends after this long.")] = 20.0,
    rotations: Annotated[
        int, typer.Option(help="Input sets that calls rotate over; 0: 3 on a GPU, 2 on a CPU (each costs a reference).")
    ] = 0,
    reference: Annotated[
        str,
        typer.Option(
            help="What the speed-up is over: moeref's reference; published: all local experts' weights expanded "
            "to float32 first, as the published definition does (11 GB, a minute a call on a CPU); none."
        ),
    ] = "moeref",
    timeout: Annotated[float, typer.Option(help="Seconds that one call may take.")] = 300.0,
    rank_limit: RankLimit = 0,
    routing_from: Annotated[Path | None, typer.Option(help="As for verify: where captured_... routing is.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything measured to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file as Markdown.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency against seq_len into this .png, .svg or .pdf.")
    ] = None,
    earlier: Annotated[
        Path | None, typer.Option("--from", help="Run nothing: show what an earlier --json FILE holds.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Time candidates in turn, each beside its verdict, the floor and the reference."""
    names = list(dict.fromkeys(candidates or ["moe_fast"]))
    for option, value, legal in (("mode", mode, MODES), ("cache", cache, CACHES)):
        if value != "auto" and value not in legal:
            usage(f"--{option} {value}: expected auto, {', '.join(legal)}")
    if reference not in REFERENCES:
        usage(f"--reference {reference}: expected one of {', '.join(REFERENCES)}")
    if sum((bool(workloads), bool(problem), small, everything)) > 1:
        usage("--workloads, --problem, --small and --all exclude each other: give one")
    if repeat < 0 or rotations < 0:
        usage(f"--repeat {repeat}, --rotations {rotations}: expected 0 or more")
    _check_targets(json, markdown, plot)
    with reported(debug):
        from moeref.bench.result import Result

        if earlier is not None:
            if candidates or workloads or problem or small or everything:
                usage("--from shows an earlier run: no candidates or problems go with it")
            result = Result.read(earlier)
            _show(result)
        else:
            from moeref.bench.run import Options

            device = usable_device(device)
            gpu = device != "cpu"
            problems, left_out = select_problems(workloads, problem or [], small, everything, values, seed, device)
            if routing_from is not None:
                from moeref.interop.flashinfer_bench import capture_routing

                capture_routing(routing_from)
            check_kinds([one for _, one in problems])
            options = Options(
                device=device,
                recipe=recipe,
                modes=MODES["both" if gpu else "eager"] if mode == "auto" else MODES[mode],
                caches=CACHES["both" if gpu else "cold"] if cache == "auto" else CACHES[cache],
                repeat=repeat or (30 if gpu else 10),
                seconds=seconds,
                rotations=rotations or (3 if gpu else 2),
                reference=reference,
                timeout=timeout,
                routing_from=str(routing_from or ""),
            )
            place = world()
            if place is not None:
                raise typer.Exit(
                    _run_over_ranks(
                        place, names, problems, left_out, options, rank_limit, json, debug, (markdown, plot)
                    )
                )
            result = _run(names, problems, left_out, options, json, debug)
        _write(result, json, markdown, plot)
        raise typer.Exit(exit_code([row.status for row in result.rows]))


def _run_over_ranks(
    place: World,
    names: list[str],
    problems: list[tuple[str, Problem]],
    left_out: list[str],
    options: Options,
    limit: float,
    json: Path | None,
    debug: bool,
    targets: tuple[Path | None, Path | None],
) -> int:
    """Each problem on one rank of torchrun; the exit code."""
    from moeref.bench.ranks import Gathered, bench_job

    limit = limit or 4 * options.timeout + len(names) * options.seconds

    def report(sweep: Sweep) -> int:
        gathered = Gathered(sweep, names, options)
        result = _run(names, problems, left_out, options, json, debug, gathered)
        _write(result, json, *targets)
        return exit_code([row.status for row in result.rows])

    return over_ranks(place, bench_job(names, problems, options, limit), report)


def _check_targets(json: Path | None, markdown: Path | None, plot: Path | None) -> None:
    """What would fail after the run fails before it."""
    for option, path in (("json", json), ("markdown", markdown), ("plot", plot)):
        if path is not None and not path.parent.is_dir():
            usage(f"--{option} {path}: the folder {path.parent} does not exist")
    if plot is not None and plot.suffix not in PLOTS:
        usage(f"--plot {plot}: expected a file that ends in {', '.join(PLOTS)}")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        usage("--plot needs matplotlib: pip install 'moeref[report]'; or --json here and --from FILE --plot elsewhere")


def _run(
    names: list[str],
    problems: list[tuple[str, Problem]],
    left_out: list[str],
    options: Options,
    json: Path | None,
    debug: bool,
    gathered: Gathered | None = None,
) -> Result:
    from moeref.bench.result import Result
    from moeref.bench.run import Bench
    from moeref.report import bench_table
    from moeref.report.machine import environment

    console = Console(highlight=False, soft_wrap=True)
    table = bench_table.Table([label for label, _ in problems], names, options.device)
    where = options.device if gathered is None else f"{options.device}, {gathered.size} ranks"
    console.print(f"moeref bench {' '.join(names)} on {where}, {len(problems)} problems", markup=False)
    if gathered is not None and options.device == "cpu":
        console.print("ranks share this machine's cores: they disturb each other's figures", markup=False)
    rows: list[Row] = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(problems))
        label = ""

        def announce(what: str) -> None:
            progress.update(task, description=f"{label} {what}")

        with gathered or Bench(names, options, announce) as running:
            ceilings = running.ceilings()
            console.print(bench_table.ceilings_line(ceilings), markup=False)
            console.print(table.header(), style="bold", markup=False)

            def result() -> Result:
                told = {
                    "repeat": options.repeat,
                    "seconds": options.seconds,
                    "rotations": options.rotations,
                    "modes": " ".join(options.modes),
                    "caches": " ".join(options.caches),
                    "recipe": options.recipe,
                }
                return Result(
                    environment(), options.device, told, ceilings, options.reference, tuple(rows), tuple(left_out)
                )

            for label, problem in problems:
                for row in running.run(label, problem, ceilings):
                    rows.append(row)
                    _print_row(console, table, row)
                if debug:
                    for text in running.tracebacks:
                        console.print(text, markup=False)
                if json is not None:
                    result().write(json)  # after every problem: a run that is cut off leaves what it has
                progress.advance(task)
    console.print()
    for text in bench_table.summary(result()):
        console.print(text, markup=False)
    return result()


def _print_row(console: Console, table: object, row: Row) -> None:
    from moeref.report import bench_table

    assert isinstance(table, bench_table.Table)
    console.print(table.line(row), style=bench_table.style(row), markup=False)
    for text in table.below(row):
        console.print(text, markup=False)


def _show(result: Result) -> None:
    from moeref.report import bench_table

    console = Console(highlight=False, soft_wrap=True)
    names = list(dict.fromkeys(row.candidate for row in result.rows))
    table = bench_table.Table([row.label for row in result.rows], names, result.device)
    console.print(bench_table.ceilings_line(result.ceilings), markup=False)
    console.print(table.header(), style="bold", markup=False)
    for row in result.rows:
        _print_row(console, table, row)
    console.print()
    for text in bench_table.summary(result):
        console.print(text, markup=False)


def _write(result: Result, json: Path | None, markdown: Path | None, plot: Path | None) -> None:
    """The files that were asked for."""
    from moeref.report.bench_markdown import to_markdown
    from moeref.report.bench_plot import NothingToPlot, write_plot

    if json is not None:
        result.write(json)
        typer.echo(f"written: {json}")
    if markdown is not None:
        markdown.write_text(to_markdown(result), encoding="utf-8")
        typer.echo(f"written: {markdown}")
    if plot is not None:
        try:
            write_plot(result, plot)
            typer.echo(f"written: {plot}")
        except NothingToPlot as error:
            typer.echo(f"{plot}: {error}", err=True)
