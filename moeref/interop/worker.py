"""The process in which a candidate runs: `python -m moeref.interop.worker COMMAND_FD REPLY_FD`, started by runner.

It reads JSON lines from one private pipe and answers on another, so a candidate may print, or close its standard
streams, as it likes. It ends with its whole process group when the command pipe closes: also when its parent dies.

Commands: {"do": "load", "candidate", "folder", "device"} and {"do": "run", "inputs", "then", "poisons", "outputs"}.
Replies: {"event": "ready"}, then to load {"event": "loaded"} or {"event": "refused" or "broken", "message", ...},
to run {"event": "stage", "stage"} at each step and {"event": "done", "run", "outputs", "usable"}.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moeref.interop.candidates import Candidate, CandidateBroken, CandidateError, load
from moeref.interop.observe import CandidateRun, failed, observe
from moeref.interop.shared_inputs import Description, OutputWriter, open_shared

Reply = Callable[..., None]
"""reply(event, **content) writes one line."""


def main(command_fd: int, reply_fd: int) -> None:
    """Serve until the command pipe closes."""
    commands, reply = channel(command_fd, reply_fd)
    candidate: Candidate | None = None
    device = torch.device("cpu")
    while True:
        command = commands.get()
        if command["do"] == "load":
            device = torch.device(command["device"])
            candidate = load_candidate(command, reply)
        else:
            assert candidate is not None, "run before load"
            run_candidate(candidate, command, device, reply)


def channel(command_fd: int, reply_fd: int) -> tuple[queue.SimpleQueue[dict[str, Any]], Reply]:
    """(commands as they come, what answers them); 'ready' has been said. The process ends when the pipe closes."""
    for fd in (command_fd, reply_fd):
        os.set_inheritable(fd, False)  # a process that the candidate starts must not hold them open
    faulthandler.enable()
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(command_fd, commands), daemon=True).start()

    def reply(event: str, **content: Any) -> None:
        line = json.dumps({"event": event, **content}).encode() + b"\n"
        while line:
            line = line[os.write(reply_fd, line) :]

    reply("ready")
    return commands, reply


def load_candidate(command: dict[str, Any], reply: Reply) -> Candidate | None:
    """Serve the command 'load'."""
    try:
        candidate = load(command["candidate"], Path(command["folder"]))
        takes_groups = bool(candidate.geometry_keywords)
        reply("loaded", recipe=candidate.recipe, deterministic=candidate.deterministic, takes_groups=takes_groups)
        return candidate
    except CandidateBroken as error:
        reply("broken", message=str(error), traceback=error.traceback)
    except CandidateError as error:
        reply("refused", message=str(error))
    return None


def run_candidate(candidate: Candidate, command: dict[str, Any], device: torch.device, reply: Reply) -> None:
    """Serve the command 'run'."""
    writer = OutputWriter(command["outputs"])
    run = _run(candidate, command, device, writer, reply)
    run.outputs = []  # they lie in the file
    outputs = [place.to_json() for place in writer.places]
    reply("done", run=vars(run), outputs=outputs, usable=_usable(device, run))


def _run(
    candidate: Candidate,
    command: dict[str, Any],
    device: torch.device,
    writer: OutputWriter,
    reply: Reply,
) -> CandidateRun:
    try:
        opened = open_shared(Description.from_json(command["inputs"]))
        then = open_shared(Description.from_json(command["then"])) if command["then"] else None
        poisons = [float(poison) for poison in command["poisons"]]  # 'nan' travels as text
        run = observe(candidate, opened, device, poisons, writer.keep, lambda stage: reply("stage", stage=stage), then)
    except BaseException as error:
        return failed(error, "opening the inputs", CandidateRun())
    if len(run.outputs) > len(writer.places):  # too large to keep: told by shape and dtype
        writer.note(run.outputs[-1])
    return run


def _usable(device: torch.device, run: CandidateRun) -> bool:
    """Whether this process can go on: after an illegal access a CUDA context is lost for good."""
    if run.status != "error" or device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def _read(command_fd: int, commands: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass commands on; at the end of the pipe end the process and every process that it started."""
    with os.fdopen(command_fd, encoding="utf-8") as lines:
        for line in lines:
            commands.put(json.loads(line))
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
