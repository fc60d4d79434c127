"""Every routing kind has the property its docstring promises, stable bytes, and tokens that do not depend on T."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeref.make import digest
from moeref.reference import Routing, route
from moeref.routings import ROUTINGS, draw_routing
from moeref.spec import PRESETS, Geometry, Problem, SpecError
from moeref.testing.strategies import geometries

GEOMETRIES = ["small", "dsv3", "kimi"]

# digests of (routing_logits, routing_bias as float32) of small-t7-o8-KIND-model_like-s5
PINNED = {
    "iid": ("547f985aa776a16a", "29914b222605c852"),
    "deepseek_like": ("6e1f146cac6a78cc", "8f953188e33f28ac"),
    "balanced": ("78be4ea2d3ddf9da", "38723a2e5e8a17aa"),
    "one_expert": ("680df123d8958783", "38723a2e5e8a17aa"),
    "no_local_work": ("986e23286f26f2a8", "38723a2e5e8a17aa"),
    "ties": ("b7026c7f355a141f", "559f423cf7d47aa1"),
    "near_ties": ("ac0c3c252b2131af", "38723a2e5e8a17aa"),
    "all_negative": ("547f985aa776a16a", "780e342072543c19"),
    "underflow": ("792e87cafd3ed4ca", "610e1c9c642ffe2c"),
    "large_bias": ("05b9e4703de6ae02", "0413bff8b3d5f0ed"),
    "skewed": ("93c6aaa17e94fd64", "38723a2e5e8a17aa"),
}


def drawn(name: str, routing: str, tokens: int = 200, offset: int = 0, seed: int = 0) -> tuple[Problem, Routing]:
    """The problem and what the reference's router decides."""
    problem = Problem(PRESETS[name], tokens, offset, routing, "model_like", seed)
    logits, bias = tensors(problem)
    return problem, route(logits, bias, problem.geometry, problem.factor)


def tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    logits, bias = draw_routing(problem)
    return torch.from_numpy(logits), torch.from_numpy(bias)


def scores_of(problem: Problem) -> torch.Tensor:
    """[T, E] sigmoid in float32, as the reference has it."""
    return 1.0 / (1.0 + torch.exp(-tensors(problem)[0]))


def test_the_pins_hold_every_kind() -> None:
    assert set(PINNED) == set(ROUTINGS)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_bytes_are_the_pinned_ones(routing: str) -> None:
    logits, bias = tensors(Problem(PRESETS["small"], 7, 8, routing, "model_like", 5))
    assert (digest(logits), digest(bias)) == PINNED[routing]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_shapes_dtypes_and_bf16_bias(name: str, routing: str) -> None:
    problem = Problem(PRESETS[name], 13, 8, routing, "model_like", 1)
    logits, bias = draw_routing(problem)
    assert logits.shape == (13, problem.geometry.num_experts) and logits.dtype == np.float32
    assert bias.shape == (problem.geometry.num_experts,) and bias.dtype == np.float32
    assert np.isfinite(logits).all() and np.isfinite(bias).all()
    assert torch.equal(torch.from_numpy(bias), torch.from_numpy(bias).bfloat16().float())


@pytest.mark.parametrize("routing", ROUTINGS)
@settings(max_examples=15)
@given(few=st.integers(0, 9), more=st.integers(1, 20), seed=st.integers(0, 2**63 - 1))
def test_the_first_tokens_do_not_depend_on_seq_len(routing: str, few: int, more: int, seed: int) -> None:
    problem = Problem(PRESETS["small"], few, 8, routing, "model_like", seed)
    logits, bias = draw_routing(problem)
    longer, same_bias = draw_routing(replace(problem, seq_len=few + more))
    assert (longer[:few] == logits).all() and (bias == same_bias).all()


OF_THE_SHARD = {"one_expert", "no_local_work", "underflow", "large_bias"}
"""Kinds that are about one shard: the last two give its experts the largest biases, or nothing would be local."""


@pytest.mark.parametrize("routing", sorted(set(ROUTINGS) - OF_THE_SHARD))
def test_all_ranks_of_one_seed_see_the_same_routing(routing: str) -> None:
    problem = Problem(PRESETS["small"], 9, 0, routing, "model_like", 3)
    logits, bias = draw_routing(problem)
    for offset in (-3, 8, 24, 30):
        other, other_bias = draw_routing(replace(problem, offset=offset))
        assert (other == logits).all() and (other_bias == bias).all()


@pytest.mark.parametrize("routing", sorted(set(ROUTINGS) - {"balanced"}))
def test_another_seed_gives_other_logits(routing: str) -> None:
    problem = Problem(PRESETS["small"], 9, 0, routing, "model_like", 3)
    assert (draw_routing(problem)[0] != draw_routing(replace(problem, seed=4))[0]).any()


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"unknown routing kind 'nope': expected one of iid, deepseek_like, balanced"):
        draw_routing(Problem(PRESETS["small"], 1, 0, "nope", "model_like", 0))


# --- what each kind promises


@pytest.mark.parametrize("name", GEOMETRIES)
def test_iid_spreads_over_the_experts(name: str) -> None:
    problem, found = drawn(name, "iid", 500)
    counts = torch.bincount(found.topk_ids.flatten(), minlength=problem.geometry.num_experts)
    assert (counts > 0).float().mean() > 0.5 and counts.max() < 500
    assert tensors(problem)[1].abs().max() < 0.5  # N(0, 0.1)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_deepseek_like_bias_is_at_least_2_and_some_experts_are_popular(name: str) -> None:
    problem, found = drawn(name, "deepseek_like", 1000)
    bias = tensors(problem)[1]
    assert bias.min() >= 2 and bias.max() < 2.25
    counts = torch.bincount(found.topk_ids.flatten(), minlength=problem.geometry.num_experts).float()
    assert counts.max() > 2 * counts.mean()
    # K = 4 or 8, and unbiased scores far from saturated: weights differ within a token
    assert (found.topk_weights.max(1).values > 1.1 * found.topk_weights.min(1).values).float().mean() > 0.9


# tokens of a whole number of rounds: E / K of them
@pytest.mark.parametrize(("name", "tokens"), [("small", 8), ("dsv3", 64), ("kimi", 96), ("small_kimi", 12)])
def test_balanced_gives_every_expert_the_same_number(name: str, tokens: int) -> None:
    for rounds in (1, 3):
        problem, found = drawn(name, "balanced", tokens * rounds)
        counts = torch.bincount(found.topk_ids.flatten(), minlength=problem.geometry.num_experts)
        assert counts.min() == counts.max()
    assert found.expert_margin.min() > 0.1 and found.group_margin.min() > 0.1  # meant, not left to chance


def test_balanced_stays_within_one_for_any_number_of_tokens() -> None:
    for tokens in range(1, 40):
        problem, found = drawn("small", "balanced", tokens)
        counts = torch.bincount(found.topk_ids.flatten(), minlength=problem.geometry.num_experts)
        assert counts.max() - counts.min() <= 1


def test_balanced_where_a_token_s_groups_do_not_divide_the_groups() -> None:
    """Eight groups, three a token: visits go on counting across the end."""
    g = Geometry(32, 32, 128, 128, 3, 8, 3)
    problem = Problem(g, 32, 0, "balanced", "model_like", 0)
    found = route(*tensors(problem), g, 2.5)
    counts = torch.bincount(found.topk_ids.flatten(), minlength=32)
    assert counts.tolist() == [3] * 32


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("offset", [-2, 0, 8, 23])
def test_one_expert_hits_one(name: str, offset: int) -> None:
    problem, found = drawn(name, "one_expert", 50, offset)
    local = [e for e in found.topk_ids.unique().tolist() if e in problem.real_experts]
    assert len(local) == 1
    assert (found.topk_ids == local[0]).any(1).all()  # every token
    assert found.expert_margin.min() > 0.1


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("offset", [-2, 0, 8, 23])
def test_no_local_work_hits_none(name: str, offset: int) -> None:
    problem, found = drawn(name, "no_local_work", 50, offset)
    assert not set(found.topk_ids.unique().tolist()) & set(problem.real_experts)


def test_no_local_work_is_refused_where_it_can_not_be() -> None:
    problem = Problem(Geometry(16, 14, 128, 128, 4, 1, 1), 3, 0, "no_local_work", "model_like", 0)
    with pytest.raises(SpecError, match="'no_local_work' is impossible for e16l14h128i128k4g1t1 at offset 0: fewer"):
        draw_routing(problem)


@settings(max_examples=150)
@given(
    geometry=geometries(most_blocks=1),
    place=st.floats(0, 1),
    kind=st.sampled_from(["one_expert", "no_local_work"]),
    seed=st.integers(0, 2**32),
)
def test_one_expert_and_no_local_work_at_any_geometry(geometry: Geometry, place: float, kind: str, seed: int) -> None:
    low, high = 1 - geometry.num_local_experts, geometry.num_experts - 1
    problem = Problem(geometry, 6, round(low + place * (high - low)), kind, "model_like", seed)
    local = set(problem.real_experts)
    # most others that topk_group groups hold
    size = geometry.group_size
    free = [sum(e not in local for e in range(i * size, (i + 1) * size)) for i in range(geometry.n_group)]
    reach = sum(sorted(free, reverse=True)[: geometry.topk_group])
    if kind == "no_local_work":
        if reach < geometry.top_k:
            with pytest.raises(SpecError):
                draw_routing(problem)
            return
        allowed = 0
    else:
        # the target's own group must be one of them
        target = problem.real_experts[len(problem.real_experts) // 2] // size
        others = sorted((n for i, n in enumerate(free) if i != target), reverse=True)[: geometry.topk_group - 1]
        allowed = 1 + max(0, geometry.top_k - 1 - free[target] - sum(others))
    found = route(*tensors(problem), geometry, 2.5)
    assert len(set(found.topk_ids.unique().tolist()) & local) == allowed


@pytest.mark.parametrize("name", GEOMETRIES)
def test_ties_are_exact_at_the_cut_in_many_tokens(name: str) -> None:
    _, found = drawn(name, "ties")
    assert (found.expert_margin == 0).float().mean() > 0.5
    if name != "kimi":  # one group: no cut
        assert (found.group_margin == 0).float().mean() > 0.15


@pytest.mark.parametrize("name", GEOMETRIES)
def test_near_ties_are_near_but_not_ties(name: str) -> None:
    problem, found = drawn(name, "near_ties", seed=2)
    assert found.expert_margin.min() > 1e-6 and found.expert_margin.max() < 1e-3
    if name != "kimi":
        assert found.group_margin.min() > 1e-6 and found.group_margin.max() < 1e-3
    logits, bias = tensors(problem)
    assert all(len(set(row)) == logits.shape[1] for row in logits.tolist())
    # a router that rounds its logits to bf16 chooses others in nearly every token
    rounded = route(logits.bfloat16().float(), bias, problem.geometry, 2.5).topk_ids
    other = (rounded.sort(1).values != found.topk_ids.sort(1).values).any(1)
    assert other.float().mean() > 0.9


@pytest.mark.parametrize("name", GEOMETRIES)
def test_all_negative_has_no_biased_score_at_or_above_zero(name: str) -> None:
    problem, _ = drawn(name, "all_negative")
    assert (scores_of(problem) + tensors(problem)[1]).max() < 0


@pytest.mark.parametrize("name", GEOMETRIES)
def test_underflow_has_sums_of_exactly_zero_and_sums_near_the_epsilon(name: str) -> None:
    problem, found = drawn(name, "underflow")
    total = scores_of(problem).gather(1, found.topk_ids).sum(1)
    assert (total[2::3] == 0).all()
    assert ((total[1::3] > 1e-21) & (total[1::3] < 1e-16)).all()  # 1e-20 is seen or nearly so
    assert (total[0::3] > 1e-16).all()
    assert found.expert_margin.min() > 1e-3  # the bias decides


@pytest.mark.parametrize("name", GEOMETRIES)
def test_large_bias_cancels_the_score(name: str) -> None:
    problem, found = drawn(name, "large_bias")
    bias = tensors(problem)[1]
    assert bias.min() >= 8
    scores = scores_of(problem)
    recovered = ((scores + bias) - bias).gather(1, found.topk_ids)
    assert (scores > 0).all()
    assert (recovered == 0).float().mean() > 0.95
    assert (found.topk_weights.sum(1) > 2.49).all()  # the right weights are as ever


@pytest.mark.parametrize("routing", ["underflow", "large_bias"])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("offset", [-2, 0, 8, 23])
def test_a_choice_by_bias_alone_leaves_local_work(name: str, routing: str, offset: int) -> None:
    problem, found = drawn(name, routing, 12, offset)
    local = [[e for e in row if e in problem.real_experts] for row in found.topk_ids.tolist()]
    assert all(local)
    bias = tensors(problem)[1]
    assert len(bias.unique()) == len(bias)  # distinct: no ties


@pytest.mark.parametrize("name", GEOMETRIES)
def test_skewed_makes_runs_of_very_different_length(name: str) -> None:
    problem, found = drawn(name, "skewed", 1000)
    counts = torch.bincount(found.topk_ids.flatten(), minlength=problem.geometry.num_experts)
    quartile = len(counts) // 4
    ordered = counts.sort().values.float()
    assert ordered[-quartile:].mean() > 8 * ordered[:quartile].mean()


def test_fib_random_is_known_by_name_and_drawn_by_no_suite() -> None:
    problem = Problem(PRESETS["dsv3"], 64, 0, "fib_random", "published", 0)
    logits, bias = draw_routing(problem)
    for drawn_values in (logits, bias):  # 16,384 and 256 draws of N(0, 1): six standard errors
        assert abs(float(drawn_values.std()) - 1) < 6 / math.sqrt(2 * drawn_values.size)
        assert abs(float(drawn_values.mean())) < 6 / math.sqrt(drawn_values.size)
    assert "fib_random" not in ROUTINGS
    later = draw_routing(replace(problem, seq_len=3))
    assert np.array_equal(later[0], logits[:3]) and np.array_equal(later[1], bias)


def test_a_captured_kind_that_was_not_read_says_how_to_give_its_files() -> None:
    with pytest.raises(SpecError, match=r"read from files.*--routing-from"):
        draw_routing(Problem(PRESETS["small"], 4, 0, "captured_0123456789abcdef", "published", 0))
