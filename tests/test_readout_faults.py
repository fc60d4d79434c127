"""Each read-out can fail, and says what it saw: kernels with a planted fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from findings import SMALL, THREE_BLOCKS, failing, read
from torch import Tensor
from torch.nn.functional import gelu

from moeref.diagnose.kernel import Kernel, to_blocks
from moeref.diagnose.readout import READOUTS, run_readouts
from moeref.diagnose.result import LocalCall
from moeref.inputs import FP8, Inputs
from moeref.quant import power_of_two_ceil
from moeref.reference import Permutation
from moeref.spec import Problem, Recipe


def fault(**hooks: Callable[..., Any]) -> Kernel:
    """A right kernel (requant) with some hooks replaced."""
    return type("Planted", (Kernel,), hooks)()


def _masked_with_zero(self: Kernel, inputs: Inputs, biased: Tensor, groups: Tensor) -> Tensor:
    masked = Kernel.mask(self, inputs, biased, groups)
    return torch.where(masked < -1e30, 0.0, masked)


def _by_largest(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor) -> Tensor:
    return biased.view(len(biased), inputs.geometry.n_group, -1).amax(-1)


def _bf16_logits(self: Kernel, inputs: Inputs) -> Tensor:
    return torch.sigmoid(inputs.routing_logits.bfloat16().float())


def _one_expert_on(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    return ids + 1 - inputs.local_expert_offset


def _last_choice_lost(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    return torch.cat([ids[:, :-1] - inputs.local_expert_offset, torch.full_like(ids[:, -1:], -1)], 1)


def _weigh_biased(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return Kernel.weigh(self, inputs, biased, biased, ids)


def _weigh_by_difference(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    recovered = biased - inputs.routing_bias.float()
    return Kernel.weigh(self, inputs, recovered, biased, ids)


def _weigh_without_epsilon(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    chosen = scores.gather(1, ids)
    return chosen / chosen.sum(1, keepdim=True)


def _no_factor(self: Kernel, inputs: Inputs, weights: Tensor) -> Tensor:
    return weights


def _stray_column(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    return torch.cat([result[:, :-1], result[:, 9:10] + 1], 1).bfloat16()


ROUTING: list[tuple[dict[str, Callable[..., Any]], str, str, str]] = [
    ({"mask": _masked_with_zero}, "routing_choice", "as if masked groups scored 0", "groups"),
    ({"group_scores": _by_largest}, "routing_choice", "as if a group's score were its largest member", "groups"),
    ({"scores": _bf16_logits}, "routing_choice", "as if logits were rounded to bfloat16", "routing"),
    ({"to_local": _one_expert_on}, "routing_choice", "as if ids were one too", "offset"),
    ({"to_local": _last_choice_lost}, "routing_choice", "as if the last choice were lost", "topk"),
    ({"weigh": _weigh_biased}, "routing_weights", "as if weights were taken from scores with bias", "weights"),
    ({"weigh": _weigh_without_epsilon}, "routing_weights", "normalised without the 1e-20", "weights"),
    ({"apply_factor": _no_factor}, "routing_weights", "routed_scaling_factor not applied", "weights"),
    ({"finish": _stray_column}, "routing_columns", "columns that no expert writes", "gemm2"),
]


@pytest.mark.parametrize(("hooks", "finding", "words", "suspect"), ROUTING, ids=lambda value: str(value)[:24])
def test_routing_faults_are_named(hooks: dict[str, Callable[..., Any]], finding: str, words: str, suspect: str) -> None:
    found = read(fault(**hooks), SMALL, "routing")
    assert found[finding].passed is False
    assert words in found[finding].detail, found[finding].detail
    assert found[finding].suspects[0] == suspect
    if finding != "routing_choice":
        assert found["routing_choice"].passed, found["routing_choice"].detail


def test_scores_that_cancel_show_only_under_a_large_bias() -> None:
    found = read(fault(weigh=_weigh_by_difference), SMALL, "routing")
    wrong = [one for one in found.values() if one.passed is False]
    assert wrong and all("large_bias" in one.detail and "iid" not in one.detail for one in wrong)


def _activation(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def hook(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
        return change(inputs.hidden_states_scale).T[permutation.permuted_idx_to_token_idx]

    return hook


def _weights(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def hook(self: Kernel, inputs: Inputs) -> Tensor:
        return change(getattr(inputs, name))

    return hook


def _halves_swapped(scale: Tensor) -> Tensor:
    return scale.roll(scale.shape[1] // 2, 1)


def _gate_uses_up(scale: Tensor) -> Tensor:
    half = scale.shape[1] // 2
    return torch.cat([scale[:, :half], scale[:, :half]], 1)


def _last_column_one(scale: Tensor) -> Tensor:
    return torch.cat([scale[..., :-1], torch.ones_like(scale[..., -1:])], -1)


def _transposed(scale: Tensor) -> Tensor:
    """Read as if it were stored [M, N]."""
    return scale.flatten(-2).unflatten(-1, scale.shape[:-3:-1]).mT.contiguous()


SCALES: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("activation", lambda s: s[:1].expand_as(s), "it reads always block 0"),
    ("activation", lambda s: s.roll(1, 0), "it reads the block before, wrapping round"),
    ("activation", lambda s: s.roll(1, 1), "it reads the token before, wrapping round"),
    ("activation", _transposed, "it reads transposed"),
    ("activation", lambda s: s.abs(), "nothing came through"),
    ("activation", lambda s: s * 0 + 1, "as where gate turns negative"),
    ("activation", lambda s: torch.cat([s[:-1], s[-1:] * 0 + 1]), "(only block 1)"),
    ("gemm1", _halves_swapped, "row blocks with their halves swapped"),
    ("gemm1", _gate_uses_up, "gate rows have scales of up rows"),
    ("gemm1", _transposed, "it reads transposed"),
    ("gemm1", lambda s: s.roll(-1, 0), "it reads the expert after, wrapping round"),
    ("gemm1", lambda s: s[:, :, :1].expand_as(s), "it reads always block 0"),
    ("gemm1", lambda s: s.abs(), "the scale's sign is lost"),
    ("gemm2", _transposed, "it reads transposed"),
    ("gemm2", lambda s: s[:, :1].expand_as(s), "it reads always row block 0"),
    ("gemm2", lambda s: s.flip(2), "it reads"),
    ("gemm2", _last_column_one, "no scale was applied at all (only block 1)"),
    ("gemm2", lambda s: 1 / s, "it was divided by the scale"),
    ("gemm2", lambda s: s.abs(), "the scale's sign is lost"),
]


@pytest.mark.parametrize(("family", "change", "words"), SCALES)
def test_scale_maps_say_which_scale_was_read(family: str, change: Callable[[Tensor], Tensor], words: str) -> None:
    if family == "activation":
        kernel = fault(activation_scale=_activation(change))
    else:
        kernel = fault(**{f"{family}_scale": _weights(f"{family}_weights_scale", change)})
    found = failing(list(read(kernel, SMALL, "scales").values()))
    assert set(found) == {f"{family}_scale_map"}
    assert words in found[f"{family}_scale_map"]


def _swiglu(rule: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def hook(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
        return rule(*gemm1_out.chunk(2, dim=-1))

    return hook


silu = torch.nn.functional.silu
ACTIVATIONS: list[tuple[Callable[[Tensor, Tensor], Tensor], str]] = [
    (lambda up, gate: silu(up) * gate, "up and gate are swapped"),
    (lambda up, gate: gelu(gate) * up, "as if gelu(gate) * up"),
    (lambda up, gate: torch.relu(gate) * up, "as if relu(gate) * up"),
    (lambda up, gate: silu(gate.clamp(max=7)) * up.clamp(-7, 7), "both cut at 7"),
    (lambda up, gate: silu(gate.clamp(max=100)) * up, "gate 1024"),
    (lambda up, gate: silu(gate) * up * (1 + 0.02 * torch.sin(9 * gate)), "do not give silu"),
]


@pytest.mark.parametrize(("rule", "words"), ACTIVATIONS)
@pytest.mark.parametrize("recipe", ["exact", "requant", "requant+ue8m0"])
def test_another_activation_is_named(rule: Callable[[Tensor, Tensor], Tensor], words: str, recipe: str) -> None:
    kernel = type("Planted", (Kernel,), {"swiglu": _swiglu(rule)})(Recipe.parse(recipe))
    found = read(kernel, SMALL, "activation")
    assert found["swiglu"].passed is False and words in found["swiglu"].detail
    assert found["swiglu_zero"].passed


def _cut(values: Tensor) -> Tensor:
    nearest = values.clamp(-448, 448).to(FP8)
    over = nearest.float().abs() > values.abs()
    return (nearest.view(torch.uint8) - over.to(torch.uint8)).view(FP8)


def _row_scale(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    scale = Kernel.block_scale(self, inputs, swiglu_out)
    return scale.amax(1, keepdim=True).expand_as(scale).contiguous()


def _tensor_scale(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    return torch.full_like(Kernel.block_scale(self, inputs, swiglu_out), float(swiglu_out.abs().max()) / 448)


def _bare_scale(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    return to_blocks(swiglu_out).abs().amax(-1) / 448


CASTS: list[tuple[dict[str, Callable[..., Any]], str]] = [
    ({"block_scale": _row_scale}, "behaves like e4m3 with one scale a token"),
    ({"block_scale": _tensor_scale}, "behaves like e4m3 with one scale for all tokens"),
    ({"cast": lambda self, inputs, values: _cut(values)}, "behaves like e4m3 cut towards zero"),
    ({"cast": lambda self, inputs, values: values.to(torch.float8_e5m2).float()}, "behaves like e5m2"),
    ({"scale_of": lambda self, amax: torch.where(amax > 0, amax / 480, 1.0)}, "amax/480"),
    (
        {"read_scale": lambda self, inputs, scale, permutation: power_of_two_ceil(scale)},
        "power-of-two scale rounded up after the cast",
    ),
    ({"cast": lambda self, inputs, values: (values / 32).round() * 32}, "like no known one"),
]


@pytest.mark.parametrize(("hooks", "words"), CASTS, ids=lambda value: value[-24:] if isinstance(value, str) else None)
def test_another_cast_is_named(hooks: dict[str, Callable[..., Any]], words: str) -> None:
    found = read(fault(**hooks), SMALL, "requantized")
    assert found["requantize"].passed is False
    assert words in found["requantize"].detail, found["requantize"].detail


def test_zeros_without_a_guard_show() -> None:
    found = failing(list(read(fault(block_scale=_bare_scale), SMALL, "activation", "requantized").values()))
    assert {"swiglu_zero", "requantize_zero"} <= set(found)
    assert "gave NaN" in found["swiglu_zero"]


def _chunks(bits: int, step: int) -> Callable[..., Tensor]:
    """Products with a running sum cut to that many significant bits every `step` of K."""

    def dot(self: Kernel, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        total = x.new_zeros(len(x), len(weight))
        for start in range(0, x.shape[1], step):
            part = x[:, start : start + step] @ weight[:, start : start + step].T
            exponent = torch.frexp(torch.maximum(total.abs(), part.abs()))[1]
            unit = torch.ldexp(torch.ones_like(total), exponent - bits)
            total = torch.trunc((total + part) / unit) * unit
        return total

    return dot


def _combine_bf16(self: Kernel, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
    result = gemm2_out.new_zeros(inputs.seq_len, gemm2_out.shape[1])
    for row, token in enumerate(permutation.permuted_idx_to_token_idx.tolist()):
        result[token] = (result[token] + weights[row] * gemm2_out[row]).bfloat16().float()
    return result


ACCUMULATORS: list[tuple[dict[str, Callable[..., Any]], Problem, set[str]]] = [
    ({"dot1": _chunks(11, 32)}, SMALL, {"gemm1_accumulator", "gemm1_across_blocks"}),
    ({"dot1": _chunks(8, 128)}, SMALL, {"gemm1_across_blocks"}),
    ({"dot1": _chunks(14, 32)}, SMALL, set()),  # two blocks cannot show it
    ({"dot1": _chunks(14, 32)}, THREE_BLOCKS, {"gemm1_across_blocks"}),
    ({"dot2": _chunks(11, 32)}, SMALL, {"gemm2_accumulator", "gemm2_across_blocks"}),
    ({"dot2": _chunks(8, 128)}, SMALL, {"gemm2_across_blocks"}),
    ({"dot2": _chunks(14, 32)}, THREE_BLOCKS, {"gemm2_across_blocks"}),
    ({"combine": _combine_bf16}, SMALL, {"combine_accumulator"}),
]


@pytest.mark.parametrize(("hooks", "problem", "expected"), ACCUMULATORS)
def test_short_accumulators_show(hooks: dict[str, Callable[..., Any]], problem: Problem, expected: set[str]) -> None:
    names = [name for name in READOUTS if name.endswith("accumulator")]
    found = failing(list(read(fault(**hooks), problem, *names).values()))
    assert set(found) == expected, found
    assert all("fraction bits kept" in detail for detail in found.values())


def test_silence_is_never_a_pass() -> None:
    found = run_readouts(LocalCall(fault(finish=lambda self, inputs, result: (result * 0).bfloat16())), SMALL)
    assert {f.name for f in found if f.passed} <= {"swiglu_zero", "requantize_zero", "routing_columns", "routing_ties",
                                                   "routing_weights"}  # fmt: skip
