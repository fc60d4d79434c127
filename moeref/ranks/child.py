"""The process in which a rank works; moeref.interop.child.Child starts it and moeref.ranks.watch drives it.

It may run out of memory, crash or hang: the rank's own process, which does nothing but watch it, goes on.

Commands: {"do": "open", "task", "settings"}, {"do": "item", "index"}, {"do": "go"}.
Replies: {"event": "open"}, {"event": "ready"} where an item goes on together with other ranks after "go",
{"event": "done", "result"}, {"event": "failed", "message", "details"}, {"event": "refused", "message"}.
Settings and results are pickled, in base64.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Generator
from contextlib import ExitStack
from typing import Any

from moeref.interop.candidates import CandidateError
from moeref.spec import SpecError


def pack(what: Any) -> str:
    """As text."""
    return base64.b64encode(pickle.dumps(what)).decode()


def unpack(text: str) -> Any:
    """The inverse of pack."""
    return pickle.loads(base64.b64decode(text))


def main(command_fd: int, reply_fd: int) -> None:
    """Serve until the command pipe closes."""
    for fd in (command_fd, reply_fd):
        os.set_inheritable(fd, False)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(command_fd, commands), daemon=True).start()

    def reply(event: str, **content: Any) -> None:
        line = json.dumps({"event": event, **content}).encode() + b"\n"
        while line:
            line = line[os.write(reply_fd, line) :]

    with ExitStack() as stack:
        do: Any = None
        while True:
            command = commands.get()
            try:
                if command["do"] == "open":
                    module, _, name = command["task"].partition(":")
                    task = getattr(importlib.import_module(module), name)
                    do = stack.enter_context(task(**unpack(command["settings"])))
                    reply("open")
                    continue
                result = do(command["index"])
                if isinstance(result, Generator):
                    result = _together(result, commands, reply)
                reply("done", result=pack(result))
            except (SpecError, CandidateError) as error:  # no item would go better
                reply("refused", message=str(error))
            except Exception as error:
                what = " ".join(str(error).split())[:500]
                memory = isinstance(error, MemoryError) or "out of memory" in what.lower()
                message = f"{'ran out of memory' if memory else type(error).__name__}: {what}"
                reply("failed", message=message, details=traceback.format_exc())


def _together(steps: Generator[None, None, Any], commands: queue.SimpleQueue[dict[str, Any]], reply: Any) -> Any:
    """Run an item's own part, wait for the others to be as far, run the rest; its result."""
    next(steps)
    reply("ready")
    assert commands.get()["do"] == "go"
    try:
        next(steps)
    except StopIteration as end:
        return end.value
    raise RuntimeError("an item stopped twice")


def _read(command_fd: int, commands: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass commands on; at the end of the pipe, also when the rank's process was killed, end with all processes."""
    with os.fdopen(command_fd, encoding="utf-8") as lines:
        for line in lines:
            commands.put(json.loads(line))
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
