"""Where the error lies: planted errors must show in the right cell, expert, bin and weight."""

from __future__ import annotations

import math
import pickle
from functools import cache

import numpy
import pytest
import torch
from judging import Run, prepare

from moeref.inputs import Inputs
from moeref.judge import detail as module
from moeref.judge.detail import EDGES, MOST_ROWS, SHARES, Detail, detail
from moeref.judge.noise import Fit
from moeref.judge.verdict import Known, judge
from moeref.reference import Trace, experts, moe
from moeref.spec import Recipe

NAME = "small-t64-o8-iid-model_like-s0"


@cache
def problem(name: str = NAME) -> tuple[Inputs, Trace]:
    return prepare(name)


def looked_at(output: torch.Tensor, name: str = NAME, recipe: str = "exact") -> Detail:
    kept = []

    def look(seen: torch.Tensor, known: Known, judged: str, fit: Fit | None) -> None:
        kept.append(detail(seen, known, judged, fit))

    inputs, trace = problem(name)
    judge(name, inputs, trace, Run([output]), recipe, look=look)
    assert len(kept) == 1
    return kept[0]


def an_active_token(trace: Trace) -> int:
    return int(trace.permutation.permuted_idx_to_token_idx.min())


def an_idle_token(trace: Trace) -> int:
    idle = torch.ones(len(trace.output), dtype=torch.bool)
    idle[trace.permutation.permuted_idx_to_token_idx] = False
    return int(idle.nonzero()[0])


def test_an_exact_output_lies_within_the_noise_everywhere() -> None:
    trace = problem()[1]
    kept = looked_at(trace.output)
    active = torch.unique(trace.permutation.permuted_idx_to_token_idx)
    assert kept.rows_out == 0 and kept.tokens_per_row == 1
    assert numpy.isfinite(kept.block_z[active]).all() and kept.block_z[active].max() < 1.2
    assert int(numpy.isnan(kept.block_z).all(1).sum()) == len(trace.output) - len(active)  # the idle ones, and no other
    assert [gate.where for gate in kept.expert_z] == list(range(8, 16))
    assert all(gate.passed for gate in kept.expert_z)
    assert sum(kept.expert_rows) == len(trace.permutation.permuted_idx_to_token_idx)


def test_a_wrong_block_of_one_token_is_in_its_cell_and_in_its_experts() -> None:
    trace = problem()[1]
    token = an_active_token(trace)
    output = trace.output.clone()
    output[token, 128:256] *= 1.5
    kept = looked_at(output)
    out = numpy.argwhere(numpy.nan_to_num(kept.block_z) > 2)
    assert out.tolist() == [[token, 1]]
    assert kept.rows_out == 1 and kept.tokens[0].token == token
    assert set(kept.tokens[0].experts) == {gate.where for gate in kept.expert_z if not gate.passed}


def test_an_idle_row_that_is_not_zero_and_a_nan_are_infinitely_far_out() -> None:
    trace = problem()[1]
    token, idle = an_active_token(trace), an_idle_token(trace)
    output = trace.output.clone()
    output[token, 0], output[idle, 200] = math.nan, 1e-3
    kept = looked_at(output)
    assert numpy.argwhere(numpy.isinf(kept.block_z)).tolist() == sorted([[token, 0], [idle, 1]])
    assert kept.counts[-1] == 1  # the NaN; idle rows are not counted
    assert kept.tokens[0].token == token and all(math.isnan(one) for one in kept.tokens[0].seen)


def test_more_tokens_than_rows_keep_the_worst_of_each_row() -> None:
    name = f"small-t{3 * MOST_ROWS - 2}-o8-iid-model_like-s0"
    trace = problem(name)[1]
    token = int(trace.permutation.permuted_idx_to_token_idx.max())
    output = trace.output.clone()
    output[token] *= 3
    kept = looked_at(output, name)
    assert kept.tokens_per_row == 3 and len(kept.block_z) == MOST_ROWS
    assert set(numpy.argwhere(numpy.nan_to_num(kept.block_z) > 2)[:, 0]) == {token // 3}
    assert len(pickle.dumps(kept)) < 100_000


@pytest.mark.parametrize("recipe", ["exact", "requant", "bf16_gemm1+requant+ue8m0"])
def test_an_honest_histogram_follows_the_expected_one(recipe: str) -> None:
    """Errors of one row share sources, so counts spread more than independent ones: a fifth, where 500 are expected."""
    name = "small-t129-o8-balanced-model_like-s0"
    output = moe(problem(name)[0], Recipe.parse(recipe)).output
    kept = looked_at(output, name, recipe)
    assert kept.counts.sum() == pytest.approx(kept.expected.sum())
    many = (kept.expected > 500) & (numpy.arange(len(kept.expected)) < EDGES.index(1.0))
    assert many.sum() >= 5
    assert kept.counts[many] == pytest.approx(kept.expected[many], rel=0.2)
    beyond = EDGES.index(4.0) + 1
    assert kept.counts[beyond:].sum() < 10 and kept.expected[beyond:].sum() < 10


def test_a_wrong_output_leaves_the_expected_histogram() -> None:
    kept = looked_at((problem()[1].output.float() * 0.84).to(torch.bfloat16))
    beyond = EDGES.index(8.0) + 1
    assert kept.counts[beyond:].sum() > 0.9 * kept.counts.sum() and kept.expected[beyond:].sum() < 1e-3


@pytest.mark.parametrize("place", [0, SHARES // 2, SHARES - 1])
def test_the_expected_histogram_is_that_of_drawn_errors(place: int) -> None:
    """200,000 draws of sqrt(s) N + sqrt(1 - s) U against the closed form: within 6 standard deviations in every bin."""
    draws, share = 200_000, (place + 0.5) / SHARES
    shares = numpy.zeros(SHARES)
    shares[place] = draws
    generator = numpy.random.default_rng(place)
    z = math.sqrt(share) * generator.standard_normal(draws)
    z += math.sqrt(1 - share) * generator.uniform(-math.sqrt(3), math.sqrt(3), draws)
    drawn = numpy.bincount(numpy.digitize(abs(z), EDGES), minlength=len(EDGES) + 1)
    expected = module._expected(shares)
    assert (abs(drawn - expected) <= 6 * numpy.sqrt(expected + 1)).all()


def test_the_output_shows_the_routing_weights_that_were_used() -> None:
    inputs, trace = problem()
    routing = trace.routing
    used = routing.topk_weights.flip(1)  # the right experts with weights in reverse order
    output = experts(inputs, type(routing)(routing.topk_ids, used, routing.expert_margin, routing.group_margin)).output
    kept = looked_at(output)
    assert len(kept.tokens) == len(torch.unique(trace.permutation.permuted_idx_to_token_idx))
    for one in kept.tokens:
        slots = [routing.topk_ids[one.token].tolist().index(expert) for expert in one.experts]
        assert one.due == pytest.approx(routing.topk_weights[one.token, slots].tolist())
        assert one.seen == pytest.approx(used[one.token, slots].tolist(), rel=0.02)
        assert one.z_left < 2 and one.z_left <= one.z
    assert max(one.z for one in kept.tokens) > 20


def test_rows_from_elsewhere_are_explained_by_no_weights() -> None:
    trace = problem()[1]
    active = torch.unique(trace.permutation.permuted_idx_to_token_idx)
    output = trace.output.clone()
    output[active] = trace.output[active.roll(1)]
    kept = looked_at(output)
    assert sum(one.z_left > 0.3 * one.z for one in kept.tokens) > 0.9 * len(kept.tokens)


@pytest.mark.filterwarnings("error")
def test_weights_that_the_output_does_not_determine_are_not_made_up() -> None:
    row = numpy.linspace(1.0, 2.0, 128)
    spread = numpy.ones(128)
    one, other, zero = row, row[::-1].copy(), numpy.zeros(128)
    seen, _, left = module._solve(numpy.stack([one, zero, other]), 0.5 * one + 0.25 * other, row, spread)
    assert seen[0] == pytest.approx(0.5) and math.isnan(seen[1]) and seen[2] == pytest.approx(0.25) and left < 1e-9
    seen, _, left = module._solve(numpy.stack([one, 2 * one]), 0.5 * one, row, spread)
    assert all(math.isnan(weight) for weight in seen) and left < 1e-9
    seen, z, left = module._solve(one[None], zero, zero, zero)  # nothing is expected to deviate, and nothing does
    assert math.isnan(seen[0]) and z == left == 0.0


@pytest.mark.parametrize("name", ["small-t7-o8-no_local_work-model_like-s0", "small-t0-o8-iid-model_like-s0"])
def test_nothing_active_is_nothing_to_draw(name: str) -> None:
    kept = looked_at(problem(name)[1].output, name, "auto")
    assert not kept.counts.sum() and not kept.tokens and not kept.expert_z and numpy.isnan(kept.block_z).all()
