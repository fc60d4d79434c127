"""Which variant is the fastest right one? Knows neither GPU nor kernels: a Runner draws inputs, checks and times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from moe_fast.kernels.experts import Tiling

ROUNDS = 3
"""Every variant is timed once a round, so that a clock that drifts hits all alike."""

LEAST_GAIN = 0.01
"""What is less than so much faster than the shipped choice, or not faster in every round, does not replace it."""

TRITON = "hopper_triton"


class Discard(Exception):
    """A variant that must not be used; says why."""


@dataclass(frozen=True)
class Variant:
    """A way to do a call: a backend of moe_fast, and hopper_triton's tiling."""

    pipeline: str
    tiling: Tiling | None = None

    @property
    def name(self) -> str:
        """A backend's name, or e.g. 'triton 16x32x64 w4 s3/3 u2/2 p3': tile_rows x part1 x part2, warps, stages, steps
        unrolled, programs a multiprocessor."""
        t = self.tiling
        if t is None:
            return self.pipeline
        cut = f"{t.tile_rows}x{t.part1}x{t.part2} w{t.warps} s{t.stages1}/{t.stages2} u{t.unroll1}/{t.unroll2}"
        return f"triton {cut} p{t.programs_per_sm}" + ("" if t.pdl else " nopdl")


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a number of tokens."""

    local_rows: int
    experts_hit: int
    offset: int  # first local expert


class Runner(Protocol):
    """What does the work. A fake one stands in for it in tests."""

    def open(self, tokens: int) -> Drawn:
        """Draw inputs; check and time mean these from now on."""

    def check(self, variant: Variant) -> None:
        """Compile and call it. Raises Discard for a wrong output, or whatever compiling and calling raise."""

    def time(self, variant: Variant) -> float:
        """Microseconds of a call, the median of some. Raises as check does."""

    def close(self) -> None:
        """Give the memory of these inputs back."""


@dataclass(frozen=True)
class Timing:
    """A right variant's time."""

    variant: Variant
    rounds: tuple[float, ...]  # microseconds

    @property
    def us(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    def beats(self, other: Timing) -> bool:
        """Faster in every round, and by LEAST_GAIN at least."""
        in_every_round = all(mine < theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))
        return in_every_round and self.us <= (1 - LEAST_GAIN) * other.us


@dataclass(frozen=True)
class Count:
    """What was found for one number of tokens."""

    tokens: int
    drawn: Drawn
    timings: tuple[Timing, ...]  # fastest first
    discarded: tuple[tuple[Variant, str], ...]  # with the reason
    shipped: Variant  # what a call takes without a table
    chosen: Variant | None  # None where nothing was right
    tiling: Tiling | None  # hopper_triton's best

    def timing(self, variant: Variant | None) -> Timing | None:
        """That of a variant; None where it was discarded."""
        return next((one for one in self.timings if one.variant == variant), None)

    def ratio(self, timing: Timing) -> float | None:
        """Its time over the shipped choice's."""
        shipped = self.timing(self.shipped)
        return timing.us / shipped.us if shipped is not None else None


@dataclass(frozen=True)
class Task:
    """What is tried for one number of tokens."""

    tokens: int
    shipped: Variant  # what a call takes without a table
    shipped_tiling: Variant  # what hopper_triton takes without one
    variants: tuple[Variant, ...]  # all of them, each once, the shipped ones first: they are judged first


def search(task: Task, runner: Runner, tell: Callable[[str], None] = lambda what: None) -> Count:
    """Check every variant, time those that are right in turn, choose. Nothing that a variant raises is raised here.

    tell hears of every variant before it is checked.
    """
    discarded: list[tuple[Variant, str]] = []
    right: list[Variant] = []
    rounds: dict[Variant, list[float]] = {}
    drawn = runner.open(task.tokens)
    try:
        for variant in task.variants:
            tell(f"{task.tokens} tokens: {variant.name}")
            try:
                runner.check(variant)
                right.append(variant)
            except Exception as error:
                discarded.append((variant, _reason(error)))
        for _ in range(ROUNDS):
            for variant in list(right):
                try:
                    rounds.setdefault(variant, []).append(runner.time(variant))
                except Exception as error:
                    right.remove(variant)
                    discarded.append((variant, _reason(error)))
    finally:
        runner.close()
    timings = sorted((Timing(variant, tuple(rounds[variant])) for variant in right), key=lambda one: one.us)
    tiled = [one for one in timings if one.variant.pipeline == TRITON]
    best = fastest(tiled, task.shipped_tiling)
    others = [one for one in timings if one.variant.pipeline != TRITON]
    chosen = fastest(sorted([best, *others] if best else others, key=lambda one: one.us), task.shipped)
    return Count(
        task.tokens,
        drawn,
        tuple(timings),
        tuple(discarded),
        task.shipped,
        chosen.variant if chosen else None,
        best.variant.tiling if best else None,
    )


def fastest(timings: Sequence[Timing], shipped: Variant) -> Timing | None:
    """The first of `timings`, which are sorted, that beats the shipped one; that one where none does.

    Without a time of the shipped one it is the first; None where there is none.
    """
    base = next((one for one in timings if one.variant == shipped), None)
    if base is None:
        return timings[0] if timings else None
    return next((one for one in timings if one.beats(base)), base)


def _reason(error: Exception) -> str:
    if isinstance(error, Discard):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" + (" ..." if len(text) > 200 else "")
