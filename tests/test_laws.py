"""Laws hold for honest kernels, whatever their recipe and order of sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from findings import SMALL, failing
from torch import Tensor

from moeref.diagnose.kernel import Kernel
from moeref.diagnose.laws import LAWS, run_laws
from moeref.diagnose.laws_bench import ORDER_Z, Bench, difference_fit
from moeref.diagnose.result import Broken, Call, Guarded, LocalCall
from moeref.inputs import Inputs
from moeref.judge.noise import output_noise
from moeref.make import make_inputs
from moeref.reference import Permutation, expert_spans, moe
from moeref.spec import Geometry, Problem, Recipe

TINY = Problem.parse("e16l4h256i256k4g4t2-t8-o4-iid-model_like-s0")
GEOMETRIES = (
    SMALL,
    TINY,
    Problem.parse("small_kimi-t5-o20-iid-model_like-s1"),  # one group, a shard past the last expert
    Problem.parse("e16l16h128i384k2g2t1-t4-o0-iid-published-s2"),  # one rank, I > H
    Problem.parse("e12l5h128i128k3g2t2-t4-o-2-iid-tiny-s3"),  # ranks of unequal size, one block a row
    Problem.parse("e8l1h128i128k1g1t1-t3-o3-iid-model_like-s4-f1.0"),  # one local expert
    Problem.parse("e64l2h256i128k8g8t4-t3-o13-iid-model_like-s5"),  # 32 ranks: only chosen ones are run
)
RECIPES = ("exact", "bf16_gemm1", "requant", "requant+ue8m0", "requant2", "bf16_gemm1+requant+bf16_weights")


def reference(recipe: Recipe) -> LocalCall:
    def run(*ten: Any, n_group: int, topk_group: int, top_k: int) -> Tensor:
        logits, gemm1, gemm2 = ten[0], ten[4], ten[6]
        sizes = (logits.shape[1], len(gemm1), gemm2.shape[1], gemm2.shape[2])
        return moe(Inputs(*ten, Geometry(*sizes, top_k, n_group, topk_group)), recipe).output

    return LocalCall(run)


# Honest kernels


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_keeps_every_law_in_every_recipe(recipe: str) -> None:
    found = run_laws(reference(Recipe.parse(recipe)), SMALL)
    assert not failing(found)
    assert [finding.name for finding in found] == list(LAWS)
    assert {f.name for f in found if f.passed is None} == {"poisoned_output"}  # it returns its own memory


@pytest.mark.parametrize("problem", GEOMETRIES, ids=lambda problem: problem.geometry.code)
def test_laws_hold_at_every_geometry(problem: Problem) -> None:
    call = Guarded(LocalCall(Kernel()))
    found = run_laws(call, problem, deterministic=True)
    assert not failing(found)
    assert sum(finding.passed is None for finding in found) <= 3
    assert call.runs <= 80


class RowsInOtherOrder(Kernel):
    """Sums along K in an order that depends on where the row stands in its tile, as split-K or stream-K kernels do."""

    def dot1(self, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        out = x @ weight.T
        out[1::2] = x[1::2].flip(1) @ weight.flip(1).T
        step = 96  # and other partial sums for every third row
        out[2::3] = sum(x[2::3, k : k + step] @ weight[:, k : k + step].T for k in range(0, x.shape[1], step))
        return out

    dot2 = dot1


class AtomicAdditions(Kernel):
    """Another order of sums in every call: combine and gemm2 by atomic additions."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.generator = torch.Generator().manual_seed(3)

    def dot2(self, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        order = torch.randperm(x.shape[1], generator=self.generator)
        return x[:, order] @ weight[:, order].T

    def combine(self, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        result = gemm2_out.new_zeros(inputs.seq_len, gemm2_out.shape[1])
        spans = expert_spans(permutation.expert_offsets)
        for turn in torch.randperm(len(spans), generator=self.generator).tolist():
            span = spans[turn][1]
            result[permutation.permuted_idx_to_token_idx[span]] += weights[span, None] * gemm2_out[span]
        return result


class OtherPathForFewTokens(Kernel):
    """No re-quantisation for up to eight tokens: both recipes are legal."""

    def requantize(self, inputs: Inputs, swiglu_out: Tensor, permutation: Permutation) -> Tensor:
        return swiglu_out if inputs.seq_len <= 8 else Kernel.requantize(self, inputs, swiglu_out, permutation)


@pytest.mark.parametrize("recipe", ["exact", "requant", "bf16_gemm1+requant+ue8m0", "requant2"])
@pytest.mark.parametrize("kernel", [RowsInOtherOrder, AtomicAdditions])
@pytest.mark.parametrize("problem", [SMALL, TINY], ids=["small", "tiny"])
def test_another_order_of_sums_raises_nothing(kernel: type[Kernel], recipe: str, problem: Problem) -> None:
    found = run_laws(LocalCall(kernel(Recipe.parse(recipe))), problem)
    assert not failing(found)
    judged = [finding.z for finding in found if finding.name in ("permutation", "duplicates", "repeat") and finding.z]
    assert max(judged, default=0.0) < ORDER_Z / 4
    assert judged or recipe != "exact" or problem is TINY  # bits differed, unless roundings hide it


def test_another_recipe_for_short_batches_raises_nothing() -> None:
    found = run_laws(LocalCall(OtherPathForFewTokens()), SMALL)
    assert not failing(found)
    assert next(finding.z for finding in found if finding.name == "split")


def test_a_promise_of_equal_bytes_is_held() -> None:
    found = run_laws(LocalCall(AtomicAdditions(Recipe(requantize=1))), SMALL, deterministic=True, names=["repeat"])
    assert list(failing(found)) == ["repeat"]


# Strictness


def test_the_difference_of_two_sets_of_roundings_has_z_one() -> None:
    """Two casts of the same numbers with scales that have nothing to do with each other."""
    inputs = make_inputs(replace(SMALL, seq_len=64))

    class Shifted(Kernel):
        shift = 1.0  # under a power-of-two scale it moves the numbers against e4m3's grid

        def requantize(self, inputs: Inputs, swiglu_out: Tensor, permutation: Permutation) -> Tensor:
            return Kernel.requantize(self, inputs, swiglu_out * self.shift, permutation) / self.shift

    answers = []
    for shift in (1.0, 1.37):
        kernel = Shifted(Recipe(requantize=1, scale="ue8m0"))
        kernel.shift = shift
        answers.append(LocalCall(kernel)(inputs))
    trace = moe(inputs)
    noise = output_noise(trace, inputs, Recipe(requantize=1, scale="ue8m0"))
    tokens = torch.arange(64)
    active = torch.isin(tokens, trace.permutation.permuted_idx_to_token_idx)
    found = difference_fit(answers[0], answers[1], trace, noise, tokens, active)
    assert found.passed
    assert 0.6 < found.overall.value < 1.1


# How a candidate is called


def test_local_call_refills_the_same_buffers() -> None:
    seen: list[tuple[int, float]] = []

    def run(*ten: Any) -> Tensor:
        seen.append((ten[2].data_ptr(), float(ten[0].sum())))
        return torch.zeros(len(ten[0]), ten[2].shape[1], dtype=torch.bfloat16)

    first, then = make_inputs(TINY), make_inputs(replace(TINY, seed=5))
    before = first.routing_logits.clone()
    call = LocalCall(run)
    call.refill(first, then)
    assert seen[0][0] == seen[1][0] != first.hidden_states.data_ptr()
    assert [total for _, total in seen] == [float(one.routing_logits.sum()) for one in (first, then)]
    assert torch.equal(first.routing_logits, before)
    assert call.poisoned(first, 7.0) is None


def test_local_call_passes_what_the_signature_takes() -> None:
    inputs = make_inputs(TINY)

    def writes(*ten: Any, out: Tensor, top_k: int) -> None:
        assert top_k == 4
        out[0] = 1

    written = LocalCall(writes).poisoned(inputs, 7.0)
    assert written is not None and float(written[0, 0]) == 1 and float(written[1, 0]) == 7
    assert LocalCall(writes)(inputs).shape == (8, 256)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "expected a tensor"),
        (torch.zeros(2, 2), "expected a floating tensor [8, 256], got [2, 2]"),
        (torch.zeros(8, 256, dtype=torch.int32), "int32"),
    ],
)
def test_what_is_no_output_breaks(answer: Any, words: str) -> None:
    with pytest.raises(Broken, match=words.replace("[", r"\[")):
        Guarded(LocalCall(lambda *ten: answer))(make_inputs(TINY))


def test_a_candidate_that_raises_fails_every_law() -> None:
    def run(*ten: Any) -> Tensor:
        raise RuntimeError("no such luck")

    found = run_laws(LocalCall(run), TINY)
    assert all("no such luck" in finding.detail for finding in found if finding.name != "poisoned_output")
    assert len(failing(found)) == len(LAWS) - 1


def test_bench_gives_work_to_a_small_shard() -> None:
    call: Call = LocalCall(Kernel())
    bench = Bench(Guarded(call), Problem.parse("e256l1h128i128k8g8t4-t2-o77-iid-model_like-s0"))
    assert bench.answer.any(1).any()
    assert bench.repeats and bench.recipe == Recipe(requantize=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_laws_hold_on_a_gpu() -> None:
    assert not failing(run_laws(LocalCall(Kernel()), SMALL, device="cuda"))
