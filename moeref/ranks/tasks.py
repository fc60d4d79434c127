"""What ranks' working processes do with an item: the tasks of moeref.ranks.watch.Job."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moeref.ranks.layer import add_up, kept_weights, parts_of
from moeref.ranks.shards import cut, dealt
from moeref.ranks.world import World
from moeref.spec import Problem
from moeref.verify import Diagnosis, Options, Outcome, diagnose, judge_one

Item = tuple[str, Problem, bool]
"""Label, problem, and whether laws and read-outs are asked for in place of a verdict."""


def on_this_rank(options: Options) -> Options:
    """The options with the device of this rank."""
    world = World.of()
    return options if world is None else replace(options, device=world.device(options.device))


def read_routing(folder: str) -> None:
    """Make the routing kinds known that the command read from a data set: this is another process."""
    if folder:
        from moeref.interop.flashinfer_bench import capture_routing

        capture_routing(Path(folder))


@contextmanager
def judging(
    candidate: str, items: Sequence[Item], options: Options
) -> Iterator[Callable[[int], Outcome | list[Diagnosis]]]:
    """Verdicts, and findings of laws and read-outs, on one rank each."""
    here = on_this_rank(options)
    read_routing(options.routing_from)
    with here.runner(candidate) as runner:

        def do(index: int) -> Outcome | list[Diagnosis]:
            label, problem, probed = items[index]
            repeat = options.repeat(candidate, problem)
            if probed:
                return [replace(one, repeat=f"{repeat} --diagnose") for one in diagnose(candidate, [problem], here)]
            return judge_one(runner, candidate, label, problem, here, repeat=repeat)

        yield do


@contextmanager
def adding(
    candidate: str, items: Sequence[Item], options: Options, group: int = 0
) -> Iterator[Callable[[int], Generator[None, None, Outcome]]]:
    """Verdicts on sums over all shards, each rank with its own shards. group: a new number after a rank was lost."""
    world = World.of()
    assert world is not None
    here = on_this_rank(options)
    read_routing(options.routing_from)
    together = Processes(world, here.device, group)
    with here.runner(candidate) as runner, kept_weights(here) as weights:

        def do(index: int) -> Generator[None, None, Outcome]:
            label, problem, _ = items[index]
            mine = dealt(cut(problem.geometry, options.shards or 0), world.rank, world.size)
            parts, seconds = parts_of(runner, problem, mine, here, weights)
            yield
            outcome = add_up(candidate, label, problem, here, parts, seconds, together)
            return replace(outcome, repeat=options.repeat(candidate, problem))

        yield do


class Processes:
    """moeref.ranks.total.Together over a torch.distributed group of all ranks."""

    def __init__(self, world: World, device: str, group: int) -> None:
        self.rank = world.rank
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        backend = world.backend(device)
        self._on_device = backend == "nccl"
        store = world.open_store(f"group/{group}")
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timedelta(minutes=10)
        )

    def _reduce(self, tensor: torch.Tensor, how: Any) -> torch.Tensor:
        where = self._device if self._on_device else torch.device("cpu")
        moved = tensor.to(where).clone()
        dist.all_reduce(moved, how)
        return moved.to(tensor.device)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over all ranks."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over all ranks."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, what: Any) -> list[Any]:
        """One object from each rank, in their order."""
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, what)
        return every
