"""Running a candidate on problem after problem, whatever it does: in a process of its own, or in this one."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moeref.inputs import Inputs
from moeref.interop.candidates import Candidate, CandidateBroken, CandidateError, load, locate
from moeref.interop.child import Child, Died, TimedOut
from moeref.interop.observe import CandidateRun, observe
from moeref.interop.shared_inputs import Description, Place, SharedFile, SharedInputs, open_shared
from moeref.judge.checks import POISONS

__all__ = ["CandidateRun", "Runner"]


class Runner:
    """Calls one candidate on many problems; a context manager.

    candidate      a text that moeref.interop.candidates.load understands.
    device         'cpu', 'cuda' or 'cuda:N'.
    timeout        seconds for one call. The process of a candidate that takes longer is killed, and another started.
    isolate        False: in this process, for debuggers. No time limit, and nothing survives a crash.
    load_timeout   seconds for importing the candidate, for moving the inputs, and, added to `timeout`, for the first
                   call in a process, which may compile.
    Raises CandidateError, at entering or at the first run, when the text names nothing that could be called.
    """

    def __init__(
        self, candidate: str, device: str = "cpu", timeout: float = 300, isolate: bool = True, load_timeout: float = 300
    ) -> None:
        self.candidate = candidate
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.timeout = timeout
        self.isolate = isolate
        self.load_timeout = load_timeout
        self._folder: str | None = None  # for what the candidate's loading writes
        self._worker: Child | None = None
        self._called = False  # the worker has made a call
        self._declared: dict[str, Any] = {}
        self._unloadable: CandidateRun | None = None  # importing failed: it would again
        self._loaded: Candidate | None = None  # in-process

    def __enter__(self) -> Runner:
        locate(self.candidate)
        if self.isolate:
            self._start()  # it imports torch while the caller makes inputs
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker with every process that it started. May be called again; a later run starts anew."""
        self._stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def run(
        self,
        inputs: Description | Inputs,
        *,
        trials: int = 1,
        poisons: Sequence[float] = POISONS,
        then: Inputs | None = None,
    ) -> CandidateRun:
        """Call the candidate on one problem's inputs: `trials` times once for each of `poisons`.

        poisons   what an output buffer holds before each call.
        then      inputs of the same shapes, copied over the first ones in place after the first call.
        A Description (SharedInputs.describe) is mapped without a copy; Inputs are copied. Nothing that the candidate
        does is raised: it stands in the result.
        """
        if self._unloadable is not None:
            return self._unloadable
        with SharedInputs() as shared:
            first = shared.describe(inputs) if isinstance(inputs, Inputs) else inputs
            second = None if then is None else shared.describe(then)
            calls = list(poisons) * trials
            if self.isolate:
                return self._isolated(first, second, calls)
            return self._in_process(first, second, calls)

    # ---- in this process

    def _in_process(self, inputs: Description, then: Description | None, poisons: list[float]) -> CandidateRun:
        if self._loaded is None:
            try:
                self._loaded = load(self.candidate, Path(self._scratch()))
            except CandidateBroken as error:
                self._unloadable = CandidateRun("error", str(error), error.traceback, cause="import")
                return self._unloadable
        return observe(
            self._loaded,
            open_shared(inputs),
            self.device,
            poisons,
            lambda tensor: tensor.cpu().clone(),
            then=None if then is None else open_shared(then),
        )

    # ---- in a worker

    def _isolated(self, inputs: Description, then: Description | None, poisons: list[float]) -> CandidateRun:
        outputs = SharedFile()
        doing = "starting its process"
        try:
            if self._worker is None or not self._worker.alive():
                self._stop()
                self._start()
            assert self._worker is not None
            worker = self._worker
            if not self._declared:
                reply = worker.receive(self.load_timeout)
                assert reply["event"] == "ready", reply
                doing = "importing the candidate"
                self._load(worker)
            worker.printed = b""
            command: dict[str, Any] = {"do": "run", "inputs": inputs.to_json(), "outputs": outputs.path}
            command["then"] = None if then is None else then.to_json()
            command["poisons"] = [str(poison) for poison in poisons]  # NaN is no JSON number
            worker.send(command)
            doing = "preparing"
            while True:
                limit = self.load_timeout
                if doing.startswith("call "):
                    limit = self.timeout + (0 if self._called else self.load_timeout)
                reply = worker.receive(limit)
                if reply["event"] == "done":
                    break
                self._called = self._called or doing.startswith("call ")
                doing = reply["stage"]
            run = CandidateRun(**reply["run"])
            run.outputs = [Place.from_json(place).open(mmap.ACCESS_COPY) for place in reply["outputs"]]
            if run.status == "error":
                run.printed = worker.last_lines()
                run.traceback = _with_print(run.traceback, run.printed)
            if not reply["usable"]:
                self._stop()
            return run
        except (Died, TimedOut) as error:
            printed = self._worker.last_lines() if self._worker is not None else ""
            self._stop()
            message = f"{doing}: {error}"
            if isinstance(error, TimedOut):
                message += "; its process was killed. --timeout sets the limit"
            run = CandidateRun("error", message, _with_print("", printed), printed=printed, **self._declared)
            run.cause = "timeout" if isinstance(error, TimedOut) else ""
            self._declared = {}
            if doing == "importing the candidate":
                self._unloadable = run
            return run
        except _Broken as error:
            printed = self._worker.last_lines() if self._worker is not None else ""
            details = _with_print(error.traceback, printed)
            self._unloadable = CandidateRun("error", str(error), details, printed=printed, cause="import")
            return self._unloadable
        finally:
            outputs.close()

    def _load(self, worker: Child) -> None:
        folder = tempfile.mkdtemp(dir=self._scratch())
        worker.send({"do": "load", "candidate": self.candidate, "folder": folder, "device": str(self.device)})
        reply = worker.receive(self.load_timeout)
        if reply["event"] == "refused":
            self._stop()
            raise CandidateError(reply["message"])
        if reply["event"] == "broken":
            raise _Broken(reply["message"], reply["traceback"])
        self._declared = {name: reply[name] for name in ("recipe", "deterministic", "takes_groups")}

    def _start(self) -> None:
        self._worker = Child()
        self._called, self._declared = False, {}

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _scratch(self) -> str:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="moeref-")
        return self._folder


class _Broken(Exception):
    """Importing the candidate raised."""

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.traceback = details


def _with_print(details: str, printed: str) -> str:
    return details + (f"--- printed last ---\n{printed}\n" if printed else "")
