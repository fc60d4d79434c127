"""What commands share: exit codes, errors without a traceback, the device, the progress bar."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moeref.interop.devices import usable_device as usable_device

EXIT_PASS, EXIT_FAIL, EXIT_USAGE, EXIT_NOT_TESTED = 0, 1, 2, 3

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Isolate = Annotated[bool, typer.Option("--isolate/--no-isolate", help="Run the candidate in a process of its own.")]


def exit_code(statuses: list[str]) -> int:
    """0 when something passed and nothing failed; 1 for a FAIL or an ERROR; 3 when nothing could be judged."""
    if any(status in ("FAIL", "ERROR") for status in statuses):
        return EXIT_FAIL
    return EXIT_PASS if "PASS" in statuses else EXIT_NOT_TESTED


class reported:
    """Turn known errors into one message and exit code 2; anything else into one line that asks for --debug."""

    def __init__(self, debug: bool) -> None:
        self.debug = debug

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or self.debug or isinstance(error, typer.Exit | SystemExit):
            return
        if isinstance(error, BrokenPipeError):  # `| head` has read enough: typer ends in silence with exit code 1
            return
        if isinstance(error, KeyboardInterrupt):
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_FAIL) from None
        if isinstance(error, ValueError):  # SpecError, InputError, CandidateError
            usage(str(error))
        typer.echo(
            f"moeref: {type(error).__name__}: {error}\nThis is a fault of moeref: --debug shows where.", err=True
        )
        raise typer.Exit(EXIT_FAIL) from None


def usage(message: str) -> NoReturn:
    typer.echo(f"moeref: {message}", err=True)
    raise typer.Exit(EXIT_USAGE) from None


def progress_bar(console: Console) -> Progress:
    """A progress bar on a terminal; nothing elsewhere."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
