"""What only a GPU has, with a torch.cuda that writes down what it is asked: events, graphs, launches, bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeref.bench import device_tools
from moeref.bench.stopwatch import EAGER, GRAPH, CudaStopwatch, Flush
from moeref.bench.worker import Service
from moeref.interop.candidates import Candidate


def test_the_candidates_memory_is_told_from_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: Iterator[int] = iter([100, 1100])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1850)
    memory = device_tools.Memory(torch.device("cpu"))
    assert memory.own(lambda: "inputs") == "inputs"
    assert memory.peak_of(lambda: None) == 850  # 100 kept from before, 750 in this call


@pytest.mark.parametrize(("releases", "bytes_"), [(True, 700), (False, 1700)])
def test_a_call_that_gives_back_what_it_kept_is_told_its_own_workspace(
    releases: bool, bytes_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate that keeps 1000 bytes of an earlier problem, and 700 of each call."""
    kept = {"earlier": 1000, "this": 700}
    service = Service.__new__(Service)
    candidate = Candidate("mine", lambda *ten, out: None, release=kept.clear if releases else None)
    slot = SimpleNamespace(eager=lambda: kept.update(this=700), buffer=torch.empty(0), shape=(1, 1))
    service.session = SimpleNamespace(slots=[slot], candidate=candidate)  # type: ignore[assignment]

    def peak_of(call: Any) -> int:
        call()
        return sum(kept.values())

    service.memory = SimpleNamespace(peak_of=peak_of)  # type: ignore[assignment]
    monkeypatch.setattr("moeref.bench.worker.count_launches", lambda call: device_tools.Launches(3, 0))
    told = service.study(lambda *event, **fields: None)
    assert (told["workspace"], told["kernels"], told["notes"]) == (bytes_, 3, [])


class FakeCuda:
    """The part of torch.cuda that timing uses: writes down the order; events are a millisecond apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        seen = self.seen
        made = iter(range(100))

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.name = ("begin", "end")[next(made) % 2]

            def record(self) -> None:
                seen.append(self.name)

            def elapsed_time(self, other: Event) -> float:
                assert (self.name, other.name) == ("begin", "end")
                return 1.5

        class Stream:
            def wait_stream(self, other: Any) -> None:
                seen.append("wait for a stream")

        @contextlib.contextmanager
        def noted(name: str) -> Iterator[None]:
            seen.append(name)
            yield
            seen.append(f"end of {name}")

        class CUDAGraph:
            def replay(self) -> None:
                seen.append("replay")

        fakes = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "current_stream": Stream,
            "stream": lambda side: noted("side stream"),
            "graph": lambda graph: noted("capture"),
            "synchronize": lambda device=None: seen.append("synchronize"),
            "_sleep": lambda cycles: seen.append("sleep"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_events_stand_around_the_call_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    watch = CudaStopwatch.__new__(CudaStopwatch)  # its flush asks for a real device
    watch._device = torch.device("cuda", 0)
    took = watch.time(lambda: cuda.seen.append("call"), GRAPH)
    assert cuda.seen == ["sleep", "begin", "call", "end", "synchronize"]
    assert took.seconds == pytest.approx(1.5e-3) and took.host_seconds is None
    cuda.seen.clear()
    took = watch.time(lambda: cuda.seen.append("call"), EAGER)
    assert cuda.seen == ["synchronize", "begin", "call", "end", "synchronize"]
    assert took.seconds == pytest.approx(1.5e-3) and took.host_seconds is not None and took.host_seconds < 1.0


def test_a_graph_is_captured_after_a_call_on_a_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def call() -> str:
        cuda.seen.append("call")
        return "result"

    captured = device_tools.capture(call)
    wait = "wait for a stream"
    before = [wait, "side stream", "call", "end of side stream", wait, "synchronize"]
    assert cuda.seen == [*before, "capture", "call", "end of capture"]
    cuda.seen.clear()
    assert captured.replay() == "result" and cuda.seen == ["replay"]


def test_launches_are_counted_on_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    one_call = [("route", "CUDA"), ("experts", "CUDA"), ("Memset (Device)", "CUDA"), ("cudaLaunchKernel", "CPU")]
    names = one_call * device_tools.PROFILED_CALLS

    class Profile:
        def __init__(self, activities: Any) -> None: ...

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *error: object) -> None: ...

        def events(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name=name, device_type=f"DeviceType.{where}") for name, where in names]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    calls: list[int] = []
    assert device_tools.count_launches(lambda: calls.append(1)) == device_tools.Launches(kernels=2, copies=1)
    assert len(calls) == device_tools.PROFILED_CALLS
    names.clear()
    with pytest.raises(RuntimeError, match="saw no kernel"):
        device_tools.count_launches(lambda: None)


def test_a_flush_writes_and_reads_more_than_the_cache() -> None:
    flush = Flush(torch.device("cpu"))
    flush._written.fill_(1)
    flush()
    assert flush.nbytes == flush._written.nbytes == flush._read.nbytes >= 128 * 2**20
    assert not bool(flush._written.any())
