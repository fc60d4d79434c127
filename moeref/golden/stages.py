"""Comparing one stage with what was recorded: whole numbers exactly, sums by a tolerance, casts by both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moeref.quant import spacing_bf16


@dataclass(frozen=True)
class StageResult:
    """What was found at one stage."""

    stage: str
    passed: bool
    detail: str = ""  # one sentence with numbers; empty where it passed
    worst: float | None = None  # largest difference over its tolerance; None where equality was asked for


Locate = Callable[[tuple[int, ...]], str]


def position(index: tuple[int, ...]) -> str:
    """An index as text."""
    return f"[{', '.join(map(str, index))}]"


def same_form(stage: str, found: torch.Tensor, golden: torch.Tensor) -> StageResult | None:
    """A failure where shape or dtype differ, else None."""
    if found.shape == golden.shape and found.dtype == golden.dtype:
        return None
    detail = f"now {_form(found)}, recorded {_form(golden)}"
    return StageResult(stage, False, detail)


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def equal(stage: str, found: torch.Tensor, golden: torch.Tensor, locate: Locate = position) -> StageResult:
    """Bit for bit: whole numbers, casts, and what is computed without a choice of order."""
    wrong = same_form(stage, found, golden)
    if wrong is not None:
        return wrong
    different = (found != golden) & ~((found != found) & (golden != golden))
    if not bool(different.any()):
        return StageResult(stage, True)
    first = _first(different)
    detail = (
        f"{int(different.sum())} of {found.numel()} elements differ; first {locate(first)}: "
        f"now {found[first].item()}, recorded {golden[first].item()}"
    )
    return StageResult(stage, False, detail)


def close(
    stage: str, found: torch.Tensor, golden: torch.Tensor, tolerance: torch.Tensor, locate: Locate = position
) -> StageResult:
    """|found - golden| <= tolerance, element by element; all of one shape."""
    wrong = same_form(stage, found, golden)
    if wrong is not None:
        return wrong
    error = (found.double() - golden.double()).abs()
    excess = torch.where(error == 0, torch.zeros_like(error), error / tolerance.double()).nan_to_num(nan=torch.inf)
    return _judged(stage, found, golden, tolerance, excess, locate)


def rounded(
    stage: str,
    found: torch.Tensor,
    golden: torch.Tensor,
    exact: torch.Tensor,
    tolerance: torch.Tensor,
    locate: Locate = position,
) -> StageResult:
    """Values rounded to bfloat16: equal, or both what a value within the tolerance of the exact one rounds to.

    exact      the value before rounding; its `tolerance` is that before rounding too. Rounding keeps the order, so the
               values within reach are those from exact - tolerance to exact + tolerance, both rounded.
    A result that was not rounded, or rounded another way, is not among them.
    """
    wrong = same_form(stage, found, golden)
    if wrong is not None:
        return wrong
    middle, reach = exact.double(), tolerance.double()
    low, high = (middle - reach).to(torch.bfloat16).double(), (middle + reach).to(torch.bfloat16).double()
    excess = torch.zeros_like(middle)
    for value in (found.double(), golden.double()):
        inside = (value >= low) & (value <= high) & (value.to(torch.bfloat16).double() == value)
        beyond = ((value - middle).abs() - spacing_bf16(value) / 2).clamp(min=0)  # from the cell that rounds to value
        part = torch.where(beyond == 0, beyond, beyond / reach).clamp(max=1)
        excess = torch.maximum(excess, torch.where(inside, part, torch.inf))
    excess = excess.masked_fill(found.double() == golden.double(), 0.0)
    return _judged(stage, found, golden, tolerance, excess, locate)


def _judged(
    stage: str,
    found: torch.Tensor,
    golden: torch.Tensor,
    tolerance: torch.Tensor,
    excess: torch.Tensor,
    locate: Locate,
) -> StageResult:
    if not excess.numel():
        return StageResult(stage, True, worst=0.0)
    worst, beyond = float(excess.max()), excess > 1
    if worst <= 1:
        return StageResult(stage, True, worst=worst)
    first = _first(beyond)
    peak = _first(excess == excess.max())
    detail = (
        f"{int(beyond.sum())} of {excess.numel()} elements beyond the tolerance; first {locate(first)}; worst "
        f"{locate(peak)}: now {found[peak].item():.9g}, recorded {golden[peak].item():.9g}, "
        f"tolerance {float(tolerance[peak]):.2g}"
    )
    return StageResult(stage, False, detail, worst)


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    """Index of the first True in row-major order."""
    return tuple(int(part) for part in mask.nonzero()[0])
