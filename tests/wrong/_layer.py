"""What the planted faults share: the right layer, from a candidate's ten arguments."""

from __future__ import annotations

from typing import Any

from moeref.inputs import Inputs
from moeref.reference import Trace, moe
from moeref.spec import Geometry


def inputs_of(ten: tuple[Any, ...], n_group: int, topk_group: int, top_k: int) -> Inputs:
    """The ten inputs with the geometry of their shapes."""
    local, hidden, inner = ten[6].shape
    geometry = Geometry(ten[0].shape[1], local, hidden, inner, top_k, n_group, topk_group)
    return Inputs(*ten, geometry=geometry)


def trace_of(ten: tuple[Any, ...], n_group: int, topk_group: int, top_k: int) -> Trace:
    """Every stage of the right answer."""
    return moe(inputs_of(ten, n_group, topk_group, top_k))
