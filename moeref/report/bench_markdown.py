"""A benchmark as a Markdown page: what was measured where, then one table."""

from __future__ import annotations

from moeref.bench.result import Result, Row
from moeref.judge.verdict import PASS
from moeref.report.bench_table import REFERENCE_NAMES, Table, ceilings_line, launches, short, unit_of

REASON_LENGTH = 240  # characters of a reason; --json holds all of it


def to_markdown(result: Result) -> str:
    """The whole page. A row that is no PASS has its status in place of figures, and its reason below the table."""
    unit, _ = unit_of(result.device)
    table = Table([], [], result.device)
    environment = ", ".join(f"{name} {value}" for name, value in result.environment.items())
    ways = list(dict.fromkeys(name for row in result.rows for name in row.latencies))
    hosted = [name for name in ways if any(_host(row, name) is not None for row in result.rows)]
    head = ["problem", "seq_len", "local rows", "experts hit", "candidate", "verdict", f"floor {unit}"]
    head += [f"{name} {unit} (p10..p90)" for name in ways] + [f"{name}: host {unit}" for name in hosted]
    head += ["x floor", "x first", "x ref", "GB/s", "TFLOP/s", "kernels", "workspace MB"]
    lines = [
        f"Device: {result.device}; {environment}. {_sentence(ceilings_line(result.ceilings))}",
        f"Options: {', '.join(f'{name} {value}' for name, value in result.options.items())}.",
    ]
    if result.reference in REFERENCE_NAMES:
        lines.append(f"x ref is the speed-up over the {REFERENCE_NAMES[result.reference]}.")
    lines += ["", _cells(head), _cells(["---"] * len(head))]
    for row in result.rows:
        cells = [row.label, str(row.seq_len), f"{row.local_rows:.0f}", f"{row.experts_hit:.0f}", f"`{row.candidate}`"]
        cells += [row.status, table.time(row.floor)]
        if row.status != PASS:
            cells += [""] * (len(head) - len(cells))
            lines.append(_cells(cells))
            continue
        for name in ways:
            spread = row.latencies[name].device if name in row.latencies else None
            told = (
                f"{table.time(spread.median)} ({table.time(spread.p10)}..{table.time(spread.p90)})" if spread else "-"
            )
            cells.append(told)
        for name in hosted:
            host = _host(row, name)
            cells.append("-" if host is None else table.time(host))
        cells += [short(row.times_floor), short(row.ratio), short(row.speedup), short(row.gbps), short(row.tflops)]
        cells += [launches(row), short(None if row.workspace is None else row.workspace / 1e6)]
        lines.append(_cells(cells))
    reasons = [
        f"- {row.label}, `{row.candidate}`: {text}"
        for row in result.rows
        for text in ([f"{row.status}: {_cut(row.message)}"] if row.status != PASS else []) + list(row.notes)
    ]
    return "\n".join([*lines, *(["", *reasons] if reasons else [])]) + "\n"


def _host(row: Row, name: str) -> float | None:
    latency = row.latencies.get(name)
    return latency.host.median if latency is not None and latency.host is not None else None


def _cut(text: str) -> str:
    return text[:REASON_LENGTH] + (" ..." if len(text) > REASON_LENGTH else "")


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
