"""The single checks behind a verdict: each returns its name, whether it passed, and one sentence with numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moeref.judge.compare import Criterion
from moeref.judge.noise import Fit

if TYPE_CHECKING:
    from moeref.judge.verdict import Observed

POISONS = (float("nan"), 1e4)
"""What output buffers hold before a destination-passing call, in turn."""


@dataclass(frozen=True)
class Check:
    """One thing looked at. `detail` says what was expected and what came; empty where it passed."""

    name: str
    passed: bool
    detail: str = ""


def comparable(outputs: list[Any], seq_len: int, hidden: int) -> bool:
    """Whether values can be compared at all: floating tensors of the right shape."""
    return bool(outputs) and all(
        isinstance(out, torch.Tensor) and tuple(out.shape) == (seq_len, hidden) and out.is_floating_point()
        for out in outputs
    )


def form(outputs: list[Any], seq_len: int, hidden: int) -> Check:
    """A bfloat16 tensor [T, H]."""
    for out in outputs or [None]:
        if not isinstance(out, torch.Tensor):
            return Check("form", False, f"expected a tensor [{seq_len}, {hidden}] bfloat16, got {type(out).__name__}")
        wrong = []
        if tuple(out.shape) != (seq_len, hidden):
            wrong.append(f"expected shape [{seq_len}, {hidden}], got {list(out.shape)}")
        if out.dtype != torch.bfloat16:
            wrong.append(f"expected dtype bfloat16, got {str(out.dtype).removeprefix('torch.')}")
        if wrong:
            return Check("form", False, ", ".join(wrong))
    return Check("form", True)


def conduct(observed: Observed) -> list[Check]:
    """Inputs unchanged, the output no view of an input, an earlier result not overwritten by a later call."""
    changed, aliased = ", ".join(observed.changed_inputs), ", ".join(observed.aliased_inputs)
    return [
        Check("inputs_unchanged", not changed, f"the call changed {changed}" if changed else ""),
        Check("no_alias", not aliased, f"the output shares memory with {aliased}" if aliased else ""),
        Check(
            "own_result",
            not observed.overwritten_result,
            "a second call overwrote the first call's result: return fresh memory"
            if observed.overwritten_result
            else "",
        ),
    ]


def written(observed: Observed) -> list[Check]:
    """Every element of a destination-passing call's buffer is written, whatever it held before."""
    if not observed.poisoned or len(observed.outputs) < 2:
        return []
    first, second = observed.outputs[0], observed.outputs[1]
    left = torch.isnan(first) & (second == POISONS[1])  # still what we had put there, in both
    depends = torch.isnan(first) & ~torch.isnan(second) & ~left
    if bool(depends.any()):
        row = int(depends.any(1).nonzero()[0])
        detail = f"{int(depends.sum())} elements depend on what the output buffer held before (first: row {row})"
        return [Check("written", False, detail)]
    if bool(left.any()):
        rows = left.any(1).nonzero().squeeze(1)
        detail = (
            f"{int(left.sum())} elements of {len(rows)} rows were never written (first: row {int(rows[0])}); rows "
            "without a local expert must be set to zero"
        )
        return [Check("written", False, detail)]
    return [Check("written", True)]


def repeated(observed: Observed) -> list[Check]:
    """The same bytes from every call, where the candidate promises that."""
    if not observed.deterministic or len(observed.outputs) < 2:
        return []
    first = observed.outputs[0]
    for count, other in enumerate(observed.outputs[1:], start=2):
        differ = first.contiguous().view(torch.uint8) != other.contiguous().view(torch.uint8)
        if bool(differ.any()):
            rows = int(differ.reshape(len(first), -1).any(1).sum())
            return [Check("repeat", False, f"call {count} gave other bytes than call 1 in {rows} rows")]
    return [Check("repeat", True)]


def content(outputs: list[torch.Tensor], active: torch.Tensor) -> list[Check]:
    """Finite everywhere; exactly zero in rows without a local expert."""
    finite, idle = Check("finite", True), Check("idle_rows", True)
    for out in outputs:
        bad = ~torch.isfinite(out)
        if bool(bad.any()) and finite.passed:
            rows = bad.any(1).nonzero().squeeze(1)
            detail = f"{int(bad.sum())} elements of {len(rows)} rows are NaN or inf (first: row {int(rows[0])})"
            finite = Check("finite", False, detail)
        is_idle = torch.ones(len(out), dtype=torch.bool, device=out.device)
        is_idle[active] = False
        nonzero = (out != 0).any(1) & is_idle
        if bool(nonzero.any()) and idle.passed:
            detail = (
                f"{int(nonzero.sum())} of {int(is_idle.sum())} rows without a local expert are not zero "
                f"(first: row {int(nonzero.nonzero()[0])})"
            )
            idle = Check("idle_rows", False, detail)
    return [finite, idle]


def matched(ratio: float, criterion: Criterion) -> Check:
    """The matched ratio against its required share."""
    if ratio >= criterion.required:
        return Check("matched_ratio", True)
    detail = f"{ratio:.4f} of the elements match, {criterion.required} needed ({criterion.name} criterion)"
    return Check("matched_ratio", False, detail)


def noise(worst: Fit, recipe: str) -> list[Check]:
    """The gates of the noise model."""
    out = int((~(worst.row_excess <= 1)).sum())
    rows = (
        f"{out} of {len(worst.row_z)} active tokens lie outside of what recipe {recipe} costs; the worst, token "
        f"{worst.rows.where}, is {worst.rows.value:.3g} times its limit"
    )
    overall = f"root mean square z is {worst.overall.value:.3g}, recipe {recipe} allows {worst.overall.limit:.3g}"
    peak = f"the largest |z| is {worst.peak.value:.3g}, {worst.peak.limit:.3g} allowed"
    gain = f"the output is off by a common factor: {worst.gain.value:.3g} of it, {worst.gain.limit:.3g} allowed"
    experts = f"tokens of local expert {worst.experts.where} lie at {worst.experts.value:.3g} times their mean's limit"
    blocks = f"output columns of 128-block {worst.blocks.where} lie at {worst.blocks.value:.3g} times their limit"
    gates = (
        ("rows", worst.rows, rows),
        ("experts", worst.experts, experts),
        ("blocks", worst.blocks, blocks),
        ("overall", worst.overall, overall),
        ("peak", worst.peak, peak),
    )
    found = [Check(f"noise_{name}", gate.passed, "" if gate.passed else text) for name, gate, text in gates]
    return [*found, Check("noise_gain", worst.gain.passed, "" if worst.gain.passed else gain)]
