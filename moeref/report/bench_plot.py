"""Latency against seq_len, both logarithmic, with the floor drawn in. matplotlib is imported only here."""

from __future__ import annotations

from pathlib import Path

from moeref.bench.result import Result
from moeref.report.bench_table import unit_of

MARKERS = "os^Dv<>P"


class NothingToPlot(ValueError):
    """No row has passed."""


def write_plot(result: Result, path: Path) -> None:
    """Write the picture in the format of the file's ending (png, svg, pdf). Raises NothingToPlot; ValueError for an
    ending that matplotlib does not know; ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    unit, per_second = unit_of(result.device)
    passed = [row for row in result.rows if row.seconds is not None and row.seq_len > 0]
    if not passed:
        raise NothingToPlot("nothing to plot: no candidate has passed a problem")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, candidate in enumerate(dict.fromkeys(row.candidate for row in passed)):
        mine = sorted((row for row in passed if row.candidate == candidate), key=lambda row: row.seq_len)
        spreads = [row.latencies[row.primary].device for row in mine]
        middle = [one.median * per_second for one in spreads]
        down = [(one.median - one.p10) * per_second for one in spreads]
        up = [(one.p90 - one.median) * per_second for one in spreads]
        axes.errorbar(
            [row.seq_len for row in mine],
            middle,
            yerr=[down, up],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1,
            capsize=2,
            label=f"{candidate} ({', '.join(dict.fromkeys(row.primary for row in mine))})",
        )
    floors = sorted({(row.seq_len, row.floor * per_second) for row in passed if row.floor > 0})
    axes.plot([at for at, _ in floors], [floor for _, floor in floors], "k--", linewidth=1, label="floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("seq_len")
    axes.set_ylabel(f"latency in {unit}, median; bars: 10th to 90th percentile")
    axes.set_title(f"{result.environment.get('gpu', result.device)}: latency, and the floor of bytes and FLOPs")
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
