"""What happens around one timed call, with a clock that tells what it is told: order, figures, and cheats found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moeref.bench import device_tools
from moeref.bench.rotation import ROTATED, Work, exchanged, make_rotations, rows_of_expert
from moeref.bench.session import Content, Session, WrongOutput, copy_moved
from moeref.bench.stats import percentile, spread
from moeref.bench.stopwatch import COLD, EAGER, GRAPH, WARM, CpuStopwatch, Timed
from moeref.inputs import Inputs
from moeref.interop.candidates import Candidate
from moeref.interop.observe import Misbehaved
from moeref.make import make_inputs, zeros
from moeref.reference import moe
from moeref.spec import Geometry, Problem

NAME = "small-t16-o8-iid-model_like-s0"


def right(*ten: Any, n_group: int, topk_group: int, top_k: int) -> torch.Tensor:
    """The layer."""
    local, hidden, inner = ten[6].shape
    return moe(
        Inputs(*ten, geometry=Geometry(ten[0].shape[1], local, hidden, inner, top_k, n_group, topk_group))
    ).output


def rotations_of(name: str = NAME, count: int = 3) -> list[Inputs]:
    return make_rotations(Problem.parse(name), count, zeros)


def session_of(run: Callable[..., Any], rotations: list[Inputs], stopwatch: Any = None, **declared: Any) -> Session:
    """A session that knows what every rotation must give."""
    session = Session(Candidate("mine", run, **declared), rotations, stopwatch or CpuStopwatch())
    for number, one in enumerate(rotations):
        session.expect(number, moe(one).output, 2.0**-7)
    return session


@pytest.fixture(scope="module")
def rotations() -> list[Inputs]:
    return rotations_of()


# ---- figures


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.5
    assert percentile(list(range(11)), 0.1) == 1.0 and percentile(list(range(11)), 0.9) == 9.0
    assert percentile([7.0], 0.1) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)


def test_times_are_the_clocks_and_only_the_calls(rotations: list[Inputs]) -> None:
    wanted = [0.5, 0.1, 0.3, 0.2, 0.4]
    reading = iter([value for start, took in enumerate(wanted) for value in (100.0 * start, 100.0 * start + took)])
    session = session_of(right, rotations, CpuStopwatch(lambda: next(reading)))
    samples = session.measure(EAGER, WARM, calls=5)
    times = [one.seconds for one in samples]
    assert times == pytest.approx(wanted) and all(one.host_seconds is None for one in samples)
    found = spread(times)
    assert (found.median, found.count) == (pytest.approx(0.3), 5)
    assert (found.p10, found.p90) == (pytest.approx(0.14), pytest.approx(0.46))
    assert next(reading, None) is None  # nothing else was timed


# ---- what stands around a call


class Recorder:
    """A stopwatch of a GPU that is not there: writes down what it is asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def flush(self) -> None:
        self.seen.append("flush")

    def synchronise(self) -> None:
        self.seen.append("wait")

    def time(self, call: Callable[[], Any], mode: str) -> Timed:
        self.seen.append(f"time {mode}")
        return Timed(1e-5, 2e-6 if mode == EAGER else None, call())


def test_cold_calls_follow_a_flush_and_warm_ones_a_call_on_the_same_inputs(rotations: list[Inputs]) -> None:
    watch = Recorder()

    def run(*ten: Any, out: torch.Tensor, **groups: int) -> None:
        watch.seen.append("call" if torch.isnan(out).all() else "call on a written buffer")
        out.copy_(right(*ten, **groups))

    session = session_of(run, rotations, watch, takes_geometry=True)
    sample = session.measure(EAGER, COLD, calls=1)[0]
    assert watch.seen == ["flush", "time eager", "call"]
    assert (sample.seconds, sample.host_seconds) == (1e-5, 2e-6)
    watch.seen.clear()
    session.measure(EAGER, WARM, calls=1)
    assert len(watch.seen) == 3 and watch.seen[0].startswith("call") and watch.seen[1:] == ["time eager", "call"]


def test_every_call_has_other_inputs_than_the_buffers_last_ones(rotations: list[Inputs]) -> None:
    session = session_of(right, rotations)
    assert len(session.slots) == len(rotations) - 1
    held: dict[int, Content | None] = {}
    for _ in range(12):
        session.measure(EAGER, WARM, calls=1)
        slot = session.slots[session.calls % len(session.slots)]
        assert slot.content is not None
        last = held.get(id(slot))
        assert last is None or last.rotation != slot.content.rotation
        held[id(slot)] = slot.content
        wanted = rotations[slot.content.rotation].hidden_states_scale.roll(slot.content.shift, 1)
        assert torch.equal(slot.inputs.hidden_states_scale, wanted)


@pytest.mark.parametrize("shift", [0, 1, 5, 16])
def test_tokens_move_round(rotations: list[Inputs], shift: int) -> None:
    for name, axis in (("routing_logits", 0), ("hidden_states", 0), ("hidden_states_scale", 1)):
        source = getattr(rotations[1], name)
        target = torch.zeros_like(source)
        copy_moved(target, source, axis, shift)
        octets = [one.view(torch.uint8) if one.element_size() == 1 else one for one in (target, source)]
        assert torch.equal(octets[0], octets[1].roll(shift, axis)), name


# ---- graphs, with a stand-in for the capture


class Replayed:
    """As a CUDA graph does, runs what was captured on the same buffers and writes to the same result."""

    def __init__(self, call: Callable[[], Any], stuck: bool = False) -> None:
        self.call, self.stuck = call, stuck
        self.returned = call()

    def replay(self) -> Any:
        if not self.stuck:
            self.returned.copy_(self.call())
        return self.returned


def test_graphs_are_replayed_on_refilled_buffers(rotations: list[Inputs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_tools, "capture", Replayed)
    watch = Recorder()
    session = session_of(right, rotations, watch)
    session.warm_up()
    session.capture()
    watch.seen.clear()
    samples = session.measure(GRAPH, COLD, calls=4)
    assert watch.seen == ["flush", "time graph"] * 4 and [one.host_seconds for one in samples] == [None] * 4
    session.release_graphs()
    assert all(slot.graph is None for slot in session.slots)


def test_a_graph_that_does_nothing_on_replay_is_found_out(
    rotations: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_tools, "capture", lambda call: Replayed(call, stuck=True))
    session = session_of(right, rotations, Recorder())
    session.warm_up()
    session.capture()
    with pytest.raises(WrongOutput, match=r"timed call \d+ \(graph, cold\): 16 of 16 rows"):
        session.measure(GRAPH, COLD, calls=1)


# ---- cheats: right at first, or right for somebody


def first_again(after: int) -> Callable[..., Any]:
    calls: list[torch.Tensor] = []

    def run(*ten: Any, **groups: int) -> torch.Tensor:
        calls.append(right(*ten, **groups) if len(calls) < after else calls[0])
        return calls[-1]

    return run


def kept_by(key: Callable[..., Any]) -> Callable[..., Any]:
    kept: dict[Any, torch.Tensor] = {}

    def run(*ten: Any, **groups: int) -> torch.Tensor:
        found = key(*ten)
        if found not in kept:
            kept[found] = right(*ten, **groups)
        return kept[found].clone()

    return run


CHEATS: dict[str, Callable[[], Callable[..., Any]]] = {
    "the first output again": lambda: first_again(after=1),
    "the first output again, after some calls": lambda: first_again(after=9),
    "kept by address": lambda: kept_by(lambda *ten: ten[2].data_ptr()),
    "kept by address of the logits": lambda: kept_by(lambda *ten: ten[0].data_ptr()),
    "kept by a sum over the activations": lambda: kept_by(lambda *ten: int(ten[2].view(torch.uint8).long().sum())),
    "kept by the bias": lambda: kept_by(lambda *ten: tuple(ten[1].tolist())),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_kept_outputs_do_not_pass(rotations: list[Inputs], cheat: str) -> None:
    session = session_of(CHEATS[cheat](), rotations, takes_geometry=True)
    with pytest.raises(WrongOutput, match="rows lie further than"):
        session.measure(EAGER, WARM, calls=30)


def test_whose_output_it_was_is_said(rotations: list[Inputs]) -> None:
    session = session_of(CHEATS["kept by address"](), rotations, takes_geometry=True)
    with pytest.raises(WrongOutput, match="an earlier call had in the same buffers"):
        session.measure(EAGER, WARM, calls=30)


def test_an_output_that_is_not_written_does_not_pass(rotations: list[Inputs]) -> None:
    session = session_of(lambda *ten, out, **groups: None, rotations, takes_geometry=True)
    with pytest.raises(WrongOutput, match="16 of 16 rows"):
        session.measure(EAGER, WARM, calls=1)


@pytest.mark.parametrize("returned", [None, torch.zeros(16, 256), torch.zeros(3, 256, dtype=torch.bfloat16)])
def test_a_call_that_returns_something_else(rotations: list[Inputs], returned: Any) -> None:
    session = session_of(lambda *ten: returned, rotations)
    with pytest.raises(Misbehaved, match="expected a bfloat16 tensor"):
        session.measure(EAGER, WARM, calls=1)


def test_one_rotation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Session(Candidate("mine", right), rotations_of(count=1), CpuStopwatch())


# ---- rotations


def test_local_experts_of_a_group_exchange_their_places() -> None:
    problem = Problem(Geometry(8, 4, 128, 128, 2, 2, 1), 4, 4, "iid", "model_like", 0)
    assert exchanged(problem, 0, 3).tolist() == [*range(8)]
    assert exchanged(problem, 1, 3).tolist() == [0, 1, 2, 3, 5, 6, 7, 4]
    assert exchanged(replace(problem, offset=2), 1, 3).tolist() == [0, 1, 3, 2, 5, 4, 6, 7]


@pytest.mark.parametrize("name", [NAME, "small-t33-o28-deepseek_like-heterogeneous-s3", "small_kimi-t9-o6-iid-tiny-s1"])
def test_rotations_share_their_weights_and_have_the_same_work(name: str) -> None:
    problem = Problem.parse(name)
    made = make_rotations(problem, 3, zeros)
    everything = make_inputs(problem, experts="all")
    works = [Work.of(problem.geometry, rows_of_expert(one)) for one in made]
    assert works[0] == works[1] == works[2] == Work.mean(works)
    assert torch.equal(made[0].hidden_states.view(torch.uint8), everything.hidden_states.view(torch.uint8))
    for one in made:
        one.check()
        assert one.gemm1_weights.data_ptr() == made[0].gemm1_weights.data_ptr()
        for slot in rows_of_expert(one).nonzero().flatten().tolist():
            for field in ("gemm1_weights", "gemm2_weights"):
                mine, wanted = (getattr(which, field)[slot].view(torch.uint8) for which in (one, everything))
                assert torch.equal(mine, wanted)
    for name_of in ROTATED:
        one, other = (getattr(made[at], name_of).contiguous().view(torch.uint8) for at in (0, 1))
        assert not torch.equal(one, other), name_of


def test_work_is_bytes_of_experts_hit_and_operations_of_rows() -> None:
    work = Work.of(Problem.parse("dsv3-t1-o0-iid-published-s0").geometry, torch.tensor([0, 3, 0, 1]))
    assert (work.local_rows, work.experts_hit) == (4, 2)
    assert work.weight_bytes == 2 * 44_040_192 and work.flops == 4 * 88_080_384
