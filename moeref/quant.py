"""e4m3 block casts. A scale always means: real value = fp8 value * scale. Clamped before every cast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from moeref.spec import BLOCK

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def ldexp(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """x * 2**exponent, exponent int32, on the tensors' own device.

    Not torch.ldexp itself: it launches its kernel on the current device (seen in 2.11), so that on any other one the
    result is arbitrary or the access illegal (https://github.com/pytorch/pytorch/issues/189567).
    """
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        return torch.ldexp(x, exponent)


def power_of_two_ceil(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two at or above each positive scale (UE8M0 keeps only the exponent); 0 stays 0."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [1/2, 1)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.where(scale > 0, ldexp(torch.ones_like(scale), exponent), scale)


def quantize_1x128(x: torch.Tensor, scale_format: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., N], N a multiple of 128 -> (e4m3 [..., N], scale [..., N/128] in x's dtype).

    scale = amax/448 of each block of 128, for 'ue8m0' rounded up to a power of two; a zero block has scale 1.
    Raises ValueError for a value that is not finite: a cast would hide it.
    """
    return _quantize(x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK), (-1,), scale_format, x.shape)


def quantize_128x128(x: torch.Tensor, scale_format: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, M], multiples of 128 -> (e4m3 [N, M], scale [N/128, M/128]); otherwise as quantize_1x128."""
    rows, columns = x.shape
    blocks = x.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    return _quantize(blocks, (1, 3), scale_format, x.shape)


def _quantize(
    blocks: torch.Tensor, axes: tuple[int, ...], scale_format: str, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    if not bool(torch.isfinite(blocks).all()):
        raise ValueError("quantise: expected finite values, got NaN or inf: look at the stage before")
    scale = blocks.abs().amax(dim=axes, keepdim=True) / FP8_MAX
    if scale_format == "ue8m0":
        scale = power_of_two_ceil(scale)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    quantized = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return quantized.reshape(shape), scale.squeeze(axes)


def dequantize_1x128(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(e4m3 [..., N], scale [..., N/128]) -> [..., N] in scale's dtype."""
    blocks = quantized.to(scale.dtype).reshape(*scale.shape, BLOCK) * scale.unsqueeze(-1)
    return blocks.reshape(quantized.shape)


def dequantize_128x128(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(e4m3 [N, M], scale [N/128, M/128]) -> [N, M] in scale's dtype."""
    rows, columns = scale.shape
    blocks = quantized.to(scale.dtype).view(rows, BLOCK, columns, BLOCK) * scale[:, None, :, None]
    return blocks.view(rows * BLOCK, columns * BLOCK)


def weight_slices(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, rows: int = 4 * BLOCK
) -> Iterator[tuple[slice, torch.Tensor]]:
    """One expert's weight e4m3 [N, M] dequantised `rows` rows at a time: yields (rows of N, [rows, M] in dtype).

    Memory stays at one slice, whatever N is.
    """
    for start in range(0, weight.shape[0], rows):
        part = slice(start, min(start + rows, weight.shape[0]))
        blocks = slice(part.start // BLOCK, part.stop // BLOCK)
        yield part, dequantize_128x128(weight[part], scale[blocks].to(dtype))


def spacing_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Distance between neighbouring e4m3 numbers at |x| <= 448: 2**(max(floor(log2|x|), -6) - 3)."""
    exponent = torch.frexp(x)[1] - 1  # floor(log2|x|); 0 gives -1, raised to -6 below
    exponent = torch.where(x == 0, torch.full_like(exponent, -6), exponent).clamp(min=-6)
    return ldexp(torch.ones_like(x), exponent - 3)


def spacing_bf16(x: torch.Tensor) -> torch.Tensor:
    """Distance between neighbouring bfloat16 numbers at x: 2**(max(floor(log2|x|), -126) - 7)."""
    exponent = torch.frexp(x)[1] - 1  # floor(log2|x|); 0 gives -1, lowered to -126 below
    exponent = torch.where(x == 0, torch.full_like(exponent, -126), exponent).clamp(min=-126)
    return ldexp(torch.ones_like(x), exponent - 7)
