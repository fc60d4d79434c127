"""Read-outs say nothing about honest kernels; the parts they are made of: crafting, admissible choices, maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from findings import SMALL, THREE_BLOCKS, failing, read
from torch import Tensor

from moeref.diagnose.kernel import Kernel, best
from moeref.diagnose.readout import READOUTS, run_readouts
from moeref.diagnose.readout.craft import Stand, companions, locals_together
from moeref.diagnose.readout.maps import NONE, describe, flat, mistakes
from moeref.diagnose.readout.rules import admissible
from moeref.diagnose.result import Guarded, LocalCall
from moeref.inputs import Inputs
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.spec import PRESETS, Geometry, Problem, Recipe

GEOMETRIES = (
    THREE_BLOCKS,
    Problem.parse("small_kimi-t5-o-2-iid-model_like-s1"),  # one group, shards off the grid
    Problem.parse("small-t1-o28-iid-published-s2-f1.0"),  # a shard past the last expert
    Problem.parse("e16l16h128i384k2g2t1-t4-o0-iid-model_like-s2"),  # one rank, I > H
    Problem.parse("e144l144h128i128k8g1t1-t4-o0-iid-model_like-s3"),  # more local experts than columns
    Problem.parse("e64l2h256i128k8g8t4-t3-o13-iid-model_like-s5"),  # 32 shards: some are read
    Problem.parse("e4l1h128i128k1g1t1-t3-o3-iid-model_like-s4-f0.0"),
)
RECIPES = ("exact", "bf16_gemm1", "requant", "requant+ue8m0", "requant2", "requant2+ue8m0", "requant+bf16_weights")


# Honest kernels


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_raises_nothing_in_any_recipe(recipe: str) -> None:
    def run(*ten: Any, n_group: int, topk_group: int, top_k: int) -> Tensor:
        logits, gemm1, gemm2 = ten[0], ten[4], ten[6]
        sizes = (logits.shape[1], len(gemm1), gemm2.shape[1], gemm2.shape[2])
        geometry = Geometry(*sizes, top_k, n_group, topk_group)
        return moe(Inputs(*ten, geometry), Recipe.parse(recipe)).output

    call = Guarded(LocalCall(run))
    found = run_readouts(call, SMALL)
    assert not failing(found)
    assert all(finding.passed for finding in found)
    assert [finding.name for finding in found] == [name for one in READOUTS.values() for name in one.findings]
    assert call.runs <= 45


@pytest.mark.parametrize("problem", GEOMETRIES, ids=lambda problem: problem.geometry.code)
def test_nothing_is_raised_at_any_geometry(problem: Problem) -> None:
    for recipe in ("exact", "requant+ue8m0"):
        found = run_readouts(LocalCall(Kernel(Recipe.parse(recipe))), problem)
        assert not failing(found)
        assert sum(finding.passed is None for finding in found) <= 4


class CutOff(Kernel):
    """The output and the weights in bfloat16, the output cut off."""

    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        return (result.contiguous().view(torch.int32) & -65536).view(torch.float32).bfloat16()


class Hopper(Kernel):
    """Sums of a 128-block keep 13 fraction bits below the largest product, cut off; blocks are added in float32."""

    def dot1(self, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        total = x.new_zeros(len(x), len(weight))
        for start in range(0, x.shape[1], 128):
            products = x[:, None, start : start + 128] * weight[None, :, start : start + 128]
            exponent = torch.frexp(products.abs().amax(2, keepdim=True))[1]
            unit = torch.ldexp(torch.ones_like(products[..., :1]), exponent - 14)
            total += (torch.trunc(products / unit) * unit).sum(2)
        return total

    dot2 = dot1


class HigherIdFirst(Kernel):
    def choose_groups(self, inputs: Inputs, group_scores: Tensor) -> Tensor:
        return inputs.geometry.n_group - 1 - best(group_scores.flip(1), inputs.geometry.topk_group)

    def choose_experts(self, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
        return inputs.geometry.num_experts - 1 - best(masked.flip(1), inputs.geometry.top_k)


class ScaledTo240(Kernel):
    def scale_of(self, amax: Tensor) -> Tensor:
        return torch.where(amax > 0, amax / 240, 1.0)


class TanhSigmoid(Kernel):
    """The sigmoid of SwiGLU by way of a tanh with 11 bits."""

    def swiglu(self, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
        up, gate = gemm1_out.chunk(2, dim=-1)
        tanh = (torch.tanh(gate / 2) * 2**11).round() / 2**11
        return gate * (0.5 + 0.5 * tanh) * up


@pytest.mark.parametrize("kernel", [CutOff, HigherIdFirst, ScaledTo240, TanhSigmoid])
def test_legal_kernels_raise_nothing(kernel: type[Kernel]) -> None:
    recipe = Recipe(requantize=1, topk_weights="bf16") if kernel is CutOff else Recipe(requantize=1)
    found = read(kernel(recipe))
    assert not failing(list(found.values()))
    ties = "take another id than the lower" if kernel is HigherIdFirst else "ties go to the lower id"
    assert ties in found["routing_ties"].detail
    assert kernel is not ScaledTo240 or "amax/240" in found["requantize"].detail


@pytest.mark.parametrize("problem", [SMALL, THREE_BLOCKS], ids=["two blocks", "three"])
def test_thirteen_bits_within_a_block_are_enough(problem: Problem) -> None:
    found = read(Hopper(), problem, *[name for name in READOUTS if name.endswith("accumulator")])
    assert not failing(list(found.values()))
    for name in ("gemm1_accumulator", "gemm2_accumulator"):
        assert found[name].detail.startswith("13 fraction bits")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("exact", "re-quantisation: none ("),
        ("bf16_gemm1+requant", "re-quantisation: e4m3, amax/448 per 1x128, gemm1_out bfloat16 ("),
        ("requant", "re-quantisation: e4m3, amax/448 per 1x128 ("),
        ("requant+ue8m0", "re-quantisation: e4m3, power-of-two scale per 1x128 ("),
    ],
)
def test_the_legal_cast_is_named(recipe: str, words: str) -> None:
    for problem in (SMALL, THREE_BLOCKS):
        found = read(Kernel(Recipe.parse(recipe)), problem, "requantized")
        assert found["requantize"].passed and words in found["requantize"].detail


# Crafting, and what answers are held against


@pytest.mark.parametrize("geometry", [*PRESETS.values(), Geometry(12, 5, 128, 128, 6, 4, 3)], ids=lambda g: g.code)
def test_companions_lie_in_few_groups(geometry: Geometry) -> None:
    for expert in range(geometry.num_experts):
        ids = companions(geometry, expert)
        assert ids[0] == expert and len(set(ids)) == geometry.top_k
        assert len({e // geometry.group_size for e in ids}) <= geometry.topk_group
    chosen = locals_together(geometry, range(geometry.num_local_experts))
    assert len(set(chosen)) == geometry.top_k and max(chosen) < geometry.num_experts


def test_blank_inputs_are_ten_good_ones() -> None:
    stand = Stand(Guarded(LocalCall(Kernel())), SMALL, torch.device("cpu"))
    inputs = stand.blank(3)
    inputs.check()
    assert not bool(stand.call(inputs).any())


def test_a_candidate_that_raises_fails_every_readout() -> None:
    def run(*ten: Any) -> Tensor:
        raise RuntimeError("no such luck")

    found = run_readouts(LocalCall(run), SMALL)
    assert len(found) == sum(len(one.findings) for one in READOUTS.values())
    assert all(finding.passed is False and "no such luck" in finding.detail for finding in found)


def test_admissible_choices_at_a_tie() -> None:
    g = Geometry(8, 8, 128, 128, 2, 4, 2)
    inputs = make_inputs(Problem(g, 1, 0, "iid", "model_like", 0))
    # groups score 2, 2, 2, 0 (times 1/2): any two of the first three may be kept
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0]])
    inputs = replace(inputs, routing_logits=logits, routing_bias=torch.zeros(8, dtype=torch.bfloat16))
    for ids, allowed in (([0, 1], True), ([1, 4], True), ([2, 5], True), ([0, 6], False), ([0], False)):
        assert admissible(inputs, 0, torch.tensor(ids)) is allowed
    # a better expert of a kept group may not be left out
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0]])
    inputs = replace(inputs, routing_logits=logits)
    assert admissible(inputs, 0, torch.tensor([0, 1])) and admissible(inputs, 0, torch.tensor([0, 4]))
    assert not admissible(inputs, 0, torch.tensor([1, 2]))


def test_every_mistake_is_named_by_the_map_that_made_it() -> None:
    shape, axes = (3, 4, 2), ("expert", "row block", "block")
    true = torch.cartesian_prod(*(torch.arange(size) for size in shape))
    assert describe(true, flat(true, shape), shape, axes) == ""
    for name, apply in mistakes(shape, axes).items():
        seen = flat(apply(true), shape)
        if not torch.equal(seen, flat(true, shape)):
            words = describe(true, seen, shape, axes)
            named = next(other for other in mistakes(shape, axes) if f"it reads {other}" in words)
            assert torch.equal(flat(mistakes(shape, axes)[named](true), shape), seen), name
    lost = torch.where(true[:, 2] == 1, NONE, flat(true, shape))
    assert "(only block 1)" in describe(true, lost, shape, axes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_is_raised_on_a_gpu() -> None:
    assert not failing(run_readouts(LocalCall(Kernel()), SMALL, device="cuda"))
