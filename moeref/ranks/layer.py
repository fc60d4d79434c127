"""One problem through all shards that this process holds, and the sum over all processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from moeref.interop.runner import Runner
from moeref.judge.verdict import ERROR, Figures, Verdict
from moeref.ranks.part import Part, Weights, work
from moeref.ranks.shards import Shard, cut
from moeref.ranks.total import Alone, Together, judge_total
from moeref.spec import Problem
from moeref.verify import Options, Outcome


def verify_layers(candidate: str, problems: Sequence[tuple[str, Problem]], options: Options) -> Iterator[Outcome]:
    """Judge the sum over all shards of each problem's layer, all shards in turn in this process; as moeref.verify."""
    for _, problem in problems:
        cut(problem.geometry, options.shards or 0)  # a wrong number is said before anything runs
    with options.runner(candidate) as runner, kept_weights(options) as weights:
        for label, problem in problems:
            mine = cut(problem.geometry, options.shards or 0)
            try:
                parts, seconds = parts_of(runner, problem, mine, options, weights)
                yield add_up(candidate, label, problem, options, parts, seconds, Alone())
            except torch.cuda.OutOfMemoryError as error:
                text = f"the judge ran out of GPU memory: {str(error).splitlines()[0]}; try --device cpu or torchrun"
                figures = Figures(problem.seq_len, problem.offset, 0, 0, 0)
                verdict = Verdict(problem.name, ERROR, (), "", False, figures, text)
                yield Outcome(label, verdict, options.preset, 0.0, (), options.repeat(candidate, problem))


def kept_weights(options: Options) -> Weights:
    """Weights are kept on a machine with a GPU: it has the memory for a layer, and its time is dear."""
    return Weights(on=options.device.startswith("cuda"))


def parts_of(
    runner: Runner, problem: Problem, mine: Sequence[Shard], options: Options, weights: Weights
) -> tuple[list[Part], float]:
    """The parts of this process's shards, one shard after the other, and the seconds that they took."""
    start = time.perf_counter()
    return [work(runner, problem, shard, options, weights) for shard in mine], time.perf_counter() - start


def add_up(
    candidate: str,
    label: str,
    problem: Problem,
    options: Options,
    parts: Sequence[Part],
    seconds: float,
    together: Together,
) -> Outcome:
    """One problem's outcome from the parts of this process and, through `together`, of all others."""
    start = time.perf_counter()
    verdict, briefs = judge_total(problem, parts, together, options, torch.device(options.device))
    return Outcome(
        label=label,
        verdict=verdict,
        preset=options.preset,
        seconds=seconds + time.perf_counter() - start,
        call_seconds=tuple(taken for brief in briefs for taken in brief.own.call_seconds),
        repeat=options.repeat(candidate, problem),
        traceback="\n".join(brief.traceback for brief in briefs if brief.traceback),
        shards=tuple(brief.own for brief in briefs),
    )
