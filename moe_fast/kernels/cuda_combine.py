"""Combine in CUDA C++: as `combine`, for gemm2_out in bfloat16 too, and for the tokens of one window only."""

from __future__ import annotations

import ctypes

import torch

from moe_fast.kernels.cuda_build import load
from moe_fast.target import target_of

THREADS = 224
CTAS_PER_SM = 5  # enough loads under way to fill the memory; more make an empty window dearer


class Params(ctypes.Structure):
    """Params of combine.cu."""

    _fields_ = (
        ("gemm2_out", ctypes.c_void_p),
        ("topk_weights", ctypes.c_void_p),
        ("token_rows", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("window_tokens", ctypes.c_void_p),
        ("hidden", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("skip_idle", ctypes.c_int),
        ("unused", ctypes.c_int),
    )


def defines(top_k: int, wide: bool) -> tuple[tuple[str, int], ...]:
    """What a variant of combine.cu is compiled with."""
    return (("TOP_K", top_k), ("WIDE", int(wide)))


def combine(
    gemm2_out: torch.Tensor,
    topk_weights: torch.Tensor,
    token_rows: torch.Tensor,
    output: torch.Tensor,
    window_tokens: torch.Tensor | None = None,
    skip_idle: bool = False,
    pdl: bool = False,
) -> None:
    """Fill output [T, H] bfloat16: the float32 sum, ascending by expert, of topk_weights times rows; else exact zeros.

    gemm2_out [P, H] bfloat16 or float32, topk_weights [T, K] float32, token_rows [T, K] int32, -1 where a choice is
    not local. window_tokens [2] int32: only these tokens, from the first up to but without the second. skip_idle:
    tokens without a row are left as they are.
    """
    tokens, hidden = output.shape
    if tokens == 0:
        return
    params = Params(
        gemm2_out.data_ptr(),
        topk_weights.data_ptr(),
        token_rows.data_ptr(),
        output.data_ptr(),
        None if window_tokens is None else window_tokens.data_ptr(),
        hidden,
        tokens,
        int(skip_idle),
        0,
    )
    index = output.device.index or 0
    variant = defines(topk_weights.shape[1], gemm2_out.dtype == torch.float32)
    kernel = load("combine.cu", variant, "combine_kernel", THREADS, 0, index)
    blocks = min(tokens, CTAS_PER_SM * target_of(output.device).sm_count)
    kernel.launch(blocks, (params,), torch.cuda.current_stream(output.device).cuda_stream, pdl)


def combine_torch(
    gemm2_out: torch.Tensor,
    topk_weights: torch.Tensor,
    token_rows: torch.Tensor,
    output: torch.Tensor,
    window_tokens: torch.Tensor | None = None,
    skip_idle: bool = False,
    pdl: bool = False,
) -> None:
    """Twin of `combine`."""
    begin, end = (0, len(output)) if window_tokens is None else window_tokens.tolist()
    token_rows, topk_weights, output = token_rows[begin:end], topk_weights[begin:end], output[begin:end]
    acc = torch.zeros(output.shape, device=output.device)
    rows, order = torch.sort(token_rows, dim=-1)  # absent ones, -1, first
    weights = topk_weights.gather(1, order)
    for slot in range(rows.shape[1]):
        present = rows[:, slot] >= 0
        acc[present] += weights[present, slot, None] * gemm2_out[rows[present, slot].long()].float()
    written = (token_rows >= 0).any(1) if skip_idle else torch.ones(len(output), dtype=torch.bool, device=output.device)
    output[written] = acc[written].to(output.dtype)
