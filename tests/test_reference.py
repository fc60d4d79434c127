"""The reference against the second oracle as a whole, and its routing and permutation."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeref.inputs import Inputs
from moeref.make import make_inputs
from moeref.reference import Routing, expert_spans, moe, permute, route
from moeref.routings import ROUTINGS
from moeref.spec import PRESETS, Geometry, Problem
from moeref.testing.strategies import problems
from moeref.values import VALUES

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
"""Unit roundoff u: a rounded operation is off by at most u, relatively."""

# What float32 may do to the output (Higham, Accuracy and Stability, 3.1: n roundings in a sum of products move it by at
# most n * u times the sum of magnitudes, in any order of summation; * 1.1 covers the terms in u**2).
#   gemm1    H roundings of products and sums, 1 of fp8 * scale on each side: (H + 2) u * sum|w||x|
#   swiglu   carries that on through |silu'| <= 1.1 and |silu(g)| <= |g|: (H + 2) u * moved (oracle: spread), and
#            rounds: exp 2, 1 + , 1 /, * gate, * up: within 8 u * |act|
#   gemm2    I roundings of products and sums, 1 of fp8 * scale: (I + 1) u * sum|w||act| (oracle: size)
#   combine  weights: sigmoid 4, sum K + 1, divide 1, factor 1; product 1; sum over experts K: (2 K + 8) u
# Together (H + 2) u * spread + (I + 2 K + 17) u * size. FLOOR: silu and sigmoid in float32 underflow below e**-88,
# where float64 still has something near 1e-38 (silu) or 1e-51 / 1e-20 (weights of underflow), times at most 1e8.
SECOND_ORDER = 1.1
FLOOR = 1e-22


def bound(answer: oracle.Answer, geometry: Geometry, unit: float) -> oracle.F64:
    """Largest rounding error of every output element, [T, H]."""
    first = geometry.hidden_size + 2
    later = geometry.intermediate_size + 2 * geometry.top_k + 17
    return SECOND_ORDER * unit * (first * answer.spread + later * answer.size) + FLOOR


def assert_equals_oracle(inputs: Inputs, dtype: torch.dtype) -> None:
    """The reference's output is the oracle's for the experts that the reference chose, within rounding errors.

    The oracle is float64 itself and rounds as much again, hence the + UNIT[float64].
    """
    trace = moe(inputs, dtype=dtype)
    ids = trace.routing.topk_ids.tolist()
    answer = oracle.experts(inputs, *oracle.route(inputs, given=ids))
    allowed = bound(answer, inputs.geometry, UNIT[dtype] + UNIT[torch.float64])
    error = np.abs(trace.unrounded.double().numpy() - answer.output)
    assert (error <= allowed).all(), f"worst error {np.max(error / allowed):.3g} of what is allowed"
    assert (trace.unrounded.numpy()[answer.size.sum(1) == 0] == 0).all()
    assert torch.equal(trace.output, trace.unrounded.to(torch.bfloat16))
    assert trace.output.shape == (inputs.seq_len, inputs.geometry.hidden_size)


def clear(routing: Routing, inputs: Inputs) -> torch.Tensor:
    """[T] True where rounding can not change the choice.

    A biased score is off by 4u (sigmoid below 1: exp 2, 1 +, 1 /) and u * |biased| (the sum); a difference of two by
    twice that; of two group scores by four times that and 2u * 2|biased| for the groups' own sums: u * (16 + 12 B).
    """
    largest = 1.0 + float(inputs.routing_bias.float().abs().max())
    least = UNIT[torch.float32] * (16 + 12 * largest)
    return (routing.expert_margin > least) & (routing.group_margin > least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=150)
@given(problem=problems(most_tokens=20))
def test_the_layer_equals_the_oracle(dtype: torch.dtype, problem: Problem) -> None:
    inputs = make_inputs(problem)
    inputs.check()
    assert_equals_oracle(inputs, dtype)


# Every routing and value kind once for sure; DeepSeek's geometry, Kimi-K2's, three groups, one expert a group.
GEOMETRIES = [
    PRESETS["small"],
    PRESETS["small_kimi"],
    Geometry(18, 5, 384, 128, 5, 3, 2),
    Geometry(8, 3, 128, 384, 3, 8, 4),
]
CASES = [
    Problem(g, 8, 2, routing, values, 11)
    for routing, values, g in zip(list(ROUTINGS) * 2, cycle(VALUES), cycle(GEOMETRIES), strict=False)
]


@pytest.mark.parametrize("problem", CASES, ids=lambda problem: problem.name)
def test_every_kind_equals_the_oracle_in_float64(problem: Problem) -> None:
    assert_equals_oracle(make_inputs(problem), torch.float64)


def test_the_cases_hold_every_kind() -> None:
    assert {p.routing for p in CASES} == set(ROUTINGS) and {p.values for p in CASES} == set(VALUES)


@pytest.mark.parametrize("offset", [-7, -1, 0, 8, 24, 25, 31])
def test_offsets_up_to_both_ends(offset: int) -> None:
    inputs = make_inputs(Problem(PRESETS["small"], 48, offset, "iid", "model_like", 2))
    trace = moe(inputs, dtype=torch.float64)
    answer = oracle.moe(inputs)
    assert answer.rows, "no local work: this would test nothing"
    # 1e-12 of the row's accumulated magnitude: bound() in float64 is (H + I + 27) * 2**-53 = 6e-14 of spread + size,
    # and spread is below 16 * size for these values (sum|w||x| over its own sum, times silu's slope)
    scale = answer.size.max(1, keepdims=True)
    assert (np.abs(trace.unrounded.numpy() - answer.output) <= 1e-12 * scale).all()
    assert len(trace.permutation.permuted_idx_to_token_idx) == len(answer.rows)


@pytest.mark.parametrize(("dtype", "fault"), [(torch.float32, 0.02), (torch.float64, 1e-10)])
def test_the_bound_is_tight_enough_to_see_a_fault(dtype: torch.dtype, fault: float) -> None:
    """A scaling factor that is this much off exceeds the bound: the comparison above can fail."""
    inputs = make_inputs(Problem(PRESETS["small"], 12, 8, "iid", "model_like", 2))
    assert_equals_oracle(inputs, dtype)
    trace = moe(replace(inputs, routed_scaling_factor=2.5 * (1 + fault)), dtype=dtype)
    answer = oracle.experts(inputs, *oracle.route(inputs, given=trace.routing.topk_ids.tolist()))
    error = np.abs(trace.unrounded.double().numpy() - answer.output)
    assert (error > bound(answer, inputs.geometry, UNIT[dtype])).any()


def test_float32_is_as_near_as_independent_roundings_are() -> None:
    """The worst case above is far off. Independent roundings add like a random walk: for n products of random sign the
    relative error of the sum is near u * sqrt(n), so u * (sqrt(H) + sqrt(I)) + the 8 and 2 K + 8 of the rest here:
    (16 + 16 + 24) u. Twice that is allowed: 6.7e-6. A factor that is 1e-5 off is seen."""
    inputs = make_inputs(Problem(PRESETS["small"], 40, 8, "iid", "model_like", 2))
    exact = moe(inputs, dtype=torch.float64).unrounded
    active = exact.abs().sum(1) > 0
    allowed = 2 * 56 * UNIT[torch.float32]

    def worst(changed: Inputs) -> float:
        error = moe(changed).unrounded.double() - exact
        return float((error[active].norm(dim=1) / exact[active].norm(dim=1)).max())

    assert worst(inputs) <= allowed < worst(replace(inputs, routed_scaling_factor=2.5 * (1 + 1e-5)))


def test_shards_add_up_to_the_whole() -> None:
    whole = Geometry(16, 16, 128, 128, 4, 4, 2)
    everything = moe(make_inputs(Problem(whole, 9, 0, "iid", "model_like", 4)), dtype=torch.float64).unrounded
    total = torch.zeros_like(everything)
    for offset in range(0, 16, 4):
        part = Problem(replace(whole, num_local_experts=4), 9, offset, "iid", "model_like", 4)
        total += moe(make_inputs(part), dtype=torch.float64).unrounded
    # the same products in another order of at most K sums: K * 2**-53 of the magnitudes, here below 100
    assert torch.allclose(total, everything, rtol=0, atol=4 * 2.0**-53 * 100)


# --- route


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", ["small", "dsv3", "kimi"])
def test_route_equals_the_oracle_where_the_margin_decides(routing: str, name: str) -> None:
    tokens = 60
    inputs = routed_only(Problem(PRESETS[name], tokens, 0, routing, "model_like", 5))
    found = route(inputs.routing_logits, inputs.routing_bias, inputs.geometry, 2.5)
    ids, weights = oracle.route(inputs)
    decided = clear(found, inputs)
    if routing != "ties":  # made to have none that is clear
        assert decided.float().mean() >= 0.95
    same = torch.tensor(ids) == found.topk_ids
    # the order within the chosen is not guarded by the margin: compare as sets
    sets = torch.tensor([set(a) == set(b) for a, b in zip(ids, found.topk_ids.tolist(), strict=True)])
    assert sets[decided].all()
    # weight: sigmoid 4, sum K + 1, divide, factor: (K + 7) u; FLOOR as above
    allowed = (inputs.geometry.top_k + 7) * 2.0**-24 * weights + FLOOR
    error = np.abs(found.topk_weights.double().numpy() - weights)
    assert (error <= allowed)[same.numpy()].all()
    assert same.float().mean() > 0.5 or routing == "ties"


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", ["small", "dsv3", "kimi"])
def test_choice_is_exact_on_the_reference_s_own_scores(routing: str, name: str) -> None:
    """Python sorting of the very float32 scores: no margin is needed, ties included."""
    inputs = routed_only(Problem(PRESETS[name], 20, 0, routing, "model_like", 6))
    g = inputs.geometry
    biased = 1.0 / (1.0 + torch.exp(-inputs.routing_logits)) + inputs.routing_bias.float()
    expected = [oracle.choose(list(row), g.n_group, g.topk_group, g.top_k) for row in biased.numpy()]
    assert route(inputs.routing_logits, inputs.routing_bias, g, 2.5).topk_ids.tolist() == expected


def routed_only(problem: Problem) -> Inputs:
    """The problem's routing with H = I = 128: a large model's routing without its weights."""
    return make_inputs(replace(problem, geometry=replace(problem.geometry, hidden_size=128, intermediate_size=128)))


def test_ties_go_to_the_lower_id_and_the_margin_says_so() -> None:
    g = Geometry(16, 4, 128, 128, 3, 4, 2)
    found = route(torch.zeros(2, 16), torch.zeros(16, dtype=torch.bfloat16), g, 1.0)
    assert found.topk_ids.tolist() == [[0, 1, 2]] * 2
    assert found.expert_margin.tolist() == [0.0, 0.0] and found.group_margin.tolist() == [0.0, 0.0]
    assert torch.allclose(found.topk_weights, torch.full((2, 3), 1 / 3), rtol=1e-6)  # four roundings: 4 * 2**-24


def test_margins_are_the_distances_at_the_cuts() -> None:
    g = Geometry(6, 6, 128, 128, 2, 3, 2)
    bias = torch.tensor([4.0, 0.0, 2.0, 1.0, 0.0, 1.5], dtype=torch.bfloat16)  # s = 1/2 everywhere
    found = route(torch.zeros(1, 6), bias, g, 1.0)
    # group sums 5, 4, 2.5: groups 0 and 1 stay; 4.5 and 2.5 are chosen, 1.5 is the best one left
    assert found.topk_ids.tolist() == [[0, 2]]
    assert found.expert_margin.tolist() == [1.0] and found.group_margin.tolist() == [1.5]


def test_margins_are_infinite_where_nothing_is_left_out() -> None:
    g = Geometry(4, 4, 128, 128, 4, 2, 2)
    found = route(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(4).bfloat16(), g, 1.0)
    assert found.expert_margin.isinf().all() and found.group_margin.isinf().all()


def test_the_best_group_is_the_one_with_the_best_two() -> None:
    g = Geometry(4, 4, 128, 128, 1, 2, 1)
    bias = torch.tensor([5.0, 0.0, 4.0, 3.0], dtype=torch.bfloat16)
    assert route(torch.zeros(1, 4), bias, g, 1.0).topk_ids.tolist() == [[2]]  # not 0, the single best


def test_a_masked_group_does_not_outrank_a_negative_score() -> None:
    g = Geometry(4, 4, 128, 128, 2, 2, 1)
    bias = torch.tensor([-9.0, -9.0, -3.0, -4.0], dtype=torch.bfloat16)
    assert route(torch.zeros(1, 4), bias, g, 1.0).topk_ids.tolist() == [[2, 3]]


def test_weights_are_of_the_unbiased_scores_and_sum_to_the_factor() -> None:
    inputs = routed_only(Problem(PRESETS["dsv3"], 30, 64, "deepseek_like", "model_like", 1))
    found = route(inputs.routing_logits, inputs.routing_bias, inputs.geometry, 2.5)
    scores = torch.sigmoid(inputs.routing_logits).gather(1, found.topk_ids)
    # ratios of weights are ratios of scores: 10 roundings, 10 * 2**-24 < 1e-6; the sum: (2 K + 2) * 2**-24 < 2e-6
    ratio = found.topk_weights / found.topk_weights[:, :1]
    assert torch.allclose(ratio, scores / scores[:, :1], rtol=1e-6, atol=0)
    assert torch.allclose(found.topk_weights.sum(1), torch.full((30,), 2.5), rtol=2e-6)


def test_scores_that_underflow_give_zero_weights_not_nan() -> None:
    inputs = routed_only(Problem(PRESETS["small"], 9, 0, "underflow", "model_like", 1))
    weights = route(inputs.routing_logits, inputs.routing_bias, inputs.geometry, 2.5).topk_weights
    assert (weights[2::3] == 0).all() and torch.isfinite(weights).all() and (weights[::3] > 0).all()


# --- permute


def test_permute_does_what_its_docstring_shows() -> None:
    g = Geometry(8, 2, 128, 128, 2, 1, 1)
    found = permute(torch.tensor([[5, 2], [4, 5]]), g, 4)
    assert found.expert_offsets.tolist() == [0, 1, 3]
    assert found.permuted_idx_to_token_idx.tolist() == [1, 0, 1]
    assert found.permuted_idx_to_slot.tolist() == [0, 0, 1]


@given(
    ids=st.lists(st.permutations(range(6)).map(lambda order: order[:3]), max_size=12),
    local=st.integers(1, 6),
    offset=st.integers(-5, 5),
)
def test_permute_lists_every_local_pair_once_by_expert_then_token(
    ids: list[list[int]], local: int, offset: int
) -> None:
    g = Geometry(6, local, 128, 128, 3, 1, 1)
    found = permute(torch.tensor(ids, dtype=torch.int64).reshape(len(ids), 3), g, offset)
    pairs = sorted(
        (expert - offset, token, slot)
        for token, row in enumerate(ids)
        for slot, expert in enumerate(row)
        if offset <= expert < offset + local
    )
    assert found.permuted_idx_to_token_idx.tolist() == [token for _, token, _ in pairs]
    assert found.permuted_idx_to_slot.tolist() == [slot for _, _, slot in pairs]
    counts = [sum(expert == e for expert, _, _ in pairs) for e in range(local)]
    assert found.expert_offsets.tolist() == [sum(counts[:e]) for e in range(local + 1)]
    assert [e for e, _ in expert_spans(found.expert_offsets)] == [e for e in range(local) if counts[e]]
