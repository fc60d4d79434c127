"""A rank's watch over its working process: hands it items, ends it when it hangs, starts another after it died.

Two ways to share items. `Dealt`: each item goes to the rank that asks next. `Joint`: all ranks do every item together,
each its own part, then add up; when one dies or hangs, the item is lost and all begin the next one with new processes.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from moeref.interop.child import Child, Died, TimedOut
from moeref.ranks.board import SILENT, Board, Failed, Pulse
from moeref.ranks.child import pack, unpack
from moeref.ranks.world import World

LEAST_START = 60.0
"""Seconds that a working process may take to start however short an item's limit is: importing torch from a cold disk,
meeting the other ranks."""

IN_A_ROW = 3
"""Working processes of one rank that may die or hang one after the other before it gives up."""


@dataclass(frozen=True)
class Job:
    """What is to be done. Pickled once; every rank has its own from the same command line."""

    task: str  # module:function, a context manager that yields do(index)
    settings: dict[str, Any]  # its keyword arguments
    count: int | None  # items 0 .. count-1; None: until the time is over
    limit: float  # seconds for one item
    seconds: float | None = None  # no new item after so long
    joint: bool = False


class Refused(ValueError):
    """The task can't be done at all; the message says why."""


class Watch(threading.Thread):
    """Drives one working process after another until the job is done. `ending` stops it after the item in hand."""

    def __init__(self, world: World, job: Job, pulse: Pulse) -> None:
        super().__init__(daemon=True)
        self.world, self.job, self.pulse = world, job, pulse
        self.ending = threading.Event()
        self._board = Board(world)
        self._child: Child | None = None
        self._start = time.monotonic()

    def run(self) -> None:
        """Until no item is left. At its end `end/RANK` stands on the board."""
        reason = ""
        try:
            reason = self._joint() if self.job.joint else self._dealt()
        except Refused as error:
            self._board.first("refused", str(error))
        except Exception:
            if not self.ending.is_set():  # else its working process was ended below its hands, or the store is gone
                raise
            return
        finally:
            self.close()
        self._board.put(f"end/{self.world.rank}", reason or "done")

    def close(self) -> None:
        """End the working process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    # ---- each item by one rank

    def _dealt(self) -> str:
        lost = 0
        while not self._over():
            index = self._board.take_number("next")
            if self.job.count is not None and index >= self.job.count:
                break
            self._board.put(f"at/{self.world.rank}", index)
            try:
                result = self._result(self._ask(index))
            except (Died, TimedOut) as error:
                result = self._lost(error)
                lost += 1
            else:
                lost = 0
            self._board.put(f"result/{index}", result)
            if lost == IN_A_ROW:
                return f"gave up after {lost} processes in a row had died or hung"
        return ""

    def _over(self) -> bool:
        late = self.job.seconds is not None and time.monotonic() - self._start >= self.job.seconds
        return late or self.ending.is_set() or self._board.get("stop") is not None

    def _ask(self, index: int) -> dict[str, Any]:
        """Hand an item to the working process, a new one where there is none. Raises Died, TimedOut, Refused."""
        if self._child is None:
            self._child = Child("moeref.ranks.child")
            self._open(self._child, {})
        self._child.send({"do": "item", "index": index})
        return self._reply(self._child, self.job.limit)

    def _open(self, child: Child, more: dict[str, Any]) -> None:
        child.send({"do": "open", "task": self.job.task, "settings": pack({**self.job.settings, **more})})
        reply = self._reply(child, max(self.job.limit, LEAST_START))
        if reply["event"] == "failed":
            raise Died(f"its process could not begin: {reply['message']}")

    def _reply(self, child: Child, limit: float) -> dict[str, Any]:
        reply = child.receive(limit)
        if reply["event"] == "refused":
            raise Refused(reply["message"])
        return reply

    def _result(self, reply: dict[str, Any]) -> Any:
        if reply["event"] == "failed":
            return Failed(self.world.rank, reply["message"], reply["details"])
        return unpack(reply["result"])

    def _lost(self, error: Died | TimedOut) -> Failed:
        printed = self._child.last_lines() if self._child is not None else ""
        self.close()
        killed = "; its process was killed. --rank-limit sets the limit" if isinstance(error, TimedOut) else ""
        return Failed(self.world.rank, f"{error}{killed}", printed)

    # ---- every item by all ranks

    def _joint(self) -> str:
        assert self.job.count is not None
        index, lost = 0, 0
        for attempt in range(self.job.count + 1):
            try:
                while index < self.job.count:
                    if self.ending.is_set():
                        return "ended"
                    self._board.put(f"at/{self.world.rank}", index)
                    result = self._part(attempt, index)
                    if self.world.rank == 0 or isinstance(result, Failed):
                        self._board.put(f"result/{index}", result)
                    index, lost = index + 1, 0
                return ""
            except _Closed as closed:
                self.close()
                if closed.index < 0:
                    return f"could not go on: {closed.failure.reason}"
                if self._board.get(f"result/{closed.index}") is None:
                    self._board.put(f"result/{closed.index}", closed.failure)
                index, lost = closed.index + 1, lost + 1
                if lost == IN_A_ROW:
                    return f"gave up after {lost} items in a row were lost"
        return ""

    def _part(self, attempt: int, index: int) -> Any:
        """This rank's part of an item, then the sum with all others. Raises _Closed, Refused."""
        try:
            if self._child is None:
                self._child = Child("moeref.ranks.child")
                self._open(self._child, {"group": attempt})
            child = self._child
            child.send({"do": "item", "index": index})
            reply = self._reply(child, self.job.limit)
            if reply["event"] != "ready":  # it failed by itself: out of memory, say
                self._close_attempt(attempt, index, self._result(reply))
            self._board.put(f"ready/{attempt}/{index}/{self.world.rank}", True)
            self._wait_for_all(attempt, index)
            child.send({"do": "go"})
            reply = self._summed(child, attempt, index)
            if reply["event"] == "failed":
                # the partner that was lost names itself; else it is this rank's own failure
                self._watch_closing(attempt, index, SILENT)
                self._close_attempt(attempt, index, self._result(reply))
            return self._result(reply)
        except (Died, TimedOut) as error:
            self._close_attempt(attempt, index, self._lost(error))

    def _summed(self, child: Child, attempt: int, index: int) -> dict[str, Any]:
        """The working process's answer while it adds up with the others; a library may wait for a dead one for ever."""
        end = time.monotonic() + self.job.limit
        while True:
            try:
                return self._reply(child, 0.2)
            except TimedOut:
                self._obey(attempt, index)
                if time.monotonic() > end:
                    raise TimedOut(f"no sum after {self.job.limit:g} s") from None

    def _wait_for_all(self, attempt: int, index: int) -> None:
        missing = [rank for rank in range(self.world.size) if rank != self.world.rank]
        while missing:
            missing = [r for r in missing if self._board.get(f"ready/{attempt}/{index}/{r}") is None]
            self._obey(attempt, index)
            gone = [rank for rank in missing if self.pulse.silence(rank) > SILENT]
            if gone or self.ending.is_set():
                named = gone[0] if gone else -1
                raise _Closed(-1, Failed(named, f"rank {named} gives no sign" if gone else "the run was ended"))
            time.sleep(0.02)

    def _close_attempt(self, attempt: int, index: int, failure: Failed) -> Any:
        """Tell all that this item is lost. Raises _Closed with what was told first."""
        raise _Closed(*self._board.first(f"closed/{attempt}", (index, failure)))

    def _obey(self, attempt: int, index: int) -> None:
        """Raise _Closed where a rank has lost this item or an earlier one; one that lost a later one has done its part
        of this."""
        closed = self._board.get(f"closed/{attempt}")
        if closed is not None and closed[0] <= index:
            raise _Closed(*closed)

    def _watch_closing(self, attempt: int, index: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._obey(attempt, index)
            time.sleep(0.1)


class _Closed(Exception):
    """An item is lost for all ranks; -1: no item can be done any more."""

    def __init__(self, index: int, failure: Failed) -> None:
        super().__init__(failure.reason)
        self.index, self.failure = index, failure
