"""The catalogue of faults, the kernel they are changes of, and the legal variants beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from moeref.diagnose.faults import FAULTS, STAGES, SYNTHETIC, Fault, fault
from moeref.diagnose.faults.__main__ import call, observe, prepare, verdicts
from moeref.diagnose.kernel import HOOKS, Kernel, widen
from moeref.diagnose.variants import VARIANTS
from moeref.inputs import FP8, Inputs
from moeref.judge.recipes import LEGAL
from moeref.judge.verdict import INCONCLUSIVE, PASS
from moeref.make import make_inputs
from moeref.reference import Trace, moe
from moeref.spec import Problem, Recipe
from moeref.suites import small_suite
from moeref.verify import Options, verify

PROBES = {
    "small-t24-o8-iid-model_like-s7": "nothing special: most faults show at once",
    "small-t16-o8-iid-published-s7": "half of the scales are negative, gates are large",
    "small-t24-o0-all_negative-model_like-s7": "a mask of 0 outranks negative biased scores",
    "small-t24-o16-ties-model_like-s7": "equal scores at the cut",
    "small-t24-o8-near_ties-model_like-s7": "scores that bfloat16 can't tell apart",
    "small-t24-o8-underflow-model_like-s7": "the sum of the chosen scores is 0",
    "small-t24-o16-large_bias-model_like-s7": "score + bias - bias cancels",
    "small_kimi-t16-o6-deepseek_like-model_like-s7": "one group",
    "small-t1-o24-deepseek_like-model_like-s0": "one token",
    "small-t15-o28-deepseek_like-heterogeneous-s7": "the shard reaches past the last expert; T is odd",
    "small-t33-o-3-iid-heterogeneous-s7": "the shard begins before the first expert",
    "small-t20-o24-iid-zero_block-s7": "blocks of zeros",
    "small-t12-o8-iid-tiny-s7": "outputs near 1e-7",
    "small-t12-o16-iid-huge-s7": "outputs beyond float16",
    "small-t16-o8-iid-model_like-s7-f1.0": "another routed_scaling_factor, after 2.5",
    "small-t17-o8-one_expert-heterogeneous-s7": "a run of 16 + 1 rows",
    "small-t80-o8-one_expert-model_like-s7": "a run of 5 full tiles, longer than 64 rows",
    "small-t66-o8-balanced-heterogeneous-s7": "more than 64 tokens, every expert hit",
}
"""Each probe is called twice, into buffers poisoned otherwise; one kernel goes through all of them in this order."""

REFILLED = ("small-t24-o8-iid-model_like-s7", "small-t24-o8-iid-model_like-s8")
"""After the probes: the first one's buffers are refilled in place with the second one's contents."""

Suite = list[tuple[Problem, Inputs, Trace]]

SOURCE = re.compile(r"[\w./-]+ (#\d+|[0-9a-f]{7})(, [\w./-]+ (#\d+|[0-9a-f]{7}))*")


@cache
def probes() -> list[tuple[str, Inputs, bytes]]:
    """(name, inputs, what the right kernel leaves in both buffers)."""
    made = [(name, make_inputs(Problem.parse(name))) for name in PROBES]
    return [(name, inputs, octets(observe(Kernel(), inputs).outputs)) for name, inputs in made]


def octets(outputs: list[torch.Tensor]) -> bytes:
    return b"".join(output.contiguous().view(torch.uint8).numpy().tobytes() for output in outputs)


def refilled(kernel: Kernel) -> bytes:
    """The second answer out of the same buffers."""
    first, second = (make_inputs(Problem.parse(name)) for name in REFILLED)
    call(kernel, first)
    for name, tensor in first.tensors().items():
        tensor.view(torch.uint8).copy_(second.tensors()[name].view(torch.uint8))
    return octets([call(kernel, first)])


def first_difference(one: Fault) -> str:
    """The first probe on which the fault shows, '' where none does."""
    kernel = one.build()
    for name, inputs, right in probes():
        run = observe(kernel, inputs)
        if run.changed_inputs or octets(run.outputs) != right:
            return name
    return "refilled" if refilled(kernel) != refilled(Kernel()) else ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_somewhere(name: str) -> None:
    assert first_difference(FAULTS[name])


@pytest.mark.parametrize(
    ("name", "probe"),
    [
        ("masked_with_zero", "all_negative"),
        ("index_found_by_value", "ties"),
        ("tied_candidates_overflow", "ties"),
        ("no_normaliser_epsilon", "underflow"),
        ("tile_tail_row_lost", "t17-o8-one_expert"),
        ("rows_past_64_read_the_first", "t80-o8-one_expert"),
        ("no_zero_guard", "zero_block"),
        ("gemm1_single_token_is_nan", "t1-"),
        ("scores_cached_by_address", "refilled"),
        ("stale_factor", "f1.0"),
    ],
)
def test_a_fault_needs_its_trigger(name: str, probe: str) -> None:
    assert probe in first_difference(FAULTS[name])


def test_the_catalogue_is_complete() -> None:
    assert len(FAULTS) >= 110
    count = Counter(one.stage for one in FAULTS.values())
    assert set(count) == set(STAGES) and min(count.values()) >= 3, count
    for name, one in FAULTS.items():
        assert one.name == name and one.hook in HOOKS and one.summary.strip(), name
        assert one.source == SYNTHETIC or SOURCE.fullmatch(one.source), (name, one.source)
    assert len({one.summary for one in FAULTS.values() if one.stage != "state"}) > 110
    real = [one for one in FAULTS.values() if one.source != SYNTHETIC]
    assert len(real) >= 50


@pytest.mark.parametrize(
    ("stage", "hook", "source", "name"),
    [
        ("nowhere", "swiglu", "synthetic", "f"),
        ("swiglu", "no_hook", "synthetic", "f"),
        ("swiglu", "swiglu", "", "f"),
        ("swiglu", "swiglu", "synthetic", "gelu_for_silu"),
    ],
)
def test_a_wrong_entry_is_refused(stage: str, hook: str, source: str, name: str) -> None:
    def body() -> None: ...

    body.__name__ = name
    before = dict(FAULTS)
    with pytest.raises(ValueError, match=f"fault {name}"):
        fault(stage=stage, hook=hook, source=source, summary="x")(body)
    assert before == FAULTS


def test_every_build_has_its_own_memory() -> None:
    one, other = FAULTS["stale_factor"].build(), FAULTS["stale_factor"].build()
    inputs = make_inputs(Problem.parse(REFILLED[0]))
    call(one, inputs)
    assert one.memory and not other.memory
    right = Kernel()
    call(right, inputs)
    assert not right.memory


def test_a_fault_is_a_candidate_by_its_name() -> None:
    problem = Problem.parse("small-t24-o8-iid-model_like-s7")
    (outcome,) = verify("moeref.diagnose.faults:offset_ignored", [("", problem)], Options(timeout=60))
    assert outcome.verdict.status == "FAIL" and "noise_rows" in outcome.verdict.failed


# The kernel


@pytest.fixture(scope="module")
def suite() -> Iterator[Suite]:
    """The small suite's problems, inputs and traces."""
    yield prepare(small_suite())


def test_widen_is_the_cast() -> None:
    payload = torch.arange(256, dtype=torch.uint8).view(FP8)
    assert torch.equal(widen(payload).view(torch.int32), payload.float().view(torch.int32))
    finite = payload[(payload.float().abs() <= 448)]
    assert len(finite) == 254 and torch.equal(widen(finite).view(torch.int32), finite.float().view(torch.int32))
    assert widen(payload[:0]).shape == (0,)


@pytest.mark.parametrize("recipe", LEGAL, ids=lambda recipe: recipe.name)
def test_the_right_kernel_computes_what_the_reference_does(recipe: Recipe, suite: Suite) -> None:
    for problem, inputs, _ in suite:
        assert torch.equal(call(Kernel(recipe), inputs), moe(inputs, recipe).output), problem.name


@pytest.mark.parametrize("name", VARIANTS)
def test_the_judge_passes_every_legal_variant(name: str, suite: Suite) -> None:
    """The recipes are the unmodified kernel's."""
    found = verdicts(VARIANTS[name].build(), suite)
    assert {one.problem: one.message for one in found if one.status not in (PASS, INCONCLUSIVE)} == {}
    assert sum(one.status == PASS for one in found) >= len(found) - 2


def test_a_variant_differs_from_its_recipe(suite: Suite) -> None:
    for name, one in VARIANTS.items():
        if one.kernel is not Kernel and name not in ("stable_sigmoid", "masked_with_infinity"):
            pairs = ((call(one.build(), inputs), call(Kernel(one.recipe), inputs)) for _, inputs, _ in suite)
            assert any(not torch.equal(*pair) for pair in pairs), name
