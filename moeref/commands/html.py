"""The option --html of verify and explain."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moeref.commands.common import usage
from moeref.spec import SpecError

if TYPE_CHECKING:
    from moeref.diagnose.explain.result import Explanation
    from moeref.verify import Diagnosis, Outcome

Html = Annotated[
    Path | None, typer.Option(help="Write a report to this file: one HTML page with figures, nothing fetched.")
]


def check_html(path: Path | None) -> None:
    """Exit with one message, before anything is computed, where a report could not be written."""
    if path is None:
        return
    from importlib.util import find_spec

    if not path.parent.is_dir():
        usage(f"--html {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        usage(f"--html {path}: that is a folder, expected a file's name")
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        usage(f"--html needs {' and '.join(missing)}: pip install 'moeref[report]'")


def write_html(
    path: Path,
    console: Console,
    candidate: str,
    outcomes: Sequence[Outcome],
    found: Sequence[Diagnosis] = (),
    left_out: Sequence[str] = (),
    explanations: Sequence[Explanation] = (),
) -> None:
    """Write the report of this run and say where it is. Raises SpecError where the file can't be written."""
    from moeref.report import html

    command = shlex.join(["moeref", *sys.argv[1:]])
    try:
        with console.status("drawing the report"):
            html.write(path, candidate, outcomes, found, left_out, explanations, command)
    except OSError as error:
        raise SpecError(f"--html {path}: {error.strerror}") from error
    console.print(f"written: {path}", markup=False)
