"""Grouped FP8 GEMMs in CUDA C++ (wgmma, TMA, warp specialisation) for many rows an expert: arithmetic is the cost.

One launch does gemm1 (gathered rows times gemm1_weights, SwiGLU, 1x128 re-quantisation) and gemm2 (those rows times
gemm2_weights, not yet weighted). Axes: T, L, H, I as everywhere; P permuted rows, sorted by expert. H and I are
multiples of 128. The grid never depends on the counts, which the kernel reads from expert_offsets on the device. Needs
compute capability 9.0.

`counters` [4] int32 must be zero before a launch and is zero after it. `cluster` CTAs share each load of weights.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from dataclasses import dataclass

import torch

from moe_fast.current import current_stream
from moe_fast.kernels.cuda_build import TensorMap, load, tensor_map
from moe_fast.target import target_of

THREADS = 512
DYNAMIC_SHARED = 219136
MAX_EXPERTS = 512


class Params(ctypes.Structure):
    """Params of layout.cuh."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "hidden_states",
                "hidden_states_scale",
                "gemm1_weights_scale",
                "gemm2_weights_scale",
                "requantized",
                "requantized_scale",
                "gemm2_out",
                "counters",
                "idle_tokens",
                "idle_count",
                "output",
            )
        ),
        ("hidden_states_scale_stride", ctypes.c_int64),
        ("hidden_states_scale_token_stride", ctypes.c_int64),
        ("requantized_scale_stride", ctypes.c_int64),
        ("hidden", ctypes.c_int),
        ("intermediate", ctypes.c_int),
        ("experts", ctypes.c_int),
        ("phases", ctypes.c_int),
    )


class Window(ctypes.Structure):
    """Window of layout.cuh."""

    _fields_ = (
        ("row_index", ctypes.c_void_p),
        ("expert_offsets", ctypes.c_void_p),
        ("tiles_done", ctypes.c_void_p),
        ("row_targets", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Direct:
    """What is written into output [T, H] bfloat16 at once, so that combine has less to do.

    row_targets [P, 2] int32: the token whose only row a row is, or -1, and the bits of its weight. Such a row is
    weighted and written. idle_tokens [T] int32, the first idle_count [1] of them: their rows of output become zero.
    """

    output: torch.Tensor
    row_targets: torch.Tensor
    idle_tokens: torch.Tensor | None = None
    idle_count: torch.Tensor | None = None


def num_tiles(rows: int, local: int) -> int:
    """Length of tiles_done for that many rows at most: one more than the largest tile_of of layout.cuh."""
    return rows // 128 + local + 1


def scale_stride(rows: int) -> int:
    """First stride of requantized_scale [I/128, >= rows]: scales are read four at a time."""
    return -(-rows // 4) * 4


def defines(cluster: int) -> tuple[tuple[str, int], ...]:
    """What a variant of grouped_gemm.cu is compiled with."""
    return (("CLUSTER", cluster), ("DYNAMIC_SHARED", DYNAMIC_SHARED))


def weights_map(weights: torch.Tensor) -> TensorMap:
    """Map over the rows of weights [L, rows, K], in boxes of 128 rows x 128 columns.

    A box is ordered so that its row 32a + 8j + 2q + b is row 32a + 8q + 2j + b of the weights: a thread's 8 columns of
    32 are neighbours.
    """
    experts, rows, depth = weights.shape
    return _rows_map(weights.data_ptr(), experts * rows, depth)[0]


@functools.lru_cache(maxsize=256)
def _rows_map(address: int, rows: int, depth: int) -> tuple[TensorMap, object]:
    sizes = (depth, 2, 4, 4, rows // 32)
    strides = (depth, 8 * depth, 2 * depth, 32 * depth)
    return tensor_map(address, sizes, strides, (128, 2, 4, 4, 4))


def gemm_params(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    expert_offsets: torch.Tensor,
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    gemm2_out: torch.Tensor,
    tiles_done: torch.Tensor,
    counters: torch.Tensor,
    direct: Direct | None = None,
    phases: int = 3,
) -> tuple[Params, Window]:
    """The kernel's parameters from the arguments of `grouped_gemms`; it raises what that raises."""
    local, hidden, intermediate = gemm2_weights.shape
    if requantized_scale.stride(0) % 4 or requantized_scale.data_ptr() % 16:
        given = f"first stride {requantized_scale.stride(0)}, address {requantized_scale.data_ptr():#x}"
        raise ValueError(f"requantized_scale: {given}; expected a stride from scale_stride and a multiple of 16 bytes")
    params = Params(
        hidden_states.data_ptr(),
        hidden_states_scale.data_ptr(),
        gemm1_weights_scale.data_ptr(),
        gemm2_weights_scale.data_ptr(),
        requantized.data_ptr(),
        requantized_scale.data_ptr(),
        gemm2_out.data_ptr(),
        counters.data_ptr(),
        None if direct is None or direct.idle_tokens is None else direct.idle_tokens.data_ptr(),
        None if direct is None or direct.idle_count is None else direct.idle_count.data_ptr(),
        None if direct is None else direct.output.data_ptr(),
        *hidden_states_scale.stride(),
        requantized_scale.stride(0),
        hidden,
        intermediate,
        local,
        phases,
    )
    window = Window(
        permuted_idx_to_token_idx.data_ptr(),
        expert_offsets.data_ptr(),
        tiles_done.data_ptr(),
        None if direct is None else direct.row_targets.data_ptr(),
    )
    return params, window


def grouped_gemms(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    expert_offsets: torch.Tensor,
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    gemm2_out: torch.Tensor,
    tiles_done: torch.Tensor,
    counters: torch.Tensor,
    direct: Direct | None = None,
    cluster: int = 2,
    phases: int = 3,
    pdl: bool = False,
) -> None:
    """Fill requantized [P, I] e4m3, requantized_scale [I/128, >= P] float32 and gemm2_out [P, H] bfloat16, rows
    below expert_offsets[-1]. The first stride of requantized_scale is a multiple of 4, as scale_stride gives it.

    hidden_states [T, H] e4m3, hidden_states_scale [H/128, T] float32 (any strides), gemm1_weights [L, 2I, H] e4m3,
    rows [up ; gate], gemm1_weights_scale [L, 2I/128, H/128] float32, gemm2_weights [L, H, I] e4m3, gemm2_weights_scale
    [L, H/128, I/128] float32. phases: 1 gemm1, 2 gemm2, 3 both; with both, tiles_done [num_tiles(P, L)] int32 must be
    zero. direct: what is written into the output besides; without it every row goes to gemm2_out.

    Raises ValueError where requantized_scale can't be read four scales at a time.
    """
    params = gemm_params(
        hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale,
        permuted_idx_to_token_idx, expert_offsets, requantized, requantized_scale, gemm2_out, tiles_done, counters,
        direct, phases,
    )  # fmt: skip
    device = hidden_states.device
    index = device.index or 0
    kernel = load("grouped_gemm.cu", defines(cluster), "grouped_gemm_kernel", THREADS, DYNAMIC_SHARED, index)
    blocks = target_of(device).sm_count // cluster * cluster
    maps = weights_map(gemm1_weights), weights_map(gemm2_weights)
    kernel.launch(blocks, (*maps, *params), current_stream(device.index or 0), pdl)


def grouped_gemms_torch(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    expert_offsets: torch.Tensor,
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    gemm2_out: torch.Tensor,
    tiles_done: torch.Tensor,
    counters: torch.Tensor,
    direct: Direct | None = None,
    cluster: int = 2,
    phases: int = 3,
    pdl: bool = False,
) -> None:
    """Twin of `grouped_gemms`; it leaves tiles_done alone."""
    bounds = expert_offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if phases & 1:
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
        if phases & 2:
            rows = _block_scaled(
                requantized[start:end],
                requantized_scale[:, start:end],
                gemm2_weights[expert],
                gemm2_weights_scale[expert],
            )
            alone = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            if direct is not None:
                token, weight = direct.row_targets[start:end].T
                alone = token >= 0
                weighted = rows[alone] * weight.contiguous().view(torch.float32)[alone, None]
                direct.output[token[alone].long()] = weighted.to(direct.output.dtype)
            gemm2_out[start:end][~alone] = rows[~alone].to(gemm2_out.dtype)
    if direct is not None and direct.idle_tokens is not None and direct.idle_count is not None:
        direct.output[direct.idle_tokens[: int(direct.idle_count)].long()] = 0.0


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
