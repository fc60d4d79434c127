"""Golden files: a changed stage is named, a changed file is refused, another machine's float noise passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeref import reference
from moeref.golden import Case, CaseResult, GoldenError, cases, check_case, find, write_case
from moeref.golden.case import seal
from moeref.golden.catalogue import NAMES, PUBLISHED, Spec, spec_of
from moeref.golden.stages import rounded
from moeref.make import make_inputs
from moeref.quant import weight_slices
from moeref.routings import ROUTINGS
from moeref.spec import BLOCK, EXACT, Problem, SpecError
from moeref.values import VALUES
from moeref.verify import Options
from moeref.workloads import WORKLOADS

WRONG = Path(__file__).parent / "wrong"
PLAIN = "small-t16-o0-iid-model_like-s0"
ROUNDED = "small-t5-o8-iid-published-s1@bf16_gemm1+requant"
DEEPSEEK = "small-t12-o24-deepseek_like-model_like-s0"
BALANCED = "small-t8-o8-balanced-heterogeneous-s0"
SMALL = [case for case in cases(everything=True) if not case.sampled]


def copied(name: str, folder: Path) -> Case:
    """The project's case, in a folder of the test's own."""
    original = find([name])[0]
    case = Case(original.spec, folder)
    case.path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".safetensors"):
        shutil.copy(original.path.with_suffix(suffix), case.path.with_suffix(suffix))
    return case


def change(case: Case, stage: str, edit: Callable[[torch.Tensor], None], resealed: bool) -> None:
    """Edit one tensor of a case; resealed: with the manifest's digests made to fit, as a wrong recording has them."""
    manifest, tensors = case.manifest(), case.tensors(case.manifest())
    edit(tensors[stage])
    if resealed:
        case.save(manifest, tensors)
    else:
        save_file(tensors, case.path.with_suffix(".safetensors"))


def flip(bit: int, where: int = 0) -> Callable[[torch.Tensor], None]:
    """Flips one bit of the element at this flat position."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def edit(tensor: torch.Tensor) -> None:
        flat = tensor.view(-1).view(width[tensor.element_size()])
        flat[where] ^= 1 << bit

    return edit


def swap_ids(tensor: torch.Tensor) -> None:
    tensor[2, [0, 1]] = tensor[2, [1, 0]]


def sampled_case(folder: Path, problem: str) -> Case:
    """A case of the published kind, of a small problem."""
    case = Case(Spec("sampled", Problem.parse(problem), EXACT, PUBLISHED), folder)
    assert write_case(case, "a test")
    return case


# ---- the project's own files


def test_the_catalogue_is_what_is_promised() -> None:
    small = [spec_of(name) for name in NAMES if len(name) > 8]
    assert len(small) >= 16 and [name for name in NAMES if len(name) == 8] == [one.short for one in WORKLOADS]
    kinds = {spec.problem.routing for spec in small}
    assert kinds == set(ROUTINGS) and {spec.problem.values for spec in small} == set(VALUES)
    assert {spec.problem.geometry.name for spec in small} >= {"small", "small_kimi"}
    assert {case.name for case in cases(everything=True)} == set(NAMES)
    folder = cases()[0].root
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_reference_keeps_every_small_case(case: Case) -> None:
    result = check_case(case)
    assert result.status == "PASS", result.message
    assert len(result.stages) == 21 and 0 <= result.worst <= 1


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_no_small_case_hangs_on_a_gap_that_rounding_could_turn(case: Case) -> None:
    routing = case.manifest()["routing"]
    assert not routing["open_tokens"]
    assert routing["smallest_gap"] is None or routing["smallest_gap"] > 5 * routing["safe_gap"]


def test_the_published_cases_are_whole_files_with_clear_samples() -> None:
    for case in cases(everything=True):
        if case.sampled:
            manifest = case.manifest()
            assert case.tensors(manifest) and manifest["sampled_tokens"]
            assert not set(manifest["sampled_tokens"]) & set(manifest["routing"]["open_tokens"])
            assert case.spec.problem.seq_len > 100 or not manifest["routing"]["open_tokens"]


def test_the_shortest_published_case_holds_at_full_size() -> None:
    result = check_case(find(["e05c6c03"])[0])
    assert result.status == "PASS", result.message


# ---- changed files


@pytest.mark.parametrize("stage", ["topk_ids", "topk_weights", "gemm1_out", "swiglu_out", "gemm2_out", "output"])
def test_one_flipped_bit_in_a_file_is_refused_with_its_stage(stage: str, tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    change(case, stage, flip(0), resealed=False)  # the lowest bit, far below any tolerance
    result = check_case(case)
    assert result.status == "ERROR" and [one.stage for one in result.diverged] == [stage]
    assert f"stage {stage} is not what was recorded" in result.message and "git checkout" in result.message


@pytest.mark.parametrize(
    ("stage", "bit"),
    [
        ("topk_ids", 0),
        ("topk_weights", 10),
        ("expert_offsets", 1),
        ("permuted_idx_to_token_idx", 0),
        ("permuted_idx_to_slot", 0),
        ("gemm1_out", 16),
        ("swiglu_out", 10),
        ("requantized", 0),
        ("gemm2_out", 16),
        ("unrounded", 16),
        ("output", 0),
    ],
)
def test_a_wrong_recording_is_a_divergent_stage(stage: str, bit: int, tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    tensor = case.tensors(case.manifest())[stage].flatten()
    change(case, stage, flip(bit, int(tensor.abs().argmax())), resealed=True)
    result = check_case(case)
    assert result.status == "FAIL" and result.diverged[0].stage == stage, result.message
    assert f"first divergent stage {stage}" in result.message


def test_two_swapped_ids_are_caught_and_placed(tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    change(case, "topk_ids", swap_ids, resealed=True)
    result = check_case(case)
    assert result.diverged[0].stage == "topk_ids"
    assert "2 of 64 elements differ; first token 2, slot 0" in result.message


def test_a_truncated_tensor_file(tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    path = case.path.with_suffix(".safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    result = check_case(case)
    assert result.status == "ERROR" and "truncated" in result.message and path.name in result.message


def test_a_truncated_manifest(tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    case.path.write_text(case.path.read_text()[:700])
    with pytest.raises(GoldenError, match="not whole JSON, the file is truncated"):
        case.manifest()
    assert check_case(case).status == "ERROR"


def test_a_manifest_of_another_schema_version(tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    manifest = {**case.manifest(), "schema": 2}
    case.path.write_text(json.dumps({**manifest, "digest": seal(manifest)}))
    with pytest.raises(GoldenError, match="schema version 2, this moeref reads 1"):
        case.manifest()


@pytest.mark.parametrize("key", ["reason", "problem", "rows_by_expert", "floats"])
def test_a_manifest_edited_by_hand(key: str, tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    case.path.write_text(json.dumps({**json.loads(case.path.read_text()), key: "other"}))
    with pytest.raises(GoldenError, match="edited by hand"):
        case.manifest()


def test_a_reformatted_manifest_is_still_the_same(tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    before = case.manifest()
    case.path.write_text(json.dumps(before, indent=8, sort_keys=True))
    assert case.manifest() == before and check_case(case).status == "PASS"


@pytest.mark.parametrize(
    ("suffix", "what"), [(".json", "manifest is missing"), (".safetensors", "tensors are missing")]
)
def test_a_missing_file(suffix: str, what: str, tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    case.path.with_suffix(suffix).unlink()
    assert [one.name for one in cases(tmp_path)] == [PLAIN]
    result = check_case(case)
    assert result.status == "ERROR" and what in result.message


def test_tensors_of_another_case_under_its_name(tmp_path: Path) -> None:
    case, other = copied(PLAIN, tmp_path), copied("small-t8-o0-iid-outlier-s0", tmp_path)
    shutil.copy(other.path, case.path)
    assert "holds the case small-t8-o0-iid-outlier-s0" in check_case(case).message


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(SpecError, match=f"did you mean {PLAIN}"):
        find([PLAIN.replace("s0", "s1")])
    with pytest.raises(SpecError, match=r"written 'small-t8-o8-iid-model_like-s1@bf16_gemm1[+]requant'"):
        spec_of("small-t8-o8-iid-model_like-s1@requant+bf16_gemm1")
    with pytest.raises(SpecError, match="expected PROBLEM, PROBLEM@RECIPE"):
        spec_of("nonsense")


# ---- a changed reference: one rounding in one stage


def bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Truncated to 10 fraction bits."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)


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


# ---- the published kind: digests, norms, sampled tokens

OPEN = "small-t64-o8-ties-model_like-s0"  # sums of two scores tie between groups but for float noise


def diverged(result: CaseResult) -> list[str]:
    return [one.stage for one in result.diverged]


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


# ---- recording


def test_what_still_holds_is_left_as_it_is(tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    before = case.path.read_bytes()
    assert not write_case(case, "no need") and case.path.read_bytes() == before
    assert write_case(case, "for a test", force=True)
    manifest = case.manifest()
    assert manifest["reason"] == "for a test" and manifest["replaces"] == json.loads(before)["digest"]
    assert load_file(case.path.with_suffix(".safetensors")).keys() == manifest["tensors"]["stages"].keys()


def test_a_reason_and_clear_routing_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--reason"):
        write_case(Case(spec_of(PLAIN), tmp_path), "  ")
    with pytest.raises(SpecError, match="another machine may choose otherwise; take another seed"):
        write_case(Case(spec_of(OPEN), tmp_path), "a test")
    assert make_inputs(Problem.parse(OPEN)).seq_len == 64
