"""The 19 published workloads: the table is the published rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeref.spec import PRESETS, Problem, SpecError
from moeref.workloads import DEFINITION, WORKLOADS, find

ROWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "moe_workloads.jsonl"


@pytest.mark.skipif(not ROWS.exists(), reason="the published rows are not beside this checkout: only pins are checked")
def test_the_table_is_the_published_rows() -> None:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    published = []
    for row in rows:
        workload = row["workload"]
        assert row["definition"] == DEFINITION
        assert workload["inputs"]["routed_scaling_factor"]["value"] == 2.5
        offset = workload["inputs"]["local_expert_offset"]["value"]
        published.append((workload["uuid"], workload["axes"]["seq_len"], offset))
    assert sorted(published) == sorted((w.uuid, w.seq_len, w.offset) for w in WORKLOADS)


def test_the_table_is_the_pinned_one() -> None:
    """Sums are of the published rows."""
    assert len(WORKLOADS) == len({w.short for w in WORKLOADS}) == 19
    assert [w.seq_len for w in WORKLOADS] == sorted(w.seq_len for w in WORKLOADS)
    assert sum(w.seq_len for w in WORKLOADS) == 27_627
    assert sum(w.offset for w in WORKLOADS) == 1_792
    assert all(w.offset % 32 == 0 for w in WORKLOADS)  # eight ranks of 32
    assert sum(w.seq_len * w.offset for w in WORKLOADS) == 2_133_536


def test_a_workload_is_a_problem_of_the_published_geometry() -> None:
    for workload in WORKLOADS:
        problem = workload.problem()
        assert (problem.seq_len, problem.offset, problem.factor) == (workload.seq_len, workload.offset, 2.5)
        assert problem.geometry == PRESETS["dsv3"] and problem.values == "published"
        assert Problem.parse(problem.name) == problem
    assert WORKLOADS[0].problem("model_like", 3).name == "dsv3-t1-o32-deepseek_like-model_like-s3"


def test_find_takes_prefixes_and_keeps_table_order() -> None:
    assert find([]) == []
    assert [w.seq_len for w in find(["5e8dc11c", "e05", WORKLOADS[2].uuid])] == [1, 14, 14107]
    assert len(find(["e05", "e05c6c03"])) == 1
    for workload in WORKLOADS:
        assert find([workload.short]) == [workload]


@pytest.mark.parametrize(("prefix", "what"), [("zz", "fits none"), ("8", "fits 3"), ("", "fits 19")])
def test_an_unknown_or_ambiguous_prefix_is_refused_with_the_known_ones(prefix: str, what: str) -> None:
    with pytest.raises(SpecError, match=f"workload '{prefix}' {what} of the published uuids: .* e05c6c03, b8f4f012"):
        find([prefix])
