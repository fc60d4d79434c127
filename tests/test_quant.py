"""e4m3 block casts: nearest, saturating, scale per block; and spacings."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeref.quant import (
    FP8_MAX,
    dequantize_1x128,
    dequantize_128x128,
    power_of_two_ceil,
    quantize_1x128,
    quantize_128x128,
    spacing_bf16,
    spacing_e4m3,
    weight_slices,
)

FORMATS = ["fp32", "ue8m0"]


def random(*shape: int, seed: int = 0, spread: float = 6.0) -> torch.Tensor:
    """Normal draws whose blocks of 128 columns differ by powers of e."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    size = torch.exp(spread * (torch.rand(*shape[:-1], shape[-1] // 128, generator=generator) - 0.5))
    return (x.reshape(*size.shape, 128) * size[..., None]).reshape(shape)


def nearest(value: float, scale: float) -> float:
    """The e4m3 value nearest to value / scale, ties to the even byte."""
    steps = min(abs(value) / scale, 448.0)
    byte = min(range(127), key=lambda b: (abs(oracle.DECODED[b] - steps), b % 2))
    return math.copysign(oracle.DECODED[byte], value)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_quantize_1x128_is_a_scale_per_block_and_the_nearest_value(scale_format: str) -> None:
    x = random(3, 256)
    quantized, scale = quantize_1x128(x, scale_format)
    assert quantized.shape == (3, 256) and scale.shape == (3, 2) and scale.dtype == torch.float32
    for row in range(3):
        for block in range(2):
            part = x[row, block * 128 : block * 128 + 128]
            expected = np.float32(part.abs().max().item()) / np.float32(448)
            if scale_format == "ue8m0":
                expected = 2.0 ** math.ceil(math.log2(expected))
            assert float(scale[row, block]) == expected
            # the quotient in float32, as the cast sees it: rounding it can move a value across a midpoint
            steps = (part / scale[row, block]).tolist()
            got = oracle.fp8(quantized[row, block * 128 : block * 128 + 128])
            assert got.tolist() == [nearest(value, 1.0) for value in steps]


@pytest.mark.parametrize("scale_format", FORMATS)
def test_quantize_128x128_is_a_scale_per_tile(scale_format: str) -> None:
    x = random(256, 384)
    quantized, scale = quantize_128x128(x, scale_format)
    assert quantized.shape == (256, 384) and scale.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            tile = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
            flat, flat_scale = quantize_1x128(x[tile].reshape(1, -1)[:, :128] * 0 + x[tile].abs().max(), scale_format)
            assert scale[row, column] == flat_scale[0, 0]
            assert oracle.fp8(flat).max() <= 448
            expected = (x[tile] / scale[row, column]).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(quantized[tile].float(), expected.float())


@pytest.mark.parametrize("scale_format", FORMATS)
@given(exponent=st.integers(-60, 60), seed=st.integers(0, 1000))
def test_what_comes_back_is_within_half_a_step(scale_format: str, exponent: int, seed: int) -> None:
    x = random(2, 128, seed=seed) * 2.0**exponent
    quantized, scale = quantize_1x128(x, scale_format)
    back = dequantize_1x128(quantized, scale)
    # half of e4m3's spacing there, and three roundings of float32: the scale, x / scale, fp8 * scale
    allowed = spacing_e4m3(x / scale) * scale / 2 + x.abs() * 4 * 2.0**-24
    assert ((back - x).abs() <= allowed).all()
    top = oracle.fp8(quantized).max(), -oracle.fp8(quantized).min()
    assert max(top) == FP8_MAX or (scale_format == "ue8m0" and 224 <= max(top) <= 448)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_a_zero_block_stays_zero_with_scale_one(scale_format: str) -> None:
    x = random(2, 256)
    x[1, :128] = 0
    quantized, scale = quantize_1x128(x, scale_format)
    assert scale[1, 0] == 1 and (quantized[1, :128].float() == 0).all()
    assert (scale[0] != 1).all() and torch.isfinite(dequantize_1x128(quantized, scale)).all()


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-37, 1e37, 3e38])
def test_the_ends_of_float32_stay_finite(scale_format: str, size: float) -> None:
    quantized, scale = quantize_1x128(torch.full((1, 128), size), scale_format)
    assert torch.isfinite(quantized.float()).all() and torch.isfinite(scale).all() and (scale > 0).all()
    back = dequantize_1x128(quantized, scale)
    # where the scale itself is a normal number the value comes back; below it, no further than to zero
    if size > 1e-35:
        assert torch.allclose(back, torch.full((1, 128), size), rtol=2.0**-4)
    assert (back <= size * 1.1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    x = random(256, 128)
    x[7, 3] = bad
    for quantize in (quantize_1x128, quantize_128x128):
        with pytest.raises(ValueError, match="expected finite values, got NaN or inf: look at the stage before"):
            quantize(x)


def test_leading_axes_and_no_rows() -> None:
    x = random(2, 3, 256)
    quantized, scale = quantize_1x128(x)
    assert quantized.shape == (2, 3, 256) and scale.shape == (2, 3, 2)
    flat, _ = quantize_1x128(x.reshape(6, 256))
    assert torch.equal(flat.float().reshape(2, 3, 256), quantized.float())
    quantized, scale = quantize_1x128(torch.zeros(0, 256))
    assert quantized.shape == (0, 256) and dequantize_1x128(quantized, scale).shape == (0, 256)


def test_dequantise_multiplies_each_element_by_its_block_s_scale() -> None:
    payload = torch.arange(128 * 256, dtype=torch.int64).remainder(127).to(torch.uint8).view(128, 256)
    payload = payload.repeat(2, 1).view(torch.float8_e4m3fn)  # [256, 256], no NaN
    values = oracle.fp8(payload)
    scale = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    expected = np.block(
        [[values[:128, :128], values[:128, 128:] * -2], [values[128:, :128] * 0.5, values[128:, 128:] * 3]]
    )
    assert dequantize_128x128(payload, scale).double().numpy().tolist() == expected.tolist()
    rows = torch.tensor([[1.0, -2.0]] * 256, dtype=torch.float64)
    expected = np.concatenate([values[:, :128], values[:, 128:] * -2], axis=1)
    assert dequantize_1x128(payload, rows).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("rows", [128, 256, 512])
def test_weight_slices_cover_the_weight_in_order(rows: int) -> None:
    quantized, scale = quantize_128x128(random(640, 128))
    whole = dequantize_128x128(quantized, scale)
    parts = list(weight_slices(quantized, scale, torch.float32, rows))
    assert [part.start for part, _ in parts] == list(range(0, 640, rows))
    assert max(len(values) for _, values in parts) <= rows
    assert torch.equal(torch.cat([values for _, values in parts]), whole)
    assert next(weight_slices(quantized, scale, torch.float64))[1].dtype == torch.float64


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_power_of_two_ceil_is_the_smallest_at_or_above(scale: float) -> None:
    found = float(power_of_two_ceil(torch.tensor([scale], dtype=torch.float64)))
    mantissa, _ = math.frexp(found)
    assert mantissa == 0.5 and found / 2 < scale <= found


def test_power_of_two_ceil_of_powers_and_zero() -> None:
    powers = 2.0 ** torch.arange(-126, 127, dtype=torch.float32)
    assert torch.equal(power_of_two_ceil(powers), powers)
    assert torch.equal(power_of_two_ceil(torch.zeros(2)), torch.zeros(2))


def test_spacing_e4m3_is_the_distance_to_the_next_value() -> None:
    grid = oracle.DECODED[:127]
    inside = torch.tensor((grid[:-1] + grid[1:]) / 2)
    assert spacing_e4m3(inside).tolist() == np.diff(grid).tolist()
    assert spacing_e4m3(-inside).tolist() == np.diff(grid).tolist()
    assert spacing_e4m3(torch.tensor(grid[:-1])).tolist() == np.diff(grid).tolist()  # at a value: upwards


@given(st.integers(0, 0x7F7F - 1))
def test_spacing_bf16_is_the_distance_to_the_next_value(bits: int) -> None:
    """Of every finite bfloat16, zero and subnormals included; the last one has no next."""
    low, high = (torch.tensor([b << 16], dtype=torch.int32).view(torch.float32) for b in (bits, bits + 1))
    assert float(spacing_bf16(low)) == float(high.double() - low.double()) == float(spacing_bf16(-low))
