"""The process in which a candidate is timed: `main` serves commands as moeref.interop.worker does, and these beside:

supports {geometry}             -> reason or null, what an automatic choice picked
open {rotations}                -> the rotations are on the device; one of them may be open at a time
output {rotation, outputs}      -> the output of an untimed call, kept in the file
study                           -> kernels and copies a call, peak workspace of one, notes on what could not be told
expect {rotation, place, limit} -> what outputs are held to
warm_up, capture, close
measure {mode, cache, calls, warm_ups} -> samples

Each is answered by {"event": "done", ...}; what the candidate raises by {"event": "failed", "status", "message",
"traceback"}; a {"event": "beat"} tells in between that it is not hanging.
"""

from __future__ import annotations

import gc
import mmap
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moeref.bench.device_tools import Memory, count_launches
from moeref.bench.rotation import ROTATED
from moeref.bench.session import Session, WrongOutput
from moeref.bench.stopwatch import Stopwatch, stopwatch_for
from moeref.inputs import TENSOR_FIELDS
from moeref.interop.candidates import Candidate, Unsupported
from moeref.interop.observe import CandidateRun, failed
from moeref.interop.shared_inputs import Description, OutputWriter, Place, open_shared
from moeref.interop.worker import Reply, channel, load_candidate, run_candidate
from moeref.judge.verdict import ERROR, FAIL, UNSUPPORTED
from moeref.spec import Geometry


def main(command_fd: int, reply_fd: int) -> None:
    """Serve until the command pipe closes."""
    commands, reply = channel(command_fd, reply_fd)
    candidate: Candidate | None = None
    service: Service | None = None
    device = torch.device("cpu")
    while True:
        command = commands.get()
        if command["do"] == "load":
            device = torch.device(command["device"])
            if device.type == "cuda":
                torch.cuda.set_device(device)
            candidate = load_candidate(command, reply)
            continue
        assert candidate is not None, "nothing before load"
        if command["do"] == "run":
            run_candidate(candidate, command, device, reply)
            gc.collect()  # its inputs on the device go before anybody counts bytes
            continue
        try:
            if service is None:
                service = Service(candidate, device)
            reply("done", **getattr(service, command.pop("do"))(reply=reply, **command))
        except KeyboardInterrupt:
            raise
        except WrongOutput as error:
            reply("failed", status=FAIL, message=str(error), traceback="")
        except Unsupported as error:
            reply("failed", status=UNSUPPORTED, message=str(error), traceback="")
        except BaseException as error:
            told = failed(error, "timing it", CandidateRun())
            reply("failed", status=ERROR, message=told.message, traceback=traceback.format_exc())


class Service:
    """One method a command; keyword arguments are the command's fields, the result is the answer's."""

    def __init__(self, candidate: Candidate, device: torch.device) -> None:
        self.candidate = candidate
        self.device = device
        self.memory = Memory(device) if device.type == "cuda" else None
        self.stopwatch: Stopwatch = self._own(lambda: stopwatch_for(device))
        self.session: Session | None = None

    def supports(self, reply: Reply, geometry: str) -> dict[str, Any]:
        """Why the candidate can't run there; the name that an automatic choice stands for."""
        shape = Geometry.parse(geometry)
        reason = self.candidate.unsupported(shape, self.device)
        chosen = self.candidate
        if reason is None and chosen.resolve is not None:
            chosen = chosen.resolve(shape, self.device)
        return {"reason": reason, "note": chosen.summary if chosen is not self.candidate else ""}

    def open(self, reply: Reply, rotations: list[dict[str, Any]]) -> dict[str, Any]:
        """Map the inputs, move them to the device: the weights once."""
        self.close(reply)
        mapped = [open_shared(Description.from_json(one)).inputs for one in rotations]

        def start() -> Session:
            first = mapped[0].to(self.device)
            kept = {name: getattr(first, name) for name in TENSOR_FIELDS if name not in ROTATED}
            placed = [first]
            for other in mapped[1:]:
                moved = {name: getattr(other, name).to(self.device) for name in ROTATED}
                placed.append(replace(first, **kept, **moved))
            candidate = self.candidate
            if candidate.resolve is not None:
                candidate = candidate.resolve(first.geometry, self.device)
            return Session(candidate, placed, self.stopwatch)

        self.session = self._own(start)
        return {}

    def output(self, reply: Reply, rotation: int, outputs: str) -> dict[str, Any]:
        """An untimed output, in the file."""
        writer = OutputWriter(outputs)
        writer.keep(self._session.output_of(rotation))
        return {"outputs": [place.to_json() for place in writer.places]}

    def expect(self, reply: Reply, rotation: int, place: dict[str, Any], limit: float) -> dict[str, Any]:
        """Take what a rotation's outputs are held to."""
        expected = Place.from_json(place).open(mmap.ACCESS_READ)
        self._own(lambda: self._session.expect(rotation, expected, limit))
        return {}

    def study(self, reply: Reply) -> dict[str, Any]:
        """Kernels a call and peak workspace of one call, before anything is captured. On a CPU neither is measured."""
        if self.memory is None:
            return {"kernels": None, "copies": None, "workspace": None, "notes": []}
        slot = self._session.slots[0]
        if self._session.candidate.release is not None:
            self._session.candidate.release()  # what earlier calls had: this one asks for its own again
        workspace = self.memory.peak_of(slot.eager)
        if slot.buffer is None:
            workspace -= 2 * slot.shape[0] * slot.shape[1]  # the output that it returns
        notes = []
        kernels = copies = None
        try:
            launches = count_launches(slot.eager)
            kernels, copies = launches.kernels, launches.copies
        except Exception as error:  # profiling may be forbidden or missing; the times do not need it
            notes.append(f"kernels not counted: {type(error).__name__}: {error}")
        return {"kernels": kernels, "copies": copies, "workspace": max(0, workspace), "notes": notes}

    def warm_up(self, reply: Reply) -> dict[str, Any]:
        """Untimed calls."""
        self._session.warm_up()
        return {}

    def capture(self, reply: Reply) -> dict[str, Any]:
        """One graph a slot."""
        self._session.capture()
        return {}

    def measure(self, reply: Reply, mode: str, cache: str, calls: int, warm_ups: int) -> dict[str, Any]:
        """Timed calls."""
        samples = self._session.measure(mode, cache, calls, warm_ups, lambda: reply("beat"))
        return {"samples": [[one.seconds, one.host_seconds] for one in samples]}

    def close(self, reply: Reply) -> dict[str, Any]:
        """Give the problem's memory back."""
        if self.session is not None:
            session, self.session = self.session, None
            session.release_graphs()
            gc.collect()
            self._own(session.release)
        return {}

    @property
    def _session(self) -> Session:
        if self.session is None:
            raise RuntimeError("no problem is open")
        return self.session

    def _own(self, make: Callable[[], Any]) -> Any:
        return make() if self.memory is None else self.memory.own(make)
