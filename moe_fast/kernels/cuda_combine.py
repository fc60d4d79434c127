"""Combine in CUDA C++: the weighted sum of several rows a token, for the tokens of a list."""

from __future__ import annotations

import ctypes

import torch

from moe_fast.current import current_stream
from moe_fast.kernels.cuda_build import load
from moe_fast.target import target_of

THREADS = 224
CTAS_PER_SM = 5  # enough loads under way to fill the memory; more make an empty window dearer


class Params(ctypes.Structure):
    """CombineParams of combine.cuh."""

    _fields_ = (
        ("gemm2_out", ctypes.c_void_p),
        ("token_weights", ctypes.c_void_p),
        ("token_rows", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("bounds", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("hidden", ctypes.c_int),
        ("unused", ctypes.c_int),
    )


def defines(top_k: int) -> tuple[tuple[str, int], ...]:
    """What a variant of combine.cu is compiled with."""
    return (("TOP_K", top_k), ("CTAS_PER_SM", CTAS_PER_SM))


def combine_params(
    gemm2_out: torch.Tensor,
    token_weights: torch.Tensor,
    token_rows: torch.Tensor,
    tokens: torch.Tensor,
    bounds: torch.Tensor,
    output: torch.Tensor,
) -> Params:
    """The kernel's parameters from the arguments of `combine`."""
    return Params(
        gemm2_out.data_ptr(),
        token_weights.data_ptr(),
        token_rows.data_ptr(),
        tokens.data_ptr(),
        bounds.data_ptr(),
        output.data_ptr(),
        output.shape[1],
        0,
    )


def combine(
    gemm2_out: torch.Tensor,
    token_weights: torch.Tensor,
    token_rows: torch.Tensor,
    tokens: torch.Tensor,
    bounds: torch.Tensor,
    output: torch.Tensor,
    pdl: bool = False,
) -> None:
    """Fill output [T, H] bfloat16, rows tokens[bounds[0]:bounds[1]]: the float32 sum, in the order given, of
    token_weights times rows of gemm2_out [P, H] bfloat16; exact zeros for a token without a row.

    token_rows [T, K] int32: rows, then -1; token_weights [T, K] float32 beside them; tokens [T] and bounds [2] int32.
    pdl: the kernel before wrote gemm2_out alone, and let this one start when all that came before it had ended, as
    grouped_gemms does.
    """
    most = output.shape[0]
    if most == 0:
        return
    params = combine_params(gemm2_out, token_weights, token_rows, tokens, bounds, output)
    kernel = load("combine.cu", defines(token_rows.shape[1]), "combine_kernel", THREADS, 0, output.device.index or 0)
    parts = 2  # of a token, at H 7168: each may have a CTA
    blocks = min(parts * most, CTAS_PER_SM * target_of(output.device).sm_count)
    kernel.launch(blocks, (params,), current_stream(output.device.index or 0), pdl)


def combine_torch(
    gemm2_out: torch.Tensor,
    token_weights: torch.Tensor,
    token_rows: torch.Tensor,
    tokens: torch.Tensor,
    bounds: torch.Tensor,
    output: torch.Tensor,
    pdl: bool = False,
) -> None:
    """Twin of `combine`."""
    begin, end = bounds.tolist()
    chosen = tokens[begin:end].long()
    rows, weights = token_rows[chosen], token_weights[chosen]
    acc = torch.zeros(len(chosen), output.shape[1], device=output.device)
    for slot in range(rows.shape[1]):
        present = (rows[:, : slot + 1] >= 0).all(1)
        acc[present] += weights[present, slot, None] * gemm2_out[rows[present, slot].long()].float()
    output[chosen] = acc.to(output.dtype)
