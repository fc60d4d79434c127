"""The report as one self-contained HTML file: figures inside, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from moeref.diagnose.explain.result import Explanation
from moeref.report import machine
from moeref.report.page import COLUMNS, SHARD_COLUMNS, TOKEN_COLUMNS, Page, collect
from moeref.verify import Diagnosis, Outcome


def write(
    path: Path,
    candidate: str,
    outcomes: Sequence[Outcome],
    found: Sequence[Diagnosis] = (),
    left_out: Sequence[str] = (),
    explanations: Sequence[Explanation] = (),
    command: str = "",
) -> None:
    """Write the report of one run.

    outcomes       figures are drawn for those that were judged with Options(keep_detail=True).
    found          laws and read-outs that ran.
    left_out       labels of problems that were not run.
    explanations   of `moeref explain`, shown before everything else.
    command        the line that repeats the whole run.
    Raises ModuleNotFoundError without jinja2 or matplotlib, OSError where the file can't be
    written.
    """
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    environment = [*machine.environment().items(), ("written", written)]
    page = collect(candidate, outcomes, found, left_out, explanations, command, environment)
    path.write_text(render(page), encoding="utf-8")


def render(page: Page) -> str:
    """The page as text. Everything is escaped but the figures, which are drawn from numbers and our own words."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("moeref.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = {"columns": COLUMNS, "token_columns": TOKEN_COLUMNS, "shard_columns": SHARD_COLUMNS}
    return environment.get_template("page.html").render(page=page, **columns)
