"""Grouped FP8 GEMMs in CUDA C++ (wgmma, TMA, warp specialisation) for many rows an expert: arithmetic is the cost.

gemm1: gathered rows times gemm1_weights, SwiGLU, 1x128 re-quantisation. gemm2: those rows times gemm2_weights, not yet
weighted. Axes: T, L, H, I as everywhere; P permuted rows, sorted by expert. H and I are multiples of 128. The grid
never depends on the counts, which the kernels read from expert_offsets on the device. Needs compute capability 9.0.

`counters` [2] int32 must be zero before a launch and is zero after it. `cluster` CTAs share each load of weights.
"""

from __future__ import annotations

import ctypes
import functools
import itertools

import torch

from moe_fast.kernels.cuda_build import TensorMap, load, tensor_map

THREADS = 384
DYNAMIC_SHARED = 212992
MAX_EXPERTS = 512


class Params(ctypes.Structure):
    """Params of grouped_gemm.cu."""

    _fields_ = (
        ("tokens", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("row_index", ctypes.c_void_p),
        ("weight_scale", ctypes.c_void_p),
        ("expert_offsets", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_scale", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("token_scale_stride", ctypes.c_int64),
        ("out_scale_stride", ctypes.c_int64),
        ("depth", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("experts", ctypes.c_int),
        ("wide", ctypes.c_int),
    )


def defines(cluster: int) -> tuple[tuple[str, int], ...]:
    """What a variant of grouped_gemm.cu is compiled with."""
    return (("CLUSTER", cluster), ("DYNAMIC_SHARED", DYNAMIC_SHARED))


@functools.cache
def sm_count(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def weights_map(weights: torch.Tensor) -> TensorMap:
    """Map over the rows of weights [L, rows, K], in boxes of 128 rows x 128 columns.

    A box is ordered so that its row 32a + 8j + 2q + b is row 32a + 8q + 2j + b of the weights: a thread's 8 columns of
    32 are neighbours.
    """
    depth = weights.shape[2]
    rows = weights.shape[0] * weights.shape[1]
    sizes = (depth, 2, 4, 4, rows // 32)
    strides = (depth, 8 * depth, 2 * depth, 32 * depth)
    return tensor_map(weights.data_ptr(), sizes, strides, (128, 2, 4, 4, 4))[0]


def _launch(name: str, made: TensorMap, params: Params, device: torch.device, cluster: int, pdl: bool) -> None:
    index = device.index or 0
    kernel = load("grouped_gemm.cu", defines(cluster), name, THREADS, DYNAMIC_SHARED, index)
    blocks = sm_count(index) // cluster * cluster
    kernel.launch(blocks, (made, params), torch.cuda.current_stream(device).cuda_stream, pdl)


def gemm1(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    expert_offsets: torch.Tensor,
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    counters: torch.Tensor,
    cluster: int = 1,
    pdl: bool = False,
) -> None:
    """Fill requantized [P, I] e4m3 and requantized_scale [I/128, >= P] float32, rows below expert_offsets[-1].

    hidden_states [T, H] e4m3, hidden_states_scale [H/128, T] float32 (any first stride), gemm1_weights [L, 2I, H] e4m3,
    rows [up ; gate], gemm1_weights_scale [L, 2I/128, H/128] float32.
    """
    local, double, hidden = gemm1_weights.shape
    params = Params(
        hidden_states.data_ptr(),
        hidden_states_scale.data_ptr(),
        permuted_idx_to_token_idx.data_ptr(),
        gemm1_weights_scale.data_ptr(),
        expert_offsets.data_ptr(),
        requantized.data_ptr(),
        requantized_scale.data_ptr(),
        counters.data_ptr(),
        hidden_states_scale.stride(0),
        requantized_scale.stride(0),
        hidden,
        double // 2,
        local,
        0,
    )
    _launch("gemm1_kernel", weights_map(gemm1_weights), params, hidden_states.device, cluster, pdl)


def gemm1_torch(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    expert_offsets: torch.Tensor,
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    counters: torch.Tensor,
    cluster: int = 1,
    pdl: bool = False,
) -> None:
    """Twin of `gemm1`."""
    bounds = expert_offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        token = permuted_idx_to_token_idx[start:end].long()
        out = _block_scaled(
            hidden_states[token], hidden_states_scale[:, token], gemm1_weights[expert], gemm1_weights_scale[expert]
        )
        up, gate = out.chunk(2, dim=-1)
        blocks = (torch.nn.functional.silu(gate) * up).unflatten(1, (-1, 128))
        amax = blocks.abs().amax(-1)
        scale = torch.where(amax > 0, (amax / 448.0).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        scaled = (blocks / scale.unsqueeze(-1)).clamp(-448.0, 448.0)
        requantized[start:end] = scaled.to(torch.float8_e4m3fn).flatten(1)
        requantized_scale[:, start:end] = scale.T


def gemm2(
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    gemm2_out: torch.Tensor,
    counters: torch.Tensor,
    cluster: int = 1,
    pdl: bool = False,
) -> None:
    """Fill gemm2_out [P, H], bfloat16 or float32, rows below expert_offsets[-1].

    requantized [P, I] e4m3, requantized_scale [I/128, >= P] float32, gemm2_weights [L, H, I] e4m3,
    gemm2_weights_scale [L, H/128, I/128] float32.
    """
    local, hidden, intermediate = gemm2_weights.shape
    params = Params(
        requantized.data_ptr(),
        requantized_scale.data_ptr(),
        None,
        gemm2_weights_scale.data_ptr(),
        expert_offsets.data_ptr(),
        gemm2_out.data_ptr(),
        None,
        counters.data_ptr(),
        requantized_scale.stride(0),
        0,
        intermediate,
        hidden,
        local,
        int(gemm2_out.dtype == torch.float32),
    )
    _launch("gemm2_kernel", weights_map(gemm2_weights), params, requantized.device, cluster, pdl)


def gemm2_torch(
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    gemm2_out: torch.Tensor,
    counters: torch.Tensor,
    cluster: int = 1,
    pdl: bool = False,
) -> None:
    """Twin of `gemm2`."""
    bounds = expert_offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        gemm2_out[start:end] = _block_scaled(
            requantized[start:end], requantized_scale[:, start:end], gemm2_weights[expert], gemm2_weights_scale[expert]
        )


def _block_scaled(
    rows: torch.Tensor, row_scale: torch.Tensor, weights: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """rows [R, K] e4m3, row_scale [K/128, R], weights [N, K] e4m3, weight_scale [N/128, K/128] -> [R, N] float32."""
    out = torch.zeros(len(rows), len(weights), device=rows.device)
    for step in range(rows.shape[1] // 128):
        k = slice(step * 128, step * 128 + 128)
        product = rows[:, k].float() @ weights[:, k].float().T
        out += product * (row_scale[step][:, None] * weight_scale[:, step].repeat_interleave(128))
    return out
