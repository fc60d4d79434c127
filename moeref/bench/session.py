"""One candidate on one problem's rotations, beside the candidate: calls, times and looks at every timed output.

Slots are the buffers that a candidate sees, one fewer than there are rotations. Before every timed call a slot is
refilled in place with another rotation whose tokens are moved round by some places, and its output buffer is filled
with NaN. So no buffer holds the same inputs in two calls running: a result kept by address or by call is wrong, and
where there are several tokens also one kept by content. Refilling, poisoning and comparing are not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moeref.bench import device_tools
from moeref.bench.rotation import ROTATED
from moeref.bench.stopwatch import COLD, EAGER, GRAPH, WARM, Stopwatch
from moeref.inputs import Inputs
from moeref.interop.candidates import Candidate
from moeref.interop.observe import Misbehaved
from moeref.judge.compare import row_errors
from moeref.reference import Trace

WARM_UPS = 3
"""Untimed calls of each slot before anything is measured or captured."""


class WrongOutput(Exception):
    """A timed call's output is not that of its inputs; says how far off it is, and whose output it looks like."""


@dataclass(frozen=True)
class Content:
    """What a slot holds: a rotation, its tokens moved round by `shift` places."""

    rotation: int
    shift: int


@dataclass(frozen=True)
class Sample:
    """One timed call, in seconds."""

    seconds: float
    host_seconds: float | None


class Slot:
    """Buffers that stay where they are: four of the inputs, the output where the candidate is given one."""

    def __init__(self, candidate: Candidate, first: Inputs) -> None:
        own = {name: getattr(first, name).clone() for name in ROTATED}
        self.inputs: Inputs = replace(first, **own)
        self.shape = (first.seq_len, first.geometry.hidden_size)
        self.buffer: torch.Tensor | None = None
        if candidate.output_argument is not None:
            self.buffer = torch.empty(self.shape, dtype=torch.bfloat16, device=first.device)
        self.eager: Callable[[], Any] = bind(candidate, self.inputs, self.buffer)
        self.graph: device_tools.Captured | None = None
        self.content: Content | None = None
        self.before: Content | None = None  # what it held last

    def refill(self, rotations: Sequence[Inputs], content: Content) -> None:
        """Copy a rotation in, its tokens moved round."""
        self.before, self.content = self.content, content
        source = rotations[content.rotation]
        for name in ROTATED:
            axis = {"routing_bias": None, "hidden_states_scale": 1}.get(name, 0)
            copy_moved(getattr(self.inputs, name), getattr(source, name), axis, content.shift)

    def poison(self) -> None:
        """Fill with NaN what the next call has to write: the buffer, and what a captured call returned."""
        for tensor in (self.buffer, self.graph.returned if self.graph else None):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.fill_(torch.nan)

    def output(self, returned: Any) -> torch.Tensor:
        """The output of a call that returned this. Raises Misbehaved where there is none."""
        if self.buffer is not None:
            return self.buffer
        if isinstance(returned, Trace):
            returned = returned.output
        device = self.inputs.device
        expected = f"expected a bfloat16 tensor {list(self.shape)} on {device}"
        if not isinstance(returned, torch.Tensor):
            raise Misbehaved(f"a timed call returned {type(returned).__name__}, {expected}")
        if tuple(returned.shape) != self.shape or returned.dtype != torch.bfloat16 or returned.device != device:
            got = f"{list(returned.shape)} {str(returned.dtype).removeprefix('torch.')} on {returned.device}"
            raise Misbehaved(f"a timed call returned a tensor {got}, {expected}")
        return returned.detach()


def bind(candidate: Candidate, inputs: Inputs, buffer: torch.Tensor | None) -> Callable[[], Any]:
    """The candidate's call with all arguments in place, so that nothing of ours runs inside of a timed call."""
    arguments = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs.args()]
    keywords: dict[str, Any] = {name: getattr(inputs.geometry, name) for name in candidate.geometry_keywords}
    if buffer is not None and candidate.output_argument:
        keywords[candidate.output_argument] = buffer.detach()
    elif buffer is not None:
        arguments.append(buffer.detach())
    return functools.partial(candidate.run, *arguments, **keywords)


def copy_moved(target: torch.Tensor, source: torch.Tensor, axis: int | None, shift: int) -> None:
    """target = source.roll(shift, axis), as bytes and without a temporary; axis None: a plain copy."""
    if axis is None or not source.shape[axis]:
        target.copy_(source)
        return
    if source.element_size() == 1:  # not every device copies parts of e4m3
        target, source = target.view(torch.uint8), source.view(torch.uint8)
    length = source.shape[axis]
    shift %= length
    target.narrow(axis, shift, length - shift).copy_(source.narrow(axis, 0, length - shift))
    target.narrow(axis, 0, shift).copy_(source.narrow(axis, length - shift, shift))


class Session:
    """Holds one problem's rotations on the device. `rotations`: at least two, which share their weights."""

    def __init__(self, candidate: Candidate, rotations: Sequence[Inputs], stopwatch: Stopwatch) -> None:
        if len(rotations) < 2:
            raise ValueError(f"{len(rotations)} rotation: expected at least 2, or a kept output would pass")
        self.candidate = candidate
        self.rotations = list(rotations)
        self.stopwatch = stopwatch
        self.slots = [Slot(candidate, rotations[0]) for _ in range(len(rotations) - 1)]
        self.calls = 0
        self._expected: dict[int, torch.Tensor] = {}
        self._limit = 0.0

    # ---- outputs

    def output_of(self, rotation: int) -> torch.Tensor:
        """The output of an untimed call on a rotation as it is, [T, H]."""
        slot = self.slots[rotation % len(self.slots)]
        slot.refill(self.rotations, Content(rotation, 0))
        slot.poison()
        returned = slot.eager()
        self.stopwatch.synchronise()
        return slot.output(returned)

    def expect(self, rotation: int, expected: torch.Tensor, limit: float) -> None:
        """From now on outputs for a rotation are held to `expected` [T, H]: no row may be further off than `limit`,
        relative to that row's norm; rows that are zero must be zero."""
        self._expected[rotation] = expected.to(self.rotations[0].device)
        self._limit = limit

    def _compare(self, slot: Slot, output: torch.Tensor, what: str) -> None:
        assert slot.content is not None
        far = self._far(output, slot.content)
        if not far:
            return
        rows = len(output)
        looks = ""
        others = [Content(rotation, slot.content.shift) for rotation in self._expected]
        for kept in [slot.before, *others]:
            if kept is not None and kept != slot.content and not self._far(output, kept):
                looks = "; it is the output of other inputs, which an earlier call had" + (
                    " in the same buffers" if kept == slot.before else ""
                )
                break
        raise WrongOutput(
            f"{what}: {far} of {rows} rows lie further than {self._limit:.2g} from what rotation "
            f"{slot.content.rotation} of the inputs must give{looks}"
        )

    def _far(self, output: torch.Tensor, content: Content) -> int:
        """Rows that are further from a content's expected output than allowed."""
        expected = self._expected[content.rotation]
        if content.shift and len(expected):
            expected = expected.roll(content.shift, 0)
        return int((~(row_errors(output, expected) <= self._limit)).sum())

    # ---- times

    def warm_up(self) -> None:
        """WARM_UPS untimed calls of each slot, outputs compared."""
        for _ in range(WARM_UPS):
            for _ in self.slots:
                self._call(EAGER, WARM, timed=False)

    def capture(self) -> None:
        """Capture one graph a slot. Raises whatever the candidate or the capture raises."""
        for slot in self.slots:
            slot.graph = device_tools.capture(slot.eager)

    def release_graphs(self) -> None:
        """Forget the graphs, and with them the memory that they hold for the candidate."""
        for slot in self.slots:
            slot.graph = None

    def release(self) -> None:
        """Forget every tensor."""
        self.slots.clear()
        self.rotations.clear()
        self._expected.clear()

    def measure(
        self, mode: str, cache: str, calls: int, warm_ups: int = 0, beat: Callable[[], None] = lambda: None
    ) -> list[Sample]:
        """`calls` timed calls after `warm_ups` untimed ones. Raises WrongOutput at the first output that is wrong.

        beat is called after every call: what watches for a hang needs to hear.
        """
        samples = []
        for call in range(warm_ups + calls):
            sample = self._call(mode, cache, timed=call >= warm_ups)
            if sample is not None:
                samples.append(sample)
            beat()
        return samples

    def _call(self, mode: str, cache: str, timed: bool) -> Sample | None:
        self.calls += 1
        slot = self.slots[self.calls % len(self.slots)]
        rotation = self.calls % len(self.rotations)
        shift = 617 * self.calls % max(1, self.rotations[0].seq_len)  # another one in every call, where T allows
        slot.refill(self.rotations, Content(rotation, shift))
        if mode == GRAPH:
            assert slot.graph is not None, "capture first"
        call: Callable[[], Any] = slot.graph.replay if mode == GRAPH and slot.graph else slot.eager
        if cache == WARM and timed:
            call()
        slot.poison()
        if cache == COLD:
            self.stopwatch.flush()
        took = self.stopwatch.time(call, mode)
        output = slot.output(took.returned)
        self._compare(slot, output, f"{'timed' if timed else 'warm-up'} call {self.calls} ({mode}, {cache})")
        return Sample(took.seconds, took.host_seconds) if timed else None
