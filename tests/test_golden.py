"""Golden files: the project's own hold; a damaged or wrong one is refused, with its stage; recording; the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_cases import (
    OPEN,
    PLAIN,
    ROUNDED,
    SMALL,
    WRONG,
    change,
    copied,
    flip,
    swap_ids,
)
from safetensors.torch import load_file
from typer.testing import CliRunner

from moeref.cli import app
from moeref.golden import Case, GoldenError, cases, check_case, find, write_case
from moeref.golden.case import seal
from moeref.golden.catalogue import NAMES, spec_of
from moeref.make import make_inputs
from moeref.routings import ROUTINGS
from moeref.spec import Problem, SpecError
from moeref.values import VALUES
from moeref.workloads import WORKLOADS

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


# ---- the command line


def golden(*words: str) -> Any:
    return CliRunner().invoke(app, ["golden", *words])


def test_check_exits_0_or_1_and_prints_the_stages_and_the_repeat_command(tmp_path: Path) -> None:
    case = copied(PLAIN, tmp_path)
    done = golden("check", "--dir", str(tmp_path))
    assert done.exit_code == 0 and "1 of 1 cases PASS" in done.output and "21/21" in done.output
    change(case, "gemm1_out", flip(20), resealed=True)
    target = tmp_path / "out.json"
    done = golden("check", "--dir", str(tmp_path), "--json", str(target))
    assert done.exit_code == 1 and "first divergent stage gemm1_out: 1 of" in done.output
    assert "then swiglu_out" in done.output  # it too is run on the wrong recording
    assert f"repeat: moeref golden check {PLAIN} --dir" in done.output
    assert json.loads(target.read_text())[0]["diverged"] == ["gemm1_out", "swiglu_out"]


def test_check_judges_a_candidate(tmp_path: Path) -> None:
    words = ("check", PLAIN, "--no-isolate", "--device", "cpu", "--candidate")
    assert golden(*words, "torch_grouped").exit_code == 0
    done = golden(*words, f"{WRONG / 'scaling_2_1.py'}:run")
    assert done.exit_code == 1 and "noise_gain" in done.output
    done = golden("check", ROUNDED, "--no-isolate", "--device", "cpu", "--candidate", "torch_grouped")
    assert done.exit_code == 3 and "the reference's own roundings" in done.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["check", "nonsense"], "unknown case 'nonsense'"),
        (["check", PLAIN.replace("t16", "t15")], "did you mean"),
        (["check", PLAIN, "--all"], "exclude each other"),
        (["check", "--dir", "/nonexistent"], "no golden files at /nonexistent"),
        (["check", PLAIN, "--candidate", "no_such_backend"], "unknown candidate 'no_such_backend'"),
        (["write", PLAIN], 'needs --reason "why'),
        (["write", "nonsense", "--reason", "r"], "expected PROBLEM, PROBLEM@RECIPE"),
        (["show", "nonsense"], "unknown case"),
        (["diff", "no-such-revision"], "expected a golden folder, or a git revision"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(words: list[str], text: str) -> None:
    done = golden(*words)
    assert done.exit_code == 2 and text in done.output and "Traceback" not in done.output


def test_write_show_and_diff(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    copied(PLAIN, old), copied("small-t8-o0-iid-outlier-s0", old)
    case = copied(PLAIN, new)
    done = golden("write", PLAIN, ROUNDED, "--dir", str(new), "--reason", "more of them")
    assert done.exit_code == 0 and "1 of 2 cases recorded" in done.output and "left as it is" in done.output
    shown = golden("show", ROUNDED, "--dir", str(new)).output
    assert "reason    more of them" in shown and "recipe bf16_gemm1+requant" in shown and "requantized" in shown
    assert PLAIN in golden("show").output
    change(case, "gemm2_out", flip(20, 7), resealed=True)
    done = golden("diff", str(old), str(new))
    assert done.exit_code == 1 and "small-t8-o0-iid-outlier-s0: gone" in done.output
    assert "1 of" in done.output and "gemm2_out" in done.output and f"{ROUNDED}: new: more of them" in done.output
    done = golden("diff", str(old), str(old))
    assert done.exit_code == 0 and "0 cases moved, 2 the same" in done.output
    case.path.write_text("{")
    assert golden("show", PLAIN, "--dir", str(new)).exit_code == 1


def test_the_default_folder_misses_a_case_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(PLAIN, tmp_path)
    monkeypatch.setattr("moeref.golden.case.DEFAULT_FOLDER", tmp_path)
    results = [check_case(case) for case in cases()]
    assert len(results) == len([name for name in NAMES if spec_of(name).short])
    assert [result.case for result in results if result.status != "ERROR"] == [PLAIN]


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
