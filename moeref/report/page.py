"""What the HTML report shows, as plain data: outcomes, laws and read-outs, and explanations -> Page.

Texts of a candidate (its name, its messages) are in here as they came: the template escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from moeref.diagnose.explain.result import Explanation
from moeref.judge.detail import Detail, TokenWeights
from moeref.judge.verdict import ERROR, FAIL, INCONCLUSIVE, PASS, UNSUPPORTED
from moeref.report import text
from moeref.report.pictures import Picture, explained_stages, pictures_of, suspected_stages
from moeref.verify import Diagnosis, Outcome

MOST_SECTIONS = 12
"""Problems shown in full, so that the page stays under 2 MB; the others have their row, and a message where they did
not pass."""

FEW = 3  # a run of that few problems shows all of them in full

MOST_TEXT = 4000  # characters of a message or traceback; --json holds all of it

WORST_TOKENS = 10

MOST_EXPERTS = 12  # named in one sentence

OFF = 0.02
"""Least relative change of an expert's median weight that is worth a sentence: bf16 weights move by 0.004 at most."""


@dataclass(frozen=True)
class Row:
    """A problem's line in the summary table; cells are in the order of COLUMNS."""

    label: str
    status: str
    cells: tuple[str, ...]
    anchor: str  # id of its section, '' where it has none


@dataclass(frozen=True)
class Section:
    """One problem in full."""

    anchor: str
    label: str
    problem: str
    status: str
    message: str
    facts: tuple[tuple[str, str], ...]  # (name, value)
    failed: tuple[tuple[str, str], ...]  # (check, detail)
    passed: tuple[str, ...]
    pictures: tuple[Picture, ...]
    unseen: tuple[str, ...]  # sentences: what could not be shown, and why
    notes: tuple[str, ...]  # sentences on the tokens below
    tokens: tuple[tuple[str, ...], ...]  # cells in the order of TOKEN_COLUMNS
    shards: tuple[tuple[str, ...], ...]  # cells in the order of SHARD_COLUMNS
    repeat: str
    traceback: str


COLUMNS = ("seq_len", "offset", "active", "matched", "of active", "worst row", "noise z", "s")
TOKEN_COLUMNS = ("token", "z", "z with best weights", "experts", "weights due", "weights seen")
SHARD_COLUMNS = ("shard", "experts", "rank", "status", "what it does")


@dataclass(frozen=True)
class Page:
    """The whole report."""

    candidate: str
    status: str  # of the run
    summary: tuple[str, ...]
    command: str
    rows: tuple[Row, ...]
    sections: tuple[Section, ...]
    others: tuple[tuple[str, str, str, str], ...]  # (label, status, message, repeat): not passed, and not in full
    left_out: tuple[str, ...]  # sentences: what this page does not hold
    explanations: tuple[Explanation, ...]
    broken: tuple[Diagnosis, ...]  # laws and read-outs
    holding: tuple[Diagnosis, ...]  # those that do, or that do not apply
    stages: tuple[Picture, ...]
    inside: str  # a sentence in the place of `stages`; '' where there are any
    environment: tuple[tuple[str, str], ...]


def collect(
    candidate: str,
    outcomes: Sequence[Outcome],
    found: Sequence[Diagnosis] = (),
    left_out: Sequence[str] = (),
    explanations: Sequence[Explanation] = (),
    command: str = "",
    environment: Sequence[tuple[str, str]] = (),
) -> Page:
    """Everything that the page shows. left_out: labels of problems that were not run."""
    full = _in_full(outcomes)
    anchors = {number: f"p{number}" for number in full}
    others = [
        (one.label, one.verdict.status, _cut(one.verdict.message, 300), one.repeat)
        for number, one in enumerate(outcomes)
        if number not in anchors and one.verdict.status != PASS
    ]
    stages = (*suspected_stages(found), *explained_stages(explanations))
    return Page(
        candidate=candidate,
        status=_overall([one.verdict.status for one in outcomes], found, explanations),
        summary=tuple(text.summary(outcomes, candidate, found)) if outcomes else (),
        command=command,
        rows=tuple(_row(one, anchors.get(number, "")) for number, one in enumerate(outcomes)),
        sections=tuple(_section(outcomes[number], anchors[number]) for number in full),
        others=tuple(others),
        left_out=_omitted(outcomes, full, left_out),
        explanations=tuple(explanations),
        broken=tuple(one for one in found if one.status == FAIL),
        holding=tuple(one for one in found if one.status != FAIL),
        stages=stages,
        inside=_inside(found, explanations, stages),
        environment=tuple(environment),
    )


def _in_full(outcomes: Sequence[Outcome]) -> list[int]:
    """Which outcomes get a section, in the order of the page: what did not pass, then the passing one furthest out."""
    if len(outcomes) <= FEW:
        return list(range(len(outcomes)))
    order = (FAIL, ERROR, INCONCLUSIVE, UNSUPPORTED)
    numbers = [number for status in order for number, one in enumerate(outcomes) if one.verdict.status == status]
    passing = [number for number, one in enumerate(outcomes) if one.verdict.status == PASS and one.detail is not None]
    furthest = sorted(passing, key=lambda number: outcomes[number].verdict.figures.noise_z or 0.0)[-1:]
    return numbers[: MOST_SECTIONS - len(furthest)] + furthest


def _omitted(outcomes: Sequence[Outcome], full: Sequence[int], left_out: Sequence[str]) -> tuple[str, ...]:
    said = []
    short = len(outcomes) - len(full)
    if short:
        said.append(
            f"{short} of {len(outcomes)} problems have their row in the table only: at most {MOST_SECTIONS} are shown "
            "in full, those that did not pass first, and of those that passed the one with the largest noise z. "
            "Run one alone, with --problem, to see it in full."
        )
    if left_out:
        said.append(f"Not run: {', '.join(left_out)}; verify --all runs them.")
    return tuple(said)


def _overall(statuses: Sequence[str], found: Sequence[Diagnosis], explanations: Sequence[Explanation]) -> str:
    broken = any(one.status == FAIL for one in found) or any(not one.correct for one in explanations)
    if broken or FAIL in statuses:
        return FAIL
    if ERROR in statuses:
        return ERROR
    if PASS in statuses or (explanations and not statuses):
        return PASS
    return UNSUPPORTED if statuses and set(statuses) == {UNSUPPORTED} else INCONCLUSIVE


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cut(message: str, most: int = MOST_TEXT) -> str:
    return message if len(message) <= most else f"{message[:most]} ... ({len(message) - most} more characters)"


def _row(outcome: Outcome, anchor: str) -> Row:
    figures, preset = outcome.verdict.figures, outcome.preset
    cells = (
        str(figures.seq_len),
        str(figures.offset),
        f"{figures.active_tokens}/{figures.seq_len}",
        _number(figures.matched.get(preset), ".4f"),
        _number(figures.matched_active.get(preset), ".4f"),
        _number(figures.worst_row, ".2e"),
        _number(figures.noise_z, ".3g"),
        f"{outcome.seconds:.1f}",
    )
    return Row(outcome.label, outcome.verdict.status, cells, anchor)


def _section(outcome: Outcome, anchor: str) -> Section:
    verdict, figures, kept = outcome.verdict, outcome.verdict.figures, outcome.detail
    facts = [
        ("tokens", f"{figures.seq_len}, {figures.active_tokens} of them with a local expert"),
        ("rows", f"{figures.local_rows} in {figures.experts_hit} local experts, the first one global id "
                 f"{figures.offset}"),
    ]  # fmt: skip
    if verdict.recipe:
        facts.append(
            ("recipe", f"{verdict.recipe} ({'found from the errors' if verdict.recipe_found else 'declared'})")
        )
    facts += [
        (f"matched, {name}", f"{ratio:.4f}, of active rows {_number(figures.matched_active.get(name), '.4f')}")
        for name, ratio in figures.matched.items()
    ]
    if figures.worst_row is not None:
        facts.append(
            ("row error", f"largest {figures.worst_row:.3g} (token {figures.worst_row_token}), "
                          f"median {_number(figures.median_row, '.3g')}")
        )  # fmt: skip
    if figures.noise_z is not None:
        facts.append(("noise z", f"root mean square {figures.noise_z:.3g}; an honest kernel has about 1 or less"))
    if figures.ambiguous_tokens:
        facts.append(
            ("ties", f"{figures.ambiguous_tokens} tokens tie at the cut, {figures.other_choice_tokens} of them were "
                     "judged by another admissible choice")
        )  # fmt: skip
    if figures.blind:
        facts.append(("blind", f"the data cannot show faults of {', '.join(figures.blind)}"))
    if outcome.call_seconds:
        facts.append(("time of a call", ", ".join(f"{one:.3g} s" for one in outcome.call_seconds[:4])))
    message = "" if verdict.failed and not verdict.missed and verdict.status == FAIL else verdict.message
    return Section(
        anchor=anchor,
        label=outcome.label,
        problem=verdict.problem,
        status=verdict.status,
        message=_cut(message),
        facts=tuple(facts),
        failed=tuple((check.name, _cut(check.detail)) for check in verdict.checks if check.passed is False),
        passed=tuple(check.name for check in verdict.checks if check.passed),
        pictures=pictures_of(kept, anchor) if kept else (),
        unseen=_unseen(outcome),
        notes=_token_notes(kept) if kept else (),
        tokens=tuple(_token(one) for one in kept.tokens[:WORST_TOKENS]) if kept else (),
        shards=tuple(
            (
                str(one.shard),
                f"{one.experts[0]} to {one.experts[1]}",
                str(one.rank),
                one.verdict.status,
                f"{one.sign}: {one.detail}" if one.sign else one.detail,
            )
            for one in outcome.shards
        ),
        repeat=outcome.repeat,
        traceback=_cut(outcome.traceback[-MOST_TEXT:]),
    )


def _unseen(outcome: Outcome) -> tuple[str, ...]:
    kept = outcome.detail
    if outcome.shards:
        return ("Judged as the sum over all shards: where its error lies is not drawn.",)
    if kept is None:
        return ("There was no output whose values could be compared, so nothing is drawn.",)
    if not kept.counts.sum():
        return ("No token has a local expert here, so there is no noise to compare with.",)
    return ()


def _token_notes(kept: Detail) -> tuple[str, ...]:
    if not kept.tokens:
        return ()
    count = kept.rows_out or "No"
    active = (
        f"{count} active tokens lie over the limit of their own roundings."
        if kept.rows_out != 1
        else "1 active token lies over the limit of its own roundings."
    )
    bad = [token for token in kept.tokens if token.z > 2 and math.isfinite(token.z)]
    if not bad:
        return (active,)
    cured = [token for token in bad if token.z_left**2 < 0.1 * token.z**2]
    share = f"{len(cured)} of the {len(bad)} looked at"
    reading = (
        f"Other weights of the same experts take away at least nine tenths of the squared error of {share} with z "
        "above 2: "
    )
    if len(cured) == len(bad):
        reading += "wrong routing weights, or a factor on a whole expert's result, would explain it."
    elif cured:
        reading += "there, wrong weights or a factor on a whole expert's result would explain it; elsewhere not."
    else:
        reading += "the error is not one of routing weights alone."
    mostly = 2 * len(cured) > len(bad)  # else a few rows fit by chance, and factors would mislead
    return (active, reading, *(_ratios(cured) if mostly else ()))


def _ratios(tokens: Sequence[TokenWeights]) -> list[str]:
    """Experts whose weight is off by one factor in most of these tokens: left out, scaled, doubled."""
    seen: dict[int, list[float]] = {}
    for one in tokens:
        for expert, due, found in zip(one.experts, one.due, one.seen, strict=True):
            if due and math.isfinite(found):
                seen.setdefault(expert, []).append(found / due)
    middle = {expert: median(ratios) for expert, ratios in sorted(seen.items())}
    off = {expert: ratio for expert, ratio in middle.items() if abs(ratio - 1) > OFF}
    if not off:
        return []
    named = ", ".join(
        f"{round(ratio, 3) + 0.0:g} for expert {expert}" for expert, ratio in list(off.items())[:MOST_EXPERTS]
    )
    more = f" and {len(off) - MOST_EXPERTS} more experts" if len(off) > MOST_EXPERTS else ""
    return [f"Weight seen over weight due, the median where it is off by more than {OFF:.0%}: {named}{more}."]


def _token(one: TokenWeights) -> tuple[str, ...]:
    return (
        str(one.token),
        f"{one.z:.3g}",
        f"{one.z_left:.3g}",
        ", ".join(str(expert) for expert in one.experts),
        ", ".join(f"{weight:.4g}" for weight in one.due),
        ", ".join(f"{weight:.4g}" for weight in one.seen),
    )


def _inside(found: Sequence[Diagnosis], explanations: Sequence[Explanation], stages: Sequence[Picture]) -> str:
    if stages:
        return ""
    if found:
        return (
            f"{sum(one.status == PASS for one in found)} of {len(found)} laws and read-outs hold, and none is broken."
        )
    if explanations:
        return "The explanation suspects no stage: what it saw is listed with it."
    return (
        "Nothing looked inside of the candidate in this run, and an output alone does not show its stages: verify "
        "--diagnose (or --small) runs laws and read-outs, moeref explain ranks suspects."
    )
