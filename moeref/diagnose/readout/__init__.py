"""Read-outs: crafted inputs that make a fused black box show its inside, through the ten inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from moeref.diagnose.readout.accumulators import (
    read_combine_accumulator,
    read_gemm1_accumulator,
    read_gemm2_accumulator,
)
from moeref.diagnose.readout.craft import Stand
from moeref.diagnose.readout.routing import read_routing
from moeref.diagnose.readout.scales import read_scales
from moeref.diagnose.readout.swiglu import read_activation, read_requantized
from moeref.diagnose.result import Broken, Call, Finding, Guarded
from moeref.spec import Problem

__all__ = ["READOUTS", "Readout", "run_readouts"]


@dataclass(frozen=True)
class Readout:
    """One set of crafted inputs, and the findings that it gives."""

    name: str
    findings: tuple[str, ...]
    stages: tuple[str, ...]  # suspects when the candidate breaks on these inputs
    summary: str
    read: Callable[[Stand], list[Finding]]


_ALL = (
    Readout(
        "routing",
        ("routing_choice", "routing_weights", "routing_ties", "routing_columns"),
        ("routing", "topk", "permute"),
        "the matrix of topk_weights",
        read_routing,
    ),
    Readout(
        "scales",
        ("activation_scale_map", "gemm1_scale_map", "gemm2_scale_map"),
        ("activation_scale", "gemm1_scale", "gemm2_scale"),
        "which scale was used for every token and block",
        read_scales,
    ),
    Readout("activation", ("swiglu_zero", "swiglu"), ("swiglu",), "silu(gate) * up", read_activation),
    Readout(
        "requantized",
        ("requantize_zero", "requantize"),
        ("requantize",),
        "the value that gemm2 reads",
        read_requantized,
    ),
    Readout(
        "gemm1_accumulator",
        ("gemm1_accumulator", "gemm1_across_blocks"),
        ("gemm1",),
        "fraction bits of gemm1's sums",
        read_gemm1_accumulator,
    ),
    Readout(
        "gemm2_accumulator",
        ("gemm2_accumulator", "gemm2_across_blocks"),
        ("gemm2",),
        "fraction bits of gemm2's sums",
        read_gemm2_accumulator,
    ),
    Readout(
        "combine_accumulator",
        ("combine_accumulator",),
        ("combine",),
        "fraction bits of the sum over a token's experts",
        read_combine_accumulator,
    ),
)
READOUTS: dict[str, Readout] = {one.name: one for one in _ALL}
"""Every read-out by name."""


def run_readouts(
    call: Call, problem: Problem, *, device: str | torch.device = "cpu", names: Collection[str] = ()
) -> list[Finding]:
    """The findings of every read-out (or of those named) at the problem's geometry, offset, factor and seed."""
    stand = Stand(Guarded(call), problem, torch.device(device))
    found = []
    for one in READOUTS.values():
        if names and one.name not in names:
            continue
        try:
            found += one.read(stand)
        except Broken as error:
            found += [Finding(name, False, str(error), one.stages) for name in one.findings]
    return found
