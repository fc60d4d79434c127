"""Candidates on problems, one problem after another: judged first, then timed in turn. The CLI calls this."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moeref.bench.ceilings import Ceilings, measure_ceilings
from moeref.bench.lane import Lane, LaneFailed, Shared, Study
from moeref.bench.references import NONE, PUBLISHED, REFERENCES, published_moe, seconds_of, timed_moe
from moeref.bench.result import Latency, Row
from moeref.bench.rotation import ROTATED, Work, make_rotations, rows_of_expert
from moeref.bench.stats import percentile, spread
from moeref.bench.stopwatch import COLD, EAGER, GRAPH, WARM
from moeref.inputs import Inputs
from moeref.interop.observe import CandidateRun
from moeref.interop.shared_inputs import Description, Place, SharedInputs
from moeref.judge.verdict import AUTO, ERROR, PASS, UNSUPPORTED, Known, judge
from moeref.reference import Trace, permute, route
from moeref.routings import CAPTURED, draw_routing
from moeref.spec import Problem, Recipe, SpecError
from moeref.verify import LEAST_START
from moeref.verify import Options as VerifyOptions

BLOCK_OF_CALLS = 5
"""Timed calls of one candidate before the next one's turn on a GPU, where changing processes costs a warm-up call. On a
CPU candidates take turns call by call."""

LEAST_CALLS = 3
"""Timed calls of each kind, however short --seconds is."""

LEAST_LIMIT = 2.0**-7
"""Two bfloat16 roundings, the output's and the expected one's, are 2**-9 of an element each at most; times two."""

SLACK = 2.0
"""A timed output's row may be so many times further off than the worst row that the judge passed. Another order of
summation moves it by less than all roundings of the recipe do, and these are within the worst row."""

PUBLISHED_REPEATS = 3


@dataclass(frozen=True)
class Options:
    """How to time. Defaults are the CLI's on a CPU."""

    device: str = "cpu"
    recipe: str = AUTO
    modes: tuple[str, ...] = (EAGER,)  # of 'graph', 'eager'
    caches: tuple[str, ...] = (COLD,)  # of 'cold', 'warm'
    repeat: int = 30  # timed calls of each mode and cache
    seconds: float = 10.0  # of timing, a candidate and problem; ends earlier than `repeat` where calls are long
    rotations: int = 3
    reference: str = "moeref"
    timeout: float = 300.0  # seconds for one call
    routing_from: str = ""  # where routing kinds that are read from files were found; only repeated, not opened

    def __post_init__(self) -> None:
        if self.repeat < LEAST_CALLS:
            raise SpecError(f"repeat={self.repeat}: expected at least {LEAST_CALLS}, a spread needs some")
        if self.rotations < 2:
            raise SpecError(f"rotations={self.rotations}: expected at least 2, or a kept output would pass")
        if not self.seconds > 0 or not self.timeout > 0:
            raise SpecError(f"seconds={self.seconds:g}, timeout={self.timeout:g}: expected more than 0")
        if self.reference not in REFERENCES:
            raise SpecError(f"reference '{self.reference}': expected one of {', '.join(REFERENCES)}")
        if GRAPH in self.modes and torch.device(self.device).type != "cuda":
            raise SpecError("mode graph: CUDA graphs need a GPU; use --mode eager")
        if self.recipe != AUTO:
            Recipe.parse(self.recipe)

    @property
    def ways(self) -> list[tuple[str, str]]:
        """(mode, cache), the one that decides first: graphs before eager calls, cold before warm."""
        return [(m, c) for m in (GRAPH, EAGER) for c in (COLD, WARM) if m in self.modes and c in self.caches]


@dataclass
class Entry:
    """One candidate on the problem in hand."""

    lane: Lane
    status: str = PASS  # of what was seen so far
    message: str = ""
    traceback: str = ""
    recipe: str = ""
    declared: CandidateRun = field(default_factory=CandidateRun)
    worst_row: float = 0.0
    study: Study = field(default_factory=Study)
    ways: list[tuple[str, str]] = field(default_factory=list)
    samples: dict[tuple[str, str], list[tuple[float, float | None]]] = field(default_factory=dict)
    spent: float = 0.0
    notes: list[str] = field(default_factory=list)
    judged: bool = False  # the first verdict has passed: a failure after that is one of timing

    def end(self, status: str, message: str, traceback: str = "") -> None:
        """No further call on this problem."""
        self.status, self.message, self.traceback = status, message, traceback

    def attempt(self, step: Callable[..., None], *arguments: Any) -> bool:
        """Do a step; True if it went well. A failure ends the entry."""
        try:
            step(*arguments)
        except LaneFailed as error:
            self.end(error.status, str(error), error.traceback)
        return self.status == PASS


class Bench:
    """A context manager that holds one process a candidate. Raises CandidateError for a text that names none."""

    def __init__(
        self, candidates: Sequence[str], options: Options, announce: Callable[[str], None] = lambda what: None
    ) -> None:
        """announce is told what is being done, for a progress bar."""
        self.options = options
        self.announce = announce
        self.device = torch.device(options.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        start = max(options.timeout, LEAST_START)
        self.lanes = [Lane(candidate, str(self.device), options.timeout, start) for candidate in candidates]
        self.tracebacks: list[str] = []  # of the last problem, for --debug

    def __enter__(self) -> Bench:
        for lane in self.lanes:
            lane.start()
        return self

    def __exit__(self, *error: object) -> None:
        for lane in self.lanes:
            lane.close()

    def ceilings(self) -> Ceilings:
        """The machine's, measured now."""
        self.announce("what the machine can do")
        found = measure_ceilings(self.device)
        self._empty()
        return found

    def run(self, label: str, problem: Problem, ceilings: Ceilings) -> list[Row]:
        """Every candidate's row for one problem."""
        entries = [Entry(lane, ways=list(self.options.ways)) for lane in self.lanes]
        work, reference = work_of(problem), None
        try:
            for entry in entries:
                entry.attempt(self._ask_support, entry, problem)
            if _live(entries):
                work, reference = self._judge_and_time(problem, entries)
        except torch.cuda.OutOfMemoryError as error:
            for entry in _live(entries):
                entry.end(ERROR, f"the judge ran out of GPU memory: {str(error).splitlines()[0]}")
        finally:
            for entry in entries:
                if entry.status == ERROR:
                    entry.lane.stop()  # after an illegal access a CUDA context is lost: the next problem gets a new one
                else:
                    entry.lane.release()
            self._empty()
        self.tracebacks = [entry.traceback for entry in entries if entry.traceback]
        rows = [self._row(label, problem, entry, work, reference, ceilings) for entry in entries]
        first = rows[0]
        return [replace(row, ratio=_ratio(row, first)) for row in rows]

    # ---- judged first

    def _ask_support(self, entry: Entry, problem: Problem) -> None:
        reason, note = entry.lane.supports(problem.geometry.code)
        if reason is not None:
            entry.end(UNSUPPORTED, reason)
        if note:
            entry.notes.append(note)

    def _judge_and_time(self, problem: Problem, entries: list[Entry]) -> tuple[Work, float | None]:
        with SharedInputs() as shared, ExitStack() as stack:
            self.announce("inputs")
            rotations = make_rotations(problem, self.options.rotations, shared.allocate)
            described = [shared.describe(one) for one in rotations]
            work = Work.mean([Work.of(problem.geometry, rows_of_expert(one)) for one in rotations])
            first = rotations[0].to(self.device)
            seconds: list[float] = []
            expected: list[Place] = []
            for number, one in enumerate(rotations):
                self.announce(f"reference {number + 1} of {len(rotations)}")
                placed = replace(first, **{name: getattr(one, name).to(self.device) for name in ROTATED})
                trace, took = timed_moe(placed)
                seconds.append(took)
                expected.append(stack.enter_context(Shared(trace.output.cpu())))
                self._judge_all(problem, entries, number, described, placed, trace)
                del trace
            reference = self._reference(first, seconds, bool(_live(entries)))
            del first
            self._empty()
            for entry in _live(entries):
                self.announce(f"{entry.lane.candidate}: warm-up")
                entry.attempt(self._prepare, entry, described, expected)
            self._take_turns(_live(entries))
        return work, reference

    def _judge_all(
        self,
        problem: Problem,
        entries: list[Entry],
        number: int,
        described: list[Description],
        placed: Inputs,
        trace: Trace,
    ) -> None:
        """Judge every candidate's output for one rotation."""
        known = Known(trace, placed)
        for entry in _live(entries):
            self.announce(f"{entry.lane.candidate}: judging rotation {number + 1} of {len(described)}")
            if number == 0:
                run = entry.lane.run(described[0])
                entry.declared, entry.traceback = run, run.traceback
            else:
                run = replace(entry.declared, outputs=[], poisoned=False)
                if not entry.attempt(_call_untimed, entry.lane, number, run):
                    continue
            recipe = entry.declared.recipe if self.options.recipe == AUTO else self.options.recipe
            verdict = judge(problem.name, placed, trace, run, recipe, known=known)
            if verdict.status != PASS:
                where = f"rotation {number} of the inputs: " if number else ""
                entry.end(verdict.status, where + verdict.message, run.traceback)
                continue
            entry.recipe = entry.recipe or verdict.recipe
            entry.worst_row = max(entry.worst_row, verdict.figures.worst_row or 0.0)
            entry.declared = replace(run, outputs=[])
            if number == 0:
                entry.judged = entry.attempt(entry.lane.open, described)

    def _reference(self, first: Inputs, seconds: list[float], needed: bool) -> float | None:
        if self.options.reference == NONE:
            return None
        if self.options.reference == PUBLISHED and needed:
            self.announce("the published way")
            return percentile(seconds_of(lambda: published_moe(first), self.device, PUBLISHED_REPEATS), 0.5)
        return percentile(seconds, 0.5)

    # ---- then timed

    def _prepare(self, entry: Entry, described: list[Description], expected: list[Place]) -> None:
        """Expected outputs, warm-ups, what a call costs beside time, graphs."""
        lane = entry.lane
        limit = max(LEAST_LIMIT, SLACK * entry.worst_row)

        def ready() -> None:
            for number, place in enumerate(expected):
                lane.expect(number, place, limit)
            lane.warm_up()

        ready()
        entry.study = lane.study()
        entry.notes += entry.study.notes
        if any(mode == GRAPH for mode, _ in entry.ways):
            try:
                lane.capture()
            except LaneFailed as error:
                # a capture that broke off may leave the process unusable: go on in a fresh one, without graphs
                entry.notes.append(f"no CUDA graph, eager calls only: {error}")
                entry.ways = [(EAGER, cache) for cache in self.options.caches]
                lane.stop()
                lane.open(described)
                ready()

    def _take_turns(self, entries: list[Entry]) -> None:
        """A, B, A, B, ...: what changes while the machine runs hits all alike."""
        on_gpu = self.device.type == "cuda"
        block = BLOCK_OF_CALLS if on_gpu else 1
        rounds = math.ceil(self.options.repeat / block)
        for number in range(rounds):
            for entry in _live(entries):
                counts = [len(entry.samples.get(way, ())) for way in entry.ways]
                if entry.spent > self.options.seconds and min(counts) >= LEAST_CALLS:
                    continue
                self.announce(f"{entry.lane.candidate}: round {number + 1} of {rounds}")
                start = time.perf_counter()
                entry.attempt(self._one_turn, entry, block, int(on_gpu))
                entry.spent += time.perf_counter() - start

    def _one_turn(self, entry: Entry, calls: int, warm_ups: int) -> None:
        for way in entry.ways:
            left = self.options.repeat - len(entry.samples.get(way, ()))
            if left > 0:
                entry.samples.setdefault(way, []).extend(entry.lane.measure(*way, min(calls, left), warm_ups))

    # ---- and told

    def _row(
        self, label: str, problem: Problem, entry: Entry, work: Work, reference: float | None, ceilings: Ceilings
    ) -> Row:
        passed = entry.status == PASS
        latencies = {f"{mode} {cache}": _latency(entry.samples[mode, cache]) for mode, cache in entry.ways if passed}
        return Row(
            label=label,
            problem=problem.name,
            candidate=entry.lane.candidate,
            status=entry.status,
            message=entry.message,
            repeat=self._repeat(entry, problem),
            seq_len=problem.seq_len,
            offset=problem.offset,
            **vars(work),
            floor=ceilings.floor(work),
            bound=ceilings.bound(work),
            reference=reference,
            recipe=entry.recipe if passed else "",
            worst_row=entry.worst_row if passed else None,
            latencies=latencies,
            primary=next(iter(latencies), ""),
            kernels=entry.study.kernels if passed else None,
            copies=entry.study.copies if passed else None,
            workspace=entry.study.workspace if passed else None,
            notes=tuple(entry.notes),
        )

    def _repeat(self, entry: Entry, problem: Problem) -> str:
        """The command that shows the same again: verify where that already fails."""
        if not entry.judged:
            mine = self.options
            options = VerifyOptions(mine.device, mine.recipe, timeout=mine.timeout, routing_from=mine.routing_from)
            return options.repeat(entry.lane.candidate, problem)
        words = ["moeref", "bench", entry.lane.candidate, "--problem", problem.name]
        if self.options.device != "cpu":
            words += ["--device", self.options.device]
        if self.options.routing_from and problem.routing.startswith(CAPTURED):
            words += ["--routing-from", self.options.routing_from]
        return shlex.join(words)

    def _empty(self) -> None:
        """Leave the GPU's memory to the candidates."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _live(entries: list[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.status == PASS]


def _call_untimed(lane: Lane, rotation: int, run: CandidateRun) -> None:
    run.outputs.append(lane.output(rotation))


def work_of(problem: Problem) -> Work:
    """The work of a problem's own routing, without making its inputs."""
    logits, bias = (torch.from_numpy(part) for part in draw_routing(problem))
    routing = route(logits, bias, problem.geometry, problem.factor)
    offsets = permute(routing.topk_ids, problem.geometry, problem.offset).expert_offsets
    return Work.of(problem.geometry, offsets.diff())


def _latency(samples: list[tuple[float, float | None]]) -> Latency:
    host = [one for _, one in samples if one is not None]
    return Latency(spread([seconds for seconds, _ in samples]), spread(host) if host else None)


def _ratio(row: Row, first: Row) -> float | None:
    """Time over the first candidate's, where both were called in the same way."""
    if row.seconds is None or first.seconds is None or row.primary != first.primary:
        return None
    return row.seconds / first.seconds
