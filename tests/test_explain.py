"""From a mismatch to its cause: catalogue entries named, faults outside of it, right kernels, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from uncatalogued import UNCATALOGUED

from moeref.cli import app
from moeref.diagnose.explain.case import ASKED, Case, Library
from moeref.diagnose.explain.choice import judge_routing, read_routing_weights
from moeref.diagnose.explain.confusion import LEGAL, Told, counts, lines, shared_library, tell
from moeref.diagnose.explain.distance import direction, live_rows, row_distance
from moeref.diagnose.explain.engine import explain
from moeref.diagnose.explain.geometry import error_geometry
from moeref.diagnose.explain.inside import PROBLEM, look_inside
from moeref.diagnose.explain.panel import PANEL, LocalSubject, Prepared, Step, panel_at, regrouped
from moeref.diagnose.explain.result import Explanation
from moeref.diagnose.explain.substitution import judge_trace
from moeref.diagnose.faults import FAULTS
from moeref.diagnose.kernel import USUAL, Kernel
from moeref.diagnose.result import LocalCall
from moeref.explain import explain_candidate
from moeref.interop.bundle import write_bundle
from moeref.judge.verdict import Known
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.spec import PRESETS, Problem, Recipe, SpecError
from moeref.verify import Options

ROOT = Path(__file__).resolve().parents[1]

SAMPLE = (
    "masked_with_zero",
    "index_found_by_value",
    "offset_cut_at_zero",
    "tile_tail_row_lost",
    "gemm1_accumulator_of_14_bits",
    "silu_with_ripple",
    "cast_drops_the_carry",
    "gemm2_odd_experts_lack_last_block",
    "stale_tiles_run_again",
    "last_columns_unwritten",
)
"""Faults of all kinds: some need a trigger, some are below what the judge sees, some need an earlier call."""


@pytest.fixture(scope="module")
def library() -> Library:
    """The panel with its hypotheses, shared by all tests."""
    return shared_library()


def told(build: type[Kernel], library: Library, problem: str = ASKED) -> Explanation:
    case = Case(build.__name__, Problem.parse(problem), shrink_seconds=0)
    return explain(LocalSubject(build), LocalCall(build()), case, library)


# Named


@pytest.mark.slow
def test_faults_of_the_catalogue_are_named() -> None:
    found = [tell(name) for name in SAMPLE]
    total = counts(found)
    assert total.stage_first >= 9 and total.stage_within_three == len(SAMPLE), found
    assert total.exact >= 8, found


def test_a_fault_is_named_in_another_recipe(library: Library) -> None:
    recipe = Recipe.parse("bf16_gemm1+requant+ue8m0+bf16_weights")
    fault = FAULTS["gemm1_scale_of_next_expert"]
    case = Case("x", Problem.parse(ASKED), shrink_seconds=0)
    found = explain(LocalSubject(lambda: fault.build(recipe)), LocalCall(fault.build(recipe)), case, library)
    assert (found.suspects[0].stage, found.suspects[0].fault) == ("gemm1_scale", "gemm1_scale_of_next_expert")
    assert found.recipe == recipe.name and found.suspects[0].match is not None and found.suspects[0].match > 0.99


def test_what_fits_alike_is_separated() -> None:
    """Offset 4 rounded down to a multiple of 8 is offset ignored: only another offset tells."""
    alike = Library(panel=(Step("small-t24-o4-iid-heterogeneous-s2"),))
    for name in ("offset_ignored", "offset_rounded_down"):
        case = Case(name, Problem.parse("small-t24-o4-iid-heterogeneous-s2"), shrink_seconds=0)
        found = explain(LocalSubject(FAULTS[name].build), LocalCall(FAULTS[name].build()), case, alike)
        assert [one.fault for one in found.suspects] == [name]
        assert any("built to separate" in text for text in found.ruled_out)


# Not in the catalogue


@pytest.mark.slow
def test_stages_outside_of_the_catalogue(library: Library) -> None:
    found = {kernel: told(kernel, library) for kernel in UNCATALOGUED}
    named = {kernel.__name__: one.suspects[0].fault for kernel, one in found.items() if one.suspects[0].fault}
    assert not named, "a wrong name was given"
    missed = [kernel.__name__ for kernel, one in found.items() if one.suspects[0].stage not in UNCATALOGUED[kernel]]
    assert len(missed) <= 0.3 * len(UNCATALOGUED), missed
    assert all("no catalogue entry fits" in " ".join(one.ruled_out) for one in found.values())


# Right


@pytest.mark.parametrize("name", ["exact", "bf16_gemm1+requant+ue8m0", "requant2+bf16_weights"])
def test_a_right_kernel_is_said_to_be_right(name: str) -> None:
    assert tell(name) == Told(name, LEGAL, True, name, ())


@pytest.mark.parametrize("name", ["weight_before_requantize", "bf16_throughout", "ties_to_the_higher_id"])
def test_a_right_kernel_of_its_own_way_is_right(name: str) -> None:
    found = tell(name)
    assert found.correct and found.recipe in ("requant", "bf16_gemm1+requant")


# The parts


def test_row_distance() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 0.0], [3.0, float("nan")]])
    assert row_distance(x, x).tolist() == [0, 0, 0, 0]
    assert row_distance(x, -x)[0] == pytest.approx(2) and row_distance(x, 0 * x)[2] == 1
    assert row_distance(x, torch.nan_to_num(x, nan=3.0))[3] == pytest.approx(0.5)
    assert row_distance(1e-200 * x.double(), 1e-200 * 1.1 * x.double())[0] == pytest.approx(0.01 / 2.21)
    assert live_rows(x, 0 * x).tolist() == [True, False, True, True]
    assert direction(x[:1], -3 * x[:1]).tolist() == pytest.approx([1])
    assert direction(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])).tolist() == [0]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("factor_applied_twice", "which is routed_scaling_factor = 2.5"),
        ("gain_of_7_8", "which is 7/8"),
        ("negated", "which is -1"),
        ("results_one_token_late", "the right row of another token"),
        ("offset_one_too_large", "local_expert_offset 17"),
        ("every_second_token_zero", "are odd tokens"),
        ("last_local_expert_dropped", "rows of local experts [7] are missing"),
        ("weights_of_previous_token", "with other weights"),
        ("halves_swapped", "the fault lies inside of the experts"),
        ("gemm2_last_columns_zero", "only the last 64 of 256 columns are wrong"),
        ("all_zeros", "every active row is all zero"),
        ("ids_taken_modulo", "rows without a local expert are not zero"),
    ],
)
def test_the_geometry_of_an_error(fault: str, sentence: str) -> None:
    inputs = make_inputs(Problem.parse(ASKED))
    facts = error_geometry(LocalCall(FAULTS[fault].build())(inputs), Known(moe(inputs), inputs), USUAL)
    assert any(sentence in one.text for one in facts), [one.text for one in facts]


def test_a_right_answer_has_no_geometry() -> None:
    inputs = make_inputs(Problem.parse(ASKED))
    assert error_geometry(LocalCall(Kernel())(inputs), Known(moe(inputs), inputs), USUAL) == []


@pytest.mark.parametrize("recipe", ["exact", "bf16_gemm1+requant2+ue8m0+bf16_weights"])
def test_a_right_kernel_shows_nothing_inside(recipe: str) -> None:
    kernel = Kernel(Recipe.parse(recipe))
    inputs = make_inputs(Problem.parse(PROBLEM))
    assert look_inside(LocalCall(kernel)(inputs), inputs, moe(inputs)) == []
    read = read_routing_weights(LocalCall(kernel), Problem.parse("e16l4h384i384k4g4t2-t24-o4-iid-model_like-s0"), "cpu")
    assert read is not None and judge_routing(read) is None


def test_the_panel_stands_on_its_own_feet() -> None:
    assert len(set(PANEL)) == len(PANEL)
    assert Problem.parse(PANEL[0].problem).factor not in (1.0, 2.5)  # else a kept factor is a factor not applied
    for step in panel_at(PRESETS["dsv3"]):
        assert Problem.parse(step.problem).geometry == PRESETS["dsv3"]


def test_problems_for_one_models_groups() -> None:
    """Sizes and the shard's place stay; a shard that reached past the last expert still does."""
    like = PRESETS["dsv3"]
    names = {regrouped(step.problem, like) for step in PANEL}
    for step in PANEL:
        old, new = Problem.parse(step.problem), Problem.parse(regrouped(step.problem, like))
        assert (new.geometry.n_group, new.geometry.topk_group, new.geometry.top_k) == (8, 4, 8)
        assert (new.geometry.hidden_size, new.seq_len, new.seed) == (old.geometry.hidden_size, old.seq_len, old.seed)
        assert len(new.real_experts) == len(old.real_experts)
    assert len(names) == len({step.problem for step in PANEL}) and regrouped(ASKED, None) == ASKED


def test_a_subject_is_given_its_inputs_back() -> None:
    prepared = Prepared((Step("small-t9-o8-iid-model_like-s0"),))
    inputs, _ = prepared.inputs(0)
    before = inputs.map(torch.clone)
    run = LocalSubject(FAULTS["scale_folded_in_place"].build).observe(inputs)
    assert run.changed_inputs == ["gemm2_weights_scale"]
    assert torch.equal(inputs.gemm2_weights_scale, before.gemm2_weights_scale)


def test_counts_and_lines() -> None:
    one = Told("gain_of_7_8", "output", False, "requant", (("weights", "factor_fixed"), ("output", "gain_of_7_8")))
    told = [one, replace(one, suspects=one.suspects[::-1]), Told("exact", LEGAL, True, "exact", ())]
    found = counts(told)
    assert (found.faults, found.stage_first, found.stage_within_three, found.exact) == (2, 1, 2, 1)
    assert found.misnamed == ("gain_of_7_8",) and not found.accused and not found.good
    assert counts([replace(told[2], correct=False)]).accused == ("exact",)
    written: list[str] = []
    lines(told, written.append)
    assert written[0] == "gain_of_7_8 (output): weights factor_fixed, output gain_of_7_8"


TRACES = """
from dataclasses import replace
import torch
from moeref.inputs import Inputs
from moeref.reference import Trace, combine, gemm2, moe
from moeref.spec import PRESETS, Geometry

def run(*ten, n_group, topk_group, top_k):
    g = Geometry(ten[0].shape[1], len(ten[4]), ten[2].shape[1], ten[6].shape[2], top_k, n_group, topk_group)
    inputs = Inputs(*ten, g)
    right = moe(inputs)
    swiglu_out = right.swiglu_out.roll(3, 1)
    read = gemm2(swiglu_out, inputs, right.permutation)
    sums = combine(read, right.routing, right.permutation)
    return replace(right, swiglu_out=swiglu_out, requantized=swiglu_out, gemm2_out=read, output=sums.bfloat16())
"""


def test_a_trace_is_judged_stage_by_stage(tmp_path: Path, library: Library) -> None:
    """SwiGLU's columns moved by three: the stages behind follow from it, so it alone is blamed."""
    (tmp_path / "traces.py").write_text(TRACES)
    options = Options(timeout=60, isolate=False)
    candidate = f"{tmp_path / 'traces.py'}:run"
    found = explain_candidate(candidate, Problem.parse(ASKED), options, shrink_seconds=0, library=library)
    assert found.suspects[0].stage == "swiglu" and found.suspects[0].fault is None
    assert "swiglu_out does not follow from the stage before" in found.suspects[0].evidence


@pytest.mark.parametrize("stage", ["gemm1_out", "swiglu_out", "requantized", "gemm2_out", "output"])
def test_the_first_wrong_stage_of_a_trace(stage: str) -> None:
    inputs = make_inputs(Problem.parse(ASKED))
    right = moe(inputs, Recipe.parse("requant+ue8m0"))
    assert judge_trace(right, inputs) == []
    wrong = replace(right, **{stage: 1.1 * getattr(right, stage)})
    assert judge_trace(wrong, inputs)[0].text.startswith(f"{stage} does not follow")


def test_wrong_choices_of_a_trace() -> None:
    inputs = make_inputs(Problem.parse(ASKED))
    right = moe(inputs)
    ids, weights = right.routing.topk_ids, right.routing.topk_weights
    other = replace(right, routing=replace(right.routing, topk_ids=(ids + 1) % 32))
    assert judge_trace(other, inputs)[0].text.startswith("topk_ids are wrong for 24 of 24 tokens")
    other = replace(right, routing=replace(right.routing, topk_weights=weights.flip(1)))
    assert judge_trace(other, inputs)[0].text.startswith("topk_weights are wrong for 24 tokens")


# The command line


def test_the_command_line(tmp_path: Path) -> None:
    candidate = f"{ROOT / 'tests' / 'wrong' / 'gate_up_swapped.py'}:run"
    path, folder = tmp_path / "found.json", tmp_path / "bundle"
    words = ["explain", candidate, "--no-isolate", "--device", "cpu", "--json", str(path), "--bundle", str(folder)]
    result = CliRunner().invoke(app, [*words, "--shrink", "2"])
    assert result.exit_code == 1, result.output
    assert "1. swiglu: halves_swapped" in result.output and "seen in: sglang #32430" in result.output
    found = json.loads(path.read_text())
    assert found["suspects"][0].items() >= {"stage": "swiglu", "fault": "halves_swapped"}.items()
    assert found["suspects"][0]["match"] > 0.99 and "--problem" in found["suspects"][0]["replay"]
    assert Problem.parse(found["shrunk"]).geometry.hidden_size == 128
    replayed = subprocess.run([sys.executable, folder / "replay.py"], capture_output=True, text=True, check=True)
    assert found["shrunk"] in replayed.stdout and "[]" not in replayed.stdout


def test_wrong_use_is_one_sentence(tmp_path: Path) -> None:
    for words, sentence in (
        (["--problem", "nothing"], "unknown problem 'nothing'"),
        (["--json", str(tmp_path / "no" / "x.json")], "does not exist"),
    ):
        result = CliRunner().invoke(app, ["explain", "moe_fast", *words])
        assert result.exit_code == 2 and sentence in result.output and "Traceback" not in result.output


def test_a_bundle_overwrites_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    inputs = make_inputs(Problem.parse("small-t1-o8-iid-model_like-s0"))
    with pytest.raises(SpecError, match="expected a new or empty folder"):
        write_bundle(tmp_path, "p", "c", inputs, [], torch.zeros(1, 256, dtype=torch.bfloat16))


def test_a_candidate_that_raises_is_told(library: Library) -> None:
    class Raises(Kernel):
        """Never gets anywhere."""

    subject = LocalSubject(Raises)
    observed = replace(
        subject.observe(make_inputs(Problem.parse(ASKED))), status="error", message="raised E", outputs=[]
    )
    subject.observe = lambda inputs, then=None: observed  # type: ignore[method-assign]
    found = explain(subject, LocalCall(Raises()), Case("x", Problem.parse(ASKED)), library)
    assert not found.correct and not found.suspects and found.facts[-1] == "raised E"
