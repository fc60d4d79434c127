"""One shard of a layer: the candidate's output, its own verdict, and what the sum over all shards needs of it.

A part keeps [T, H] tensors only, no weights and no permuted rows, so that one process can hold all shards in turn.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from moeref.inputs import Inputs
from moeref.interop.observe import CandidateRun
from moeref.interop.runner import Runner
from moeref.interop.shared_inputs import SharedInputs
from moeref.judge.checks import comparable
from moeref.judge.compare import CRITERIA, block_errors
from moeref.judge.noise import Noise, output_noise
from moeref.judge.ties import ambiguous_tokens, other_choices
from moeref.judge.verdict import AUTO, FAIL, Known, Verdict, judge
from moeref.make import make_inputs
from moeref.ranks.shards import Shard
from moeref.ranks.sign import Sign, find_sign
from moeref.reference import Trace, experts, moe, permute
from moeref.spec import EXACT, Problem, Recipe
from moeref.verify import Options


@dataclass(frozen=True)
class Share:
    """What the reference says of a shard under one choice of experts, for some or all tokens."""

    unrounded: torch.Tensor  # [n, H] float32
    noise: Noise  # of the recipe that the shard was judged under
    local: torch.Tensor  # [n, E] bool: chosen, and of this shard


@dataclass(frozen=True)
class Part:
    """One shard's work on one problem."""

    shard: Shard
    verdict: Verdict
    sign: Sign
    seconds: float
    call_seconds: tuple[float, ...]
    traceback: str
    output: torch.Tensor | None  # [T, H] as returned by the first call; None where nothing can be added
    share: Share  # all tokens, the lower id first among equals
    tossed: torch.Tensor  # int64 [n] tokens at a tie
    others: tuple[Share, ...]  # those tokens under each other admissible choice
    adopted: tuple[int, ...]  # for each of them the choice that this shard's rows come nearest to; 0 is `share`


class Weights:
    """Weights of shards, kept from one problem to the next: at full size drawing them takes longer than all else.

    A context manager. on: False keeps nothing; a layer of DeepSeek-V3 takes 11 GB.
    """

    NAMES = ("gemm1_weights", "gemm2_weights")

    def __init__(self, on: bool) -> None:
        self.on = on
        self.shared = SharedInputs()
        self._tensors: dict[tuple[Any, ...], torch.Tensor] = {}
        self._drawn: dict[tuple[Any, ...], set[int]] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._tensors.clear()
        self.shared.close()

    def make(self, problem: Problem, layer: Problem, shared: SharedInputs) -> Inputs:
        """The problem's inputs, routed as the layer; what is not kept is allocated in `shared`."""
        if not self.on:
            return make_inputs(problem, allocate=shared.allocate, routed_as=layer)
        key = (problem.geometry, problem.offset, problem.values, problem.seed)

        def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            if name not in self.NAMES:
                return shared.allocate(name, shape, dtype)
            if (*key, name) not in self._tensors:
                self._tensors[(*key, name)] = self.shared.allocate(name, shape, dtype)
            return self._tensors[(*key, name)]

        drawn = self._drawn.setdefault(key, set())
        return make_inputs(problem, allocate=allocate, routed_as=layer, drawn=drawn)


def work(runner: Runner, layer: Problem, shard: Shard, options: Options, weights: Weights) -> Part:
    """Run the candidate on one shard of `layer` and judge it. Raises as moeref.verify.verify."""
    start = time.perf_counter()
    problem = shard.problem(layer)
    with SharedInputs(weights.shared) as shared:
        inputs = weights.make(problem, layer, shared)
        run = runner.run(shared.describe(inputs), trials=options.trials)
        placed = inputs.to(options.device)
        trace = moe(placed)
        known = Known(trace, placed)
        recipe = run.recipe if options.recipe == AUTO else options.recipe
        verdict = judge(
            problem.name, placed, trace, run, recipe, CRITERIA[options.preset], options.matched_ratio_alone, known
        )
        return _part(shard, placed, trace, known, run, verdict, time.perf_counter() - start)


def _part(
    shard: Shard, inputs: Inputs, trace: Trace, known: Known, run: CandidateRun, verdict: Verdict, seconds: float
) -> Part:
    recipe = noise_recipe(verdict)
    output = None
    if run.status == "ok" and comparable(run.outputs, inputs.seq_len, inputs.geometry.hidden_size):
        output = run.outputs[0].to(inputs.device)
    tossed = ambiguous_tokens(inputs, trace.routing)
    others: list[Share] = []
    adopted: tuple[int, ...] = (0,) * len(tossed)
    if len(tossed):
        some = inputs.take(tossed)
        others = [_share(experts(some, choice), some, recipe) for choice in other_choices(some, inputs.geometry)]
        if output is not None:
            adopted = _nearest(output[tossed], trace.unrounded[tossed], others)
    sign = Sign("", "")
    if verdict.status == FAIL and output is not None:
        sign = find_sign(inputs, trace, output, shard.count)
    share = Share(trace.unrounded, known.noise(recipe), _local(trace, inputs))
    return Part(
        shard, verdict, sign, seconds, tuple(run.seconds), run.traceback, output, share, tossed, tuple(others), adopted
    )


def noise_recipe(verdict: Verdict) -> Recipe:
    """The recipe whose noise a shard's output is given in the sum.

    One that was found from the errors of a shard's few rows can't tell whether routing weights were rounded to
    bfloat16: it is given that rounding too, which is no larger than the output's own.
    """
    if not verdict.recipe:
        return EXACT
    recipe = Recipe.parse(verdict.recipe)
    return replace(recipe, topk_weights="bf16") if verdict.recipe_found else recipe


def _share(trace: Trace, inputs: Inputs, recipe: Recipe) -> Share:
    return Share(trace.unrounded, output_noise(trace, inputs, recipe), _local(trace, inputs))


def _local(trace: Trace, inputs: Inputs) -> torch.Tensor:
    """[T, E] bool: experts that a token chose and that are of this shard."""
    rows = permute(trace.routing.topk_ids, inputs.geometry, inputs.local_expert_offset)
    chosen = trace.routing.topk_ids[rows.permuted_idx_to_token_idx, rows.permuted_idx_to_slot]
    local = torch.zeros(inputs.seq_len, inputs.geometry.num_experts, dtype=torch.bool, device=inputs.device)
    local[rows.permuted_idx_to_token_idx, chosen] = True
    return local


def _nearest(rows: torch.Tensor, first: torch.Tensor, others: list[Share]) -> tuple[int, ...]:
    """For each row the choice whose reference lies nearest, the first among equals."""
    errors = torch.stack([block_errors(rows, each) for each in (first, *(other.unrounded for other in others))])
    nearest: list[int] = errors.nan_to_num(nan=torch.inf).argmin(0).tolist()
    return tuple(nearest)
