"""Search of tilings and crossovers on the card at hand: never at run time, only where it is asked for.

    import moe_fast
    print(moe_fast.tune().crossover)   # times, judges, keeps a table; calls take it from then on
    moe_fast.tuning.forget()           # back to the shipped choices

search.py chooses, runner.py draws, judges and times, variants.py lists what is tried, table.py keeps what was found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_fast.target import target_of
from moe_fast.tuning.search import Count, Runner, Task, search
from moe_fast.tuning.table import Entry, Key, forget
from moe_fast.tuning.table import save as save_table
from moeref.spec import PRESETS, Geometry

__all__ = ["TOKENS", "Tuned", "forget", "tune"]

TOKENS = (1, 7, 16, 32, 80, 160, 901)
"""Numbers of tokens that are tuned by default; each one's choice serves the calls below it, down to a quarter of it."""


@dataclass(frozen=True)
class Tuned:
    """What `tune` found."""

    card: str
    geometry: Geometry
    counts: tuple[Count, ...]  # by tokens, ascending
    file: Path | None = None  # where the table is kept; None where it is not

    @property
    def crossover(self) -> int | None:
        """The largest tuned number of tokens whose fastest way is not hopper_cuda; None where there is none."""
        few = [one.tokens for one in self.counts if one.chosen is not None and one.chosen.pipeline != "hopper_cuda"]
        return max(few, default=None)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The table: one entry for each count of which something was right."""
        made = []
        for one in self.counts:
            timing, shipped = one.timing(one.chosen), one.timing(one.shipped)
            if one.chosen is not None and timing is not None:
                us = shipped.us if shipped is not None else None
                made.append(Entry(one.tokens, one.chosen.pipeline, one.tiling, timing.us, us))
        return tuple(made)


def tune(
    geometry: Geometry = PRESETS["dsv3"],
    tokens: Sequence[int] = TOKENS,
    device: torch.device | str | None = None,
    *,
    local_expert_offset: int | None = None,
    progress: bool = True,
    save: bool = True,
    seed: int = 0,
) -> Tuned:
    """Find the fastest tiling and pipeline for each number of tokens on this card, and keep them as a table.

    geometry: DeepSeek-V3's with expert parallel 8 by default. device: a CUDA device, the current one by default.
    local_expert_offset: by default that of the shard which gets nearest to the mean of rows. Routing is drawn as
    moeref's 'deepseek_like' from `seed`, values are made on the device. progress: a bar, where stderr is a terminal.
    save: keep the table (moe_fast/tuning/table.py), for this process and later ones; False: only tell.

    Every variant's output must be byte for byte one that moeref's judge has passed under the recipe requant, or pass it
    itself; the output buffer is poisoned before. Times: medians of graph replays with a cold L2, variants in turn. What
    does not compile or is wrong is discarded, and stands in the result with its reason. The shipped choice stays where
    nothing beats it in every round and by 1 %.
    Raises RuntimeError where this machine can't run the kernels, ValueError for tokens or an offset that make no sense.
    """
    counts = _counts(tokens)
    chosen = _device(geometry, device)
    from moe_fast.tuning.runner import GpuRunner
    from moe_fast.tuning.variants import task_for

    with torch.cuda.device(chosen):
        runner = GpuRunner(geometry, chosen, local_expert_offset, seed)
        tasks = [task_for(count, geometry, chosen) for count in counts]
        found = run_tasks(tasks, runner, progress)
    result = Tuned(target_of(chosen).name, geometry, found)
    return keep(result, Key.of(target_of(chosen), geometry)) if save else result


def run_tasks(tasks: Sequence[Task], runner: Runner, progress: bool = False) -> tuple[Count, ...]:
    """Search each task in turn."""
    with _bar(progress, sum(len(task.variants) for task in tasks)) as tell:
        return tuple(search(task, runner, tell) for task in tasks)


def keep(result: Tuned, key: Key) -> Tuned:
    """The result with its file. A folder that can't be written to is one warning, and the result has no file."""
    if not result.entries:
        warnings.warn(
            "nothing was right: no table is kept, calls take the shipped choices", RuntimeWarning, stacklevel=3
        )
        return result
    try:
        return Tuned(result.card, result.geometry, result.counts, save_table(key, result.entries))
    except OSError as error:
        where = f"{key.path} can't be written ({type(error).__name__}: {error})"
        warnings.warn(f"{where}: the table is not kept; set MOE_FAST_CACHE", RuntimeWarning, stacklevel=3)
        return result


def _counts(tokens: Sequence[int]) -> list[int]:
    wrong = [one for one in tokens if isinstance(one, bool) or not isinstance(one, int) or one < 1]
    if wrong or not tokens:
        raise ValueError(f"tokens {list(tokens)}: expected one or more whole numbers above 0")
    return sorted(set(tokens))


def _device(geometry: Geometry, device: torch.device | str | None) -> torch.device:
    """The CUDA device that is meant. Raises RuntimeError where the kernels can't run there."""
    if not torch.cuda.is_available():
        raise RuntimeError("moe_fast.tune() times kernels on a GPU, and this machine has no CUDA device")
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    from moe_fast.backends import hopper

    reason = hopper.unsupported(geometry, chosen)
    if reason is not None:
        raise RuntimeError(f"moe_fast.tune() can't time {geometry.name} on {chosen}: {reason}")
    return chosen


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, where that is a terminal; what is yielded takes the next step's name."""
    if not wanted:
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        told = False

        def tell(what: str) -> None:
            nonlocal told
            bar.update(task, description=what, advance=int(told))
            told = True

        yield tell
