"""Faults of SwiGLU and of the re-quantisation of its output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from moeref.diagnose.faults.registry import fault
from moeref.diagnose.faults.scales import nearest_power_of_two, power_of_two_down, power_of_two_up
from moeref.diagnose.kernel import Kernel, to_blocks
from moeref.inputs import FP8, Inputs
from moeref.quant import FP8_MAX, spacing_e4m3
from moeref.reference import Permutation

# SwiGLU


@fault(
    stage="swiglu",
    hook="swiglu",
    source="sglang #32430, Megatron-LM #6045, TensorRT-LLM #1842",
    summary="halves taken as [gate ; up]: silu of up times gate",
)
def halves_swapped(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    gate, up = gemm1_out.chunk(2, dim=-1)
    return silu(gate) * up


@fault(stage="swiglu", hook="swiglu", source="synthetic", summary="up and gate taken as alternating columns")
def halves_interleaved(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    return silu(gemm1_out[:, 1::2]) * gemm1_out[:, 0::2]


@fault(stage="swiglu", hook="swiglu", source="synthetic", summary="sigmoid(gate) * up: the factor gate is missing")
def sigmoid_for_silu(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    up, gate = gemm1_out.chunk(2, dim=-1)
    return torch.sigmoid(gate) * up


@fault(stage="swiglu", hook="swiglu", source="synthetic", summary="gelu in place of silu")
def gelu_for_silu(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    up, gate = gemm1_out.chunk(2, dim=-1)
    return gelu(gate) * up


@fault(stage="swiglu", hook="swiglu", source="synthetic", summary="relu in place of silu")
def relu_for_silu(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    up, gate = gemm1_out.chunk(2, dim=-1)
    return relu(gate) * up


@fault(stage="swiglu", hook="swiglu", source="synthetic", summary="gate * sigmoid(1.702 gate) in place of silu")
def swish_1702_for_silu(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    up, gate = gemm1_out.chunk(2, dim=-1)
    return gate * torch.sigmoid(1.702 * gate) * up


@fault(
    stage="swiglu",
    hook="swiglu",
    source="tokenspeed #1630, sglang #39939, sglang #39920, VeOmni #868",
    summary="gate and up clamped at 10 though the model has no limit",
)
def swiglu_clamped(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    up, gate = gemm1_out.chunk(2, dim=-1)
    return silu(gate.clamp(max=10)) * up.clamp(-10, 10)


@fault(
    stage="swiglu", hook="swiglu", source="flashinfer #4234", summary="a fast exponential with one percent of ripple"
)
def silu_with_ripple(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    return Kernel.swiglu(self, inputs, gemm1_out) * (1 + 0.01 * torch.sin(7 * gemm1_out.chunk(2, dim=-1)[1]))


@fault(
    stage="swiglu",
    hook="swiglu",
    source="synthetic",
    summary="gate * e^gate / (1 + e^gate): inf / inf for a large gate",
)
def silu_overflows(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    up, gate = gemm1_out.chunk(2, dim=-1)
    return gate * (torch.exp(gate) / (1 + torch.exp(gate))) * up


@fault(stage="swiglu", hook="swiglu", source="synthetic", summary="silu(gate) * (up + 1)")
def up_plus_one(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    up, gate = gemm1_out.chunk(2, dim=-1)
    return silu(gate) * (up + 1)


@fault(stage="swiglu", hook="swiglu", source="synthetic", summary="up meets the gate of the next column")
def gate_of_next_column(self: Kernel, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
    up, gate = gemm1_out.chunk(2, dim=-1)
    return silu(gate.roll(-1, 1)) * up


# The scale of a block


@fault(stage="requantize", hook="block_scale", source="synthetic", summary="one scale for the whole tensor")
def amax_over_the_tensor(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    scale = Kernel.block_scale(self, inputs, swiglu_out)
    return scale.amax().expand_as(scale) if scale.numel() else scale


@fault(stage="requantize", hook="block_scale", source="synthetic", summary="one scale for a token's whole row")
def amax_over_the_row(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    scale = Kernel.block_scale(self, inputs, swiglu_out)
    return scale.amax(1, keepdim=True).expand_as(scale)


@fault(
    stage="requantize",
    hook="block_scale",
    source="synthetic",
    summary="one scale for a block of columns, over all rows",
)
def amax_over_all_rows(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    scale = Kernel.block_scale(self, inputs, swiglu_out)
    return scale.amax(0, keepdim=True).expand_as(scale) if scale.numel() else scale


@fault(stage="requantize", hook="block_scale", source="synthetic", summary="amax without the absolute value")
def amax_of_signed_values(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    return self.scale_of(to_blocks(swiglu_out).amax(-1))


@fault(
    stage="requantize",
    hook="block_scale",
    source="synthetic",
    summary="amax over half of each block, the rest is cut off",
)
def amax_of_half_a_block(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    return self.scale_of(to_blocks(swiglu_out)[:, :, :64].abs().amax(-1))


@fault(stage="requantize", hook="block_scale", source="synthetic", summary="amax raised to 0.01 at least")
def amax_floor_too_high(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    return self.scale_of(to_blocks(swiglu_out).abs().amax(-1).clamp(min=0.01))


@fault(
    stage="requantize",
    hook="block_scale",
    source="flashinfer #2238, flashinfer #4027, flashinfer #2441",
    summary="no guard for a block of zeros: 0 / 0",
)
def no_zero_guard(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    return to_blocks(swiglu_out).abs().amax(-1) / FP8_MAX


@fault(
    stage="requantize", hook="block_scale", source="synthetic", summary="scale is amax / 480: the largest are cut off"
)
def scale_for_480(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    return Kernel.block_scale(self, inputs, swiglu_out) * (FP8_MAX / 480)


@fault(
    stage="requantize",
    hook="block_scale",
    source="synthetic",
    summary="scale rounded down to a power of two: values cut off",
)
def scale_rounded_down(self: Kernel, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
    return power_of_two_down(Kernel.block_scale(self, inputs, swiglu_out))


# The cast


@fault(
    stage="requantize",
    hook="requantize",
    source="pytorch #178817, ao #1912, ml_dtypes #400, ModelOpt #1633",
    summary="scale rounded to the nearest power of two, and the cast makes NaN of what passes 448",
)
def overflow_is_nan(self: Kernel, inputs: Inputs, swiglu_out: Tensor, permutation: Permutation) -> Tensor:
    scale = nearest_power_of_two(Kernel.block_scale(self, inputs, swiglu_out))
    scaled = to_blocks(swiglu_out) / scale.unsqueeze(-1)
    payload = Kernel.cast(self, inputs, scaled).masked_fill(scaled.abs() > 464, float("nan"))
    return (payload * scale.unsqueeze(-1)).view_as(swiglu_out)


@fault(
    stage="requantize",
    hook="cast",
    source="triton #11753, triton #10846, FreeToken #85",
    summary="the cast cuts off instead of rounding to nearest",
)
def cast_truncates(self: Kernel, inputs: Inputs, scaled: Tensor) -> Tensor:
    spacing = spacing_e4m3(scaled)
    return torch.trunc(scaled / spacing) * spacing


@fault(
    stage="requantize",
    hook="cast",
    source="triton #11897",
    summary="a mantissa that rounds up to the next power of two loses its carry",
)
def cast_drops_the_carry(self: Kernel, inputs: Inputs, scaled: Tensor) -> Tensor:
    payload = Kernel.cast(self, inputs, scaled)
    carried = torch.frexp(payload)[1] > torch.frexp(scaled)[1]
    return torch.where(carried, payload / 2, payload)


@fault(stage="requantize", hook="cast", source="synthetic", summary="e5m2 in place of e4m3")
def cast_to_e5m2(self: Kernel, inputs: Inputs, scaled: Tensor) -> Tensor:
    return scaled.to(torch.float8_e5m2).float()


@fault(
    stage="requantize",
    hook="cast",
    source="synthetic",
    summary="only two of e4m3's three mantissa bits are kept, cut off",
)
def cast_keeps_two_bits(self: Kernel, inputs: Inputs, scaled: Tensor) -> Tensor:
    spacing = 2 * spacing_e4m3(scaled)
    return torch.trunc(scaled / spacing) * spacing


@fault(stage="requantize", hook="cast", source="synthetic", summary="a negative value loses its sign")
def cast_loses_the_sign(self: Kernel, inputs: Inputs, scaled: Tensor) -> Tensor:
    return Kernel.cast(self, inputs, scaled).abs()


@fault(stage="requantize", hook="cast", source="synthetic", summary="stored as an 8-bit integer of -127 .. 127")
def cast_to_integers(self: Kernel, inputs: Inputs, scaled: Tensor) -> Tensor:
    step = FP8_MAX / 127
    return torch.round(scaled / step) * step


# The scale as gemm2 reads it


@fault(
    stage="requantize",
    hook="read_scale",
    source="transformers #47030, sglang #28418, sglang #26766",
    summary="scale rounded up to a power of two after the cast",
)
def scale_rounded_after_the_cast(self: Kernel, inputs: Inputs, scale: Tensor, permutation: Permutation) -> Tensor:
    return power_of_two_up(scale)


@fault(
    stage="requantize",
    hook="read_scale",
    source="synthetic",
    summary="each row is read with the scales of the row before",
)
def scale_of_previous_row(self: Kernel, inputs: Inputs, scale: Tensor, permutation: Permutation) -> Tensor:
    return scale.roll(1, 0)


@fault(
    stage="requantize", hook="read_scale", source="synthetic", summary="each block is read with its neighbour's scale"
)
def scale_of_next_block(self: Kernel, inputs: Inputs, scale: Tensor, permutation: Permutation) -> Tensor:
    return scale.roll(-1, 1)


@fault(
    stage="requantize",
    hook="read_scale",
    source="synthetic",
    summary="every block is read with the first block's scale",
)
def scale_of_first_block(self: Kernel, inputs: Inputs, scale: Tensor, permutation: Permutation) -> Tensor:
    return scale[:, :1].expand_as(scale)


@fault(
    stage="requantize", hook="read_scale", source="synthetic", summary="scales written [P, I/128] are read [I/128, P]"
)
def scale_read_transposed(self: Kernel, inputs: Inputs, scale: Tensor, permutation: Permutation) -> Tensor:
    return scale.reshape(scale.shape[1], scale.shape[0]).T


@fault(
    stage="requantize", hook="read_scale", source="synthetic", summary="scales kept in e4m3, as shares of the largest"
)
def scale_in_fp8(self: Kernel, inputs: Inputs, scale: Tensor, permutation: Permutation) -> Tensor:
    largest = scale.amax().clamp(min=1e-30) if scale.numel() else 1.0
    return (scale / largest * FP8_MAX).to(FP8).float() * largest / FP8_MAX
