"""A benchmark's rows on the terminal: one line a candidate and problem, its other latencies and notes below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moeref.bench.ceilings import Ceilings
from moeref.bench.result import Latency, Result, Row
from moeref.judge.verdict import ERROR, FAIL, PASS
from moeref.report.text import REASON_LENGTH, STYLES


def unit_of(device: str) -> tuple[str, float]:
    """(name, how many in a second) of the times that are shown: us on a GPU, ms on a CPU."""
    return ("ms", 1e3) if device.startswith("cpu") else ("us", 1e6)


def short(value: float | None, form: str = "") -> str:
    """A figure, or '-' where there is none; without a form in three to four digits."""
    if value is None:
        return "-"
    if form:
        return format(value, form)
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


class Table:
    """Lays out lines for candidates and labels of these widths."""

    def __init__(self, labels: Sequence[str], candidates: Sequence[str], device: str) -> None:
        self.label = max(map(len, [*labels, "problem"]))
        self.candidate = max(map(len, [*candidates, "candidate"]))
        self.unit, self.per_second = unit_of(device)
        self.several = len(candidates) > 1

    def header(self) -> str:
        """Column titles above `line`."""
        ratio = f" {'x first':>7}" if self.several else ""
        return (
            f"{'problem':<{self.label}} {'seq_len':>7} {'rows':>6} {'hit':>4} {'candidate':<{self.candidate}} "
            f"{'status':<12} {'called':<10} {self.unit:>8} {'p10':>8} {'p90':>8}{ratio} {'x ref':>7} {'x floor':>7} "
            f"{'GB/s':>6} {'TFLOP/s':>7} {'kernels':>7} {'MB':>7}"
        )

    def line(self, row: Row) -> str:
        """One row. Where it is no PASS, the status stands alone: a wrong kernel has no speed."""
        start = (
            f"{row.label:<{self.label}} {row.seq_len:>7} {row.local_rows:>6.0f} {row.experts_hit:>4.0f} "
            f"{row.candidate:<{self.candidate}} {row.status:<12}"
        )
        if row.status != PASS:
            return start.rstrip()
        spread = row.latencies[row.primary].device
        ratio = f" {short(row.ratio):>7}" if self.several else ""
        workspace = None if row.workspace is None else row.workspace / 1e6
        return (
            f"{start} {row.primary:<10} {self.time(spread.median):>8} {self.time(spread.p10):>8} "
            f"{self.time(spread.p90):>8}{ratio} {short(row.speedup):>7} {short(row.times_floor):>7} "
            f"{short(row.gbps, '.0f' if (row.gbps or 0) >= 100 else '.1f'):>6} {_rate(row.tflops):>7} "
            f"{launches(row):>7} {short(workspace):>7}"
        )

    def below(self, row: Row) -> list[str]:
        """Indented lines: why it did not pass, the other latencies, notes."""
        lines = []
        if row.message:
            cut = row.message[:REASON_LENGTH] + (" ..." if len(row.message) > REASON_LENGTH else "")
            lines.append(f"    {cut}")
        if row.status in (FAIL, ERROR):
            lines.append(f"    repeat: {row.repeat}")
        others = [f"{name} {self._told(one)}" for name, one in row.latencies.items() if name != row.primary]
        if row.primary and row.latencies[row.primary].host is not None:
            others.insert(0, f"{row.primary} {self._told(row.latencies[row.primary])}")
        if others:
            lines.append(f"    {', '.join(others)}")
        return lines + [f"    {note}" for note in row.notes]

    def time(self, seconds: float) -> str:
        """In the table's unit."""
        return short(seconds * self.per_second)

    def _told(self, latency: Latency) -> str:
        host = f" (host {self.time(latency.host.median)})" if latency.host else ""
        return f"{self.time(latency.device.median)} {self.unit}{host}"


def _rate(value: float | None) -> str:
    return short(value, ".3g" if (value or 0) < 100 else ".0f")


def launches(row: Row) -> str:
    """Kernels a call, copies added behind a plus."""
    if row.kernels is None:
        return "-"
    return f"{row.kernels:g}" + (f"+{row.copies:g}" if row.copies else "")


def ceilings_line(ceilings: Ceilings) -> str:
    """What the floor is made from."""
    return (
        f"ceilings, measured in this run: read {ceilings.read_gbps:.0f} GB/s, copy {ceilings.copy_gbps:.0f} GB/s, "
        f"{short(ceilings.tflops, '.3g' if ceilings.tflops < 100 else '.0f')} TFLOP/s ({ceilings.matmul})"
    )


def style(row: Row) -> str:
    """The colour of its line."""
    return STYLES[row.status]


def summary(result: Result) -> list[str]:
    """Counts by candidate, and what was not measured."""
    lines = []
    for candidate in dict.fromkeys(row.candidate for row in result.rows):
        mine = [row for row in result.rows if row.candidate == candidate]
        counts = Counter(row.status for row in mine)
        told = ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status])
        calls = sum(one.device.count for row in mine for one in row.latencies.values())
        compared = f"; {calls} timed outputs, all compared" if calls else ""
        lines.append(f"{candidate}: {counts[PASS]} of {len(mine)} timed ({told}){compared}")
    if result.device.startswith("cpu"):
        lines.append("on a CPU kernels and workspace are not measured")
    if result.reference != "none":
        lines.append(f"x ref: speed-up over the {REFERENCE_NAMES[result.reference]}")
    if result.left_out:
        lines.append(f"left for --all: {', '.join(result.left_out)}")
    return lines


REFERENCE_NAMES = {
    "moeref": "reference moeref.reference.moe, on the same device",
    "published": "published way to compute the reference (all local experts expanded to float32), on the same device",
}
