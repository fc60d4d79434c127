"""`python -m moe_fast.tools.tune`: the fastest tilings and pipelines for this card, kept for the calls that follow."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moe_fast import tuning
from moe_fast.tuning.search import Count
from moe_fast.tuning.table import VARIABLE
from moeref.spec import Geometry

EXIT_NOTHING, EXIT_USAGE = 1, 2


def main(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = ",".join(
        map(str, tuning.TOKENS)
    ),
    geometry: Annotated[str, typer.Option(help="A preset's name or a code, as `moeref show` prints it.")] = "dsv3",
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    offset: Annotated[
        int | None, typer.Option(help="First local expert; by default the shard with about the mean of rows.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of routing and values.")] = 0,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Keep the table for moe_fast.moe's calls.")] = True,
    forget: Annotated[bool, typer.Option("--forget", help="Time nothing: remove every table that is kept.")] = False,
) -> None:
    """Time moe_fast's variants on this card, each judged first, and keep what is faster than the shipped choice.

    The table shows each right variant's time in microseconds and its ratio to the shipped choice's.

    Exit codes: 0 tuned, 1 no variant was right, 2 wrong usage or no GPU.
    """
    console = Console(highlight=False, soft_wrap=True)
    if forget:
        gone = tuning.forget()
        console.print("\n".join(f"removed: {path}" for path in gone) or "no table is kept", markup=False)
        return
    try:
        counts = [int(part) for part in tokens.split(",")]
    except ValueError:
        _usage(f"--tokens {tokens}: expected whole numbers separated by commas, e.g. 1,16,80")
    try:
        meant = Geometry.parse(geometry)
        result = tuning.tune(meant, counts, device, local_expert_offset=offset, save=save, seed=seed)
    except (RuntimeError, ValueError) as error:
        _usage(str(error).splitlines()[0])
    show(console, result)
    if not result.entries:
        raise typer.Exit(EXIT_NOTHING)


def show(console: Console, result: tuning.Tuned) -> None:
    """One table, what was left out, the crossover, the file."""
    table = Table(box=None, pad_edge=False)
    for name in ("tokens", "rows", "hit"):
        table.add_column(name, justify="right")
    table.add_column("variant", no_wrap=True)
    for name in ("us", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for count in result.counts:
        _rows(table, count)
    console.print(f"{result.card}, {result.geometry.name}")
    console.print(table)
    for count in result.counts:
        for variant, reason in count.discarded:
            console.print(f"{count.tokens} tokens: {variant.name} is left out: {reason}", markup=False)
        if count.chosen is None:
            console.print(f"{count.tokens} tokens: no variant was right; calls take the shipped choice", markup=False)
    if result.entries:
        console.print(crossover(result))
    kept = f"kept in {result.file}; {VARIABLE}=0 turns it off, --forget removes it"
    console.print(kept if result.file is not None else "not kept", markup=False)


def crossover(result: tuning.Tuned) -> str:
    """Where hopper_cuda becomes the fastest pipeline."""
    few = result.crossover
    if few is None:
        return "hopper_cuda is the fastest at every tuned number of tokens"
    beyond = [entry.tokens for entry in result.entries if entry.tokens > few]
    if not beyond:
        return f"hopper_cuda is not the fastest at {few} tokens, the most that were tuned"
    return f"the crossover to hopper_cuda lies between {few} and {min(beyond)} tokens"


def _rows(table: Table, count: Count) -> None:
    for timing in count.timings:
        chosen, shipped = timing.variant == count.chosen, timing.variant == count.shipped
        ratio = count.ratio(timing)
        table.add_row(
            str(count.tokens),
            str(count.drawn.local_rows),
            str(count.drawn.experts_hit),
            timing.variant.name,
            f"{timing.us:.1f}",
            f"{ratio:.3f}" if ratio is not None else "-",
            ("stays" if chosen else "shipped") if shipped else "chosen" if chosen else "",
            style="bold" if chosen else None,
        )


def _usage(message: str) -> None:
    typer.echo(f"moe_fast.tools.tune: {message}", err=True)
    raise typer.Exit(EXIT_USAGE)


if __name__ == "__main__":
    typer.run(main)
