"""Foreign layouts: each pair gives the same bytes back, and each layout means what its docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import layouts

FP8 = torch.float8_e4m3fn
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


def payload(*shape: int, seed: int) -> torch.Tensor:
    """Every byte, NaN included: layouts move bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(FP8)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    octets = [tensor.contiguous().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*octets)


@given(SIZES, st.integers(0, 99))
def test_every_pair_gives_the_same_bytes_back(sizes: tuple[int, int, int], seed: int) -> None:
    experts, rows, width = sizes[0], 256 * sizes[1], 128 * sizes[2]
    weight = payload(experts, rows, width, seed=seed)
    scale = torch.randn(experts, rows // 128, width // 128)
    token_scale = torch.randn(width // 128, sizes[0])
    assert same(layouts.from_token_major(layouts.to_token_major(token_scale)), token_scale)
    for to_x, from_x in (
        (layouts.to_gate_up, layouts.from_gate_up),
        (layouts.to_k_major_columns, layouts.from_k_major_columns),
    ):
        for back, original in zip(from_x(*to_x(weight, scale)), (weight, scale), strict=True):
            assert same(back, original)
    assert same(layouts.from_block_major_k(layouts.to_block_major_k(weight)), weight)
    for block in layouts.SHUFFLES:
        assert same(layouts.from_shuffled_rows(layouts.to_shuffled_rows(weight, block), block), weight)


def test_token_major_has_a_tokens_scales_side_by_side_also_for_one_block() -> None:
    for blocks in (1, 3):
        scale = torch.randn(blocks, 5)
        turned = layouts.to_token_major(scale)
        assert turned.stride() == (blocks, 1) and turned[4, blocks - 1] == scale[blocks - 1, 4]
        assert turned.data_ptr() != scale.data_ptr()


def test_gate_up_exchanges_the_halves_of_weights_and_scales() -> None:
    weight, scale = payload(2, 512, 128, seed=1), torch.randn(2, 4, 1)
    turned, turned_scale = layouts.to_gate_up(weight, scale)
    assert same(turned[:, :256], weight[:, 256:]) and same(turned[:, 256:], weight[:, :256])
    assert same(turned_scale[:, :2], scale[:, 2:]) and same(turned_scale[:, 2:], scale[:, :2])


def test_k_major_columns_is_a_view_with_contiguous_columns() -> None:
    weight, scale = payload(2, 256, 384, seed=1), torch.randn(2, 2, 3)
    columns, columns_scale = layouts.to_k_major_columns(weight, scale)
    assert columns.shape == (2, 384, 256) and columns.stride(1) == 1 and columns.data_ptr() == weight.data_ptr()
    assert columns_scale[1, 2, 0] == scale[1, 0, 2]


def test_block_major_k_keeps_128_columns_of_every_row_together() -> None:
    weight = payload(2, 128, 384, seed=1)
    assert same(layouts.to_block_major_k(weight)[1, 2], weight[1, :, 256:])


@pytest.mark.parametrize(("tile", "block"), [(64, 16), (128, 32)])
def test_flashinfers_own_helpers_give_the_same(tile: int, block: int) -> None:
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer is not installed")
    fused_moe = pytest.importorskip("flashinfer.fused_moe")
    weight = payload(1, 256, 256, seed=2)
    shuffled = flashinfer.shuffle_matrix_a(weight[0].view(torch.uint8), tile)
    assert same(layouts.to_shuffled_rows(weight, block)[0].view(torch.uint8), shuffled)
    blocked = fused_moe.convert_to_block_layout(weight[0].view(torch.uint8), 128)
    assert same(layouts.to_block_major_k(weight)[0].view(torch.uint8), blocked)
