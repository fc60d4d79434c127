"""A FlashInfer-Bench data set's solutions, or any candidate, judged on its MoE workloads: what `moeref fib` calls."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moeref.interop.candidates import CandidateError
from moeref.interop.flashinfer_bench import (
    NOT_TRACED,
    DataSet,
    FibError,
    FibUnsupported,
    Prepared,
    Workload,
    prepare,
    trace,
)
from moeref.judge.verdict import ERROR, UNSUPPORTED, Figures, Verdict
from moeref.spec import SpecError
from moeref.suites import CPU_SEQ_LEN
from moeref.verify import Options, Outcome, judge_one


@dataclass(frozen=True)
class Job:
    """One candidate on some workloads of one definition."""

    name: str  # the solution's name, or the candidate as it was given
    candidate: str  # a text that moeref.interop.candidates.load understands
    definition: str
    about: str  # author and language of a solution
    workloads: tuple[Workload, ...]


@dataclass(frozen=True)
class Judged:
    """One workload's outcome."""

    job: Job
    workload: Workload
    outcome: Outcome

    def trace(self, device: str) -> dict[str, object] | None:
        """As a trace's JSON data; None where its status has no counterpart there."""
        one = self.outcome
        if one.verdict.status in NOT_TRACED:
            return None
        return trace(self.workload, self.job.name, one.verdict, one.preset, device, one.cause)


def jobs(
    data: DataSet,
    solutions: Sequence[str] = (),
    candidate: str = "",
    definitions: Sequence[str] = (),
    workloads: Sequence[str] = (),
    longest: int | None = CPU_SEQ_LEN,
) -> tuple[list[Job], list[Workload]]:
    """(what is to be judged, workloads left out because their seq_len exceeds `longest`).

    solutions     names; empty: all of the data set.
    candidate     judged instead of the data set's solutions.
    definitions   parts of names; empty: all.
    workloads     starts of uuids; empty: all up to `longest`.
    Raises SpecError for a name that fits nothing.
    """
    names = [name for name in data.definitions if not definitions or any(part in name for part in definitions)]
    if definitions and not names:
        raise SpecError(f"no definition fits {', '.join(definitions)}: the data set has {_listed(data.definitions)}")
    uuids = [one.uuid for name in names for one in data.workloads.get(name, [])]
    for prefix in workloads:
        if not any(uuid.startswith(prefix) for uuid in uuids):
            raise SpecError(f"no workload starts with '{prefix}': there are {_listed([uuid[:8] for uuid in uuids])}")
    known = {one.solution.name for name in names for one in data.solutions.get(name, [])}
    for name in solutions:
        if name not in known:
            raise SpecError(f"no solution '{name}': there are {_listed(known)}")
    found, left_out = [], []
    for name in names:
        chosen, left = _choose(data.workloads.get(name, []), workloads, longest)
        left_out += left
        if candidate:
            pairs = [(candidate, candidate, "")]
        else:
            pairs = [
                (one.solution.name, str(one.path), f"by {one.solution.author}, {one.solution.language}")
                for one in data.solutions.get(name, [])
                if not solutions or one.solution.name in solutions
            ]
        if chosen:
            found += [Job(label, text, name, about, tuple(chosen)) for label, text, about in pairs]
    return found, left_out


def _choose(
    all_of_them: Sequence[Workload], prefixes: Sequence[str], longest: int | None
) -> tuple[list[Workload], list[Workload]]:
    if prefixes:
        return [one for one in all_of_them if any(one.uuid.startswith(prefix) for prefix in prefixes)], []
    fits = [one for one in all_of_them if longest is None or one.seq_len <= longest]
    return fits, [one for one in all_of_them if one not in fits]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def judge_job(data: DataSet, job: Job, options: Options, seed: int = 0) -> Iterator[Judged]:
    """Judge one candidate on each workload in turn; yields as soon as each is done.

    What can't be used, a missing blob or a solution that can't be loaded, is the outcome of its workload alone: ERROR,
    or UNSUPPORTED for a Git LFS pointer.
    """
    try:
        runner = options.runner(job.candidate).__enter__()
    except CandidateError as error:
        yield from (Judged(job, one, _not_run(one, error, options, job, data, seed)) for one in job.workloads)
        return
    with runner:
        for workload in job.workloads:
            try:
                ready = prepare(workload, data.definitions[job.definition], data.root, seed)
                command = repeat(options, job, ready, data.root, seed)
                outcome = judge_one(
                    runner, job.candidate, workload.short, ready.problem, options, make=ready.make, repeat=command
                )
                if ready.from_files:  # the problem's name does not say everything then
                    verdict = replace(outcome.verdict, problem=f"workload {workload.uuid}")
                    outcome = replace(outcome, verdict=verdict)
            except (FibError, CandidateError) as error:
                outcome = _not_run(workload, error, options, job, data, seed)
            yield Judged(job, workload, outcome)


def _not_run(workload: Workload, error: ValueError, options: Options, job: Job, data: DataSet, seed: int) -> Outcome:
    status = UNSUPPORTED if isinstance(error, FibUnsupported) else ERROR
    figures = Figures(workload.seq_len, workload.offset, 0, 0, 0)
    return Outcome(
        label=workload.short,
        verdict=Verdict(workload.uuid, status, (), "", False, figures, str(error)),
        preset=options.preset,
        seconds=0.0,
        call_seconds=(),
        repeat=_command(job, workload, data.root, seed),
        cause="import" if isinstance(error, CandidateError) else "",
    )


def repeat(options: Options, job: Job, ready: Prepared, root: Path, seed: int) -> str:
    """The command line that judges this one workload again, the same way."""
    problem = ready.problem
    words = shlex.split(options.repeat(job.candidate, problem))
    start = words.index(problem.name) + 1  # the options follow the problem's name
    return shlex.join([*shlex.split(_command(job, ready.workload, root, seed)), *words[start:]])


def _command(job: Job, workload: Workload, root: Path, seed: int) -> str:
    words = ["moeref", "fib", "verify", str(root), "--workload", workload.short]
    words += ["--candidate", job.candidate] if job.name == job.candidate else ["--solution", job.name]
    if seed:
        words += ["--seed", str(seed)]
    return shlex.join(words)
