"""Experts: gemm1 and gemm2 in one persistent launch, so that neither one's tail nor the other's start idles the memory.

Items are all (tile, part) pairs of gemm1, then all of gemm2. Every program takes the next item from one counter. A
gemm2 item waits until its tile's gemm1 items are finished; those were taken earlier, by programs that are running, so
waiting always ends, however few programs fit on the device at once.
"""

# ruff: noqa: E741 - I is the axis's name throughout the project
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_fast.kernels.gemm1 import count_tiles, gemm1_tile, load_ends
from moe_fast.kernels.gemm2 import gemm2_tile
from moe_fast.kernels.triton_launch import Launcher


@dataclass(frozen=True)
class Tiling:
    """How `experts` is cut. Only tile_rows, part1 and part2 say which program does what; no choice changes a value."""

    tile_rows: int  # BN, rows of one expert in a tile: the matrix unit's N side
    part1: int  # NB, columns of swiglu_out an item computes: 32, 64 or 128
    part2: int  # MB, columns of gemm2_out an item computes: 64, 128 or 256
    warps: int
    stages1: int  # iterations of K in flight
    stages2: int
    programs_per_sm: int
    unroll1: int = 1  # steps of 128 of K in one iteration
    unroll2: int = 1
    pdl: bool = True  # programmatic dependent launch


@triton.jit(do_not_specialize=["scale_stride", "row_capacity", "max_tiles"])
def experts_kernel(
    hidden_states,
    hidden_states_scale,
    gemm1_weights,
    gemm1_weights_scale,
    gemm2_weights,
    gemm2_weights_scale,
    permuted_idx_to_token_idx,
    expert_offsets,
    tile_offsets,
    swiglu_out,
    requantized,
    requantized_scale,
    gemm2_out,
    counters,  # [1 + max_tiles + max_tiles * I/128] int32, zero: next item, blocks done of a tile, arrivals of a block
    scale_stride,  # hidden_states_scale's first stride
    row_capacity,  # requantized_scale's
    max_tiles,
    H: tl.constexpr,
    I: tl.constexpr,
    L: tl.constexpr,
    BN: tl.constexpr,
    NB: tl.constexpr,
    MB: tl.constexpr,
    STAGES1: tl.constexpr,
    STAGES2: tl.constexpr,
    U1: tl.constexpr,
    U2: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # now: what follows may read what came before this kernel
    done = counters + 1
    arrivals = done + max_tiles
    tile_ends, row_ends = load_ends(tile_offsets, expert_offsets, L)
    item = tl.atomic_add(counters, 1, sem="relaxed")  # while those are on their way
    tiles = count_tiles(tile_ends)
    gemm1_items = tiles * (I // NB)
    items = gemm1_items + tiles * (H // MB)
    while item < gemm1_items:
        tile, complete = gemm1_tile(
            item, hidden_states, hidden_states_scale, scale_stride, gemm1_weights, gemm1_weights_scale,
            permuted_idx_to_token_idx, tile_ends, row_ends, swiglu_out, requantized, requantized_scale, row_capacity,
            arrivals, H, I, BN, NB, STAGES1, U1,
        )  # fmt: skip
        if complete:
            tl.atomic_add(done + tile, 1, sem="release")
        item = tl.atomic_add(counters, 1, sem="relaxed")
    while item < items:
        gemm2_tile(
            item - gemm1_items, requantized, requantized_scale, row_capacity, gemm2_weights, gemm2_weights_scale,
            tile_ends, row_ends, gemm2_out, done, H, I, BN, MB, STAGES2, U2, True,
        )  # fmt: skip
        item = tl.atomic_add(counters, 1, sem="relaxed")


launch = Launcher(experts_kernel)


def num_counters(max_tiles: int, intermediate: int) -> int:
    """int32 counters that `experts` needs, zeroed before each call."""
    return 1 + max_tiles * (1 + intermediate // 128)


def experts(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    expert_offsets: torch.Tensor,
    tile_offsets: torch.Tensor,
    swiglu_out: torch.Tensor,
    requantized: torch.Tensor,
    requantized_scale: torch.Tensor,
    gemm2_out: torch.Tensor,
    counters: torch.Tensor,
    max_tiles: int,
    programs: int,
    tiling: Tiling,
    on_gpu: bool = True,
) -> None:
    """gemm1 and gemm2 of every local expert: the same writes as `gemm1` then `gemm2`, bit for bit."""
    local, hidden, intermediate = gemm2_weights.shape
    pdl = on_gpu and tiling.pdl
    options = {"launch_pdl": True} if pdl else {}
    launch(
        (programs,),
        (
            hidden_states,
            hidden_states_scale,
            gemm1_weights,
            gemm1_weights_scale,
            gemm2_weights,
            gemm2_weights_scale,
            permuted_idx_to_token_idx,
            expert_offsets,
            tile_offsets,
            swiglu_out,
            requantized,
            requantized_scale,
            gemm2_out,
            counters,
        ),
        (hidden_states_scale.stride(0), requantized_scale.stride(0), max_tiles),
        {
            "H": hidden,
            "I": intermediate,
            "L": local,
            "BN": tiling.tile_rows,
            "NB": tiling.part1,
            "MB": tiling.part2,
            "STAGES1": tiling.stages1,
            "STAGES2": tiling.stages2,
            "U1": math.gcd(tiling.unroll1, hidden // 128),
            "U2": math.gcd(tiling.unroll2, intermediate // 128),
            "PDL": pdl,
        },
        num_warps=tiling.warps,
        **options,
    )
