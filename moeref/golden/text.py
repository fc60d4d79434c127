"""Golden cases as lines of text: results of a check, and a case laid out for reading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from moeref.golden.case import Case
from moeref.golden.check import CaseResult
from moeref.judge.verdict import ERROR, FAIL, PASS

SHOWN_STAGES = 6
"""Divergent stages that a failed case spells out."""


def header(width: int, judged: bool) -> str:
    """Column titles above `line`. judged: of a candidate."""
    columns = f"{'matched':>7} {'noise z':>8} {'recipe':<18}" if judged else f"{'stages':>7} {'worst':>7}"
    return f"{'case':<{width}} {columns} {'status':<12} {'s':>6}"


def line(result: CaseResult, width: int, judged: bool) -> str:
    """One line for a case.

    Of the reference: inputs and stages that are as recorded, of all looked at; the largest difference over its
    tolerance. Of a candidate: matched ratio, error in units of what its recipe costs, that recipe.
    """
    if judged:
        verdict = result.verdict
        matched = verdict.figures.matched.get("published") if verdict else None
        noise = verdict.figures.noise_z if verdict else None
        ratio = "-" if matched is None else f"{matched:.4f}"
        z = "-" if noise is None else f"{noise:.3g}"
        columns = f"{ratio:>7} {z:>8} {(verdict.recipe if verdict else '') or '-':<18}"
    else:
        held = f"{len(result.stages) - len(result.diverged)}/{len(result.stages)}" if result.stages else "-"
        worst = f"{result.worst:.3f}" if result.stages else "-"
        columns = f"{held:>7} {worst:>7}"
    return f"{result.case:<{width}} {columns} {result.status:<12} {result.seconds:>6.2f}"


def reasons(result: CaseResult) -> list[str]:
    """Indented lines under a case that did not pass: the stages, the first divergent one first, and how to repeat."""
    lines: list[str] = []
    if result.status == FAIL and result.verdict is None:
        for number, stage in enumerate(result.diverged[:SHOWN_STAGES]):
            what = "first divergent stage" if number == 0 else "then"
            lines.append(f"    {what} {stage.stage}: {stage.detail}")
        left = len(result.diverged) - SHOWN_STAGES
        if left > 0:
            lines.append(f"    and {left} more: {', '.join(stage.stage for stage in result.diverged[SHOWN_STAGES:])}")
    elif result.message:
        lines.append(f"    {result.message}")
    if result.status in (FAIL, ERROR):
        lines.append(f"    repeat: {result.repeat}")
    return lines


def summary(results: Sequence[CaseResult], who: str, left_out: Sequence[Case]) -> list[str]:
    """Counts by status; what was compared; what was left out, and why."""
    counts = Counter(result.status for result in results)
    shown = ", ".join(f"{number} {status}" for status, number in counts.items())
    lines = [f"{who}: {counts[PASS]} of {len(results)} cases PASS ({shown})" if results else "nothing was checked"]
    judged = [result for result in results if result.stages and result.verdict is None]
    if judged:
        stages = sum(len(result.stages) for result in judged)
        worst = max(judged, key=lambda result: result.worst)
        lines.append(
            f"{stages} inputs and stages compared; largest difference {worst.worst:.3f} of its tolerance ({worst.case})"
        )
    long = [case.name for case in left_out if not case.spec.short]
    if long:
        lines.append(f"left for --all: {', '.join(long)}")
    if len(left_out) > len(long):
        lines.append(f"{len(left_out) - len(long)} cases hold the reference's own roundings: they judge no candidate")
    return lines


def listing(found: Sequence[Case]) -> list[str]:
    """All cases, one a line."""
    width = max(len(case.name) for case in found)
    lines = []
    for case in found:
        what = f"sampled, {case.spec.problem.name}" if case.sampled else "every stage"
        lines.append(f"{case.name:<{width}}  {what}")
    return lines


def describe(case: Case, manifest: dict[str, Any]) -> list[str]:
    """A case for reading: what it is, who wrote it and why, inputs, stages, figures."""
    written, routing = manifest["written"], manifest["routing"]
    gap = routing["smallest_gap"]
    clear = "nothing hangs on a gap" if gap is None else f"smallest gap {gap:.3g}, safe from {routing['safe_gap']:.3g}"
    undecided = routing["open_tokens"]
    size = manifest["tensors"]["bytes"]
    lines = [
        f"case      {manifest['case']}" + (" (published, sampled)" if case.sampled else " (every stage)"),
        f"problem   {manifest['problem']}, recipe {manifest['recipe']}",
        f"reason    {manifest['reason']}",
        f"written   torch {written['torch']} on {written['machine']}, casts to e4m3 beyond 448: "
        f"{written['fp8_cast']['beyond']}",
        f"routing   {clear}; open tokens: {', '.join(map(str, undecided)) or 'none'}",
        f"rows      {sum(manifest['rows_by_expert'])} local rows, by expert {manifest['rows_by_expert']}",
        f"files     {case.path.name}, {case.path.with_suffix('.safetensors').name} ({size} bytes), "
        f"digest {manifest['digest'][:16]}",
        "",
        f"{'input':<26} {'shape':<18} {'dtype':<14} sha256",
    ]
    for name, one in manifest["inputs"].items():
        lines.append(f"{name:<26} {_shape(one):<18} {one['dtype']:<14} {one['sha256']}")
    lines += ["", f"{'stage':<26} {'shape':<18} {'dtype':<14} {'sha256':<17} {'rms':>10} {'largest':>10}"]
    for name, one in manifest["tensors"]["stages"].items():
        figures = manifest["floats"].get(name)
        norms = f"{figures['rms']:>10.4g} {figures['largest']:>10.4g}" if figures else ""
        lines.append(f"{name:<26} {_shape(one):<18} {one['dtype']:<14} {one['sha256']:<17} {norms}".rstrip())
    for name, one in manifest.get("integers", {}).items():
        lines.append(f"{name + ' (all)':<26} {_shape(one):<18} {'int64':<14} {one['sha256']}")
    if case.sampled:
        lines.append(f"sampled tokens {manifest['sampled_tokens']}, {manifest['sampled_columns']} column")
    return lines


def _shape(one: dict[str, Any]) -> str:
    return str(one["shape"])
