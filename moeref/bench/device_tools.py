"""What only a GPU has: graphs, a count of kernels, a count of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PROFILED_CALLS = 4


@dataclass
class Captured:
    """A graph of one call, and what the call returned while it was captured: replays write to the same memory."""

    graph: torch.cuda.CUDAGraph
    returned: Any

    def replay(self) -> Any:
        """Run it again on whatever its input buffers hold now."""
        self.graph.replay()
        return self.returned


def capture(call: Callable[[], Any]) -> Captured:
    """Capture a call that has been made before (compilers must not run inside of a capture).

    Once more on a side stream first, as torch asks for: a candidate may keep a workspace for each stream.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        call()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()
    return Captured(graph, returned)


@dataclass(frozen=True)
class Launches:
    """Device activities of one call."""

    kernels: float
    copies: float  # memcpy and memset


def count_launches(call: Callable[[], Any]) -> Launches:
    """From torch's profiler, averaged over PROFILED_CALLS calls. Raises where profiling is not allowed."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(PROFILED_CALLS):
            call()
        torch.cuda.synchronize()
    names = [
        event.name
        for event in record.events() or []
        if str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
    ]
    if not names:
        raise RuntimeError("the profiler saw no kernel")
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return Launches((len(names) - copies) / PROFILED_CALLS, copies / PROFILED_CALLS)


class Memory:
    """Bytes of device memory that torch's allocator has given to the candidate, told from our own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ours = 0

    def own(self, make: Callable[[], Any]) -> Any:
        """What `make` returns; the memory that it took is ours."""
        before = torch.cuda.memory_allocated(self._device)
        made = make()
        self._ours += torch.cuda.memory_allocated(self._device) - before
        return made

    def peak_of(self, call: Callable[[], Any]) -> int:
        """Most bytes beside ours while `call` runs: what it allocates, and what the candidate had kept."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        call()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._ours
