"""One child process that serves commands over two private pipes, and can be killed with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Any

TAIL_LINES = 40
"""Lines of what a candidate printed last that a failure carries: a crash's dump of two threads is 25."""

TAIL_BYTES = 1 << 16

START = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
main = importlib.import_module(sys.argv.pop(1)).main
command_fd, reply_fd = (int(fd) for fd in sys.argv[1:])
del sys.argv[1:]
main(command_fd, reply_fd)
"""  # the child finds modules where this process does


class Died(Exception):
    """The child ended by itself; says how."""


class TimedOut(Exception):
    """The child did not answer in time."""


class Child:
    """One child process, its two pipes, and the end of what it printed.

    module   its `main(command_fd, reply_fd)` serves: JSON lines come in on one pipe, go out on the other.
    """

    def __init__(self, module: str = "moeref.interop.worker") -> None:
        command_read, self._commands = os.pipe()
        self._replies, reply_write = os.pipe()
        self.printed = b""
        self._received = b""
        self._closed = False  # the reply pipe
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                START,
                json.dumps([str(entry) for entry in sys.path]),
                module,
                str(command_read),
                str(reply_write),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(command_read, reply_write),
            start_new_session=True,  # a process group of its own, which can be killed as one
        )
        os.close(command_read)
        os.close(reply_write)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        for fd in (self._replies, self._output):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def send(self, command: dict[str, Any]) -> None:
        """Raises Died."""
        line = json.dumps(command).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._commands, line) :]
        except BrokenPipeError:
            raise self._death() from None

    def receive(self, limit: float) -> dict[str, Any]:
        """The next reply. Raises Died, or TimedOut after `limit` seconds."""
        deadline = time.monotonic() + limit
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOut(f"no end after {limit:g} s")
            self._selector.select(min(left, 0.25))
            ended = not self.alive()  # asked before reading: what it wrote before its end is read below
            self._drain()
            if b"\n" not in self._received and (ended or self._closed):
                raise self._death()
        line, _, self._received = self._received.partition(b"\n")
        try:
            reply = json.loads(line)
        except ValueError:
            raise Died("it wrote into the pipe between moeref and its process") from None
        assert isinstance(reply, dict)
        return reply

    def _drain(self) -> None:
        """Read what is there to read."""
        for fd in [key.fd for key in self._selector.get_map().values()]:
            data, count = b"?", 0
            while data and count < 64:  # a candidate that prints without end must not keep us here
                count += 1
                try:
                    data = os.read(fd, TAIL_BYTES)
                except BlockingIOError:
                    break
                if fd == self._replies:
                    self._received += data
                else:
                    self.printed = (self.printed + data)[-TAIL_BYTES:]
            if not data:
                self._selector.unregister(fd)
                self._closed |= fd == self._replies

    def _death(self) -> Died:
        try:
            code = self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return Died("it closed the pipe between moeref and its process")
        self._drain()
        if code >= 0:
            return Died(f"its process ended with exit code {code} (os._exit or the like)")
        name = signal.Signals(-code).name
        what = signal.strsignal(-code) or ""
        hint = ": most likely the system ran out of memory" if name == "SIGKILL" else ""
        return Died(f"its process was ended by {name} ({what.lower()}){hint}")

    def last_lines(self) -> str:
        """The last lines on stdout and stderr."""
        self._drain()
        lines = self.printed.decode(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join(line[:500] for line in lines)

    def kill(self) -> None:
        """End the process and its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._selector.close()
        os.close(self._commands)
        os.close(self._replies)
        if self._process.stdout is not None:
            self._process.stdout.close()
