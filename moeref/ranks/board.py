"""What ranks tell each other: objects under names in the launcher's store. Nothing here waits for a rank."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moeref.ranks.world import World

BEAT = 0.5
"""Seconds between two signs of life of a rank."""

SILENT = 20.0
"""Seconds without a sign after which a rank counts as gone: forty beats, of a thread that does nothing else. It is
stopped, killed, or its host is out of reach; work that takes long is done in another process."""

LARGEST = 4 << 20
"""Bytes in one message: the store refuses more than eight million."""


@dataclass(frozen=True)
class Failed:
    """In place of an item's result: the rank that had it did not finish."""

    rank: int  # -1: none had it
    reason: str
    printed: str = ""

    @property
    def sentence(self) -> str:
        """The reason with the rank's name before it."""
        return self.reason if self.rank < 0 else f"rank {self.rank}: {self.reason}"


@dataclass(frozen=True)
class _Parts:
    """Stands for an object that was too large for one message."""

    count: int


class Board:
    """Objects by name, the same for all ranks. Every call returns at once; raises RuntimeError when the store is gone.

    Objects are pickled: only ranks of one run, which run the same code for the same user, know the store.
    """

    def __init__(self, world: World, owner: bool = False) -> None:
        self.world = world
        self._store = world.open_store("board", owner)
        self._lock = threading.Lock()

    def put(self, name: str, what: Any) -> None:
        """Write or overwrite."""
        data = pickle.dumps(what)
        with self._lock:
            if len(data) > LARGEST:
                parts = range(0, len(data), LARGEST)
                for number, start in enumerate(parts):
                    self._store.set(f"{name}/part {number}", data[start : start + LARGEST])
                data = pickle.dumps(_Parts(len(parts)))
            self._store.set(name, data)

    def get(self, name: str) -> Any:
        """The object, or None where there is none yet."""
        with self._lock:
            if not self._store.check([name]):
                return None
            found = pickle.loads(self._store.get(name))
            if isinstance(found, _Parts):
                found = pickle.loads(b"".join(self._store.get(f"{name}/part {i}") for i in range(found.count)))
            return found

    def first(self, name: str, what: Any) -> Any:
        """Write unless somebody has; what stands there."""
        with self._lock:
            if self._store.add(f"{name}/writers", 1) == 1:
                self._store.set(name, pickle.dumps(what))
                return what
            return pickle.loads(self._store.get(name))  # waits for the first writer's next line only

    def take_number(self, name: str) -> int:
        """0, 1, 2 ...: each number once, whichever rank asks."""
        with self._lock:
            return int(self._store.add(name, 1)) - 1


class Pulse:
    """Signs of life: gives this rank's in a thread of its own, and watches those of the others."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._board = Board(world)
        self._seen: dict[int, tuple[Any, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        board, count = Board(self.world), 0
        with suppress(RuntimeError):  # the store is gone: so is the run
            while not self._stop.wait(BEAT if count else 0):
                count += 1
                board.put(f"beat/{self.world.rank}", (count, os.getpid(), socket.gethostname()))

    def stop(self) -> None:
        """No further signs."""
        self._stop.set()
        self._thread.join()

    def silence(self, rank: int) -> float:
        """Seconds since a rank's last sign was seen to be new, by this process's clock; 0 for itself."""
        if rank == self.world.rank:
            return 0.0
        sign, now = self._board.get(f"beat/{rank}"), time.monotonic()
        before = self._seen.get(rank)
        if before is None or before[0] != sign:
            self._seen[rank] = (sign, now)
        return now - self._seen[rank][1]

    def end(self, rank: int) -> bool:
        """Kill another rank's process on this host, which a launcher would wait for; False on other hosts."""
        sign = self._board.get(f"beat/{rank}")
        if sign is None or sign[2] != socket.gethostname() or rank == self.world.rank:
            return False
        with suppress(ProcessLookupError):
            os.kill(sign[1], signal.SIGKILL)
        return True


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True
