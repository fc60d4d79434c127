"""Relations between answers of one candidate that no recipe breaks: LAWS, and run_laws. No reference decides them.

One small function a law, in laws_tokens, laws_scales, laws_experts and laws_memory; laws_bench says how strictly each
is judged.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from moeref.diagnose import laws_experts, laws_memory, laws_scales, laws_tokens
from moeref.diagnose.laws_bench import LAWS, Bench, Law, active_tokens
from moeref.diagnose.result import Broken, Call, Finding, Guarded
from moeref.spec import Problem

__all__ = ["LAWS", "Law", "run_laws"]

assert all((laws_experts, laws_memory, laws_scales, laws_tokens))  # imported for the laws that they register


def run_laws(
    call: Call,
    problem: Problem,
    *,
    device: str | torch.device = "cpu",
    recipe: str = "auto",
    inexact: frozenset[str] = frozenset(),
    deterministic: bool = False,
    names: Collection[str] = (),
) -> list[Finding]:
    """A finding for every law (or for those named), on inputs of the problem's geometry, offset, factor and seed.

    recipe          declared, or 'auto': the nearest legal one; used only where a law is judged by noise.
    inexact         laws that the candidate declares not to keep bit for bit.
    deterministic   the candidate promises the same bytes on every call.
    """
    guarded = Guarded(call)
    bench = Bench(guarded, problem, device, recipe, inexact, deterministic)
    chosen = [one for one in LAWS.values() if not names or one.name in names]
    if not len(active_tokens(bench.inputs)):
        return [Finding(one.name, None, "no token could be given local work") for one in chosen]
    findings = []
    for one in chosen:
        try:
            findings.append(one.check(bench))
        except Broken as error:
            findings.append(Finding(one.name, False, str(error), one.stages))
    return findings
