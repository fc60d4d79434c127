"""Cases of test_kernels_interpret.py; a script, run with TRITON_INTERPRET=1. Usage: interpreted_kernels.py GROUP"""

from __future__ import annotations

import sys
from typing import Any

import torch

from moe_fast.kernels.combine import combine, combine_torch
from moe_fast.kernels.cuda_route_permute import route_permute_torch
from moe_fast.kernels.experts import Tiling, experts, num_counters
from moe_fast.kernels.gemm1 import gemm1, gemm1_torch
from moe_fast.kernels.gemm2 import gemm2, gemm2_torch
from moe_fast.kernels.permute import permute, permute_torch
from moe_fast.kernels.routing import route, route_torch
from moe_fast.pipelines import hopper_triton
from moe_fast.pipelines.hopper_triton import run

FP8 = torch.float8_e4m3fn
E4M3_SLACK = 64.5 / 448  # two steps of a 3-bit mantissa at 448, relative to a block's largest value
ACCUMULATION = 2e-5  # float32 sums of a few hundred terms in another order, relative to the largest


def fp8(*shape: int) -> torch.Tensor:
    """e4m3 values of ordinary size."""
    return torch.randn(shape).clamp(-2, 2).to(FP8)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NaN, or a large negative integer: whatever is read before it is written shows."""
    if dtype == FP8:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(FP8)
    return torch.full(shape, torch.nan) if dtype.is_floating_point else torch.full(shape, -(2**30), dtype=dtype)


def route_outputs(tokens: int, local: int, top_k: int) -> dict[str, torch.Tensor]:
    """Poisoned outputs of `route`, in its argument order; counters and ticket as a call finds them."""
    i32 = torch.int32
    return {
        "topk_ids": poison(tokens, top_k, dtype=i32),
        "topk_weights": poison(tokens, top_k),
        "local_slot": poison(tokens, local, dtype=i32),
        "token_rows": poison(tokens, top_k, dtype=i32),
        "expert_offsets": poison(local + 1, dtype=i32),
        "tile_offsets": poison(local + 1, dtype=i32),
        "permuted_idx_to_token_idx": poison(tokens * top_k, dtype=i32),
        "ticket": torch.zeros(1, dtype=i32),
        "counters": poison(2500, dtype=i32),
    }


GEOMETRIES = [(32, 8, 4, 4, 2), (256, 32, 8, 8, 4), (24, 6, 4, 1, 1), (48, 6, 3, 4, 2), (8, 8, 2, 8, 8)]  # E L K G TG


def check_routed(tokens: int, geometry: tuple[int, ...], offset: int, logits: torch.Tensor, bias: torch.Tensor) -> None:
    """route (and its permutation) against route_torch and permute_torch."""
    _, local, top_k, n_group, topk_group = geometry
    got, want = route_outputs(tokens, local, top_k), route_outputs(tokens, local, top_k)
    settings = (offset, 2.5, n_group, topk_group, 16)
    fused = route(logits, bias, *got.values(), *settings, fast_exp=True)
    route_torch(logits, bias, *want.values(), *settings)
    counts = torch.full((tokens // 128 + 1, local), -7, dtype=torch.int32)
    if not fused:
        permute(*[got[n] for n in PERMUTED], counts, 16)
    permute_torch(*[want[n] for n in PERMUTED], counts, 16)
    for name, value in want.items():
        if value.dtype == torch.int32:
            assert torch.equal(got[name], value), (name, tokens, geometry, offset)
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)


PERMUTED = ("local_slot", "token_rows", "expert_offsets", "tile_offsets", "permuted_idx_to_token_idx")


def routing() -> None:
    """Plain, tied, saturated and NaN logits; offsets inside, before and past the experts."""
    for geometry in GEOMETRIES:
        experts_, local = geometry[:2]
        for tokens, offset in ((1, 0), (5, -local + 2), (3, experts_ - 1)):
            bias = torch.randn(experts_).bfloat16()
            check_routed(tokens, geometry, offset, torch.randn(tokens, experts_), bias)
            ties = torch.randint(-1, 2, (tokens, experts_)).float()
            check_routed(tokens, geometry, offset, ties, torch.zeros(experts_).bfloat16())
            check_routed(tokens, geometry, offset, 200 * ties, -torch.ones(experts_).bfloat16())
            broken = torch.where(torch.rand(tokens, experts_) < 0.3, torch.nan, ties)
            got = route_outputs(tokens, local, geometry[2])
            route(broken, bias, *got.values(), offset, 2.5, *geometry[3:], 16, fast_exp=True)
            ids = got["topk_ids"]
            assert bool(((ids >= 0) & (ids < experts_)).all())
            assert all(len(set(row)) == len(row) for row in ids.tolist())


def permute_cases() -> None:
    """More tokens than one program permutes, and counts that end inside a chunk."""
    for tokens in (17, 128, 150):
        geometry = GEOMETRIES[0]
        check_routed(tokens, geometry, 8, torch.randn(tokens, 32), torch.randn(32).bfloat16())


def rows_of(counts: list[int], tile_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_offsets and tile_offsets of given counts."""
    rows = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    tiles = torch.tensor([0, *[-(-n // tile_rows) for n in counts]]).cumsum(0).to(torch.int32)
    return rows, tiles


def gemms() -> None:
    """gemm1, gemm2 and experts for each part width; an idle expert, a full tile, a tile and a bit."""
    hidden, intermediate, counts = 256, 256, [3, 0, 16, 19]
    local, tokens = len(counts), 23
    for part1, part2, tile_rows in ((32, 64, 16), (64, 128, 16), (128, 256, 32)):
        offsets, tiles = rows_of(counts, tile_rows)
        rows, capacity = int(offsets[-1]), int(offsets[-1]) + 5
        token_idx = torch.cat([torch.randperm(tokens)[:n].sort().values for n in counts]).to(torch.int32)
        token_idx = torch.cat([token_idx, poison(5, dtype=torch.int32)])
        scales = [torch.randn(hidden // 128, tokens)]
        w1, s1 = fp8(local, 2 * intermediate, hidden), 0.1 * torch.randn(local, 2 * intermediate // 128, hidden // 128)
        w2, s2 = fp8(local, hidden, intermediate), torch.randn(local, hidden // 128, intermediate // 128)
        first = (fp8(tokens, hidden), scales[0], w1, s1, token_idx, offsets, tiles)

        def outs(capacity: int = capacity) -> list[torch.Tensor]:
            return [
                poison(capacity, intermediate),
                poison(capacity, intermediate, dtype=FP8),
                poison(intermediate // 128, capacity),
            ]

        got, want = outs(), outs()
        max_tiles = local + capacity // tile_rows
        arrivals = torch.zeros(max_tiles * intermediate // 128, dtype=torch.int32)
        gemm1(*first, *got, arrivals, 3, tile_rows, part1, 4, 2)
        gemm1_torch(*first, *want, arrivals, 3, tile_rows, part1, 4, 2)
        real = slice(0, rows)
        if part1 < 128:
            assert bool(got[0][rows:].isnan().all())  # nothing past the last row is written
            near(got[0][real], want[0][real], ACCUMULATION)
        near(got[2][:, real], want[2][:, real], ACCUMULATION)
        near(dequantized(got, real), dequantized(want, real), E4M3_SLACK)

        second = (want[1], want[2], w2, s2, offsets, tiles)
        out, expected = poison(capacity, hidden), poison(capacity, hidden)
        gemm2(*second, out, 3, tile_rows, part2, 4, 2)
        gemm2_torch(*second, expected, 3, tile_rows, part2, 4, 2)
        assert bool(out[rows:].isnan().all())
        near(out[real], expected[real], ACCUMULATION)

        both, composed = poison(capacity, hidden), poison(capacity, hidden)
        counters = torch.zeros(num_counters(max_tiles, intermediate), dtype=torch.int32)
        fused = outs()
        weights = (w1, s1, w2, s2)
        tiling = Tiling(tile_rows, part1, part2, 4, 2, 2, 1, unroll1=2, unroll2=4)
        experts(*first[:2], *weights, *first[4:], *fused, both, counters, max_tiles, 3, tiling, on_gpu=False)
        gemm2(got[1], got[2], w2, s2, offsets, tiles, composed, 3, tile_rows, part2, 4, 2)
        assert torch.equal(both[real], composed[real])  # fused equals composed, bit for bit


def dequantized(stage: list[torch.Tensor], real: slice) -> torch.Tensor:
    """requantized times its scale."""
    return stage[1][real].float() * stage[2][:, real].T.repeat_interleave(128, dim=1)


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Largest difference at most `tolerance` of the largest value; NaN never passes."""
    error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
    assert error <= tolerance, f"error {error:.2e} exceeds {tolerance:.2e}"


def pipeline() -> None:
    """run() against the composed twins, for a few sizes, slices and offsets, with poisoned output; with routing in CUDA
    C++, for which its twin stands in, too, up to 100 tokens."""
    torch.manual_seed(1)
    routed: list[int] = []

    def stand_in(logits: torch.Tensor, *rest: Any) -> None:
        routed.append(len(logits))
        route_permute_torch(logits, *rest)

    hopper_triton.route_permute, hopper_triton.MAX_TOKENS = stand_in, 100
    experts_, local, top_k, n_group, topk_group = GEOMETRIES[0]
    hidden, intermediate = 256, 128
    w1, w2 = fp8(local, 2 * intermediate, hidden), fp8(local, hidden, intermediate)
    s1 = 0.1 * torch.randn(local, 2 * intermediate // 128, hidden // 128)
    s2 = torch.randn(local, hidden // 128, intermediate // 128)
    for tokens, at_once, offset in ((0, 64, 0), (1, 64, 8), (7, 64, -3), (21, 8, 27), (130, 1024, 8)):
        logits, bias = torch.randn(tokens, experts_), torch.randn(experts_).bfloat16()
        x, x_scale = fp8(tokens, hidden), torch.randn(hidden // 128, tokens)
        args = (logits, bias, x, x_scale, w1, s1, w2, s2, offset, 2.5)
        for cuda_routing in (True, False):
            routed.clear()
            out = poison(tokens, hidden).bfloat16()
            run(
                *args, out, n_group=n_group, topk_group=topk_group, top_k=top_k, tokens_at_once=at_once,
                tiling=Tiling(16, 64, 128, 4, 2, 2, 1), cuda_routing=cuda_routing,
            )  # fmt: skip
            slices = [min(at_once, tokens - start) for start in range(0, tokens, at_once)]
            assert routed == [count for count in slices if cuda_routing and count <= 100]
            if tokens == 0:
                continue
            want, rows = twins(args, local, top_k, n_group, topk_group)
            near(out.float(), want.float(), E4M3_SLACK)
            idle = (rows < 0).all(1)
            assert bool((out[idle] == 0).all())


def twins(args: tuple, local: int, top_k: int, n_group: int, topk_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and token_rows by the twins alone."""
    logits, bias, x, x_scale, w1, s1, w2, s2, offset, factor = args
    tokens, (hidden, intermediate) = len(x), w2.shape[1:]
    r = route_outputs(tokens, local, top_k)
    route_torch(logits, bias, *r.values(), offset, factor, n_group, topk_group, 16)
    permute_torch(*[r[n] for n in PERMUTED], torch.zeros(0), 16)
    rows = tokens * top_k
    stage = [poison(rows, intermediate), poison(rows, intermediate, dtype=FP8), poison(intermediate // 128, rows)]
    plan = (r["permuted_idx_to_token_idx"], r["expert_offsets"], r["tile_offsets"])
    gemm1_torch(x, x_scale, w1, s1, *plan, *stage, torch.zeros(0), 1)
    out2, output = poison(rows, hidden), poison(tokens, hidden).bfloat16()
    gemm2_torch(*stage[1:], w2, s2, *plan[1:], out2, 1)
    combine_torch(out2, r["topk_weights"], r["token_rows"], output)
    again = poison(tokens, hidden).bfloat16()
    combine(out2, r["topk_weights"], r["token_rows"], again, block=128)
    near(again.float(), output.float(), 2**-7)  # the interpreter truncates bf16
    return output, r["token_rows"]


if __name__ == "__main__":
    torch.manual_seed(0)
    {"routing": routing, "permute": permute_cases, "gemms": gemms, "pipeline": pipeline}[sys.argv[1]]()
