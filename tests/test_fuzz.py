"""Fuzzing: problems are drawn and judged, a failure comes down to the boundary and prints a command that repeats it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from test_cli import moeref

from moeref.diagnose.shrink import possible
from moeref.spec import Problem
from moeref.testing.fuzz import BATCH, drawn, fuzz
from moeref.testing.strategies import problems
from moeref.verify import Options

TILE_TAIL = '''
"""The last row of an expert's run is lost when it is the first of another tile of 16."""
import torch
from dataclasses import replace
from moeref.inputs import FIELDS, Inputs
from moeref.reference import moe, combine
from moeref.spec import Geometry

def run(*ten, n_group=8, topk_group=4, top_k=8):
    local, hidden, inner = ten[6].shape
    geometry = Geometry(ten[0].shape[1], local, hidden, inner, top_k, n_group, topk_group)
    trace = moe(Inputs(**dict(zip(FIELDS, ten)), geometry=geometry))
    rows = trace.gemm2_out.clone()
    bounds = trace.permutation.expert_offsets.tolist()
    for start, stop in zip(bounds, bounds[1:]):
        if stop - start > 16 and (stop - start) % 16 == 1:
            rows[stop - 1] = 0
    return combine(rows, trace.routing, trace.permutation).bfloat16()
'''


def test_a_lost_tile_tail_shrinks_to_the_boundary(tmp_path: Path) -> None:
    """17 rows of one expert are the least that fails; nothing else may be left over."""
    file = tmp_path / "tile_tail.py"
    file.write_text(TILE_TAIL)
    result = fuzz(f"{file}:run", Options(timeout=60), examples=400, database=tmp_path / "database")
    assert result.failure is not None
    assert result.seconds < 30
    smallest = Problem.parse(result.failure.label)
    geometry = smallest.geometry
    assert (geometry.num_local_experts, geometry.hidden_size, geometry.intermediate_size) == (1, 128, 128)
    assert (geometry.num_experts, smallest.seq_len, smallest.offset, smallest.seed) == (1, 17, 0, 0)
    assert "noise_rows" in result.failure.verdict.failed
    repeated = moeref(*result.failure.repeat.split()[1:])
    assert repeated.returncode == 1 and "FAIL" in repeated.stdout
    again = fuzz(f"{file}:run", Options(timeout=60), examples=5, database=tmp_path / "database")
    assert again.failure is not None, "the database tries the known failure first"


def test_a_right_candidate_survives_and_the_figures_add_up(tmp_path: Path) -> None:
    result = fuzz("torch_grouped", Options(), examples=60, seed=3, database=tmp_path)
    assert result.failure is None and result.drawn == 60
    assert result.statuses["PASS"] > 30 and set(result.statuses) <= {"PASS", "INCONCLUSIVE"}


def test_the_command_says_what_was_drawn(tmp_path: Path) -> None:
    done = moeref("fuzz", "torch_grouped", "--examples", "20", "--database", str(tmp_path))
    assert done.returncode == 0 and "20 problems drawn" in done.stdout and "problems a minute" in done.stdout
    assert moeref("fuzz", "--minutes", "1", "--examples", "2").returncode == 2
    assert moeref("fuzz", "--examples", "0").returncode == 2


def test_neighbouring_seeds_draw_other_problems() -> None:
    first, second = ({p.name for p in islice(drawn(None, seed, None, 80, 0), 3 * BATCH)} for seed in (5, 6))
    assert len(first & second) < 0.1 * BATCH  # the simplest ones may come twice


@pytest.mark.parametrize(("examples", "minutes"), [(None, None), (3, 1.0)])
def test_one_bound_is_needed(examples: int | None, minutes: float | None) -> None:
    with pytest.raises(ValueError, match="one of the two"):
        fuzz("torch_grouped", Options(), examples=examples, minutes=minutes)


@settings(max_examples=300)
@given(problems())
def test_drawn_problems_are_possible_and_their_names_say_all(problem: Problem) -> None:
    assert Problem.parse(problem.name) == problem and possible(problem)
