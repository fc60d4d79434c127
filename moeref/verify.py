"""One problem's way through: inputs -> reference and candidate -> verdict. The CLI and the test plugin call this."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from moeref.diagnose.laws import LAWS, run_laws
from moeref.diagnose.readout import READOUTS, run_readouts
from moeref.diagnose.result import Finding
from moeref.inputs import Inputs
from moeref.interop.isolated_call import IsolatedCall
from moeref.interop.runner import CandidateRun, Runner
from moeref.interop.shared_inputs import SharedInputs
from moeref.judge.compare import CRITERIA
from moeref.judge.detail import Detail, detail
from moeref.judge.noise import Fit
from moeref.judge.verdict import AUTO, ERROR, FAIL, INCONCLUSIVE, PASS, Figures, Known, Verdict, judge
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.routings import CAPTURED
from moeref.spec import Problem, Recipe, SpecError

LEAST_START = 30.0
"""Seconds that importing a candidate, and compiling in its first call, may take however short a call's limit is."""


@dataclass(frozen=True)
class Options:
    """How to judge. Defaults are the CLI's."""

    device: str = "cpu"
    recipe: str = AUTO  # 'auto': the candidate's declared one, else found from the errors
    preset: str = "published"  # a name of moeref.judge.compare.CRITERIA
    matched_ratio_alone: bool = False
    trials: int = 1
    timeout: float = 300.0  # seconds for one call of the candidate
    isolate: bool = True
    routing_from: str = ""  # where routing kinds that are read from files were found; only repeated, not opened
    shards: int | None = None  # all shards of the layer are run and added: this many, 0 for E / L of the problem
    keep_detail: bool = False  # outcomes hold where the error lies, for a report to draw

    def __post_init__(self) -> None:
        if self.preset not in CRITERIA:
            raise SpecError(f"unknown preset '{self.preset}': expected one of {', '.join(CRITERIA)}")
        if self.recipe != AUTO:
            Recipe.parse(self.recipe)
        if self.trials < 1:
            raise SpecError(f"trials={self.trials}: expected at least 1")
        if not self.timeout > 0:
            raise SpecError(f"timeout={self.timeout}: expected more than 0 seconds")

    def runner(self, candidate: str) -> Runner:
        """A runner of the candidate under these options."""
        starting = max(self.timeout, LEAST_START)
        return Runner(candidate, self.device, timeout=self.timeout, isolate=self.isolate, load_timeout=starting)

    def repeat(self, candidate: str, problem: Problem) -> str:
        """The command line that judges this one problem again, the same way."""
        words = ["moeref", "verify", candidate, "--problem", problem.name]
        if self.routing_from and problem.routing.startswith(CAPTURED):
            words += ["--routing-from", self.routing_from]
        if self.device != "cpu":
            words += ["--device", self.device]
        if self.recipe != AUTO:
            words += ["--recipe", self.recipe]
        if self.matched_ratio_alone:
            words += ["--criterion", "matched-ratio"]
        if self.preset != "published":
            words += ["--preset", self.preset]
        if self.timeout != Options.timeout:
            words += ["--timeout", f"{self.timeout:g}"]
        if self.trials != 1:
            words += ["--trials", str(self.trials)]
        if not self.isolate:
            words += ["--no-isolate"]
        if self.shards is not None:
            words += ["--ep"] + (["--shards", str(self.shards)] if self.shards else [])
        return shlex.join(words)


@dataclass(frozen=True)
class ShardVerdict:
    """One expert-parallel shard's own verdict, beside that of the sum over all shards."""

    shard: int
    experts: tuple[int, int]  # first and last global id
    rank: int  # the process that ran it
    verdict: Verdict
    sign: str  # what it does wrong: 'missing', 'doubled', 'shifted', 'extra', 'scaled', 'other'; '' for nothing
    detail: str  # the sign in one phrase
    call_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """A verdict with its label, times and repeat command."""

    label: str
    verdict: Verdict
    preset: str
    seconds: float  # inputs, reference, candidate and judging
    call_seconds: tuple[float, ...]  # each call of the candidate
    repeat: str
    traceback: str = ""
    cause: str = ""  # of an ERROR: 'import' or 'timeout' where it was that, else ''
    shards: tuple[ShardVerdict, ...] = ()  # under --ep
    detail: Detail | None = None  # with Options.keep_detail, where values could be compared, and not under --ep


Make = Callable[..., Inputs]
"""Called as make_inputs is, make(problem, allocate=...): a data set may replace tensors by those of its files."""


def verify(candidate: str, problems: Sequence[tuple[str, Problem]], options: Options) -> Iterator[Outcome]:
    """Judge `candidate` on each (label, problem) in turn; yields as soon as each is done.

    One worker process serves all problems and is started again after it died. Raises SpecError for a problem of an
    unknown kind, and moeref.interop.candidates.CandidateError where the candidate can't be found at all.
    """
    with options.runner(candidate) as runner:
        for label, problem in problems:
            yield judge_one(runner, candidate, label, problem, options)


def judge_one(
    runner: Runner,
    candidate: str,
    label: str,
    problem: Problem,
    options: Options,
    make: Make = make_inputs,
    repeat: str = "",
) -> Outcome:
    """One problem's outcome, through a runner that is already open on `candidate`.

    repeat: the command that repeats it; default that of the problem's name, which makes the inputs as make_inputs does.
    """
    start = time.perf_counter()
    verdict, run, kept = _one(runner, problem, options, make)
    return Outcome(
        label=label,
        verdict=verdict,
        preset=options.preset,
        seconds=time.perf_counter() - start,
        call_seconds=tuple(run.seconds) if run else (),
        repeat=repeat or options.repeat(candidate, problem),
        traceback=run.traceback if run else "",
        cause=run.cause if run else "",
        detail=kept,
    )


@dataclass(frozen=True)
class Diagnosis:
    """What one law or read-out saw."""

    kind: str  # 'law' or 'readout'
    finding: Finding
    repeat: str

    @property
    def status(self) -> str:
        """PASS, FAIL, or INCONCLUSIVE where it does not apply."""
        return {True: PASS, False: FAIL, None: INCONCLUSIVE}[self.finding.passed]


def diagnose(candidate: str, problems: Sequence[Problem], options: Options) -> Iterator[Diagnosis]:
    """Laws and read-outs of `candidate` at each problem's geometry, offset, factor and seed, in the order they ran.

    Yields nothing for a candidate that does not run there: `verify` says why. Raises as verify.
    """
    with options.runner(candidate) as runner:
        for problem in problems:
            first = runner.run(make_inputs(problem))
            if first.status == "ok":
                yield from diagnose_one(runner, candidate, problem, options, first)


def diagnose_one(
    runner: Runner,
    candidate: str,
    problem: Problem,
    options: Options,
    first: CandidateRun,
    laws: Collection[str] = tuple(LAWS),
    readouts: Collection[str] = tuple(READOUTS),
) -> Iterator[Diagnosis]:
    """The named laws and read-outs at one problem, through a runner that is already open on `candidate`.

    first: a run of it that went well, for what it declares.
    """
    call = IsolatedCall(runner)
    recipe = first.recipe if options.recipe == AUTO else options.recipe
    repeat = options.repeat(candidate, problem) + " --diagnose"
    inexact = frozenset(name.strip() for name in first.inexact.split(",") if name.strip())
    if laws:
        for finding in run_laws(
            call,
            problem,
            device=options.device,
            recipe=recipe,
            deterministic=first.deterministic,
            inexact=inexact,
            names=laws,
        ):
            yield Diagnosis("law", finding, repeat)
    if readouts:
        for finding in run_readouts(call, problem, device=options.device, names=readouts):
            yield Diagnosis("readout", finding, repeat)


def _one(
    runner: Runner, problem: Problem, options: Options, make: Make
) -> tuple[Verdict, CandidateRun | None, Detail | None]:
    kept: list[Detail] = []

    def look(output: torch.Tensor, known: Known, recipe: str, fit: Fit | None) -> None:
        kept.append(detail(output, known, recipe, fit))

    with SharedInputs() as shared:
        inputs = make(problem, allocate=shared.allocate)
        run = runner.run(shared.describe(inputs), trials=options.trials)
        try:
            placed = inputs.to(options.device)
            trace = moe(placed)
            recipe = run.recipe if options.recipe == AUTO else options.recipe
            criterion = CRITERIA[options.preset]
            verdict = judge(
                problem.name,
                placed,
                trace,
                run,
                recipe,
                criterion,
                options.matched_ratio_alone,
                look=look if options.keep_detail else None,
            )
        except torch.cuda.OutOfMemoryError as error:
            figures = Figures(problem.seq_len, problem.offset, 0, 0, 0)
            text = f"the judge ran out of GPU memory: {str(error).splitlines()[0]}; try --device cpu"
            verdict = Verdict(problem.name, ERROR, (), "", False, figures, text)
        return verdict, run, kept[0] if kept else None
