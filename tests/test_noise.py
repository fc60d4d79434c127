"""The noise model: honest kernels of every legal recipe lie inside, small faults outside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from judging import prepare

from moeref.diagnose.shrink import possible
from moeref.judge.noise import fit, output_noise
from moeref.judge.recipes import LEGAL, emulate, nearest_recipes
from moeref.make import make_inputs
from moeref.reference import combine, expert_spans, gemm2, moe, requantize
from moeref.routings import ROUTINGS
from moeref.spec import EXACT, Geometry, Problem, Recipe
from moeref.values import VALUES

GEOMETRIES = ("small", "small_kimi", "e16l16h128i128k4g4t2", "e32l4h384i128k8g8t4", "e8l2h128i384k2g1t1")
CHUNKS, PROBLEMS_EACH = 20, 55


def generated(chunk: int) -> Iterator[Problem]:
    """Problems of every routing and value kind at five geometries, any offset, 1 to 40 tokens."""
    choose = random.Random(chunk)
    for _ in range(PROBLEMS_EACH):
        geometry = Geometry.parse(choose.choice(GEOMETRIES))
        offset = choose.randrange(1 - geometry.num_local_experts, geometry.num_experts)
        routing, values = choose.choice(list(ROUTINGS)), choose.choice(list(VALUES))
        problem = Problem(geometry, choose.choice((1, 2, 5, 17, 40)), offset, routing, values, choose.randrange(10**6))
        if possible(problem):
            yield problem


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_false_alarm_in_any_legal_recipe(chunk: int) -> None:
    """An emulation of each recipe passes that recipe's gates: over 1,000 problems, each in three of the 16 recipes."""
    judged = 0
    for count, problem in enumerate(generated(chunk)):
        inputs = make_inputs(problem)
        trace = moe(inputs)
        active = torch.unique(trace.permutation.permuted_idx_to_token_idx)
        judged += 1
        if not len(active):
            assert not trace.unrounded.any()
            continue
        for step in range(3):
            recipe = LEGAL[(chunk + count + 5 * step) % len(LEGAL)]
            found = fit(moe(inputs, recipe).output, trace, output_noise(trace, inputs, recipe), active)
            assert found.passed, (problem.name, recipe.name, found.rows, found.overall, found.peak, found.gain)
    assert judged >= 1000 / CHUNKS


FAULTY = "small-t24-o8-iid-model_like-s7"


@pytest.mark.parametrize("recipe", [EXACT, Recipe(requantize=1), Recipe(requantize=2)], ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("fault", "gates"),
    [
        ("gain", {"rows", "overall", "gain"}),  # 2.1 for 2.5
        ("token", {"rows", "peak"}),  # one token of 24 dropped
        ("noise", {"rows", "overall"}),  # ten percent of noise on every element
        ("expert", {"experts", "rows"}),  # one local expert's results a fifth too large
        ("block", {"blocks"}),  # one 128-block of columns a fifth too large
    ],
)
def test_each_gate_sees_a_fault(recipe: Recipe, fault: str, gates: set[str]) -> None:
    inputs, trace = prepare(FAULTY)
    active = torch.unique(trace.permutation.permuted_idx_to_token_idx)
    output = moe(inputs, recipe).output.float()
    if fault == "gain":
        output *= 2.1 / 2.5
    elif fault == "token":
        output[active[-1]] = 0
    elif fault == "block":
        output[:, 128:] *= 1.2
    elif fault == "expert":
        _, span = max(expert_spans(trace.permutation.expert_offsets), key=lambda one: one[1].stop - one[1].start)
        rows = moe(inputs, recipe).gemm2_out.clone()
        rows[span] *= 1.2
        output = combine(rows, trace.routing, trace.permutation)
    else:
        output *= 1 + 0.1 * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = fit(output.bfloat16(), trace, output_noise(trace, inputs, recipe), active)
    assert {gate for gate in gates if not getattr(found, gate).passed} == gates
    if fault == "block":
        assert found.blocks.where == 1


def test_a_common_factor_within_the_noise_is_seen_by_the_gain_alone() -> None:
    """1.5 % of gain under a re-quantisation that costs 2.3 % an element: only the regression sees it."""
    inputs, trace = prepare("small-t64-o8-balanced-model_like-s7")
    active = torch.unique(trace.permutation.permuted_idx_to_token_idx)
    recipe = Recipe(requantize=1)
    output = (moe(inputs, recipe).output.float() * 0.985).bfloat16()
    found = fit(output, trace, output_noise(trace, inputs, recipe), active)
    assert not found.gain.passed
    assert found.overall.passed and found.peak.passed


def test_variance_equals_measured_variance() -> None:
    """The model's variance against the spread of real re-quantisation errors over 40 problems.

    Each problem gives one mean square z over its active tokens, whose expectation is 1. Within a cell of e4m3 the
    density of SwiGLU's outputs is not flat, hence the tenth that docs/numerics.md allows.
    """
    for recipe in (Recipe(requantize=1), Recipe(requantize=1, scale="ue8m0"), Recipe(requantize=2), EXACT):
        squares = []
        for seed in range(40):
            inputs, trace = prepare(f"small-t16-o8-iid-model_like-s{seed}")
            active = torch.unique(trace.permutation.permuted_idx_to_token_idx)
            found = fit(moe(inputs, recipe).output, trace, output_noise(trace, inputs, recipe), active)
            squares.append(found.overall.value**2)
        mean = sum(squares) / len(squares)
        assert 0.8 < mean < 1.1, (recipe.name, mean)


@pytest.mark.parametrize("recipe", LEGAL, ids=lambda r: r.name)
def test_the_nearest_recipe_is_the_one_that_was_used(recipe: Recipe) -> None:
    inputs, trace = prepare("small-t24-o8-iid-heterogeneous-s3")
    active = torch.unique(trace.permutation.permuted_idx_to_token_idx)
    ranked = nearest_recipes(moe(inputs, recipe).output, emulate(trace, inputs, active))
    assert ranked[0].recipe == recipe
    assert ranked[0].distance < 1e-3 < ranked[-1].distance
    assert len(ranked) == len(LEGAL)


def test_another_order_of_sums_keeps_the_recipe() -> None:
    """A kernel that re-quantises a slightly different float32 value flips some e4m3 roundings and stays 'requant'."""
    inputs, trace = prepare("small-t24-o8-iid-model_like-s3")
    active = torch.unique(trace.permutation.permuted_idx_to_token_idx)
    recipe = Recipe(requantize=1)
    exact = moe(inputs, EXACT, torch.float64)
    noise = torch.randn(exact.swiglu_out.shape, generator=torch.Generator().manual_seed(2))
    jitter = exact.swiglu_out * (1 + 1e-5 * noise)
    routing = replace(exact.routing, topk_weights=exact.routing.topk_weights.float())
    result = gemm2(requantize(jitter.float(), recipe), inputs, exact.permutation)
    output = combine(result, routing, exact.permutation).bfloat16()
    assert nearest_recipes(output, emulate(trace, inputs, active))[0].recipe == recipe
