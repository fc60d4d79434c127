"""The windows after the first in one launch: for each the grouped GEMMs, then combine, in the same buffers.

In a usual call these windows have no rows, and one launch that ends at once costs what one does, not two a window. The
kernel's CTAs wait for one another, so it is launched cooperatively: all of them run at once, or the launch fails.
"""

from __future__ import annotations

import ctypes

import torch

from moe_fast.current import current_stream
from moe_fast.kernels import cuda_grouped_gemm as gemm
from moe_fast.kernels.cuda_build import Kernel, load
from moe_fast.kernels.cuda_combine import combine_params, combine_torch
from moe_fast.kernels.cuda_grouped_gemm import Direct
from moe_fast.target import target_of


class WindowsParams(ctypes.Structure):
    """Windows of later_windows.cu."""

    _fields_ = (
        ("first", gemm.Window),
        ("count", ctypes.c_int),
        ("capacity", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("unused", ctypes.c_int),
    )


def defines(cluster: int, top_k: int) -> tuple[tuple[str, int], ...]:
    """What a variant of later_windows.cu is compiled with."""
    return (*gemm.defines(cluster), ("TOP_K", top_k))


def kernel_for(top_k: int, device: torch.device, cluster: int = 2) -> Kernel:
    """The kernel, compiled or loaded if need be, which can't be done within a graph capture."""
    return load(
        "later_windows.cu", defines(cluster, top_k), "later_windows_kernel", gemm.THREADS, gemm.DYNAMIC_SHARED,
        device.index or 0,
    )  # fmt: skip


def later_windows(
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
    row_targets: torch.Tensor,
    token_weights: torch.Tensor,
    token_rows: torch.Tensor,
    combine_tokens: torch.Tensor,
    combine_offsets: torch.Tensor,
    output: torch.Tensor,
    cluster: int = 2,
) -> None:
    """`grouped_gemms`, then `combine`, for each window of permuted_idx_to_token_idx [W, C], W at most MAX_WINDOWS,
    expert_offsets [W, L+1], tiles_done [W, num_tiles(C, L)], row_targets [W, C, 2] and combine_offsets [W+1]; the other
    arguments as theirs. Idle tokens are left alone. Windows without rows cost nothing but the launch.

    Raises what they raise.
    """
    matrices = (
        hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale,
    )  # fmt: skip
    windows, capacity = permuted_idx_to_token_idx.shape
    params, first = gemm.gemm_params(
        *matrices, permuted_idx_to_token_idx, expert_offsets, requantized, requantized_scale, gemm2_out, tiles_done,
        counters, Direct(output, row_targets),
    )  # fmt: skip
    combine = combine_params(gemm2_out, token_weights, token_rows, combine_tokens, combine_offsets, output)
    counts = WindowsParams(first, windows, capacity, tiles_done.shape[1], 0)
    device = output.device
    kernel = kernel_for(token_rows.shape[1], device, cluster)
    blocks = target_of(device).sm_count // cluster * cluster
    maps = gemm.weights_map(gemm1_weights), gemm.weights_map(gemm2_weights)
    stream = current_stream(device.index or 0)
    kernel.launch(blocks, (*maps, params, combine, counts), stream, pdl=True, cooperative=True)


def later_windows_torch(
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
    row_targets: torch.Tensor,
    token_weights: torch.Tensor,
    token_rows: torch.Tensor,
    combine_tokens: torch.Tensor,
    combine_offsets: torch.Tensor,
    output: torch.Tensor,
    cluster: int = 2,
) -> None:
    """Twin of `later_windows`."""
    for window in range(len(permuted_idx_to_token_idx)):
        gemm.grouped_gemms_torch(
            hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale,
            permuted_idx_to_token_idx[window], expert_offsets[window], requantized, requantized_scale, gemm2_out,
            tiles_done[window], counters, Direct(output, row_targets[window]),
        )  # fmt: skip
        combine_torch(
            gemm2_out, token_weights, token_rows, combine_tokens, combine_offsets[window : window + 2], output
        )
