"""All shards of a layer in one process: the sum's verdict, and what each wrong shard is said to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeref.diagnose.faults import FAULTS
from moeref.make import make_inputs
from moeref.ranks.layer import verify_layers
from moeref.ranks.shards import cut, dealt
from moeref.reference import moe
from moeref.spec import Geometry, Problem, SpecError
from moeref.suites import small_suite
from moeref.verify import Options, Outcome

CANDIDATES = Path(__file__).parent / "ep_candidates.py"
USUAL = "small-t32-o0-iid-model_like-s0"


def judge(candidate: str, problem: str = USUAL, shards: int = 4) -> Outcome:
    options = Options(isolate=False, shards=shards)
    return next(iter(verify_layers(f"{CANDIDATES}:{candidate}", [(problem, Problem.parse(problem))], options)))


def signs(outcome: Outcome) -> list[str]:
    return [one.sign for one in outcome.shards]


def test_shards_cover_all_experts_once_and_differ_by_one_at_most() -> None:
    for experts, count in ((256, 8), (256, 3), (24, 5), (7, 7)):
        shards = cut(Geometry(experts, 1, 128, 128, 1, 1, 1), count)
        assert [e for s in shards for e in range(s.first, s.first + s.size)] == list(range(experts))
        assert [s.first for s in shards] == [rank * experts // count for rank in range(count)]
        assert max(s.size for s in shards) - min(s.size for s in shards) <= 1
        for ranks in (1, 2, 3, count, count + 2):
            assert [s for rank in range(ranks) for s in dealt(shards, rank, ranks)] == shards
    with pytest.raises(SpecError, match=r"expected 1\.\.7"):
        cut(Geometry(7, 1, 128, 128, 1, 1, 1), 8)


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_the_shards_references_add_up_to_the_layer_with_all_experts(shards: int) -> None:
    layer = Problem.parse("small-t24-o8-one_expert-heterogeneous-s3")  # a kind that aims at the shard it is drawn for
    whole = replace(layer, geometry=replace(layer.geometry, num_local_experts=32), offset=0)
    expected = moe(make_inputs(whole, routed_as=layer)).unrounded
    cuts = cut(layer.geometry, shards)
    total = sum(moe(make_inputs(s.problem(layer), routed_as=layer)).unrounded.double() for s in cuts)
    assert isinstance(total, torch.Tensor)
    assert float((total - expected).abs().max()) <= 8 * 2.0**-23 * float(expected.abs().max())  # top_k 4 additions


def test_right_candidates_pass_every_kind_of_problem() -> None:
    problems = [(problem.name, problem) for problem in small_suite()]
    for candidate, some in (("torch_grouped", problems[::2]), (f"{CANDIDATES}:honest", problems[1::2])):
        outcomes = list(verify_layers(candidate, some, Options(isolate=False, shards=0)))
        for outcome in outcomes:
            status = "PASS" if outcome.verdict.figures.seq_len else "INCONCLUSIVE"
            assert outcome.verdict.status == status, outcome.verdict.message


# fault -> signs of four shards at USUAL; '' where a shard happens to be right
SIGNS = {
    "offset_ignored": ["", "shifted", "shifted", "shifted"],
    "stale_offset": ["", "shifted", "shifted", "shifted"],
    "offset_subtracted_twice": ["", "shifted", "missing", "missing"],
    "offset_one_too_large": ["shifted"] * 4,
    "offset_one_too_small": ["shifted"] * 4,
    "last_local_expert_dropped": ["missing", "missing", "missing", ""],  # nobody chose expert 31
    "first_local_expert_dropped": ["", "missing", "missing", "missing"],  # nor expert 0
    "ids_taken_modulo": ["extra"] * 4,
    "negative_local_ids_wrap": ["", "extra", "extra", "extra"],
    "normalised_over_local_experts": ["scaled"] * 4,
    "boundary_expert_twice": ["extra", "extra", "extra", ""],
    "reduced_twice": ["doubled"] * 4,
    "last_shard_silent": ["", "", "", "missing"],
    "next_shards_tokens": ["", "shifted", "", ""],
    "term_on_every_rank": ["other"] * 4,
}


@pytest.mark.parametrize("fault", SIGNS)
def test_a_wrong_shard_is_named_with_its_sign(fault: str) -> None:
    outcome = judge(fault)
    assert outcome.verdict.status == "FAIL"
    assert signs(outcome) == SIGNS[fault]
    for one in outcome.shards:
        assert (one.verdict.status == "FAIL") == bool(one.sign)
        named = f"shard {one.shard} (experts {one.experts[0]}..{one.experts[1]}" in outcome.verdict.message
        assert named == bool(one.sign)


def test_every_fault_of_the_offset_stage_is_tried() -> None:
    elsewhere = {"offset_rounded_down", "offset_cut_at_zero"}  # below; and legal where no offset is negative
    assert {name for name, one in FAULTS.items() if one.stage == "offset"} <= set(SIGNS) | elsewhere


def test_uneven_shards_show_an_offset_rounded_down_to_a_multiple_of_their_size() -> None:
    assert judge("offset_rounded_down").verdict.status == "PASS"  # even shards begin at such multiples
    outcome = judge("offset_rounded_down", shards=3)
    assert signs(outcome) == ["", "shifted", "shifted"]
    assert "experts 0..10 (-10 experts)" in outcome.verdict.message


def test_details_name_the_experts() -> None:
    assert "it leaves out expert 8" in judge("first_local_expert_dropped").shards[1].detail
    assert "experts 16..23 (+1 shard) in place of its own" in judge("next_shards_tokens").shards[1].detail
    assert "expert 8 (of the neighbouring shard" in judge("boundary_expert_twice").shards[0].detail
    assert "over this shard's experts alone" in judge("normalised_over_local_experts").shards[0].detail


def test_a_small_term_that_every_shard_adds_shows_in_the_sum_alone() -> None:
    outcome = judge("small_term_on_every_rank")
    assert {one.verdict.status for one in outcome.shards} == {"PASS"}
    assert outcome.verdict.status == "FAIL"
    assert "noise_overall" in outcome.verdict.failed
    assert "a term that every shard adds" in outcome.verdict.message
    assert "the published criterion alone would have passed it" in outcome.verdict.message


def test_shards_that_break_ties_for_themselves_show_in_the_sum_alone() -> None:
    problem = "small-t12-o16-ties-model_like-s3"
    assert judge("honest", problem, 2).verdict.status == "PASS"
    outcome = judge("ties_local_first", problem, 2)
    assert {one.verdict.status for one in outcome.shards} == {"PASS"}
    assert outcome.verdict.status == "FAIL"
    assert "shards break ties differently" in outcome.verdict.message
    assert "too many (doubled), top_k is 4: shard 0 experts" in outcome.verdict.message


def test_a_shard_without_an_output_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "raises.py"
    file.write_text("def run(*ten):\n    raise MemoryError('no room')\n")
    options = Options(isolate=False, shards=0)
    outcome = next(iter(verify_layers(f"{file}:run", [("x", Problem.parse(USUAL))], options)))
    assert outcome.verdict.status == "ERROR"
    assert "shard 0 (experts 0..7, rank 0) (and 3 more shards)" in outcome.verdict.message
    assert "ran out of memory: no room" in outcome.verdict.message


def test_the_matched_ratio_alone_judges_the_sum_too() -> None:
    options = Options(isolate=False, shards=0, matched_ratio_alone=True)
    candidate = f"{CANDIDATES}:small_term_on_every_rank"
    outcome = next(iter(verify_layers(candidate, [("x", Problem.parse(USUAL))], options)))
    assert outcome.verdict.status == "PASS" and "noise_overall" in outcome.verdict.missed
    assert outcome.repeat.endswith("--criterion matched-ratio --no-isolate --ep")
