"""Every check at once: a sample of the kill matrix, legal variants, and a fault that is not in the catalogue."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeref.diagnose.faults import FAULTS
from moeref.diagnose.faults.registry import STAGES
from moeref.diagnose.kernel import Kernel
from moeref.diagnose.matrix import calc_diff, examine, kill_matrix, totals
from moeref.diagnose.variants import VARIANTS
from moeref.inputs import Inputs
from moeref.reference import Permutation

SAMPLE = [next(name for name, one in FAULTS.items() if one.stage == stage) for stage in STAGES]
NOT_SEEN_BY_THE_JUDGE = [
    "silu_with_ripple",
    "gemm1_accumulator_of_14_bits",
    "gemm2_accumulator_in_bf16",
    "combined_in_bf16",
    "weights_cached_by_address",
]


class OddExpertsUnweighted(Kernel):
    """Not in the catalogue: rows of odd local experts are added without their routing weight."""

    def combine(self, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        bounds = permutation.expert_offsets
        expert = torch.searchsorted(bounds, torch.arange(len(weights)), right=True) - 1
        return Kernel.combine(self, inputs, gemm2_out, torch.where(expert % 2 == 1, 1.0, weights), permutation)


@pytest.mark.parametrize("name", [*SAMPLE, *NOT_SEEN_BY_THE_JUDGE])
def test_a_planted_fault_is_killed(name: str) -> None:
    fault = FAULTS[name]
    assert examine(name, fault.stage, fault.source, fault.build()).checks


def test_a_fault_outside_of_the_catalogue_is_killed() -> None:
    found = examine("odd", "combine", "synthetic", OddExpertsUnweighted())
    assert "noise_rows" in found.checks and any("law" in check or "readout" in check for check in found.checks)


@pytest.mark.parametrize("name", ["exact", "requant", "requant2+ue8m0", "bf16_throughout", "ties_to_the_higher_id"])
def test_no_check_fires_on_a_legal_variant(name: str) -> None:
    found = examine(name, "legal", "", VARIANTS[name].build())
    assert not found.checks, found.details


def test_the_matrix_counts() -> None:
    rows = list(kill_matrix(["silu_with_ripple", "biased_weights", "requant"], processes=1))
    found = totals(rows)
    assert [row.name for row in rows] == ["silu_with_ripple", "biased_weights", "requant"]
    assert (found.faults, found.killed, found.variants) == (2, 2, 1)
    assert not found.survivors and not found.false_alarms
    assert found.kills["noise_rows"] == 1 and sum(found.alone.values()) <= 1


def test_calc_diff_is_deepgemms() -> None:
    x = torch.tensor([[1.0, 2.0]])
    assert calc_diff(x, x) == 0 and calc_diff(0 * x, 0 * x) == 0
    assert calc_diff(torch.tensor([[2.0, -1.0]]), x) == 1
    assert calc_diff(1.1 * x, x) == pytest.approx(1 - 2.2 / 2.21)
    assert calc_diff(torch.tensor([[float("nan"), 1.0]]), x) == 1
