"""The command line: one function of moeref.commands a command. Imports no torch, so that --help answers at once."""

from __future__ import annotations

import os

import typer

from moeref.commands.bench import bench
from moeref.commands.explain import explain
from moeref.commands.faults import faults
from moeref.commands.fib import fib
from moeref.commands.fuzz import fuzz
from moeref.commands.golden import golden
from moeref.commands.look import backends, show
from moeref.commands.verify import verify

app = typer.Typer(
    help="Is my Mixture-of-Experts kernel right, and if not, why?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Is my Mixture-of-Experts kernel right, and if not, why?

    Exit codes: 0 all judged problems pass, 1 a failure or an error, 2 wrong usage, 3 nothing could be judged.
    """


for command in (verify, explain, bench, fuzz, faults, show, backends):
    app.command()(command)
app.add_typer(golden, name="golden")
app.add_typer(fib, name="fib")


def main() -> None:
    """Entry point of the `moeref` command."""
    # Judge and candidate take turns in two processes: threads that spin while they wait would slow the other one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="moeref")


if __name__ == "__main__":
    main()
