"""Golden cases against a changed reference, another machine's float noise, full-size sampling, and candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import (
    BALANCED,
    DEEPSEEK,
    OPEN,
    PLAIN,
    ROUNDED,
    SMALL,
    WRONG,
    bf16,
    change,
    copied,
    diverged,
    flip,
    sampled_case,
    swap_ids,
    tf32,
)

from moeref import reference
from moeref.golden import check_case, find
from moeref.golden.stages import rounded
from moeref.golden.tolerance import product_deviation, through
from moeref.make import make_inputs
from moeref.quant import weight_slices
from moeref.spec import BLOCK, EXACT, Problem
from moeref.verify import Options

# ---- a changed reference: one rounding in one stage


CHANGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    # stage -> (function of the reference, what is made of its result)
    "gemm1_out": ("gemm1", tf32),
    "swiglu_out": ("swiglu", tf32),
    "requantized": ("requantize", bf16),
    "gemm2_out": ("gemm2", tf32),
    "unrounded": ("combine", bf16),
}


@pytest.mark.parametrize("stage", CHANGES)
def test_one_more_rounding_in_a_stage_is_caught_in_that_stage(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, rounding = CHANGES[stage]
    right = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda *given: rounding(right(*given)))
    result = check_case(find([PLAIN])[0])
    assert result.status == "FAIL"
    # every stage is run on the recorded one before it, so no other one is accused
    assert [one.stage for one in result.diverged] == [stage], result.message


def test_a_rounding_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = find([ROUNDED])[0], reference.gemm1
    monkeypatch.setattr(reference, "gemm1", lambda inputs, permutation, *_: right(inputs, permutation))
    assert check_case(case).diverged[0].stage == "gemm1_out"
    monkeypatch.undo()
    monkeypatch.setattr(reference, "requantize", lambda swiglu_out, *_: swiglu_out)
    assert [one.stage for one in check_case(case).diverged] == ["requantized"]


def test_routing_weights_without_their_normaliser_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "NORMALISER_EPSILON", 0.0)
    assert check_case(find([PLAIN])[0]).status == "PASS"  # it shows where the scores underflow, and only there
    result = check_case(find(["small-t3-o8-underflow-model_like-s0"])[0])
    assert result.diverged[0].stage == "topk_weights"


def test_stages_joined_wrongly_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.moe

    def joined(inputs: Any, recipe: Any = EXACT, *_: Any) -> reference.Trace:
        trace = right(inputs, recipe)
        vars(trace)["output"] = (trace.unrounded * 1.01).to(torch.bfloat16)  # frozen: changed behind its back
        return trace

    monkeypatch.setattr(reference, "moe", joined)
    assert [one.stage for one in check_case(find([PLAIN])[0]).diverged] == ["moe"]


# ---- another machine: other orders of summation, other exponentials


def ordered(chunk: int) -> Callable[..., torch.Tensor]:
    """A matrix product summed one after the other in chunks of K this long."""

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        total = left.new_zeros(len(left), right.shape[1])
        for start in range(0, left.shape[1], chunk):
            part = slice(start, start + chunk)
            total = total + (left[:, part, None] * right[None, part]).sum(1)
        return total

    return product


def machine(product: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference on a machine whose matrix products and exponentials are others."""

    def gemm1(inputs: Any, permutation: Any, recipe: Any = EXACT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        scale, rows = inputs.hidden_states_scale.T.to(dtype), permutation.permuted_idx_to_token_idx
        out = torch.empty(len(rows), inputs.gemm1_weights.shape[1], dtype=dtype)
        for expert, span in reference.expert_spans(permutation.expert_offsets):
            hidden = reference.dequantize_1x128(inputs.hidden_states[rows[span]], scale[rows[span]])
            weights = weight_slices(inputs.gemm1_weights[expert], inputs.gemm1_weights_scale[expert], dtype, BLOCK)
            for columns, weight in weights:
                out[span, columns] = product(hidden, weight.T)
        return bf16(out) if recipe.gemm1_out == "bf16" else out

    def gemm2(requantized: torch.Tensor, inputs: Any, permutation: Any) -> torch.Tensor:
        out = torch.empty(len(requantized), inputs.gemm2_weights.shape[1], dtype=requantized.dtype)
        for expert, span in reference.expert_spans(permutation.expert_offsets):
            scale = inputs.gemm2_weights_scale[expert]
            weights = weight_slices(inputs.gemm2_weights[expert], scale, requantized.dtype, BLOCK)
            for columns, weight in weights:
                out[span, columns] = product(requantized[span], weight.T)
        return out

    def silu(gate: torch.Tensor) -> torch.Tensor:
        return (gate.double() / (1 + torch.exp(-gate.double()))).to(gate.dtype)

    right = reference.route

    def route(
        logits: torch.Tensor,
        bias: torch.Tensor,
        geometry: Any,
        factor: float,
        recipe: Any = EXACT,
        dtype: torch.dtype = torch.float32,
    ) -> reference.Routing:
        chosen = right(logits, bias, geometry, factor, EXACT, dtype)
        scores = 1 / (1 + torch.exp(-logits.double()).to(dtype)).gather(1, chosen.topk_ids)  # exp to the last bit
        total = scores.flip(1).cumsum(1)[:, -1:] + reference.NORMALISER_EPSILON  # summed from the other end
        weights = scores * (factor / total)
        return replace(chosen, topk_weights=bf16(weights) if recipe.topk_weights == "bf16" else weights)

    monkeypatch.setattr(reference, "route", route)
    monkeypatch.setattr(reference, "gemm1", gemm1)
    monkeypatch.setattr(reference, "gemm2", gemm2)
    monkeypatch.setattr(reference, "silu", silu)


@pytest.mark.parametrize("chunk", [1, 16])
@pytest.mark.parametrize(
    "name",
    [
        PLAIN,
        ROUNDED,
        "small-t8-o16-iid-heterogeneous-s0",
        "small-t8-o24-iid-zero_block-s0",
        "small-t5-o8-iid-model_like-s1@bf16_gemm1",
        "small-t3-o8-underflow-model_like-s0",
        "small_kimi-t5-o6-deepseek_like-model_like-s1@requant2+ue8m0+bf16_weights",
        "e16l4h384i128k4g4t2-t12-o4-iid-model_like-s0",
    ],
)
def test_another_order_of_summation_passes(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(ordered(chunk), monkeypatch)
    result = check_case(find([name])[0])
    assert result.status == "PASS", result.message
    assert 0.01 < result.worst < 1  # it does differ, and the tolerance is not far too wide


def test_exact_products_pass_and_a_short_accumulator_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(lambda left, right: (left.double() @ right.double()).to(left.dtype), monkeypatch)
    assert check_case(find([ROUNDED])[0]).status == "PASS"
    machine(lambda left, right: tf32(left) @ tf32(right.contiguous()), monkeypatch)
    assert check_case(find([PLAIN])[0]).diverged[0].stage == "gemm1_out"


def test_a_rounded_value_may_be_either_neighbour_only_at_the_middle() -> None:
    golden = torch.tensor([1.0, 1.0, 1.0, -1.0])
    step = 2.0**-7
    limit = torch.full((4,), 1e-5)
    found = torch.tensor([1.0, 1 + step, 1.0, -1 - step])
    middle = torch.tensor([1.0, 1 + step / 2, 1.0, -1 - step / 2])
    assert rounded("s", found, golden, middle, limit).passed
    assert not rounded("s", found, golden, middle + 2e-5, limit).passed  # one side is clearly nearer
    assert not rounded("s", golden + step / 2, golden, middle, limit).passed  # not rounded at all
    assert not rounded("s", golden + 2 * step, golden, golden + step, limit).passed  # two steps away
    # a sum that cancels: its tolerance spans many of its own steps
    cancelled = torch.tensor([2.0**-12])
    assert rounded("s", cancelled * 1.5, cancelled, cancelled, torch.tensor([1e-3])).passed
    assert not rounded("s", cancelled * 8, cancelled, cancelled, torch.tensor([1e-3])).passed


# ---- the published kind: digests, norms, sampled tokens


def test_a_sampled_case_names_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = sampled_case(tmp_path, "small-t64-o8-iid-published-s0")
    assert check_case(case).status == "PASS" and check_case(case).worst < 1
    for name, stage in (("gemm1", "gemm1_out"), ("swiglu", "swiglu_out"), ("gemm2", "gemm2_out")):
        right = getattr(reference, name)
        with monkeypatch.context() as patch:
            patch.setattr(reference, name, lambda *given, right=right: tf32(right(*given)))
            assert diverged(check_case(case))[0] == stage
    with monkeypatch.context() as patch:
        machine(ordered(16), patch)
        assert check_case(case).status == "PASS", check_case(case).message
    change(case, "topk_ids", swap_ids, resealed=True)
    assert diverged(check_case(case)) == ["topk_ids"]


def test_a_gate_s_deviation_reaches_the_smallest_results() -> None:
    inputs = make_inputs(Problem.parse("small-t64-o8-iid-heterogeneous-s0"))  # gates from -230 to 167
    trace = reference.moe(inputs)
    shift = product_deviation(trace.gemm1_out, 256).float()
    moved = reference.swiglu(trace.gemm1_out + shift) - trace.swiglu_out
    limit = through(trace, 256, 256)["swiglu_out"]
    tiny = (trace.swiglu_out != 0) & (trace.swiglu_out.abs() < 1e-25)  # their squares are 0 in float32
    assert bool(tiny.any()) and bool((moved.abs() <= limit).all())
    assert bool((limit[tiny] > 1e-6 * trace.swiglu_out[tiny].abs()).all())


def test_a_row_outside_of_the_sample_shows_in_its_expert_s_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, right = sampled_case(tmp_path, "small-t64-o8-iid-model_like-s0"), reference.gemm2
    sampled = case.manifest()["sampled_tokens"]

    def gemm2(requantized: torch.Tensor, inputs: Any, permutation: Any) -> torch.Tensor:
        out = right(requantized, inputs, permutation)
        other = next(i for i, t in enumerate(permutation.permuted_idx_to_token_idx.tolist()) if t not in sampled)
        out[other] = 0
        return out

    monkeypatch.setattr(reference, "gemm2", gemm2)
    result = check_case(case)
    assert diverged(result) == ["gemm2_out"] and "norm of local expert" in result.message


def test_open_tokens_may_choose_otherwise_and_clear_ones_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, right = sampled_case(tmp_path, OPEN), reference.route
    undecided = case.manifest()["routing"]["open_tokens"]
    assert undecided
    clear = [token for token in range(64) if token not in undecided]

    def turned(tokens: list[int]) -> None:
        def route(*given: Any) -> reference.Routing:
            routing = right(*given)
            if len(routing.topk_ids) == 64:
                routing.topk_ids[tokens] = (routing.topk_ids[tokens] + 8) % 32
            return routing

        monkeypatch.setattr(reference, "route", route)

    turned(undecided)
    assert check_case(case).status == "PASS", check_case(case).message
    turned(clear[:1])
    assert diverged(check_case(case))[0] == "topk_ids"


# ---- candidates


def test_a_right_candidate_passes_the_exact_cases() -> None:
    options = Options(isolate=False)
    with options.runner("torch_grouped") as runner:
        for case in SMALL:
            if case.judges_candidates:
                result = check_case(case, runner, options)
                idle = "no_local_work" in case.name or "-t0-" in case.name
                assert result.status == ("INCONCLUSIVE" if idle else "PASS"), (case.name, result.message)
    rounded_case = check_case(find([ROUNDED])[0], "torch_grouped")
    assert rounded_case.status == "INCONCLUSIVE" and "candidates are judged on" in rounded_case.message


@pytest.mark.parametrize("name", [path.stem for path in sorted(WRONG.glob("*.py")) if path.stem != "_layer"])
def test_a_wrong_candidate_fails(name: str) -> None:
    candidate, here = f"{WRONG / name}.py:run", Options(isolate=False)
    with here.runner(candidate) as runner:  # one for both: a kept output shows
        results = [check_case(case, runner, here) for case in find([DEEPSEEK, BALANCED])]
    failed = next((result for result in results if result.status == "FAIL"), None)
    assert failed is not None, results
    assert f"--candidate {candidate}" in failed.repeat


def test_candidates_are_judged_on_the_sampled_tokens_and_the_whole_form(tmp_path: Path) -> None:
    case = sampled_case(tmp_path, "small-t64-o8-iid-published-s0")
    assert check_case(case, "torch_grouped").status == "PASS"  # in a process of its own
    here = Options(isolate=False)
    for name, check in (("gate_up_swapped", "noise_rows"), ("wrong_shape", "form"), ("unwritten_rows", "idle_rows")):
        result = check_case(case, f"{WRONG / name}.py:run", here)
        assert result.status == "FAIL" and result.verdict is not None and check in result.verdict.failed


def test_a_candidate_is_not_judged_on_a_changed_golden(tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    change(case, "gemm2_out", flip(0), resealed=False)
    result = check_case(case, "torch_grouped", Options(isolate=False))
    assert result.status == "ERROR" and "stage gemm2_out" in result.message
