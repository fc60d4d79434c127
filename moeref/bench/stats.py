"""A list of times as a median and two percentiles. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Seconds of repeated calls."""

    median: float
    p10: float
    p90: float
    count: int


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie, linear between neighbours. Raises ValueError for none.

    Example: of 1, 2, 3, 4 and share 0.5 it is 2.5; of 11 values share 0.1 is the second smallest.
    """
    if not values:
        raise ValueError("a percentile of no values: expected at least one timed call")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile of some times in seconds."""
    return Spread(percentile(values, 0.5), percentile(values, 0.1), percentile(values, 0.9), len(values))
