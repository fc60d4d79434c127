"""Each law can fail: kernels with a planted fault, and all laws that see it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from findings import SMALL, failing
from torch import Tensor

from moeref.diagnose.kernel import Kernel
from moeref.diagnose.laws import LAWS, run_laws
from moeref.diagnose.result import LocalCall
from moeref.inputs import FP8, Inputs
from moeref.reference import Permutation


class Planted(Kernel):
    """The right kernel until a test changes something; `wrong` rows of the result are multiplied by 1.5."""

    def wrong(self, inputs: Inputs) -> Tensor | slice | None:
        return None

    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        rows = self.wrong(inputs)
        if rows is not None:
            result[rows] *= 1.5
        return result.bfloat16()


class FifteenPercent(Planted):
    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        return (result * 1.15).bfloat16()


class OddExpertsLouder(Planted):
    def combine(self, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        runs = permutation.expert_offsets.diff()
        slot = torch.repeat_interleave(torch.arange(len(runs)), runs)
        return Kernel.combine(self, inputs, gemm2_out, weights * (1 + 0.5 * (slot % 2)), permutation)


class MaskedWithZero(Planted):
    def mask(self, inputs: Inputs, biased: Tensor, groups: Tensor) -> Tensor:
        masked = Kernel.mask(self, inputs, biased, groups)
        return torch.where(masked < -1e30, torch.zeros_like(masked), masked)


class FactorAlways(Planted):
    def apply_factor(self, inputs: Inputs, weights: Tensor) -> Tensor:
        return weights * 2.5


class NoGuardForZeroRows(Planted):
    def requantize(self, inputs: Inputs, swiglu_out: Tensor, permutation: Permutation) -> Tensor:
        rows = Kernel.requantize(self, inputs, swiglu_out, permutation)
        return torch.where((swiglu_out == 0).all(1, keepdim=True), torch.nan, rows)


class NoGuardForZeroBlocks(Planted):
    def requantize(self, inputs: Inputs, swiglu_out: Tensor, permutation: Permutation) -> Tensor:
        rows = Kernel.requantize(self, inputs, swiglu_out, permutation)
        empty = (swiglu_out.view(len(rows), -1, 128) == 0).all(2)
        rows.view(len(rows), -1, 128)[empty & ~empty.all(1, keepdim=True)] = torch.nan
        return rows


class TouchesEveryExpert(Planted):
    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        return (result + 0.0 * inputs.gemm1_weights_scale.sum()).bfloat16()


class ThirdCallDiffers(Planted):
    def wrong(self, inputs: Inputs) -> Tensor | slice | None:
        self.memory["calls"] = self.memory.get("calls", 0) + (inputs.seq_len > 8)
        return slice(0, 4) if self.memory["calls"] == 3 and inputs.seq_len > 8 else None


class LeavesIdleRows(Planted):
    def store(self, inputs: Inputs, output: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            return output
        active = (output != 0).any(1)
        out[active] = output[active]
        return out


class LongerCallLingers(Planted):
    def wrong(self, inputs: Inputs) -> Tensor | slice | None:
        before, self.memory["seq_len"] = self.memory.get("seq_len"), inputs.seq_len
        return slice(None) if before == 2 * inputs.seq_len else None


class WeightsByAddress(Planted):
    def arguments(self, inputs: Inputs) -> Inputs:
        key = inputs.gemm2_weights.data_ptr()
        if key not in self.memory:  # holds on to the buffer, so its address is never another's
            self.memory[key] = (inputs.gemm2_weights, inputs.gemm2_weights.view(torch.uint8).clone().view(FP8))
        return replace(inputs, gemm2_weights=self.memory[key][1])


class BiasOfTheFirstCall(Planted):
    def arguments(self, inputs: Inputs) -> Inputs:
        bias = self.memory.setdefault("bias", inputs.routing_bias.clone())
        return replace(inputs, routing_bias=bias)


class OffsetByAddress(Planted):
    def arguments(self, inputs: Inputs) -> Inputs:
        key = inputs.gemm2_weights.data_ptr()
        kept = self.memory.setdefault(key, (inputs.gemm2_weights, inputs.local_expert_offset))
        return replace(inputs, local_expert_offset=kept[1])


class FirstBlocksScale(Planted):
    def activation_scale(self, inputs: Inputs, permutation: Permutation) -> Tensor:
        scale = Kernel.activation_scale(self, inputs, permutation)
        return scale[:, :1].expand_as(scale)


class ScaleForTheWholeRow(Planted):
    def block_scale(self, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
        scale = Kernel.block_scale(self, inputs, swiglu_out)
        return scale.amax(1, keepdim=True).expand_as(scale).contiguous()


class FirstRowsScale(Planted):
    def gemm2_scale(self, inputs: Inputs) -> Tensor:
        return inputs.gemm2_weights_scale[:, :1].expand_as(inputs.gemm2_weights_scale)


class LastTokensLouder(Planted):
    def wrong(self, inputs: Inputs) -> Tensor | slice | None:
        return slice(-6, None)


class SingleTokenLouder(Planted):
    def wrong(self, inputs: Inputs) -> Tensor | slice | None:
        return slice(None) if inputs.seq_len == 1 else None


class RepeatedTokensShareARow(Planted):
    def wrong(self, inputs: Inputs) -> Tensor | slice | None:
        logits = inputs.routing_logits
        same = (logits[:, None] == logits[None]).all(2).tril(-1)
        return same.any(1).nonzero().squeeze(1)


class ZeroTokenGivesItsWeight(Planted):
    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        silent = (inputs.hidden_states.view(torch.uint8) == 0).all(1)
        result[silent] = 1e-3
        return result.bfloat16()


FAULTS: dict[type[Planted], set[str]] = {
    FifteenPercent: {"ranks_add_up"},
    OddExpertsLouder: {"relabelling", "ranks_add_up"},
    MaskedWithZero: {"bias_shift"},
    FactorAlways: {"scaling_factor", "changed_scalars"},
    NoGuardForZeroRows: {"zero_expert", "zero_tokens"},
    NoGuardForZeroBlocks: {"zero_blocks"},
    TouchesEveryExpert: {"unchosen_not_read"},
    ThirdCallDiffers: {"repeat"},
    LeavesIdleRows: {"poisoned_output"},
    LongerCallLingers: {"other_call_between"},
    WeightsByAddress: {"refilled_buffers"},
    BiasOfTheFirstCall: {"refilled_buffers", "relabelling", "unchosen_not_read"},
    OffsetByAddress: {"changed_scalars"},
    FirstBlocksScale: {"trade_along_hidden", "ranks_add_up"},
    ScaleForTheWholeRow: {"trade_along_intermediate", "zero_blocks"},
    FirstRowsScale: {"scale_of_output", "ranks_add_up"},
    LastTokensLouder: {"permutation", "split", "duplicates", "ranks_add_up"},
    SingleTokenLouder: {"split"},
    RepeatedTokensShareARow: {"duplicates"},
    ZeroTokenGivesItsWeight: {"zero_tokens"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_breaks_its_laws_and_no_other(fault: type[Planted]) -> None:
    found = failing(run_laws(LocalCall(fault()), SMALL))
    assert set(found) == FAULTS[fault], found


def test_every_law_is_broken_by_a_planted_fault() -> None:
    assert set().union(*FAULTS.values()) == set(LAWS)


def test_laws_name_what_is_stale() -> None:
    found = failing(run_laws(LocalCall(WeightsByAddress()), SMALL, names=["refilled_buffers"]))
    assert "gemm2_weights, all eight" in found["refilled_buffers"]
    found = failing(run_laws(LocalCall(BiasOfTheFirstCall()), SMALL, names=["refilled_buffers"]))
    assert "routing_bias (also in fresh buffers)" in found["refilled_buffers"]


def test_a_declared_law_is_judged_by_noise() -> None:
    found = failing(run_laws(LocalCall(ScaleForTheWholeRow()), SMALL, inexact=frozenset({"trade_along_intermediate"})))
    assert set(found) == {"zero_blocks"}  # one scale a row costs little more than one a block here
