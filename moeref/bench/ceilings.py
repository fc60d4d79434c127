"""What the machine can do at best, measured in the same run as the candidates: reading, copying, multiplying."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moeref.bench.rotation import Work
from moeref.bench.stats import percentile
from moeref.inputs import FP8
from moeref.spec import BLOCK

CUDA_BYTES = 2 * 2**30
CPU_BYTES = 256 * 2**20
"""Bytes read in one measurement; beyond the caches."""

SHAPES = ((15168, 4096, 7168), (15168, 7168, 2048))
"""M, N, K of the FP8 products: gemm1 and gemm2 of DeepSeek-V3 at about the largest published workload's rows."""

REPEATS = 20


@dataclass(frozen=True)
class Ceilings:
    """Best median rates. `matmul` says how the arithmetic one was measured."""

    read_gbps: float  # 10**9 bytes a second
    copy_gbps: float  # read and written bytes together
    tflops: float  # 10**12 operations a second: what the floor is made from
    matmul: str
    others: dict[str, float]  # further rates in TFLOP/s, by how they were measured

    def floor(self, work: Work) -> float:
        """Seconds: reading the weights of the experts hit, or multiplying their rows, whichever takes longer."""
        return max(work.weight_bytes / (self.read_gbps * 1e9), work.flops / (self.tflops * 1e12))

    def bound(self, work: Work) -> str:
        """'memory' or 'arithmetic': which of the two the floor is."""
        memory = work.weight_bytes / (self.read_gbps * 1e9)
        return "memory" if memory >= self.floor(work) else "arithmetic"


def measure_ceilings(device: torch.device) -> Ceilings:
    """A few seconds on either kind of device."""
    return _cuda(device) if device.type == "cuda" else _cpu()


def _cpu() -> Ceilings:
    buffer = torch.ones(CPU_BYTES // 4)
    target = torch.empty_like(buffer)
    read = CPU_BYTES / _cpu_seconds(lambda: buffer.sum(), 7)
    copy = 2 * CPU_BYTES / _cpu_seconds(lambda: target.copy_(buffer), 7)
    side = 1024
    left, right = torch.ones(side, side), torch.ones(side, side)
    rate = 2 * side**3 / _cpu_seconds(lambda: left @ right, 7)
    return Ceilings(read / 1e9, copy / 1e9, rate / 1e12, f"float32 {side}x{side}x{side}", {})


def _cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return percentile(times[1:], 0.5)


def _cuda(device: torch.device) -> Ceilings:
    with torch.cuda.device(device):
        read, copy = _bandwidths(device)
        torch.cuda.empty_cache()
        rates = _matmul_rates(device)
    blockwise = [name for name in rates if name.startswith("block-wise")]
    best = max(blockwise or rates, key=lambda name: rates[name])
    return Ceilings(read / 1e9, copy / 1e9, rates[best], best, {k: v for k, v in rates.items() if k != best})


def _bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes a second: read, copied (both directions counted)."""
    buffer = torch.ones(CUDA_BYTES // 4, device=device)
    target = torch.empty_like(buffer)
    # several ways to read, since none is the fastest everywhere
    ways: list[Callable[[], object]] = [buffer.sum, buffer.amax, lambda: torch.linalg.vector_norm(buffer, 1)]
    read = max(CUDA_BYTES / _cuda_seconds(way) for way in ways)
    return read, 2 * CUDA_BYTES / _cuda_seconds(lambda: target.copy_(buffer))


def _matmul_rates(device: torch.device) -> dict[str, float]:
    """TFLOP/s by how they were measured; bf16 where the card or torch has no FP8."""
    rates = {}
    for m, n, k in SHAPES:
        for name, make in (("block-wise", _block_wise), ("tensor-wise", _tensor_wise)):
            try:
                rates[f"{name} FP8 {m}x{n}x{k}"] = 2e-12 * m * n * k / _cuda_seconds(make(m, n, k, device))
            except (RuntimeError, ValueError, TypeError):  # not on this card, or not in this torch
                continue
    if not rates:
        left = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
        rates["bf16 8192x8192x8192"] = 2e-12 * 8192**3 / _cuda_seconds(lambda: left @ left)
    return rates


def _operands(m: int, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] and, column-major, [K, N]; random, since the card's clock falls with the bits that switch."""
    left = torch.randn(m, k, device=device).clamp_(-2, 2).to(FP8)
    right = torch.randn(n, k, device=device).clamp_(-2, 2).to(FP8)
    return left, right.t()


def _block_wise(m: int, n: int, k: int, device: torch.device) -> Callable[[], object]:
    """1x128 scales on the left, 128x128 on the right, as the layer has them."""
    left, right = _operands(m, n, k, device)
    left_scale = torch.ones(k // BLOCK, m, device=device).t()  # [M, K/128], M fastest
    right_scale = torch.ones(n // BLOCK, k // BLOCK, device=device).t()  # [K/128, N/128], K fastest
    return lambda: torch._scaled_mm(left, right, left_scale, right_scale, out_dtype=torch.bfloat16)


def _tensor_wise(m: int, n: int, k: int, device: torch.device) -> Callable[[], object]:
    """One scale an operand."""
    left, right = _operands(m, n, k, device)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _cuda_seconds(call: Callable[[], object]) -> float:
    """Median of REPEATS calls by events, queued without waiting in between."""
    for _ in range(3):
        call()
    pairs = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return percentile([begin.elapsed_time(end) / 1e3 for begin, end in pairs], 0.5)
