"""Cases of test_exact_order.py; a script, run with TRITON_INTERPRET=1. Kernel and twin must give the same bytes.

The interpreter computes with numpy, whose additions, multiplications, divisions and float64 casts are IEEE's; e4m3 and
bfloat16, which it rounds in its own way, never reach it: those casts are integer arithmetic.
"""

from __future__ import annotations

import numpy
import torch
import triton
import triton.language as tl
from interpreted_kernels import poison

from moe_fast.kernels import exact_order as kernels
from moe_fast.kernels import exact_twins as twins
from moe_fast.pipelines.exact_order import run
from moeref.make import make_inputs
from moeref.spec import Problem

I32 = torch.int32
PROBLEMS = (
    "e16l4h256i128k4g4t2-t5-o8-iid-published-s0",
    "e12l5h128i128k3g3t2-t3-o9-iid-heterogeneous-s0",
    "e6l6h128i256k2g1t1-t2-o-1-ties-model_like-s0",
)


@triton.jit
def numbers_kernel(x, exp, silu, e4m3, bf16, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(exp + at, kernels.one_nan(kernels.exp32(value)))
    tl.store(silu + at, kernels.one_nan(kernels.silu(value)))
    tl.store(e4m3 + at, kernels.encode_e4m3(value))
    tl.store(bf16 + at, kernels.encode_bf16(value))


@triton.jit
def decode_kernel(octets, output):
    at = tl.arange(0, 256)
    tl.store(output + at, kernels.decode_e4m3(tl.load(octets + at)))


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bytes, NaN included."""
    assert got.dtype == want.dtype and got.shape == want.shape
    differing = int((got.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)).sum())
    assert differing == 0, f"{differing} bytes differ"


def floats(count: int) -> torch.Tensor:
    """float32 of every sign and exponent, NaN and infinities among them; half lie midway between a cast's results."""
    bits = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(I32)
    bits[::4] = (bits[::4] & ~0xFFFF) | 0x8000  # half a last place of a bfloat16
    bits[1::4] = (bits[1::4] & ~0xFFFFF) | 0x80000  # and of an e4m3
    bits[2::4] = (torch.rand(len(bits[2::4])) * 240 - 120).view(I32)  # where exp is neither 0 nor inf
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 88.8, -104.0, 3.4e38])
    bits[: len(special)] = special.view(I32)
    return bits.view(torch.float32)


def numbers() -> None:
    """exp, silu and the casts."""
    count = 16384
    x = floats(count)
    scaled = torch.where(x.abs() > 448, 448.0 * x.sign(), x)  # what encode_e4m3 is for
    for value in (x, scaled):
        exp, silu = torch.empty(count), torch.empty(count)
        e4m3, bf16 = torch.empty(count, dtype=torch.uint8), torch.empty(count, dtype=torch.int16)
        numbers_kernel[(1,)](value, exp, silu, e4m3, bf16, SIZE=count)
        same(exp, twins.one_nan(twins.exp32(value)))
        same(silu, twins.one_nan(twins.silu(value)))
        same(bf16, twins.encode_bf16(value))
    same(e4m3, twins.encode_e4m3(scaled))
    away = ((x.view(I32) + 0x8000) >> 16).to(torch.int16)  # halves away from zero: there are halves to tell by
    assert not torch.equal(away[~x.isnan()], twins.encode_bf16(x)[~x.isnan()])
    octets, decoded = torch.arange(256, dtype=torch.uint8), torch.empty(256, dtype=torch.float64)
    decode_kernel[(1,)](octets, decoded)
    want = twins.decode_e4m3(octets)
    numbers_ = ~want.isnan()
    assert torch.equal(decoded.isnan(), want.isnan())
    same(decoded[numbers_], want[numbers_])


def stages() -> None:
    """Each kernel alone on any bytes, NaN among them: an empty expert, a lone row, more rows than programs."""
    local, hidden, columns, tokens = 4, 384, 128, 36  # three blocks: two have one order
    counts = torch.tensor([0, 33, 1, 2])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(I32)
    total = int(offsets[-1])
    source = torch.randint(0, tokens, (total,), dtype=I32)
    x = torch.randint(0, 256, (tokens, hidden), dtype=torch.uint8)
    x[:32] &= 0xF7  # these without NaN
    weights = torch.randint(0, 256, (local, columns, hidden), dtype=torch.uint8) & 0xF7
    x_scale, w_scale = torch.randn(hidden // 128, tokens + 3)[:, :tokens], torch.randn(local, 1, hidden // 128)
    for index, lines in ((source, tokens), (None, total)):
        got, want = poison(total + 2, columns), poison(total + 2, columns)
        given = (x[:lines], x_scale[:, :lines], index, weights, w_scale, offsets)
        kernels.grouped_gemm(*given, got, tokens)
        twins.grouped_gemm_torch(*given, want, tokens)
        same(got, want)
        assert not bool(want[:total].isnan().all()) and bool(want[total:].isnan().all())
        back = torch.arange(hidden).view(-1, 128).flip(0).flatten()  # blocks descending: there is an order to tell by
        turned = (x[:lines, back], x_scale[:, :lines].flip(0), index, weights[..., back], w_scale.flip(2), offsets)
        twins.grouped_gemm_torch(*turned, want, tokens)
        finite = ~want.isnan()
        assert bool(finite.any()) and not torch.equal(got[finite], want[finite])

    both = (
        torch.randn(total + 2, 512) * torch.tensor([1e-3, 1.0, 30.0])[torch.arange(total + 2) % 3].unsqueeze(1)
    ).clone()
    both[3, :128], both[5, 300], both[6, 301], both[7, 7] = 0.0, torch.inf, -torch.inf, torch.nan
    out = [[poison(total + 2, 256).to(torch.uint8), poison(2, total + 2)] for _ in range(2)]
    kernels.swiglu_quantize(both, offsets, *out[0])
    twins.swiglu_quantize_torch(both, offsets, *out[1])
    same(out[0][0], out[1][0])
    same(out[0][1], out[1][1])
    assert float(out[1][1][0, 3]) == 1.0 and int((out[1][0][:total] == 0x7F).sum()) > 0

    rows = torch.full((6, 4), -1, dtype=I32)
    rows[1:].view(-1)[torch.randperm(20)[:13]] = torch.randperm(total)[:13].to(I32)
    y, weight = torch.randn(total, 1152), torch.randn(6, 4)
    y[4, 4] = torch.nan
    outputs = torch.full((6, 1152), -9, dtype=torch.int16), torch.full((6, 1152), -9, dtype=torch.int16)
    kernels.combine(y, weight, rows, outputs[0])
    twins.combine_torch(y, weight, rows, outputs[1])
    same(*outputs)
    assert not bool(outputs[1][0].any())


def pipeline() -> None:
    """The whole call, whatever the slices are."""
    for name in PROBLEMS:
        inputs = make_inputs(Problem.parse(name))
        g = inputs.geometry
        groups = {"n_group": g.n_group, "topk_group": g.topk_group, "top_k": g.top_k}
        got = run(*inputs.args(), **groups, kernels=True, tokens_at_once=3)
        same(got, run(*inputs.args(), **groups, kernels=False))
        assert bool(got.any())


if __name__ == "__main__":
    torch.manual_seed(0)
    numpy.seterr(all="ignore")  # overflow is among the cases
    for case in (numbers, stages, pipeline):
        case()
