"""Wrong inputs, one by one and together: one InputError that names every wrong field, what was expected, what came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeref.inputs import FIELDS, FP8, TENSOR_FIELDS, InputError, Inputs, expected_layout, find_problems
from moeref.make import make_inputs
from moeref.spec import PRESETS, Problem

GEOMETRY = PRESETS["small"]
GOOD = make_inputs(Problem(GEOMETRY, 5, 8, "iid", "model_like", 0))
SCALES = [name for name in TENSOR_FIELDS if name.endswith("_scale")]


def problems_of(**changed: Any) -> list[str]:
    """What the check says when these fields are replaced."""
    try:
        replace(GOOD, **changed).check()
    except InputError as error:
        text = str(error)
        assert text.startswith(f"{len(error.problems)} wrong input") and all(line in text for line in error.problems)
        return error.problems
    return []


def named(problems: list[str]) -> set[str]:
    """The fields that the lines begin with."""
    return {line.split(":")[0] for line in problems}


def test_good_inputs_are_good() -> None:
    GOOD.check()
    assert find_problems(GEOMETRY, *GOOD.args()) == []


def test_no_token_is_fine() -> None:
    none = make_inputs(Problem(GEOMETRY, 0, 8, "iid", "model_like", 0))
    none.check()
    assert none.seq_len == 0 and none.hidden_states_scale.shape == (2, 0)


@pytest.mark.parametrize("name", TENSOR_FIELDS)
def test_a_wrong_shape_is_named(name: str) -> None:
    good = getattr(GOOD, name)
    larger = torch.zeros([size + 1 for size in good.shape], dtype=torch.uint8).to(good.dtype)
    (line,) = problems_of(**{name: larger})
    assert line == f"{name}: expected shape {list(good.shape)}, got {list(larger.shape)}"
    (line,) = problems_of(**{name: good[None]})
    assert f"expected shape {list(good.shape)}, got {[1, *good.shape]}" in line


def test_a_transposed_matrix_is_recognised() -> None:
    (line,) = problems_of(hidden_states_scale=GOOD.hidden_states_scale.T.contiguous())
    assert line == "hidden_states_scale: expected shape [2, 5], got [5, 2] (transposed?)"


@pytest.mark.parametrize("name", TENSOR_FIELDS)
def test_a_wrong_dtype_is_named(name: str) -> None:
    good = getattr(GOOD, name)
    for wrong in (torch.float16, torch.float8_e5m2):
        (line,) = problems_of(**{name: good.float().to(wrong)})
        expected = str(good.dtype).removeprefix("torch.")
        assert line == f"{name}: expected dtype {expected}, got {str(wrong).removeprefix('torch.')}"


@pytest.mark.parametrize("name", TENSOR_FIELDS)
def test_another_device_is_named(name: str) -> None:
    """'meta' stands for another device: every machine has it."""
    (line,) = problems_of(**{name: getattr(GOOD, name).to("meta")})
    assert line == f"{name}: expected device cpu as the other inputs, got meta"


@pytest.mark.parametrize("name", TENSOR_FIELDS)
def test_a_layout_that_is_not_contiguous_is_named(name: str) -> None:
    good = getattr(GOOD, name)
    wide = torch.cat([good.view(torch.uint8), good.view(torch.uint8)], dim=-1).view(good.dtype)
    (line,) = problems_of(**{name: wide[..., : good.shape[-1]] if good.dim() > 1 else wide[::2]})
    assert line.startswith(f"{name}: expected a contiguous tensor, got strides [") and "call .contiguous()" in line


@pytest.mark.parametrize("name", TENSOR_FIELDS)
@pytest.mark.parametrize("wrong", [None, 3, "x", [1.0], np.zeros(2)], ids=["None", "int", "str", "list", "numpy"])
def test_no_tensor_at_all_is_named(name: str, wrong: Any) -> None:
    (line,) = problems_of(**{name: wrong})
    assert line.startswith(f"{name}: expected a tensor {list(getattr(GOOD, name).shape)}")
    assert line.endswith(f"got {type(wrong).__name__}")


def test_a_sparse_tensor_is_named() -> None:
    (line,) = problems_of(gemm1_weights_scale=GOOD.gemm1_weights_scale.to_sparse())
    assert line == "gemm1_weights_scale: expected a dense tensor, got layout sparse_coo"


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_not_finite_is_named_with_its_place(name: str, bad: float) -> None:
    scale = getattr(GOOD, name).clone()
    scale.view(-1)[-1] = bad
    where = [size - 1 for size in scale.shape]
    (line,) = problems_of(**{name: scale})
    assert line == f"{name}: expected finite scales, got 1 NaN or inf, the first at {where}"


def test_negative_and_zero_scales_are_fine() -> None:
    assert problems_of(hidden_states_scale=-GOOD.hidden_states_scale) == []
    assert problems_of(gemm2_weights_scale=GOOD.gemm2_weights_scale * 0) == []


@pytest.mark.parametrize("offset", [-8, 32, 10**12])
def test_an_offset_that_leaves_no_expert_is_named(offset: int) -> None:
    (line,) = problems_of(local_expert_offset=offset)
    assert line == f"local_expert_offset: expected -7..31, so that a local expert is one of 0..31, got {offset}"


@pytest.mark.parametrize("offset", [-7, 0, 25, 31])
def test_offsets_up_to_both_ends_are_fine(offset: int) -> None:
    assert problems_of(local_expert_offset=offset) == []


@pytest.mark.parametrize("wrong", [True, 8.0, None, "8", torch.tensor(8)])
def test_an_offset_that_is_no_int_is_named(wrong: Any) -> None:
    (line,) = problems_of(local_expert_offset=wrong)
    assert line == f"local_expert_offset: expected an int, got {type(wrong).__name__}"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_factor_that_is_not_finite_is_named(wrong: float) -> None:
    (line,) = problems_of(routed_scaling_factor=wrong)
    assert line == f"routed_scaling_factor: expected a finite number, got {wrong}"


@pytest.mark.parametrize("wrong", [True, None, "2.5", torch.tensor(2.5)])
def test_a_factor_that_is_no_number_is_named(wrong: Any) -> None:
    (line,) = problems_of(routed_scaling_factor=wrong)
    assert line == f"routed_scaling_factor: expected a float, got {type(wrong).__name__}"


@pytest.mark.parametrize("factor", [1, 0.0, -2.5, np.float64(2.0)])
def test_any_finite_factor_is_fine(factor: float) -> None:
    assert problems_of(routed_scaling_factor=factor) == []


def test_several_wrong_ones_are_named_in_one_message() -> None:
    problems = problems_of(
        routing_bias=GOOD.routing_bias.float(),
        hidden_states_scale=GOOD.hidden_states_scale.T.contiguous(),
        gemm1_weights=None,
        gemm2_weights=GOOD.gemm2_weights.to("meta"),
        local_expert_offset=99,
        routed_scaling_factor=float("nan"),
    )
    assert [line.split(":")[0] for line in problems] == [
        "routing_bias",
        "hidden_states_scale",
        "gemm1_weights",
        "gemm2_weights",
        "local_expert_offset",
        "routed_scaling_factor",
    ]


def test_one_field_wrong_in_several_ways_says_each() -> None:
    wrong = torch.zeros(7, 4, dtype=torch.float64).T
    lines = problems_of(routing_logits=wrong)
    assert named(lines) == {"routing_logits"} and len(lines) == 3  # shape, dtype, layout


def test_the_tensor_whose_seq_len_differs_is_the_one_named() -> None:
    assert named(problems_of(hidden_states=torch.zeros(6, 256).to(FP8))) == {"hidden_states"}
    assert named(problems_of(routing_logits=torch.zeros(6, 32))) == {"routing_logits"}
    assert named(problems_of(hidden_states_scale=torch.zeros(2, 6))) == {"hidden_states_scale"}


def test_everything_on_a_device_without_data_is_refused() -> None:
    with pytest.raises(InputError, match="expected a tensor with data, got device meta"):
        GOOD.to("meta").check()


def test_a_wrong_number_of_arguments_is_said() -> None:
    (line,) = find_problems(GEOMETRY, *GOOD.args()[:9])
    assert line.startswith("arguments: expected the 10 inputs routing_logits, ") and line.endswith("got 9")


JUNK = st.one_of(
    st.none(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.booleans(),
    st.text(max_size=3),
    st.builds(
        lambda shape, dtype, device: torch.zeros(shape, device=device).to(dtype),
        st.lists(st.integers(0, 3), max_size=4),
        st.sampled_from([torch.float32, torch.bfloat16, FP8, torch.int64, torch.bool]),
        st.sampled_from(["cpu", "meta"]),
    ),
)


@settings(max_examples=200)
@given(changes=st.dictionaries(st.sampled_from(TENSOR_FIELDS), JUNK, min_size=1, max_size=3))
def test_whatever_comes_every_wrong_tensor_is_named_and_nothing_crashes(changes: dict[str, Any]) -> None:
    found = named(problems_of(**changes))
    assert set(changes) <= found


@given(ten=st.lists(JUNK, min_size=10, max_size=10))
def test_ten_times_junk_is_a_list_of_problems(ten: list[Any]) -> None:
    assert set(TENSOR_FIELDS) <= named(find_problems(GEOMETRY, *ten))


# --- Inputs itself


def test_args_are_the_ten_in_the_definition_s_order() -> None:
    names = [
        "routing_logits",
        "routing_bias",
        "hidden_states",
        "hidden_states_scale",
        "gemm1_weights",
        "gemm1_weights_scale",
        "gemm2_weights",
        "gemm2_weights_scale",
        "local_expert_offset",
        "routed_scaling_factor",
    ]
    assert list(FIELDS) == names and list(GOOD.tensors()) == names[:8]
    assert all(given is getattr(GOOD, name) for name, given in zip(names, GOOD.args(), strict=True))


def test_the_published_shapes() -> None:
    """As the definition's JSON has them for dsv3."""
    shapes = {name: list(shape) for name, (shape, _) in expected_layout(PRESETS["dsv3"], 7).items()}
    assert shapes == {
        "routing_logits": [7, 256],
        "routing_bias": [256],
        "hidden_states": [7, 7168],
        "hidden_states_scale": [56, 7],
        "gemm1_weights": [32, 4096, 7168],
        "gemm1_weights_scale": [32, 32, 56],
        "gemm2_weights": [32, 7168, 2048],
        "gemm2_weights_scale": [32, 56, 16],
    }


@given(tokens=st.lists(st.integers(0, 4), max_size=8))
def test_take_keeps_the_chosen_tokens_in_order(tokens: list[int]) -> None:
    taken = GOOD.take(torch.tensor(tokens, dtype=torch.int64))
    taken.check()
    assert taken.seq_len == len(tokens)
    for row, token in enumerate(tokens):
        assert torch.equal(taken.routing_logits[row], GOOD.routing_logits[token])
        assert torch.equal(taken.hidden_states[row].float(), GOOD.hidden_states[token].float())
        assert torch.equal(taken.hidden_states_scale[:, row], GOOD.hidden_states_scale[:, token])
    assert taken.gemm1_weights is GOOD.gemm1_weights


def test_map_and_to_change_all_tensors_and_nothing_else() -> None:
    moved = GOOD.to("meta")
    assert str(moved.device) == "meta" and all(t.is_meta for t in moved.tensors().values())
    cloned: Inputs = GOOD.map(torch.clone)
    cloned.check()
    assert cloned.routing_logits is not GOOD.routing_logits
    assert (cloned.local_expert_offset, cloned.geometry) == (GOOD.local_expert_offset, GOOD.geometry)
