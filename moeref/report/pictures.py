"""The figures of the report with their words: a title, what a reader who does not see it should know, a caption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from moeref.diagnose.explain.result import Explanation
from moeref.diagnose.faults import STAGES
from moeref.judge.detail import EDGES, Detail
from moeref.judge.verdict import FAIL
from moeref.report import charts
from moeref.verify import Diagnosis


@dataclass(frozen=True)
class Picture:
    """A figure: `svg` is markup of our own, all the rest is text."""

    title: str
    svg: str
    alt: str  # what a reader who does not see it should know, with numbers
    caption: str


def pictures_of(kept: Detail, anchor: str) -> tuple[Picture, ...]:
    """The figures of one outcome that there is something to draw for; `anchor` begins their ids."""
    pictures = []
    total = float(kept.counts.sum())
    if kept.block_z.size and (total or bool((kept.block_z > 0).any())):
        pictures.append(_error_map(kept, anchor))
    if total:
        pictures.append(_histogram(kept, anchor))
    if kept.expert_z:
        pictures.append(_experts(kept, anchor))
    if any(all(math.isfinite(seen) for seen in token.seen) for token in kept.tokens):
        pictures.append(_weights(kept, anchor))
    return tuple(pictures)


def _error_map(kept: Detail, anchor: str) -> Picture:
    values = kept.block_z
    seen = values[~numpy.isnan(values)]
    infinite, finite = int(numpy.isinf(seen).sum()), seen[numpy.isfinite(seen)]
    shape = f"{len(values)} rows by {values.shape[1]} blocks"
    alt = f"Error map, {shape}; {int((seen > 2).sum())} of {seen.size} cells above 2"
    if finite.size:
        row, block = numpy.unravel_index(int(numpy.where(numpy.isfinite(values), values, -1).argmax()), values.shape)
        alt += f"; the largest is {finite.max():.3g}, token {int(row) * kept.tokens_per_row}, block {int(block)}"
    caption = (
        "Root mean square z of each token in each 128-block of output columns; 1 (the white line) is what the recipe's "
        "roundings cost."
    )
    if kept.tokens_per_row > 1:
        caption += f" {kept.tokens_per_row} tokens share a row, the worst of them counts."
    if bool(numpy.isnan(values).any()):
        caption += " Empty: no local expert, and zero as it should be."
    if infinite:
        caption += f" Orange: {infinite} cells with NaN or inf, or not zero where zero is due."
    return Picture("Error, tokens by blocks", charts.error_map(kept, f"{anchor}m"), alt, caption)


def _histogram(kept: Detail, anchor: str) -> Picture:
    total = kept.counts.sum()
    large = float(kept.counts[_first_bin(8.0) :].sum())
    beyond = float(kept.counts[-1])
    alt = f"Histogram of |z| over {int(total)} elements: {large / total:.3g} of them are above 8"
    caption = (
        f"{int(total)} elements of active tokens by |z|, in half octaves, and the curve that the noise model expects "
        f"of a right kernel. Above 8, the dashed line, none may lie: {int(large)} do. "
        "Sums that are more exact than an FP8 tensor core's lie a little below the curve on the right."
    )
    if beyond:
        caption += f" Not drawn: {int(beyond)} above {EDGES[-1]:.3g}, or NaN or inf."
    return Picture("Size of the error", charts.histogram(kept, f"{anchor}h"), alt, caption)


def _first_bin(edge: float) -> int:
    return EDGES.index(edge) + 1


def _experts(kept: Detail, anchor: str) -> Picture:
    out = [gate.where for gate in kept.expert_z if not gate.passed]
    named = ", ".join(str(one) for one in out[:12]) + (", ..." if len(out) > 12 else "")
    worst = max(kept.expert_z, key=lambda gate: gate.value if gate.value == gate.value else math.inf)
    alt = (
        f"Error by expert: {len(out)} of {len(kept.expert_z)} lie over their limit; the largest is expert "
        f"{worst.where} with {worst.value:.3g}, limit {worst.limit:.3g}"
    )
    caption = "Root mean square z over each local expert's tokens; the line is its limit. "
    caption += f"Over it: {len(out)} of {len(kept.expert_z)}" + (f" (global ids {named})." if out else ".")
    caption += " A token counts for each of its experts."
    return Picture("Error by expert", charts.experts(kept, f"{anchor}e"), alt, caption)


MOST_POINTS = 300
"""Weights drawn in one figure: those of the tokens furthest out. More would only weigh."""


def _weights(kept: Detail, anchor: str) -> Picture:
    finite = [token for token in kept.tokens if all(math.isfinite(seen) for seen in token.seen)]
    room = MOST_POINTS // max(len(token.due) for token in finite)
    shown = finite[: max(1, room)]
    off = max(abs(seen - due) for token in shown for due, seen in zip(token.due, token.seen, strict=True))
    alt = f"Routing weights of {len(shown)} tokens, seen against due: they differ by {off:.3g} at most"
    which = "" if len(shown) == len(finite) else " furthest out"
    caption = (
        f"Each local expert of the {len(shown)} tokens{which}: the weight that is due, and the one that explains the "
        "output's row best. On the line: right. At 0: the expert is missing. Scattered points: those rows are no "
        "combination of their experts' results."
    )
    return Picture("Routing, as the output shows it", charts.weights(shown, f"{anchor}w"), alt, caption)


def suspected_stages(found: Sequence[Diagnosis]) -> list[Picture]:
    """Bars of the stages that broken laws and read-outs suspect; none where none is broken."""
    broken = [one.finding for one in found if one.status == FAIL and one.finding.suspects]
    if not broken:
        return []
    bars = [
        (
            stage,
            sum(finding.suspects[0] == stage for finding in broken),
            sum(stage in finding.suspects[1:] for finding in broken),
        )
        for stage in STAGES
    ]
    most = max(bars, key=lambda bar: (bar[1], bar[2]))
    alt = f"Stages by broken laws and read-outs: {most[0]} is named first by {most[1]} of {len(broken)}"
    caption = (
        f"{len(broken)} of {len(found)} laws and read-outs are broken. Each names the stages that it suspects, the "
        "likeliest first; stages are in the order of the data."
    )
    return [Picture("Stages under suspicion", charts.stages(bars, "stages"), alt, caption)]


def explained_stages(explanations: Sequence[Explanation]) -> list[Picture]:
    """For each explanation with suspects, the stages by what their best suspect explains."""
    pictures = []
    for number, one in enumerate(explanations):
        best: dict[str, float | None] = {}
        for suspect in one.suspects:
            known = [share for share in (best.get(suspect.stage), suspect.match) if share is not None]
            best[suspect.stage] = max(known, default=None)
        if not best:
            continue
        told = ", ".join(
            f"{stage} {'suspected' if share is None else format(share, '.3g')}" for stage, share in best.items()
        )
        caption = (
            f"Suspected stages on {one.problem}, in the order of the data: the largest share of the error that a fault "
            "of the catalogue in that stage explains."
        )
        name = "Stages by what their faults explain"
        pictures.append(Picture(name, charts.matches(STAGES, best, f"matches{number}"), f"{name}: {told}", caption))
    return pictures
