"""One candidate's process, as the process that judges sees it."""

from __future__ import annotations

import contextlib
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from moeref.interop.candidates import CandidateError, locate
from moeref.interop.child import Child, Died, TimedOut
from moeref.interop.observe import CandidateRun
from moeref.interop.shared_inputs import Description, Place, SharedFile
from moeref.judge.checks import POISONS
from moeref.judge.verdict import ERROR

WORKER = "moeref.bench.worker"


class LaneFailed(Exception):
    """The candidate raised, hung or died (ERROR), gave an output that is not that of its inputs (FAIL), or raised
    moeref.interop.candidates.Unsupported (UNSUPPORTED): the problem's status."""

    def __init__(self, message: str, status: str = ERROR, traceback: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.traceback = traceback


@dataclass(frozen=True)
class Study:
    """What one call costs beside time; None where it was not measured."""

    kernels: float | None = None
    copies: float | None = None  # memcpy and memset
    workspace: int | None = None  # bytes
    notes: list[str] = field(default_factory=list)


class Shared:
    """A tensor's values in memory that a worker can map; a context manager."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._file = SharedFile(tensor.nbytes)
        name = str(tensor.dtype).removeprefix("torch.")
        self.place = Place(self._file.path, 0, tuple(tensor.shape), name)
        if tensor.numel():
            self.place.open(mmap.ACCESS_WRITE).copy_(tensor)

    def __enter__(self) -> Place:
        return self.place

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Lane:
    """Starts a worker when one is needed. What asks the worker raises LaneFailed; one that hung or died is gone then,
    and with it what was open there. A text that names no candidate raises CandidateError."""

    def __init__(self, candidate: str, device: str, timeout: float, start_timeout: float) -> None:
        """Raises CandidateError where the text names nothing; timeouts in seconds, for a call and for starting up."""
        locate(candidate)
        self.candidate = candidate
        self.device = device
        self.timeout = timeout
        self.start_timeout = start_timeout
        self._child: Child | None = None
        self._loaded = False
        self._broken: LaneFailed | None = None  # importing failed: it would again
        self._folder = tempfile.mkdtemp(prefix="moeref-")

    def start(self) -> None:
        """Start the process; it imports torch while the caller does something else."""
        if self._child is None or not self._child.alive():
            self.stop()
            self._child, self._loaded = Child(WORKER), False

    def stop(self) -> None:
        """End the process with all that it started."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def close(self) -> None:
        """The end: no further call."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- what the worker is asked

    def supports(self, geometry: str) -> tuple[str | None, str]:
        """(why it can't run there or None, what an automatic choice stands for)."""
        reply = self._ask("supports", self.start_timeout, geometry=geometry)
        return reply["reason"], reply["note"]

    def run(self, inputs: Description) -> CandidateRun:
        """Call it as `verify` does; nothing that it does is raised."""
        with self._file() as file:
            try:
                command = {"inputs": inputs.to_json(), "then": None, "poisons": [str(poison) for poison in POISONS]}
                reply = self._ask("run", self.timeout + self.start_timeout, **command, outputs=file.path)
            except LaneFailed as error:
                return CandidateRun("error", str(error), error.traceback)
            run = CandidateRun(**reply["run"])
            run.outputs = [Place.from_json(place).open(mmap.ACCESS_COPY) for place in reply["outputs"]]
            if not reply["usable"]:
                self.stop()
            return run

    def open(self, rotations: list[Description]) -> None:
        """Give it a problem's rotations."""
        self._ask("open", self.start_timeout, rotations=[one.to_json() for one in rotations])

    def output(self, rotation: int) -> torch.Tensor:
        """The output of an untimed call, [T, H] bfloat16 on the CPU."""
        with self._file() as file:
            reply = self._ask("output", self.timeout + self.start_timeout, rotation=rotation, outputs=file.path)
            return Place.from_json(reply["outputs"][0]).open(mmap.ACCESS_COPY)

    def expect(self, rotation: int, place: Place, limit: float) -> None:
        """Tell it what a rotation's outputs are held to."""
        self._ask("expect", self.start_timeout, rotation=rotation, place=place.to_json(), limit=limit)

    def study(self) -> Study:
        """What a call costs beside time."""
        reply = self._ask("study", 16 * self.timeout)
        return Study(**{name: reply[name] for name in ("kernels", "copies", "workspace", "notes")})

    def warm_up(self) -> None:
        """Untimed calls."""
        self._ask("warm_up", 16 * self.timeout)

    def capture(self) -> None:
        """Capture graphs."""
        self._ask("capture", 16 * self.timeout)

    def measure(self, mode: str, cache: str, calls: int, warm_ups: int) -> list[tuple[float, float | None]]:
        """(seconds, host seconds) of each call."""
        reply = self._ask("measure", 2 * self.timeout, mode=mode, cache=cache, calls=calls, warm_ups=warm_ups)
        return [(seconds, host) for seconds, host in reply["samples"]]

    def release(self) -> None:
        """Give the problem's memory back; a worker that can't is ended."""
        if self._child is not None and self._loaded:
            try:
                self._ask("close", self.start_timeout)
            except LaneFailed:
                self.stop()

    # ---- how

    def _ask(self, do: str, wait: float, **fields: Any) -> dict[str, Any]:
        if self._broken is not None:
            raise self._broken
        doing = "starting its process"
        try:
            self.start()
            assert self._child is not None
            if not self._loaded:
                self._child.receive(self.start_timeout)  # ready
                doing = "importing the candidate"
                self._load(self._child)
            doing = {"run": "calling it", "output": "calling it"}.get(do, f"timing it ({do})")
            self._child.printed = b""
            self._child.send({"do": do, **fields})
            while True:
                reply = self._child.receive(wait)
                if reply["event"] == "failed":
                    raise LaneFailed(reply["message"], reply["status"], reply["traceback"])
                if reply["event"] == "done":
                    return reply
        except (Died, TimedOut) as error:
            printed = self._child.last_lines() if self._child is not None else ""
            self.stop()
            hint = "; its process was killed. --timeout sets the limit" if isinstance(error, TimedOut) else ""
            told = LaneFailed(f"{doing}: {error}{hint}", traceback=printed)
            if doing == "importing the candidate":
                self._broken = told
            raise told from None

    def _load(self, child: Child) -> None:
        folder = tempfile.mkdtemp(dir=self._folder)
        child.send({"do": "load", "candidate": self.candidate, "folder": folder, "device": self.device})
        reply = child.receive(self.start_timeout)
        if reply["event"] == "refused":
            self.stop()
            raise CandidateError(reply["message"])
        if reply["event"] == "broken":
            self._broken = LaneFailed(reply["message"], traceback=reply["traceback"])
            raise self._broken
        self._loaded = True

    @staticmethod
    @contextlib.contextmanager
    def _file() -> Iterator[SharedFile]:
        file = SharedFile()
        try:
            yield file
        finally:
            file.close()
