"""Items dealt to the ranks of torchrun, results gathered in order on one of them: what commands call.

torchrun ends all ranks when one process of its own ends or is killed, so a rank's process only watches a working one
(moeref.ranks.watch). Should the former be killed after all, torchrun sends SIGTERM and, half a minute later, SIGKILL:
what is left of the ranks finishes what it can in the meantime, and the lowest of them prints the report.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

from moeref.ranks.board import SILENT, Board, Failed, Pulse, wait_for
from moeref.ranks.watch import Job, Refused, Watch
from moeref.ranks.world import World

GRACE = 30.0
"""Seconds between torchrun's SIGTERM and its SIGKILL."""

LAST_ITEM = 15.0
"""Seconds after SIGTERM in which ranks still begin items."""

LAST_WORD = 22.0
"""Seconds after SIGTERM from which on what is missing is reported as lost; the rest of GRACE is for printing."""

DEAD = 4.0
"""Seconds without a sign after which a rank counts as gone once torchrun has ended the run: eight beats."""


class Over(Exception):
    """Another rank has reported: there is nothing left to do here."""


class Sweep:
    """One job over all ranks; a context manager.

        with Sweep(world, job) as sweep:
            sweep.attend()  # returns on the rank that reports; raises Over on the others when it has
            for result in sweep.results():
                ...
            sweep.finish(code)

    Raises Refused where the task can't be done, e.g. for an unknown candidate.
    """

    def __init__(self, world: World, job: Job) -> None:
        self.world, self.job = world, job
        self._told_to_end: float | None = None  # when SIGTERM came
        self._before: Any = None

    def __enter__(self) -> Sweep:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_term)
        self._board = Board(self.world, owner=True)
        self._pulse = Pulse(self.world)
        self._watch = Watch(self.world, self.job, self._pulse)
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.ending.set()
        self._watch.close()
        if error[0] is not None and not isinstance(error[1], Over):
            with suppress(RuntimeError):
                self._board.put("over", 1)
        self._pulse.stop()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        if self._told_to_end is None:
            self._told_to_end = time.monotonic()

    def _since_term(self) -> float:
        """Seconds since SIGTERM, -1 without one."""
        return -1.0 if self._told_to_end is None else time.monotonic() - self._told_to_end

    def _gone(self, rank: int) -> bool:
        ended = self._since_term()
        if ended < 0:
            return self._pulse.silence(rank) > SILENT
        return self._pulse.silence(rank) > DEAD

    def attend(self) -> None:
        """Return when this rank is to report: at once on rank 0, elsewhere when all lower ones are gone."""
        while not all(self._gone(rank) for rank in range(self.world.rank)):
            if self._board.get("over") is not None:
                self._board.put(f"bye/{self.world.rank}", True)
                raise Over
            self._stop_in_time()
            time.sleep(0.1)

    def _stop_in_time(self) -> None:
        if self._since_term() > (DEAD if self.job.joint else LAST_ITEM):  # nothing can be added up without a rank
            self._watch.ending.set()

    def results(self) -> Iterator[Any]:
        """Each item's result, in order of the items, as soon as it is there; Failed for one that was lost."""
        for index in itertools.count():
            if index == self.job.count:
                return
            result = self._wait_for_result(index)
            if result is None:
                return
            yield result

    def _wait_for_result(self, index: int) -> Any:
        while True:
            result = self._board.get(f"result/{index}")
            if result is not None:
                return result
            refused = self._board.get("refused")
            if refused is not None:
                raise Refused(refused)
            self._stop_in_time()
            ends = {rank: self._board.get(f"end/{rank}") for rank in range(self.world.size)}
            gone = [rank for rank, end in ends.items() if end is None and self._gone(rank)]
            late = self._since_term() > LAST_WORD
            all_ended = all(end is not None or rank in gone for rank, end in ends.items())
            holder = next((rank for rank in gone if self._board.get(f"at/{rank}") == index), None)
            if all_ended or late or holder is not None:
                result = self._board.get(f"result/{index}")  # it may have come in between
                if result is not None:
                    return result
                if self.job.count is None and holder is None:
                    return None  # no such item was begun
                return self._missing(index, holder, gone, ends)
            time.sleep(0.05)

    def _missing(self, index: int, holder: int | None, gone: list[int], ends: dict[int, Any]) -> Failed:
        if holder is not None:
            return Failed(holder, "its process was killed or stopped: it gives no sign")
        said = "; ".join(f"rank {rank} {end}" for rank, end in ends.items() if end not in (None, "done", "ended"))
        lost = ", ".join(f"rank {rank} gives no sign" for rank in gone)
        told = "torchrun ended the run" if self._since_term() >= 0 else ""
        reasons = "; ".join(part for part in (lost, said, told) if part) or "no rank finished it"
        return Failed(-1, f"{reasons} before this problem was done")

    def stop(self) -> None:
        """No rank begins another item."""
        self._board.put("stop", True)

    def finish(self, code: int) -> None:
        """Tell the others to end; end those of this host that give no sign, for which torchrun would wait."""
        self._board.put("over", code)
        others = [rank for rank in range(self.world.size) if rank != self.world.rank]
        wait_for(lambda: all(self._board.get(f"bye/{r}") is not None or self._gone(r) for r in others), SILENT + 5)
        for rank in others:
            if self._board.get(f"bye/{rank}") is None:
                self._pulse.end(rank)


__all__ = ["Failed", "Job", "Over", "Refused", "Sweep", "World"]
