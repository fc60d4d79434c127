"""The command line. Imports torch only inside commands, so that --help answers at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moeref.spec import Problem, SpecError

if TYPE_CHECKING:
    from moeref.spec import Geometry
    from moeref.verify import Options, Outcome

EXIT_PASS, EXIT_FAIL, EXIT_USAGE, EXIT_NOT_TESTED = 0, 1, 2, 3

app = typer.Typer(
    help="Is my Mixture-of-Experts kernel right, and if not, why?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Is my Mixture-of-Experts kernel right, and if not, why?

    Exit codes: 0 all judged problems pass, 1 a failure or an error, 2 wrong usage, 3 nothing could be judged.
    """


@app.command()
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
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")] = "auto",
    recipe: Annotated[
        str,
        typer.Option(help="Judge under this recipe, e.g. requant; auto: the declared one, else found from the errors."),
    ] = "auto",
    criterion: Annotated[str, typer.Option(help="all: every check; matched-ratio: the published rule alone.")] = "all",
    preset: Annotated[
        str, typer.Option(help="Thresholds of the matched ratio: published, contest or default.")
    ] = "published",
    trials: Annotated[int, typer.Option(help="Run each problem this often; every output must pass.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that one call may take.")] = 300.0,
    isolate: Annotated[
        bool, typer.Option("--isolate/--no-isolate", help="Run the candidate in a process of its own.")
    ] = True,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Run the laws and read-outs too; --small does so by itself.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write everything measured to this file.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Judge a candidate on the published workloads, the small suite, or single problems."""
    if criterion not in ("all", "matched-ratio"):
        _usage(f"--criterion {criterion}: expected all or matched-ratio")
    if sum((bool(workloads), bool(problem), small, everything)) > 1:
        _usage("--workloads, --problem, --small and --all exclude each other: give one")
    if json is not None and not json.parent.is_dir():
        _usage(f"--json {json}: the folder {json.parent} does not exist")
    with _reported(debug):
        from moeref.suites import DIAGNOSIS
        from moeref.verify import Options

        device = _device(device)
        problems, left_out = _problems(workloads, problem or [], small, everything, values, seed, device)
        _check_kinds([one for _, one in problems])
        options = Options(device, recipe, preset, criterion == "matched-ratio", trials, timeout, isolate)
        probed = [Problem.parse(name) for name in DIAGNOSIS] if small or (diagnose and not problem) else []
        probed += [Problem.parse(name) for name in problem or []] if diagnose else []
        raise typer.Exit(_verify(candidate, problems, probed, left_out, options, json, debug))


def _verify(
    candidate: str,
    problems: list[tuple[str, Problem]],
    probed: list[Problem],
    left_out: list[str],
    options: Options,
    json: Path | None,
    debug: bool,
) -> int:
    from moeref.interop.candidates import load
    from moeref.report import machine, text
    from moeref.verify import diagnose, verify

    if not options.isolate:
        load(candidate)  # a wrong name is a usage error, said before anything is computed
    console = Console(highlight=False, soft_wrap=True)
    width = max([len(label) for label, _ in problems] + [len("problem")])
    console.print(f"moeref verify {candidate} on {options.device}, {len(problems)} problems", markup=False)
    console.print(text.header(width), style="bold", markup=False)
    outcomes: list[Outcome] = []
    with _progress(console) as progress:
        task = progress.add_task(problems[0][0] if problems else "", total=len(problems))
        for outcome in verify(candidate, problems, options):
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
            for diagnosis in diagnose(candidate, probed, options):
                found.append(diagnosis)
                console.print(text.diagnosis_line(diagnosis), style=text.STYLES[diagnosis.status], markup=False)
                if diagnosis.status == "FAIL":
                    console.print(f"    repeat: {diagnosis.repeat}", markup=False)
    console.print()
    for one in text.summary(outcomes, candidate, found):
        console.print(one, markup=False)
    if left_out:
        console.print(f"left for --all: {', '.join(left_out)}", markup=False)
    if json is not None:
        machine.write(json, outcomes, found, candidate, left_out)
        console.print(f"written: {json}", markup=False)
    return exit_code([o.verdict.status for o in outcomes] + [d.status for d in found if d.status == "FAIL"])


def exit_code(statuses: list[str]) -> int:
    """0 when something passed and nothing failed; 1 for a FAIL or an ERROR; 3 when nothing could be judged."""
    if any(status in ("FAIL", "ERROR") for status in statuses):
        return EXIT_FAIL
    return EXIT_PASS if "PASS" in statuses else EXIT_NOT_TESTED


def _problems(
    workloads: str, names: list[str], small: bool, everything: bool, values: str, seed: int, device: str
) -> tuple[list[tuple[str, Problem]], list[str]]:
    """((label, problem) to run, labels of published workloads left out)."""
    from moeref.suites import published, small_suite
    from moeref.workloads import find

    if names:
        return [(name, Problem.parse(name)) for name in names], []
    if small:
        return [(one.name, one) for one in small_suite(seed)], []
    if workloads:
        wanted = find([part.strip() for part in workloads.split(",") if part.strip()])
        return [(w.short, w.problem(values, seed)) for w in wanted], []
    chosen, left = published(device == "cpu", everything)
    return [(w.short, w.problem(values, seed)) for w in chosen], [f"{w.short} (seq_len {w.seq_len})" for w in left]


def _check_kinds(problems: list[Problem]) -> None:
    """Raise SpecError for unknown kinds before the first problem runs."""
    from moeref.routings import ROUTINGS
    from moeref.values import VALUES

    for problem in problems:
        if problem.routing not in ROUTINGS:
            raise SpecError(f"unknown routing kind '{problem.routing}': expected one of {', '.join(ROUTINGS)}")
        if problem.values not in VALUES:
            raise SpecError(f"unknown value kind '{problem.values}': expected one of {', '.join(VALUES)}")


def _device(text: str) -> str:
    """A usable torch device name. Raises SpecError for one that is not here."""
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text != "cpu" and not text.startswith("cuda"):
        raise SpecError(f"--device {text}: expected auto, cpu, cuda or cuda:N")
    if text.startswith("cuda"):
        index = text.removeprefix("cuda").removeprefix(":") or "0"
        count = torch.cuda.device_count()
        if not index.isdigit() or int(index) >= count:
            raise SpecError(f"--device {text}: this machine has {count} CUDA devices")
    return text


@app.command()
def fuzz(
    candidate: Annotated[str, typer.Argument(help="As for verify.")] = "moe_fast",
    minutes: Annotated[float | None, typer.Option(help="Draw problems for this long.")] = None,
    examples: Annotated[int | None, typer.Option(help="Draw this many problems (default 200).")] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other problems.")] = 0,
    geometry: Annotated[str, typer.Option(help="Only this geometry, e.g. dsv3; default: drawn small ones.")] = "",
    tokens: Annotated[int, typer.Option(help="Largest seq_len.")] = 80,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")] = "auto",
    recipe: Annotated[str, typer.Option(help="As for verify.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds that one call may take.")] = 60.0,
    isolate: Annotated[bool, typer.Option("--isolate/--no-isolate", help="As for verify.")] = True,
    database: Annotated[Path, typer.Option(help="Folder that keeps failing examples between runs.")] = Path(
        ".moeref/fuzz"
    ),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Judge a candidate on drawn problems; a failure is shrunk to the smallest problem that still fails."""
    if minutes is not None and examples is not None:
        _usage("--minutes and --examples exclude each other: give one")
    if (minutes is not None and not minutes > 0) or (examples is not None and examples < 1) or tokens < 0:
        _usage("--minutes, --examples: expected more than 0; --tokens: expected 0 or more")
    with _reported(debug):
        from moeref.spec import Geometry
        from moeref.verify import Options

        options = Options(_device(device), recipe, timeout=timeout, isolate=isolate)
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
        _usage(f"fuzz needs {error.name}: pip install 'moeref[test]'")
    from moeref.report import text

    console = Console(highlight=False, soft_wrap=True)
    with _progress(console) as progress:
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


@app.command()
def show(
    problem: Annotated[str, typer.Argument(help="A problem's printed name, or the start of a published uuid.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """What a problem is: shapes, bytes, experts hit, FLOPs, and the least time a card needs."""
    with _reported(debug):
        from moeref.report.show import describe

        for one in describe(problem):
            typer.echo(one)


@app.command()
def backends(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Every candidate known by name, and why one can't run here."""
    with _reported(debug):
        from moeref.interop.candidates import known
        from moeref.report.show import backend_lines

        for one in backend_lines(known()):
            typer.echo(one)


class _reported:
    """Turn known errors into one message and exit code 2; anything else into one line that asks for --debug."""

    def __init__(self, debug: bool) -> None:
        self.debug = debug

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or self.debug or isinstance(error, typer.Exit | SystemExit):
            return
        if isinstance(error, KeyboardInterrupt):
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_FAIL) from None
        if isinstance(error, ValueError):  # SpecError, InputError, CandidateError
            _usage(str(error))
        typer.echo(
            f"moeref: {type(error).__name__}: {error}\nThis is a fault of moeref: --debug shows where.", err=True
        )
        raise typer.Exit(EXIT_FAIL) from None


def _usage(message: str) -> NoReturn:
    typer.echo(f"moeref: {message}", err=True)
    raise typer.Exit(EXIT_USAGE) from None


def _progress(console: Console) -> Progress:
    """A progress bar on a terminal; nothing elsewhere."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def main() -> None:
    """Entry point of the `moeref` command."""
    # Judge and candidate take turns in two processes: threads that spin while they wait would slow the other one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="moeref")


if __name__ == "__main__":
    main()
