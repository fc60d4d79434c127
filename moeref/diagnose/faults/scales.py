"""Faults of the three inputs that hold scales: read from the wrong place, or changed on the way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moeref.diagnose.faults.registry import fault
from moeref.diagnose.kernel import Kernel
from moeref.inputs import Inputs
from moeref.quant import ldexp, power_of_two_ceil
from moeref.reference import Permutation


def power_of_two_up(scale: Tensor) -> Tensor:
    """Magnitude rounded up to a power of two, sign kept."""
    return power_of_two_ceil(scale.abs()) * scale.sign()


def power_of_two_down(scale: Tensor) -> Tensor:
    """Only the exponent is kept."""
    return torch.where(scale == 0, scale, ldexp(torch.ones_like(scale), torch.frexp(scale)[1] - 1) * scale.sign())


def nearest_power_of_two(scale: Tensor) -> Tensor:
    """Magnitude rounded to the nearer power of two, sign kept."""
    down = power_of_two_down(scale)
    return torch.where(scale.abs() >= 1.5 * down.abs(), 2 * down, down)


def _last_is_one(scale: Tensor) -> Tensor:
    """The last entry of each row replaced by 1."""
    return torch.cat([scale[..., :-1], torch.ones_like(scale[..., -1:])], -1)


def _first_for_all(scale: Tensor) -> Tensor:
    return scale[..., :1].expand_as(scale)


def _other_strides(scale: Tensor) -> Tensor:
    """Each expert's [N, M] scales as if they were stored [M, N]."""
    return scale.contiguous().view(len(scale), scale.shape[2], scale.shape[1]).transpose(1, 2)


# hidden_states_scale


@fault(
    stage="activation_scale",
    hook="activation_scale",
    source="vLLM #53338",
    summary="hidden_states_scale read as [T, H/128] though it is [H/128, T]",
)
def activation_scale_transposed(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    scale = inputs.hidden_states_scale
    return scale.reshape(scale.shape[1], scale.shape[0])[permutation.permuted_idx_to_token_idx]


@fault(stage="activation_scale", hook="activation_scale", source="synthetic", summary="block 0's scale for all blocks")
def activation_scale_of_first_block(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return _first_for_all(Kernel.activation_scale(self, inputs, permutation))


@fault(
    stage="activation_scale",
    hook="activation_scale",
    source="synthetic",
    summary="each block has its neighbour's scale",
)
def activation_scale_of_next_block(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return Kernel.activation_scale(self, inputs, permutation).roll(-1, 1)


@fault(stage="activation_scale", hook="activation_scale", source="synthetic", summary="scales of the token before")
def activation_scale_of_previous_token(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return inputs.hidden_states_scale.T.roll(1, 0)[permutation.permuted_idx_to_token_idx]


@fault(
    stage="activation_scale",
    hook="activation_scale",
    source="synthetic",
    summary="scales indexed by the permuted row instead of its token",
)
def activation_scale_of_permuted_row(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    rows = torch.arange(len(permutation.permuted_idx_to_token_idx), device=inputs.device)
    return inputs.hidden_states_scale.T[rows % max(inputs.seq_len, 1)]


@fault(
    stage="activation_scale",
    hook="activation_scale",
    source="synthetic",
    summary="row stride of the scales taken as seq_len rounded up to 4",
)
def activation_scale_stride_padded(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    flat, blocks = inputs.hidden_states_scale.reshape(-1), inputs.hidden_states_scale.shape[0]
    tokens = permutation.permuted_idx_to_token_idx[:, None]
    index = torch.arange(blocks, device=tokens.device) * (-(-inputs.seq_len // 4) * 4) + tokens
    return flat[index.clamp(max=max(len(flat) - 1, 0))]


@fault(
    stage="activation_scale",
    hook="activation_scale",
    source="transformers #47030, sglang #28418, sglang #26766",
    summary="scales rounded up to powers of two after the payload was quantised",
)
def activation_scale_ue8m0(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return power_of_two_up(Kernel.activation_scale(self, inputs, permutation))


@fault(stage="activation_scale", hook="activation_scale", source="synthetic", summary="scales rounded to powers of two")
def activation_scale_nearest_power(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return nearest_power_of_two(Kernel.activation_scale(self, inputs, permutation))


@fault(
    stage="activation_scale",
    hook="activation_scale",
    source="sglang #28662, vLLM #22399, local-inference-lab/vllm #188",
    summary="float32 scales read as bare exponents",
)
def activation_scale_exponent_only(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return power_of_two_down(Kernel.activation_scale(self, inputs, permutation))


@fault(stage="activation_scale", hook="activation_scale", source="synthetic", summary="divided by the scale")
def activation_scale_inverted(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return 1 / Kernel.activation_scale(self, inputs, permutation)


@fault(stage="activation_scale", hook="activation_scale", source="lmdeploy #3009", summary="scale 1 for the last block")
def activation_scale_lacks_last_block(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return _last_is_one(Kernel.activation_scale(self, inputs, permutation))


@fault(stage="activation_scale", hook="activation_scale", source="synthetic", summary="sign of the scales lost")
def activation_scale_unsigned(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return Kernel.activation_scale(self, inputs, permutation).abs()


@fault(stage="activation_scale", hook="activation_scale", source="synthetic", summary="scales stored in float16")
def activation_scale_in_fp16(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return Kernel.activation_scale(self, inputs, permutation).half().float()


@fault(
    stage="activation_scale",
    hook="activation_scale",
    source="synthetic",
    summary="tokens past 64 have scales of 64 before",
)
def activation_scale_wraps_at_64(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    tokens = permutation.permuted_idx_to_token_idx % 64
    return Kernel.activation_scale(self, inputs, replace(permutation, permuted_idx_to_token_idx=tokens))


# gemm1_weights_scale


@fault(
    stage="gemm1_scale",
    hook="gemm1_scale",
    source="flashinfer #4087, flashinfer #4093",
    summary="first row block's scales for all row blocks",
)
def gemm1_scale_of_first_rows(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm1_weights_scale[:, :1].expand_as(inputs.gemm1_weights_scale)


@fault(
    stage="gemm1_scale",
    hook="gemm1_scale",
    source="flashinfer #4087, flashinfer #4093",
    summary="row blocks of the scales permuted, up and gate in turn",
)
def gemm1_scale_rows_interleaved(self: Kernel, inputs: Inputs) -> Tensor:
    up, gate = inputs.gemm1_weights_scale.chunk(2, dim=1)
    return torch.stack([up, gate], 2).view_as(inputs.gemm1_weights_scale)


@fault(stage="gemm1_scale", hook="gemm1_scale", source="sglang #32430", summary="scales of up and gate exchanged")
def gemm1_scale_halves_swapped(self: Kernel, inputs: Inputs) -> Tensor:
    return torch.cat(inputs.gemm1_weights_scale.chunk(2, dim=1)[::-1], 1)


@fault(stage="gemm1_scale", hook="gemm1_scale", source="synthetic", summary="the gate has the scales of up")
def gate_has_the_scale_of_up(self: Kernel, inputs: Inputs) -> Tensor:
    return torch.cat([inputs.gemm1_weights_scale.chunk(2, dim=1)[0]] * 2, 1)


@fault(stage="gemm1_scale", hook="gemm1_scale", source="flashinfer #3882", summary="scale grid read transposed")
def gemm1_scale_transposed(self: Kernel, inputs: Inputs) -> Tensor:
    return _other_strides(inputs.gemm1_weights_scale)


@fault(stage="gemm1_scale", hook="gemm1_scale", source="synthetic", summary="each K block has its neighbour's scale")
def gemm1_scale_of_next_block(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm1_weights_scale.roll(-1, 2)


@fault(stage="gemm1_scale", hook="gemm1_scale", source="synthetic", summary="first K block's scale for all K blocks")
def gemm1_scale_of_first_block(self: Kernel, inputs: Inputs) -> Tensor:
    return _first_for_all(inputs.gemm1_weights_scale)


@fault(stage="gemm1_scale", hook="gemm1_scale", source="synthetic", summary="scale 1 for the last K block")
def gemm1_scale_lacks_last_block(self: Kernel, inputs: Inputs) -> Tensor:
    return _last_is_one(inputs.gemm1_weights_scale)


@fault(stage="gemm1_scale", hook="gemm1_scale", source="synthetic", summary="first expert's scales for all experts")
def gemm1_scale_of_first_expert(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm1_weights_scale[:1].expand_as(inputs.gemm1_weights_scale)


@fault(stage="gemm1_scale", hook="gemm1_scale", source="synthetic", summary="each expert has the next one's scales")
def gemm1_scale_of_next_expert(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm1_weights_scale.roll(-1, 0)


@fault(
    stage="gemm1_scale",
    hook="gemm1_scale",
    source="transformers #47030, sglang #28418, sglang #26766",
    summary="scales rounded up to powers of two after the weights were quantised",
)
def gemm1_scale_ue8m0(self: Kernel, inputs: Inputs) -> Tensor:
    return power_of_two_up(inputs.gemm1_weights_scale)


@fault(stage="gemm1_scale", hook="gemm1_scale", source="synthetic", summary="sign of the scales lost")
def gemm1_scale_unsigned(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm1_weights_scale.abs()


# gemm2_weights_scale


@fault(stage="gemm2_scale", hook="gemm2_scale", source="synthetic", summary="first I block's scale for all I blocks")
def gemm2_scale_of_first_block(self: Kernel, inputs: Inputs) -> Tensor:
    return _first_for_all(inputs.gemm2_weights_scale)


@fault(
    stage="gemm2_scale",
    hook="gemm2_scale",
    source="flashinfer #4087, flashinfer #4093",
    summary="each row block has the next one's scales",
)
def gemm2_scale_of_next_rows(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm2_weights_scale.roll(-1, 1)


@fault(stage="gemm2_scale", hook="gemm2_scale", source="synthetic", summary="first row block's scales for all rows")
def gemm2_scale_of_first_rows(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm2_weights_scale[:, :1].expand_as(inputs.gemm2_weights_scale)


@fault(stage="gemm2_scale", hook="gemm2_scale", source="synthetic", summary="each I block has its neighbour's scale")
def gemm2_scale_of_next_block(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm2_weights_scale.roll(-1, 2)


@fault(
    stage="gemm2_scale",
    hook="gemm2_scale",
    source="vLLM #48173, vLLM #52915, FastDeploy #4385",
    summary="the last I block's scale is read one place too far",
)
def gemm2_scale_last_block_reads_on(self: Kernel, inputs: Inputs) -> Tensor:
    scale = inputs.gemm2_weights_scale
    return torch.cat([scale[..., :-1], scale.reshape(-1).roll(-1).view_as(scale)[..., -1:]], -1)


@fault(stage="gemm2_scale", hook="gemm2_scale", source="synthetic", summary="scale grid read transposed")
def gemm2_scale_transposed(self: Kernel, inputs: Inputs) -> Tensor:
    return _other_strides(inputs.gemm2_weights_scale)


@fault(stage="gemm2_scale", hook="gemm2_scale", source="synthetic", summary="each expert has the next one's scales")
def gemm2_scale_of_next_expert(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm2_weights_scale.roll(-1, 0)


@fault(
    stage="gemm2_scale",
    hook="gemm2_scale",
    source="transformers #47030, sglang #28418, sglang #26766",
    summary="scales rounded up to powers of two after the weights were quantised",
)
def gemm2_scale_ue8m0(self: Kernel, inputs: Inputs) -> Tensor:
    return power_of_two_up(inputs.gemm2_weights_scale)


@fault(stage="gemm2_scale", hook="gemm2_scale", source="synthetic", summary="sign of the scales lost")
def gemm2_scale_unsigned(self: Kernel, inputs: Inputs) -> Tensor:
    return inputs.gemm2_weights_scale.abs()
