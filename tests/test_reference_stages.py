"""The reference's stages after routing, one by one, and the roundings of each recipe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

from moeref.inputs import FP8, Inputs
from moeref.make import make_inputs
from moeref.quant import FP8_MAX
from moeref.reference import (
    Permutation,
    Routing,
    combine,
    expert_spans,
    experts,
    gemm1,
    gemm2,
    moe,
    permute,
    requantize,
    route,
    swiglu,
)
from moeref.spec import EXACT, PRESETS, Geometry, Problem, Recipe


def small(values: str = "model_like", tokens: int = 12, routing: str = "iid") -> Inputs:
    return make_inputs(Problem(PRESETS["small"], tokens, 8, routing, values, 3))


def test_every_stage_equals_the_oracle_s() -> None:
    inputs = small()
    trace = moe(inputs, dtype=torch.float64)
    rows = oracle.moe(inputs).rows
    inner = inputs.geometry.intermediate_size
    pairs = zip(trace.permutation.permuted_idx_to_token_idx, trace.permutation.permuted_idx_to_slot, strict=True)
    assert len(rows) > 4
    for row, (token, slot) in enumerate(pairs):
        expected = rows[int(token), int(trace.routing.topk_ids[token, slot])]
        # float64 sums of 256 and 512 products: 512 * 2**-53 = 6e-14 of magnitudes that are below 50 for these values
        close = {"rtol": 1e-12, "atol": 3e-12}
        assert np.allclose(trace.gemm1_out[row, :inner], expected["up"], **close)
        assert np.allclose(trace.gemm1_out[row, inner:], expected["gate"], **close)
        assert np.allclose(trace.swiglu_out[row], expected["act"], **close)
        assert np.allclose(trace.gemm2_out[row], expected["down"], **close)


def test_gemm1_reads_no_expert_that_is_not_hit() -> None:
    inputs = small(routing="one_expert")
    hit = [expert for expert, _ in expert_spans(moe(inputs).permutation.expert_offsets)]
    assert len(hit) == 1
    others = [e for e in range(8) if e not in hit]
    poisoned = replace(
        inputs,
        gemm1_weights=poison(inputs.gemm1_weights, others),
        gemm2_weights=poison(inputs.gemm2_weights, others),
        gemm1_weights_scale=inputs.gemm1_weights_scale.index_fill(0, torch.tensor(others), torch.nan),
        gemm2_weights_scale=inputs.gemm2_weights_scale.index_fill(0, torch.tensor(others), torch.nan),
    )
    assert torch.equal(moe(poisoned).output, moe(inputs).output)
    read = replace(poisoned, gemm1_weights=poison(inputs.gemm1_weights, hit))
    assert moe(read).gemm1_out.isnan().all()  # the poison does show where it is read


def poison(weights: torch.Tensor, slots: list[int]) -> torch.Tensor:
    octets = weights.view(torch.uint8).clone()
    octets[slots] = 0x7F  # NaN
    return octets.view(FP8)


def test_gemm1_dequantises_slices_of_hit_experts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than 512 rows of one expert's weights are in float32 at a time."""
    inputs = make_inputs(Problem(Geometry(8, 8, 128, 384, 2, 1, 1), 6, 0, "one_expert", "model_like", 0))
    seen = []
    from moeref import quant

    original = quant.dequantize_128x128

    def spy(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(quantized.shape))
        return original(quantized, scale)

    monkeypatch.setattr(quant, "dequantize_128x128", spy)
    trace = moe(inputs)
    hit = len(expert_spans(trace.permutation.expert_offsets))
    assert 0 < hit < 8
    assert sorted(seen) == sorted([(512, 128), (256, 128), (128, 384)] * hit)


def test_swiglu_is_silu_of_the_second_half_times_the_first() -> None:
    gemm1_out = torch.tensor([[2.0, 3.0, 0.0, 1.0]], dtype=torch.float64)  # up 2, 3; gate 0, 1
    assert torch.allclose(swiglu(gemm1_out), torch.tensor([[0.0, 3.0 / (1 + np.exp(-1.0))]], dtype=torch.float64))


def test_combine_weights_rows_and_leaves_idle_tokens_zero() -> None:
    routing = Routing(
        torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.tensor([[0.5, 2.0], [7.0, 7.0], [4.0, 7.0]]), *torch.zeros(2, 3)
    )
    permutation = Permutation(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 2]), torch.tensor([0, 1, 0]))
    rows = torch.tensor([[2.0], [10.0], [100.0]])
    assert combine(rows, routing, permutation).tolist() == [[21.0], [0.0], [400.0]]


def test_combine_adds_experts_in_ascending_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32 in this order and 1 in the other: the order is the definition's."""
    ids = torch.tensor([[2, 1, 0]])
    routing = Routing(ids, torch.ones(1, 3), torch.zeros(1), torch.zeros(1))
    permutation = permute(ids, Geometry(3, 3, 128, 128, 3, 1, 1), 0)
    assert combine(torch.tensor([[1e8], [1.0], [-1e8]]), routing, permutation).tolist() == [[0.0]]
    assert combine(torch.tensor([[1e8], [-1e8], [1.0]]), routing, permutation).tolist() == [[1.0]]


def test_no_token_and_no_work() -> None:
    for problem in ("small-t0-o8-iid-model_like-s0", "small-t5-o8-no_local_work-model_like-s0"):
        inputs = make_inputs(Problem.parse(problem))
        for recipe in (EXACT, Recipe("bf16", 2, "ue8m0", "bf16")):
            trace = moe(inputs, recipe)
            assert trace.output.shape == (inputs.seq_len, 256) and (trace.output == 0).all()
            assert trace.gemm1_out.shape == (0, 512) and trace.gemm2_out.shape == (0, 256)


def test_experts_goes_on_from_a_given_routing() -> None:
    inputs = small()
    trace = moe(inputs)
    assert torch.equal(experts(inputs, trace.routing).output, trace.output)
    doubled = replace(trace.routing, topk_weights=trace.routing.topk_weights * 2)
    assert torch.equal(experts(inputs, doubled).unrounded, trace.unrounded * 2)  # a power of two: exact


# --- recipes: each rounding really happens, and no other


def on_e4m3_grid(blocks: torch.Tensor, power_of_two: bool) -> None:
    """Every block of 128 is e4m3 values times one scale, whose largest is 448 (or in 224 .. 448 for a power of two)."""
    grid = torch.tensor(oracle.DECODED[:127])
    for block in blocks.double().reshape(-1, 128):
        amax = block.abs().max()
        if amax == 0:
            continue
        scale = 2.0 ** torch.ceil(torch.log2(amax / FP8_MAX)) if power_of_two else amax / FP8_MAX
        steps = block.abs() / scale
        nearest = grid[torch.searchsorted((grid[1:] + grid[:-1]) / 2, steps)]
        # the stored value is fp8 * scale, rounded once, by a scale rounded once: 4 * 2**-24 relative
        assert torch.allclose(steps, nearest, rtol=0 if power_of_two else 4 * 2.0**-24, atol=0)


@pytest.mark.parametrize("values", ["model_like", "published", "heterogeneous", "tiny"])
def test_requantize_puts_every_block_on_the_e4m3_grid(values: str) -> None:
    trace = moe(small(values), Recipe(requantize=1))
    assert torch.equal(trace.gemm1_out, moe(small(values)).gemm1_out)
    assert not torch.equal(trace.requantized, trace.swiglu_out)
    on_e4m3_grid(trace.requantized, power_of_two=False)
    # RNE to 3 mantissa bits: half of 2**-3 at a power of two; below 2**-6 * scale half of 2**-9 * scale = amax / 458752
    amax = trace.swiglu_out.reshape(-1, 128).abs().amax(1).repeat_interleave(128).reshape(trace.swiglu_out.shape)
    error = (trace.requantized - trace.swiglu_out).abs()
    assert (error <= trace.swiglu_out.abs() * 2.0**-4 * 1.000001 + amax / 448 * 2.0**-10).all()


def test_ue8m0_scales_are_powers_of_two() -> None:
    exact = moe(small())
    trace = moe(small(), Recipe(requantize=1, scale="ue8m0"))
    assert torch.equal(trace.swiglu_out, exact.swiglu_out)
    # the scale is taken from what went in, since the largest value may be rounded up on the grid
    blocks, before = trace.requantized.double().reshape(-1, 128), trace.swiglu_out.double().reshape(-1, 128)
    scale = 2.0 ** torch.ceil(torch.log2(before.abs().amax(1, keepdim=True) / FP8_MAX))
    steps = blocks / scale
    assert torch.equal(steps, steps.to(FP8).double())  # exact: scales are powers of two
    assert steps.abs().amax(1).min() >= 224 and steps.abs().max() <= 448
    assert not torch.equal(trace.requantized, moe(small(), Recipe(requantize=1)).requantized)


def test_requantize_twice_casts_what_swiglu_reads_too() -> None:
    exact = moe(small())
    trace = moe(small(), Recipe(requantize=2))
    assert torch.equal(trace.gemm1_out, exact.gemm1_out)
    cast = requantize(trace.gemm1_out, Recipe(requantize=1))  # the same cast, on gemm1's output
    on_e4m3_grid(cast, power_of_two=False)
    assert torch.equal(trace.swiglu_out, swiglu(cast))
    on_e4m3_grid(trace.requantized, power_of_two=False)


def test_bf16_gemm1_is_representable_in_bf16() -> None:
    exact, trace = moe(small()), moe(small(), Recipe(gemm1_out="bf16"))
    assert torch.equal(trace.gemm1_out, exact.gemm1_out.bfloat16().float())
    assert not torch.equal(exact.gemm1_out, exact.gemm1_out.bfloat16().float())
    assert torch.equal(trace.requantized, trace.swiglu_out)


def test_bf16_weights_are_representable_in_bf16() -> None:
    exact, trace = moe(small()), moe(small(), Recipe(topk_weights="bf16"))
    assert torch.equal(trace.routing.topk_weights, exact.routing.topk_weights.bfloat16().float())
    assert not torch.equal(trace.routing.topk_weights, exact.routing.topk_weights)
    assert torch.equal(trace.gemm2_out, exact.gemm2_out)


def test_the_exact_recipe_rounds_nothing_before_the_output() -> None:
    trace = moe(small())
    assert torch.equal(trace.requantized, trace.swiglu_out)
    assert trace.unrounded.dtype == torch.float32 and trace.output.dtype == torch.bfloat16
    assert not torch.equal(trace.unrounded, trace.output.float())


def test_composing_the_stages_is_the_layer() -> None:
    inputs, recipe = small(), Recipe("bf16", 1, "ue8m0", "bf16")
    routing = route(inputs.routing_logits, inputs.routing_bias, inputs.geometry, 2.5, recipe)
    permutation = permute(routing.topk_ids, inputs.geometry, inputs.local_expert_offset)
    act = requantize(swiglu(gemm1(inputs, permutation, recipe), recipe), recipe)
    out = combine(gemm2(act, inputs, permutation), routing, permutation)
    assert torch.equal(out.bfloat16(), moe(inputs, recipe).output)
