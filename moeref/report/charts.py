"""The report's figures: SVG that is written into the page itself, in the page's colours, light and dark.

matplotlib draws with stand-in colours that are exchanged for the page's CSS variables; text stays text. A picture is as
wide as a phone and grows with its box. matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from moeref.judge.detail import EDGES, Detail, TokenWeights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.2  # inches, at 72 points each: the text is then readable at 360 CSS pixels and not huge at 520

FOREGROUND, MUTED, GRID, FIRST, SECOND, ALARM, PAPER = (f"#0{number}0{number}0{number}" for number in range(1, 8))
VARIABLES = {
    FOREGROUND: "--fg",
    MUTED: "--muted",
    GRID: "--grid",
    FIRST: "--first",
    SECOND: "--second",
    ALARM: "--alarm",
    PAPER: "--bg",
}
"""Stand-in colour -> the variable of the template's style sheet that takes its place."""

COLOUR_MAP = "cividis"  # even in lightness and the same to colour-blind readers
NOT_FINITE = (0.835, 0.369, 0.0, 1.0)  # Okabe and Ito's vermilion
COOL, LEAST_HOT = 0.5, 20.0
"""Ends of the error map's colours: rounding errors are at the dark end, and 20 times them is bright at the least."""

RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "svg.fonttype": "none",
    "text.color": FOREGROUND,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": FOREGROUND,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": FOREGROUND,
    "ytick.labelcolor": FOREGROUND,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": True,
}


def error_map(detail: Detail, name: str) -> str:
    """Root mean square z, tokens down and 128-blocks of columns across. Idle rows that are zero stay empty."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    values = detail.block_z
    finite = values[numpy.isfinite(values)]
    scale = LogNorm(COOL, max(LEAST_HOT, float(finite.max()) if finite.size else 0.0))
    colours = colormaps[COLOUR_MAP](scale(numpy.clip(numpy.nan_to_num(values, nan=COOL, posinf=COOL), COOL, None)))
    colours[numpy.isinf(values)] = NOT_FINITE
    colours[numpy.isnan(values)] = 0  # transparent
    with _drawing(3.4) as (figure, axes):
        tokens = len(values) * detail.tokens_per_row
        axes.imshow(
            colours, aspect="auto", interpolation="none", extent=(-0.5, values.shape[1] - 0.5, tokens - 0.5, -0.5)
        )
        axes.locator_params(integer=True)
        axes.set_xlabel("128-block of output columns")
        axes.set_ylabel("token" if detail.tokens_per_row == 1 else f"token ({detail.tokens_per_row} to a row)")
        bar = figure.colorbar(ScalarMappable(scale, COLOUR_MAP), ax=axes, pad=0.02, aspect=25)
        bar.set_label("root mean square z")
        _decades(bar.ax.yaxis)
        bar.outline.set_visible(False)
        bar.ax.axhline(1.0, color="white", linewidth=1)
        return _svg(figure, name)


def experts(detail: Detail, name: str) -> str:
    """Root mean square z of each hit local expert's tokens, beside the limit of its gate."""
    with _drawing(2.4) as (figure, axes):
        ids = [gate.where for gate in detail.expert_z]
        at = range(len(ids))
        values = [gate.value for gate in detail.expert_z]
        limits = [gate.limit for gate in detail.expert_z]
        shown = [value if math.isfinite(value) else math.nan for value in values]
        top = 2 * max([value for value in shown if value == value] + limits)
        bottom = 0.1
        for inside, colour in ((True, FIRST), (False, ALARM)):
            mine = [k for k in at if (values[k] <= limits[k]) is inside]
            heights = [shown[k] if shown[k] == shown[k] else top for k in mine]
            axes.bar(mine, [max(height - bottom, 0) for height in heights], bottom=bottom, color=colour, width=0.7)
        for k in at:
            if not math.isfinite(values[k]):
                axes.annotate("not finite", (k, bottom * 1.2), rotation=90, ha="center", va="bottom", fontsize=7)
        axes.hlines(limits, [k - 0.45 for k in at], [k + 0.45 for k in at], color=FOREGROUND, linewidth=1.2)
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        step = max(1, -(-len(ids) // 12))
        axes.set_xticks(list(at)[::step], [str(one) for one in ids[::step]])
        axes.set_xlim(-0.6, len(ids) - 0.4)
        axes.set_xlabel("global expert id (those that are local and were hit)")
        axes.set_ylabel("root mean square z")
        _decades(axes.yaxis)
        return _svg(figure, name)


def histogram(detail: Detail, name: str) -> str:
    """Elements by |z|, in half octaves, beside what the noise model expects. Both axes logarithmic."""
    with _drawing(2.6) as (figure, axes):
        edges = numpy.array(EDGES)
        counts, expected = detail.counts[1:-1], detail.expected[1:-1]
        last = int(numpy.nonzero((counts > 0) | (expected >= 0.5))[0].max(initial=0)) + 1
        last = max(last, int(numpy.searchsorted(edges, 8)))
        edges, counts, expected = edges[: last + 1], counts[:last], expected[:last]
        floor = 0.7
        axes.stairs(numpy.maximum(counts, floor), edges, baseline=floor, fill=True, color=FIRST, label="this output")
        axes.stairs(numpy.maximum(expected, floor), edges, baseline=None, color=SECOND, linewidth=1.8, label="expected")
        axes.axvline(8.0, color=FOREGROUND, linewidth=1, linestyle=(0, (4, 3)))
        top = 4 * max(float(counts.max(initial=1)), float(expected.max(initial=1)))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(floor, top)
        axes.set_xlim(edges[0], edges[-1])
        axes.annotate("8", (8.0, top), xytext=(3, -2), textcoords="offset points", va="top")
        axes.set_xlabel("|z| = |error| / what the recipe costs there")
        axes.set_ylabel("elements")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.2)
        _decades(axes.xaxis)
        _decades(axes.yaxis)
        return _svg(figure, name)


def weights(tokens: Sequence[TokenWeights], name: str) -> str:
    """Routing weights that the output shows, all finite, against those due: right ones lie on the diagonal."""
    with _drawing(3.0) as (figure, axes):
        due = numpy.array([one for token in tokens for one in token.due])
        seen = numpy.array([one for token in tokens for one in token.seen])
        low, high = float(due.min(initial=math.inf)), max(float(due.max(initial=0)), 1e-30)
        room = max(0.08 * (high - low), 0.02 * high)
        low, high = low - room, high + room
        # coefficients of rows that are no combination of their experts can be anything: they stand at the rim
        reach = (min(-0.1 * high, 1.2 * low), 1.3 * high)
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1)
        axes.scatter(
            due, numpy.clip(seen, *reach), s=14, facecolors="none", edgecolors=FIRST, linewidths=1, clip_on=False
        )
        axes.set_xlim(low, high)
        axes.set_ylim(*reach)
        axes.set_xlabel("routing weight due")
        axes.set_ylabel("weight seen in the output")
        axes.grid(True)
        axes.set_axisbelow(True)
        return _svg(figure, name)


def stages(bars: Sequence[tuple[str, int, int]], name: str) -> str:
    """(stage, findings that name it first, findings that name it further down), in the order of the data."""
    with _drawing(0.9 + 0.19 * len(bars)) as (figure, axes):
        at = numpy.arange(len(bars))
        first, further = [one for _, one, _ in bars], [two for _, _, two in bars]
        axes.barh(at, first, color=ALARM, height=0.7, label="named first")
        axes.barh(at, further, left=first, color=SECOND, height=0.7, alpha=0.55, label="named after others")
        axes.set_yticks(at, [stage for stage, _, _ in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, max([1, *(a + b for a, b in zip(first, further, strict=True))]) * 1.05)
        axes.locator_params(axis="x", integer=True)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("broken laws and read-outs that suspect the stage")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, borderaxespad=0.2)
        return _svg(figure, name)


def matches(stages: Sequence[str], best: Mapping[str, float | None], name: str) -> str:
    """All stages; those in `best` with the share of the error that their best hypothesis explains, None for none."""
    with _drawing(0.7 + 0.19 * len(stages)) as (figure, axes):
        at = numpy.arange(len(stages))
        shares = [min(max(best.get(stage) or 0.0, 0.0), 1.0) for stage in stages]
        axes.barh(at, shares, color=ALARM, height=0.7)
        for place, stage in enumerate(stages):
            if stage not in best:
                continue
            share = best[stage]
            label = "suspected, no known fault fits" if share is None else f"{100 * share:.3g} %"
            inside = shares[place] > 0.85
            axes.annotate(
                label,
                (shares[place], place),
                xytext=(-4 if inside else 4, 0),
                textcoords="offset points",
                va="center",
                ha="right" if inside else "left",
                color=PAPER if inside else FOREGROUND,
            )
        axes.set_yticks(at, stages)
        axes.set_ylim(len(stages) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("share of the error explained")
        return _svg(figure, name)


def _decades(axis: Any) -> None:
    """Plain numbers where they are short, and no minor labels: 0.1, 1, 10, 1000, 1e6."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def label(value: float, _: int) -> str:
        if 1e-3 < value < 1e5:
            return f"{value:g}"
        return f"1e{round(math.log10(value))}"

    axis.set_major_locator(LogLocator(10, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(label))


class _drawing:
    """A figure of this height in inches and its axes, under the report's settings."""

    def __init__(self, height: float) -> None:
        from matplotlib import rc_context

        self.height = height
        self.context = rc_context(RC)

    def __enter__(self) -> tuple[Figure, Axes]:
        from matplotlib.figure import Figure

        self.context.__enter__()
        figure = Figure(figsize=(WIDTH, self.height), layout="constrained")  # no pyplot: nothing global
        return figure, figure.subplots()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element whose ids begin with `name`, its colours the page's variables."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)  # the style would hold for the whole page
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', lambda found: f"{found[1]}{name}-", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text, count=2)  # HTML knows both, and the page names no address
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", text, count=1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page's own font
    return text.strip()
