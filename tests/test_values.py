"""Every value kind has the property its comment promises, stable bytes, and tokens that do not depend on T."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeref.inputs import FP8, TENSOR_FIELDS, Inputs
from moeref.make import digest, make_inputs, zeros
from moeref.reference import expert_spans, moe, permute, route
from moeref.spec import PRESETS, Geometry, Problem, SpecError
from moeref.values import VALUES, draw_hidden, draw_weight_scales, draw_weights

# Digests of the eight tensors of e8l3h256i128k2g2t1-t7-o2-iid-KIND-s5 with all experts, in the inputs' order. A change
# here changes what every name printed so far stands for.
PINNED = {
    "published": "d06be872fa3d0328 5a29710d876aa3ce eaa8d3d1962d35ff 26c6c85593b31011 "
    "200c1ed0845bf7de 7afe331d41279203 59dc359f63dcd0d2 ea5abe3e7a05aec9",
    "model_like": "d06be872fa3d0328 5a29710d876aa3ce f27a0230af034328 b371520b4bedadb8 "
    "c71817ec1c5884f8 4ed47ddf04d494a3 efbd26818d3c1f29 fc6a73ef979de8c9",
    "heterogeneous": "d06be872fa3d0328 5a29710d876aa3ce f27a0230af034328 15d83a92c20fb2bc "
    "c71817ec1c5884f8 01fd39d460faa7d9 efbd26818d3c1f29 e601829bef3f6b22",
    "zero_block": "d06be872fa3d0328 5a29710d876aa3ce f95e05c93e0040fa b371520b4bedadb8 "
    "d7ee7b5c6fdc20da 4ed47ddf04d494a3 1293a974b21fc2ab fc6a73ef979de8c9",
    "tiny": "d06be872fa3d0328 5a29710d876aa3ce f27a0230af034328 22222b757d28e92f "
    "c71817ec1c5884f8 4ed47ddf04d494a3 efbd26818d3c1f29 fc6a73ef979de8c9",
    "huge": "d06be872fa3d0328 5a29710d876aa3ce f27a0230af034328 8e15a9e22a3cebe9 "
    "c71817ec1c5884f8 4ed47ddf04d494a3 efbd26818d3c1f29 fc6a73ef979de8c9",
    "outlier": "d06be872fa3d0328 5a29710d876aa3ce bcf9f0330b1ebc7d 06020a9032ac0850 "
    "c71817ec1c5884f8 4ed47ddf04d494a3 efbd26818d3c1f29 fc6a73ef979de8c9",
}
PINNED_EXPERT = "bc2f18ddd12b07af 41f8a4953318972f 772dc8a76cc5c318 d96655b4454c3dce"


def problem(values: str, tokens: int = 40, offset: int = 8, seed: int = 0, name: str = "small") -> Problem:
    return Problem(PRESETS[name], tokens, offset, "iid", values, seed)


def make(values: str, **sizes: int) -> Inputs:
    return make_inputs(problem(values, **sizes), experts="all")


def test_the_pins_hold_every_kind() -> None:
    assert set(PINNED) == set(VALUES)


@pytest.mark.parametrize("values", VALUES)
def test_bytes_are_the_pinned_ones(values: str) -> None:
    inputs = make_inputs(Problem(Geometry(8, 3, 256, 128, 2, 2, 1), 7, 2, "iid", values, 5), experts="all")
    assert " ".join(digest(inputs.tensors()[name]) for name in TENSOR_FIELDS) == PINNED[values]
    assert (inputs.local_expert_offset, inputs.routed_scaling_factor) == (2, 2.5)


def test_one_expert_of_the_published_geometry_has_the_pinned_bytes() -> None:
    full = Problem(PRESETS["dsv3"], 1, 32, "deepseek_like", "published", 0)
    gemm1, gemm2 = draw_weights(full, 37)
    assert gemm1.shape == (4096, 7168) and gemm2.shape == (7168, 2048)
    scales = draw_weight_scales(full, 37)
    arrays = [gemm1, gemm2, *scales]
    assert " ".join(digest(torch.from_numpy(np.array(array))) for array in arrays) == PINNED_EXPERT


@pytest.mark.parametrize("values", VALUES)
def test_made_inputs_are_valid_and_hold_no_nan(values: str) -> None:
    inputs = make(values)
    inputs.check()
    for tensor in inputs.tensors().values():
        assert torch.isfinite(tensor.float()).all()


@pytest.mark.parametrize("values", VALUES)
@settings(max_examples=15)
@given(few=st.integers(0, 9), more=st.integers(1, 20), seed=st.integers(0, 2**63 - 1))
def test_the_first_tokens_do_not_depend_on_seq_len(values: str, few: int, more: int, seed: int) -> None:
    short = problem(values, tokens=few, seed=seed)
    payload, scale = draw_hidden(short)
    longer, longer_scale = draw_hidden(replace(short, seq_len=few + more))
    assert (longer[:few] == payload).all() and (longer_scale[:few] == scale).all()


@pytest.mark.parametrize("values", VALUES)
def test_shards_of_one_seed_agree_on_shared_experts(values: str) -> None:
    one, other, past = make(values, offset=4), make(values, offset=7), make(values, offset=-3)
    for name in ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"):
        a, b, c = (octets(inputs.tensors()[name]) for inputs in (one, other, past))
        assert torch.equal(a[3:], b[:5])  # experts 7 .. 11
        assert torch.equal(a[0], c[7])  # expert 4
        if values != "zero_block":  # there, two may be zero
            assert not torch.equal(a[0], a[1])
    assert torch.equal(octets(one.hidden_states), octets(other.hidden_states))


@pytest.mark.parametrize("values", VALUES)
def test_every_field_depends_on_the_seed(values: str) -> None:
    one, other = make(values), make(values, seed=1)
    assert all(not torch.equal(octets(one.tensors()[n]), octets(other.tensors()[n])) for n in TENSOR_FIELDS)


def octets(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, of the same leading shape."""
    return tensor.contiguous().view(torch.uint8)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"unknown value kind 'nope': expected one of published, model_like"):
        make("nope")


# --- which experts are made


@pytest.mark.parametrize("name", ["small", "small_kimi"])
def test_hit_makes_the_hit_experts_and_no_other(name: str) -> None:
    few = problem("model_like", tokens=2, name=name, offset=6)
    hit, everything = make_inputs(few), make_inputs(few, experts="all")
    routing = route(hit.routing_logits, hit.routing_bias, few.geometry, 2.5)
    permutation = permute(routing.topk_ids, few.geometry, few.offset)
    slots = {slot for slot, _ in expert_spans(permutation.expert_offsets)}
    assert 0 < len(slots) < few.geometry.num_local_experts
    for weights in ("gemm1_weights", "gemm2_weights"):
        for slot in range(few.geometry.num_local_experts):
            made = octets(hit.tensors()[weights][slot])
            wanted = octets(everything.tensors()[weights][slot])
            assert wanted.any() and torch.equal(made, wanted if slot in slots else torch.zeros_like(wanted))
    assert torch.equal(moe(hit).output, moe(everything).output)
    assert torch.equal(hit.gemm1_weights_scale, everything.gemm1_weights_scale)


@pytest.mark.parametrize(("offset", "real"), [(-3, range(3, 8)), (28, range(0, 4))])
def test_slots_outside_the_model_stay_zero(offset: int, real: range) -> None:
    inputs = make("model_like", offset=offset)
    for slot in range(8):
        assert bool(octets(inputs.gemm1_weights[slot]).any()) == (slot in real)
        assert bool(octets(inputs.gemm2_weights[slot]).any()) == (slot in real)


def test_every_tensor_is_allocated_once_by_name() -> None:
    seen = []

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        seen.append(name)
        return zeros(name, shape, dtype)

    make_inputs(problem("published", tokens=3), allocate=allocate)
    assert seen == list(TENSOR_FIELDS)
    with pytest.raises(ValueError, match="expected 'hit' or 'all'"):
        make_inputs(problem("published", tokens=3), experts="some")


def test_digest_is_of_bytes_in_row_major_order() -> None:
    matrix = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert digest(matrix.T) == digest(matrix.T.contiguous()) != digest(matrix)
    assert digest(torch.zeros(3)) != digest(-torch.zeros(3))  # bytes, not values


# --- what each kind promises


def scales(inputs: Inputs) -> list[torch.Tensor]:
    return [inputs.hidden_states_scale, inputs.gemm1_weights_scale, inputs.gemm2_weights_scale]


def gates(inputs: Inputs) -> torch.Tensor:
    return moe(inputs).gemm1_out.chunk(2, 1)[1]


def active(inputs: Inputs) -> torch.Tensor:
    """Rows of the unrounded output that have local work."""
    trace = moe(inputs)
    return trace.unrounded[trace.permutation.permuted_idx_to_token_idx.unique()]


def test_published_has_payloads_up_to_2_and_scales_half_negative() -> None:
    inputs = make("published", tokens=200)
    for tensor in (inputs.hidden_states, inputs.gemm1_weights, inputs.gemm2_weights):
        values = tensor.float()
        assert values.abs().max() == 2
        # a normal clamped to +-2 has variance 0.92; e4m3 and 256 quantiles move it by less than 0.02, and the
        # spread of at least 50,000 draws by less than 0.02
        assert abs(float(values.var()) - 0.92) < 0.04
    for scale in scales(inputs):
        # at least 64 scales, 5 standard errors
        count = scale.numel()
        assert abs(float((scale < 0).float().mean()) - 0.5) < 2.5 / count**0.5
        assert abs(float(scale.var()) - 1) < 5 * (2 / count) ** 0.5


def test_published_gates_are_so_large_that_silu_is_a_ramp() -> None:
    assert gates(make("published")).abs().median() > 5


@pytest.mark.parametrize("geometry", ["small", "e16l8h384i384k4g4t2", "e8l8h1024i128k2g1t1"])
def test_model_like_gates_lie_where_silu_is_curved(geometry: str) -> None:
    inputs = make_inputs(Problem(Geometry.parse(geometry), 60, 8 * (geometry[:2] != "e8"), "iid", "model_like", 0))
    assert 1 < gates(inputs).std() < 3
    assert 0.05 < active(inputs).std() < 20
    assert all((scale > 0).all() for scale in scales(inputs))


def test_model_like_payloads_fill_the_format_as_amax_448_does() -> None:
    inputs = make("model_like")
    for tensor in (inputs.hidden_states, inputs.gemm1_weights):
        blocks = tensor.float().reshape(-1, 128).abs().amax(1)
        assert blocks.max() <= 448 and blocks.median() >= 224  # the top binade is used


def test_heterogeneous_scales_differ_by_64_and_more() -> None:
    for scale in scales(make("heterogeneous")):
        assert scale.max() / scale.min() >= 64
    scale = make("heterogeneous").gemm1_weights_scale[0]  # neighbours within one expert too
    assert max(scale.max() / scale.min(), scale[:, 0].max() / scale[:, 0].min()) >= 8
    assert make("model_like").gemm1_weights_scale.max() / make("model_like").gemm1_weights_scale.min() < 2.01


def test_zero_block_has_zero_tokens_blocks_and_an_expert() -> None:
    inputs = make("zero_block")
    tokens = inputs.hidden_states.float()
    idle = (tokens == 0).all(1)
    assert idle[3::5].all() and not idle.all()
    blocks = (tokens.reshape(40, 2, 128) == 0).all(2)
    assert (blocks.any(1) & ~blocks.all(1)).any()  # a zero block in a token that is not zero
    first, second = inputs.gemm1_weights.float(), inputs.gemm2_weights.float()
    assert [slot for slot in range(8) if (first[slot] == 0).all()] == [3, 7]  # experts 11 and 15
    assert not (second == 0).flatten(1).all(1).any()
    for weights in (first[0:3], second):
        tiles = (weights.reshape(len(weights), -1, 128, weights.shape[2] // 128, 128) == 0).all(4).all(2)
        assert tiles.any() and not tiles.all()
    assert (inputs.hidden_states_scale > 0).all()  # only the payload is zero
    trace = moe(inputs)
    assert torch.isfinite(trace.output.float()).all() and (trace.output[3::5] == 0).all()


def test_tiny_outputs_are_below_any_absolute_tolerance() -> None:
    found = active(make("tiny"))
    assert 0 < found.abs().max() < 1e-5


def test_huge_outputs_exceed_float16() -> None:
    found = active(make("huge"))
    assert found.abs().max() > 65504 and found.abs().median() > 65504
    assert torch.isfinite(moe(make("huge")).output.float()).all()


def test_outlier_values_stand_far_above_their_block() -> None:
    hidden = make("outlier").hidden_states.float().abs().flatten()
    ordered = hidden.sort(descending=True).values
    share = float((hidden == 448).float().mean())
    # two table entries of 256 are 448: 1 in 128; 10,240 draws have a standard error of 9e-4
    assert abs(share - 1 / 128) < 5 * 9e-4
    assert ordered[hidden.eq(448).sum()] < 30


@pytest.mark.parametrize("values", VALUES)
def test_no_payload_is_nan_or_beyond_448(values: str) -> None:
    inputs = make(values)
    for tensor in (inputs.hidden_states, inputs.gemm1_weights, inputs.gemm2_weights):
        assert tensor.dtype == FP8
        assert not np.isnan(oracle.fp8(tensor)).any()
