"""Verdicts as lines: one a problem, an indented reason under a failure, a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moeref.judge.vacuity import STAGES
from moeref.judge.verdict import ERROR, FAIL, INCONCLUSIVE, PASS, UNSUPPORTED
from moeref.verify import Diagnosis, Outcome

STYLES = {PASS: "green", FAIL: "bold red", ERROR: "bold magenta", UNSUPPORTED: "yellow", INCONCLUSIVE: "yellow"}
REASON_LENGTH = 700  # characters of a reason on the terminal; --json holds all of it


def header(label_width: int) -> str:
    """Column titles above `line`."""
    return (
        f"{'problem':<{label_width}} {'seq_len':>7} {'offset':>6} {'active':>13} {'matched':>8} {'of active':>9} "
        f"{'worst row':>9} {'noise z':>8} {'status':<12} {'s':>6}"
    )


def line(outcome: Outcome, label_width: int) -> str:
    """One line for a problem. Columns: active = tokens with a local expert of all tokens; matched = matched ratio of
    the chosen preset; of active = the same over active rows; worst row = largest relative row error; noise z = error
    in units of what the recipe costs; s = seconds for inputs, reference, candidate and judging."""
    figures = outcome.verdict.figures
    preset = outcome.preset

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    active = f"{figures.active_tokens}/{figures.seq_len}"
    return (
        f"{outcome.label:<{label_width}} {figures.seq_len:>7} {figures.offset:>6} {active:>13} "
        f"{number(figures.matched.get(preset), '.4f'):>8} {number(figures.matched_active.get(preset), '.4f'):>9} "
        f"{number(figures.worst_row, '.2e'):>9} {number(figures.noise_z, '.3g'):>8} "
        f"{outcome.verdict.status:<12} {outcome.seconds:>6.1f}"
    )


def reasons(outcome: Outcome) -> list[str]:
    """Indented lines under a problem that did not pass: why, and the command that repeats it."""
    verdict = outcome.verdict
    lines = []
    if verdict.message:
        text = verdict.message
        if len(text) > REASON_LENGTH:
            text = text[:REASON_LENGTH] + " ..."
        lines.append(f"    {text}")
    if outcome.shards:
        told = Counter(f"{one.verdict.status}{f' {one.sign}' if one.sign else ''}" for one in outcome.shards)
        each = ", ".join(f"{count} {what}" for what, count in told.items())
        lines.insert(0, f"    sum of {len(outcome.shards)} shards; on their own: {each}")
    if verdict.status in (FAIL, ERROR):
        lines.append(f"    repeat: {outcome.repeat}")
    return lines


def diagnosis_line(diagnosis: Diagnosis) -> str:
    """One line for a law or read-out: its name, status, and what was seen where it did not pass."""
    finding = diagnosis.finding
    detail = "" if finding.passed else finding.detail
    suspects = f" [suspect: {', '.join(finding.suspects)}]" if finding.passed is False and finding.suspects else ""
    return f"{diagnosis.kind + ' ' + finding.name:<36} {diagnosis.status:<12} {detail}{suspects}".rstrip()


def summary(outcomes: Sequence[Outcome], candidate: str, found: Sequence[Diagnosis] = ()) -> list[str]:
    """Counts by status, the recipes judged under, and what was really tested."""
    counts = Counter(outcome.verdict.status for outcome in outcomes)
    shown = ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status])
    lines = [f"{candidate}: {counts[PASS]} of {len(outcomes)} PASS ({shown})" if outcomes else "nothing was run"]
    recipes = Counter((o.verdict.recipe, o.verdict.recipe_found) for o in outcomes if o.verdict.recipe)
    if recipes:
        parts = [
            f"{name} ({'found' if found else 'declared'}, {n} problem{'s' * (n > 1)})"
            for (name, found), n in recipes.most_common()
        ]
        lines.append(f"judged under recipe: {'; '.join(parts)}")
    judged = [o.verdict.figures for o in outcomes if o.verdict.status in (PASS, FAIL)]
    lines.append(
        f"really tested: {sum(f.active_tokens for f in judged)} tokens with local work, "
        f"{sum(f.local_rows for f in judged)} local rows, {sum(f.experts_hit for f in judged)} expert runs "
        f"in {len(judged)} problems"
    )
    if found:
        seen = Counter(one.status for one in found)
        lines.append(
            f"laws and read-outs: {seen[PASS]} of {len(found)} hold"
            + (f", {seen[FAIL]} broken" if seen[FAIL] else "")
            + (f", {seen[INCONCLUSIVE]} do not apply" if seen[INCONCLUSIVE] else "")
        )
    if judged:
        seeing = ((stage, sum(stage not in f.blind for f in judged)) for stage in STAGES)
        tested = ", ".join(f"{stage} {count}" for stage, count in seeing)
        lines.append(f"problems whose data tell right from wrong: {tested} of {len(judged)}")
    tossed = sum(f.ambiguous_tokens for f in judged)
    if tossed:
        other = sum(f.other_choice_tokens for f in judged)
        lines.append(
            f"ties: {tossed} tokens tie at the cut; {other} of them were right by another admissible choice only"
        )
    missed = [o for o in outcomes if o.verdict.missed]
    for outcome in missed:
        lines.append(f"passed by the matched ratio alone: {outcome.label}, despite {', '.join(outcome.verdict.missed)}")
    return lines
