"""Timing one call: on a GPU by events, on a CPU by the clock; and emptying the caches before it.

What a figure means (docs/benchmarking.md says why):
graph   the device's time from just before to just after one replay, queued behind other work: no launch from the host.
eager   the device's time from an idle device to the end of the call, so that it waits for the host where it must; and
        beside it the host's time until the call returns, without waiting for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

GRAPH, EAGER = "graph", "eager"
COLD, WARM = "cold", "warm"

CACHES = 4
"""Each of the two flush buffers holds so many times the cache's bytes."""

LEAST_FLUSH = 128 * 2**20
"""Bytes of a flush buffer at least: last-level caches of CPUs do not tell their size."""

QUEUE_CYCLES = 200_000
"""Cycles (about 0.1 ms) that the device is kept busy before a replay, while the host queues events and replay."""


@dataclass(frozen=True)
class Timed:
    """One timed call."""

    seconds: float
    host_seconds: float | None  # until the call returned; None where that is the same, or nobody waits for it
    returned: Any


class Stopwatch(Protocol):
    """What times calls. Fake ones stand in for it in tests."""

    def flush(self) -> None:
        """Fill the caches with data that no call uses, none of it waiting to be written back."""

    def synchronise(self) -> None:
        """Wait until all that was asked for is done."""

    def time(self, call: Callable[[], Any], mode: str) -> Timed:
        """Call once and say how long it took."""


class Flush:
    """Two buffers larger than the cache: one is written, then the other one read.

    Writing alone leaves the cache full of modified lines, and the timed call would pay for writing them back: about
    10 us on an H100. Reading the second buffer displaces them first.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self.nbytes = max(CACHES * cache, LEAST_FLUSH)  # of each buffer
        self._written = torch.zeros(self.nbytes // 4, dtype=torch.float32, device=device)
        self._read = torch.zeros(self.nbytes // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        """Queue the write and the read."""
        self._written.zero_()
        self._read.sum()


class CpuStopwatch:
    """perf_counter around the call. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._flush: Flush | None = None

    def flush(self) -> None:
        """Write 128 MB, then read other 128 MB."""
        if self._flush is None:
            self._flush = Flush(torch.device("cpu"))
        self._flush()

    def synchronise(self) -> None:
        """Nothing runs behind a CPU call's back."""

    def time(self, call: Callable[[], Any], mode: str) -> Timed:
        """Eager only. Raises ValueError for another mode."""
        if mode != EAGER:
            raise ValueError(f"mode {mode}: a CPU has eager calls only")
        start = self._clock()
        returned = call()
        return Timed(self._clock() - start, None, returned)


class CudaStopwatch:
    """CUDA events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = Flush(device)

    def flush(self) -> None:
        """Write four times the L2's size, then read as much elsewhere."""
        self._flush()

    def synchronise(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self._device)

    def time(self, call: Callable[[], Any], mode: str) -> Timed:
        """Queued behind busy work (graph), or from an idle device (eager)."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        host: float | None = None
        if mode == GRAPH:
            torch.cuda._sleep(QUEUE_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            returned = call()
        else:
            self.synchronise()
            begin.record()
            start = time.perf_counter()
            returned = call()
            host = time.perf_counter() - start
        end.record()
        self.synchronise()
        return Timed(begin.elapsed_time(end) / 1e3, host, returned)


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The one that fits the device."""
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()
