"""Verdicts: each check fails on something wrong, and statuses follow."""

from __future__ import annotations

import math

import pytest
import torch
from judging import Run, prepare

from moeref.judge import ties
from moeref.judge.compare import CRITERIA, Criterion, matched_per_token, row_errors
from moeref.judge.ties import ambiguous_tokens, other_choices
from moeref.judge.verdict import ERROR, FAIL, INCONCLUSIVE, PASS, UNSUPPORTED, Verdict, judge
from moeref.reference import experts, moe
from moeref.spec import Recipe

NAME = "small-t24-o8-iid-model_like-s7"


def judged(run: Run, name: str = NAME, **options: object) -> Verdict:
    inputs, trace = prepare(name)
    return judge(name, inputs, trace, run, **options)  # type: ignore[arg-type]


def right(name: str = NAME) -> torch.Tensor:
    return prepare(name)[1].output.clone()


def test_the_reference_itself_passes_every_check() -> None:
    found = judged(Run([right(), right()], deterministic=True, poisoned=True))
    assert found.status == PASS and found.recipe == "exact" and found.recipe_found
    assert not found.failed and found.message == ""
    assert found.figures.matched["published"] == 1.0
    assert found.figures.worst_row == 0.0


def test_nothing_passes_for_the_reference_of_other_inputs() -> None:
    found = judged(Run([right("small-t24-o8-iid-model_like-s8")]))
    assert found.status == FAIL and "noise_rows" in found.failed


def idle_row(name: str = NAME) -> int:
    inputs, trace = prepare(name)
    active = set(trace.permutation.permuted_idx_to_token_idx.tolist())
    return next(t for t in range(inputs.seq_len) if t not in active)


def test_a_value_in_an_idle_row_fails() -> None:
    output = right()
    output[idle_row(), 3] = 1e-20
    assert "idle_rows" in judged(Run([output])).failed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails(value: float) -> None:
    output = right()
    output[2, 5] = value
    found = judged(Run([output]))
    assert found.status == FAIL and "finite" in found.failed and "row 2" in found.message


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ([None], "got NoneType"),
        ([torch.zeros(3, 4, dtype=torch.bfloat16)], "expected shape [24, 256], got [3, 4]"),
        ([torch.zeros(24, 256)], "expected dtype bfloat16, got float32"),
        ([torch.zeros(24, 256, dtype=torch.int32)], "got int32"),
        ([(1, 2)], "got tuple"),
        ([], "got NoneType"),
    ],
)
def test_a_wrong_form_fails_and_says_what_came(outputs: list[object], text: str) -> None:
    found = judged(Run(outputs))
    assert found.status == FAIL and "form" in found.failed and text in found.message


def test_unwritten_and_accumulated_elements_fail() -> None:
    first, second = right(), right()
    row = idle_row()
    first[row], second[row] = math.nan, 1e4
    found = judged(Run([first, second], poisoned=True))
    assert "written" in found.failed and "never written" in found.message
    huge = "small-t24-o8-iid-huge-s7"  # values that survive a sum with 1e4 in bfloat16
    found = judged(Run([right(huge) + math.nan, right(huge) + 1e4], poisoned=True), huge)
    assert "written" in found.failed and "depend on what the output buffer held" in found.message


def test_conduct() -> None:
    assert "inputs_unchanged" in judged(Run([right()], changed_inputs=["hidden_states"])).failed
    assert "no_alias" in judged(Run([right()], aliased_inputs=["hidden_states"])).failed
    assert "own_result" in judged(Run([right()], overwritten_result=True)).failed


def test_promised_repeatability_is_held() -> None:
    other = right()
    other.view(torch.int16)[other.abs().sum(1).argmax(), 0] ^= 1  # one unit in the last place
    assert "repeat" in judged(Run([right(), other], deterministic=True)).failed
    assert judged(Run([right(), other])).status == PASS


def test_the_worst_of_several_calls_counts() -> None:
    second = right()
    second[:] = 0
    found = judged(Run([right(), second]))
    assert found.status == FAIL and found.figures.worst_row == 1.0


def test_a_scaling_factor_of_2_1_passes_the_published_rule_and_fails_here() -> None:
    output = (right().float() * (2.1 / 2.5)).bfloat16()
    found = judged(Run([output]))
    assert found.status == FAIL and "noise_rows" in found.failed
    assert "the published criterion alone would have passed it" in found.message
    alone = judged(Run([output]), matched_ratio_alone=True)
    assert alone.status == PASS and "noise_rows" in alone.missed and "noise_rows" in alone.message


def test_an_honest_requantising_kernel_passes_and_is_named() -> None:
    inputs, trace = prepare(NAME)
    output = moe(inputs, Recipe(requantize=1)).output
    found = judge(NAME, inputs, trace, Run([output]))
    assert found.status == PASS and found.recipe == "requant"
    strict = judge(NAME, inputs, trace, Run([output]), recipe="exact")
    assert strict.status == FAIL and strict.recipe == "exact" and not strict.recipe_found
    assert "behaves like requant" in strict.message
    wrong = judge(NAME, inputs, trace, Run([(output.float() * 0.8).bfloat16()]), recipe="exact")
    assert wrong.status == FAIL and "behaves like" not in wrong.message


def test_weights_applied_before_requantising_pass_as_a_requantisation_of_its_own() -> None:
    """sum_e gemm2(q(w * swiglu)) rounds elsewhere than gemm2(q(swiglu)) * w by values, not by size."""
    from moeref.reference import combine, gemm2, requantize

    inputs, trace = prepare("small-t64-o8-balanced-model_like-s7")
    tokens, slots = trace.permutation.permuted_idx_to_token_idx, trace.permutation.permuted_idx_to_slot
    weights = trace.routing.topk_weights[tokens, slots, None] * 1.37  # a factor that moves the blocks' scales
    # scale 448/amax is linear, so w cancels unless the cast itself differs: shift the grid by an odd block maximum
    shifted = trace.swiglu_out * weights
    shifted[:, ::128] *= 1.0
    coarse = requantize(torch.nn.functional.pad(shifted, (64, 64)), Recipe(requantize=1))[:, 64:-64] / weights
    output = combine(gemm2(coarse, inputs, trace.permutation), trace.routing, trace.permutation).bfloat16()
    found = judge("small-t64-o8-balanced-model_like-s7", inputs, trace, Run([output]))
    assert found.status == PASS and found.recipe == "requant"


def test_small_systematic_errors_of_an_exact_kernel_are_not_excused_as_noise() -> None:
    found = judged(Run([(right().float() * 0.985).bfloat16()]))
    assert found.status == FAIL


@pytest.mark.parametrize("name", ["small-t7-o8-no_local_work-model_like-s0", "small-t0-o8-iid-model_like-s0"])
def test_nothing_to_test_is_inconclusive_and_a_wrong_output_still_fails(name: str) -> None:
    found = judged(Run([right(name)]), name)
    assert found.status == INCONCLUSIVE and "was tested" in found.message
    if found.figures.seq_len:
        assert judged(Run([right(name) + 1]), name).status == FAIL


def test_a_candidate_that_did_not_run() -> None:
    assert judged(Run([], status="error", message="it raised")).status == ERROR
    assert judged(Run([], status="unsupported", message="needs a GPU")).status == UNSUPPORTED


def test_a_reference_that_is_not_finite_is_an_error_never_a_match() -> None:
    inputs, trace = prepare(NAME)
    trace.unrounded[3, 4] = math.nan
    found = judge(NAME, inputs, trace, Run([trace.output]))
    assert found.status == ERROR and "the reference itself" in found.message
    with pytest.raises(ValueError, match="reference"):
        matched_per_token(torch.zeros(1, 1), torch.tensor([[math.nan]]), CRITERIA["published"])


TIES = "small-t24-o16-ties-model_like-s0"


def test_any_admissible_choice_passes_at_ties_and_others_fail() -> None:
    inputs, trace = prepare(TIES)
    ambiguous = ambiguous_tokens(inputs, trace.routing)
    assert len(ambiguous) > 5
    different = 0
    for choice in other_choices(inputs, inputs.geometry):
        other = experts(inputs, choice).output
        whole = trace.output.clone()
        # rows that no longer have local work are zero under the other choice, which is right as well
        whole[ambiguous] = other[ambiguous]
        found = judge(TIES, inputs, trace, Run([whole]))
        assert found.status == PASS
        different += found.figures.other_choice_tokens > 0
    assert different > 3
    wrong = trace.output.clone()
    wrong[ambiguous] *= 1.1
    assert judge(TIES, inputs, trace, Run([wrong])).status == FAIL


# Token 28 ties between an expert of 0.3 % of its row and experts elsewhere: less than re-quantisation costs the row,
# but most of what there is in some columns.
SMALL_PART = "e32l8h256i256k4g1t1-t29-o0-ties-heterogeneous-s11552"


def test_at_ties_a_small_part_of_a_row_tells_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, trace = prepare(SMALL_PART)
    run = Run([moe(inputs, Recipe(requantize=1)).output])
    assert judge(SMALL_PART, inputs, trace, run, recipe="requant").status == PASS
    monkeypatch.setattr(ties, "block_errors", row_errors)
    assert judge(SMALL_PART, inputs, trace, run, recipe="requant").status == FAIL


def test_matched_ratio_is_the_published_formula() -> None:
    """abs > atol and abs / (|ref| + 1e-8) > rtol fails; both bounds inclusive."""
    rule = Criterion("x", rtol=0.5, atol=0.25, required=0.5)
    ref = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 4.0]])
    out = torch.tensor([[1.25, 1.5, 1.75, 0.25, 0.5, 6.5]])
    #                    abs    rel   both   abs   both  both
    assert matched_per_token(out, ref, rule).item() == pytest.approx(3 / 6)


def test_row_errors() -> None:
    ref = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    out = torch.tensor([[3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    assert row_errors(out, ref).tolist() == [pytest.approx(0.2), 0.0, math.inf]
