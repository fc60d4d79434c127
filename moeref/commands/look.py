"""`moeref show` and `moeref backends`."""

from __future__ import annotations

from typing import Annotated

import typer

from moeref.commands.common import Debug, reported


def show(
    problem: Annotated[str, typer.Argument(help="A problem's printed name, or the start of a published uuid.")],
    debug: Debug = False,
) -> None:
    """What a problem is: shapes, bytes, experts hit, FLOPs, the least time a card needs, workspaces."""
    with reported(debug):
        from moeref.interop.candidates import known
        from moeref.report.show import describe

        for one in describe(problem, known()):
            typer.echo(one)


def backends(debug: Debug = False) -> None:
    """Every candidate known by name, and why one can't run here."""
    with reported(debug):
        from moeref.interop.candidates import known
        from moeref.report.show import backend_lines

        for one in backend_lines(known()):
            typer.echo(one)
