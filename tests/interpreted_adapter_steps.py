"""Cases of test_adapter_steps.py; a script, run with TRITON_INTERPRET=1."""

from __future__ import annotations

import torch
from interpreted_kernels import ACCUMULATION, E4M3_SLACK, FP8, fp8, near, poison

from moe_fast.kernels import adapter_steps as steps
from moe_fast.kernels.permute import permute_torch
from moe_fast.kernels.routing import route_torch

BF16_TRUNCATED = 2**-7  # the interpreter truncates to 8 bits where the twin rounds


def dequantize() -> None:
    """Widths below, at and above a program's; negative scales."""
    for tokens, hidden in ((1, 128), (3, 1024), (5, 1152)):
        x, scale = fp8(tokens, hidden), torch.randn(hidden // 128, tokens)
        got, want = poison(tokens, hidden).bfloat16(), poison(tokens, hidden).bfloat16()
        steps.dequantize(x, scale, got)
        steps.dequantize_torch(x, scale, want)
        near(got.float(), want.float(), BF16_TRUNCATED)
        near(want.float(), x.float() * scale.T.repeat_interleave(128, 1), 2**-8)


def localize() -> None:
    """Ids before, inside and after the shard; more pairs than a program's; float32 and bfloat16 weights."""
    for tokens, offset, local, dtype in ((3, 8, 8, torch.float32), (130, -3, 8, torch.bfloat16), (7, 28, 8, FP8)):
        dtype = torch.float32 if dtype == FP8 else dtype
        ids = torch.randint(0, 32, (tokens, 4), dtype=torch.int32)
        weights = torch.rand(tokens, 4).bfloat16().float()  # nothing to round
        got = [torch.full_like(ids, -9), poison(tokens, 4).to(dtype)]
        want = [torch.full_like(ids, -9), poison(tokens, 4).to(dtype)]
        steps.localize(ids, weights, *got, offset, local)
        steps.localize_torch(ids, weights, *want, offset, local)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        inside = (ids >= offset) & (ids < offset + local)
        assert bool((want[0][inside] == ids[inside] - offset).all()) and bool((want[0][~inside] == -1).all())
        assert bool((want[1][~inside] == 0).all()) and bool((want[1][inside] == weights[inside]).all())


def place_rows() -> None:
    """Padded and masked places; every local pair's bytes and scales are where they should be, the rest untouched."""
    experts, local, top_k, offset, tile, hidden = 32, 8, 4, 8, 16, 2176
    for tokens in (1, 37):
        i32 = torch.int32
        ids, rows = torch.zeros(tokens, top_k, dtype=i32), torch.zeros(tokens, top_k, dtype=i32)
        slots, bounds = torch.zeros(tokens, local, dtype=i32), torch.zeros(local + 1, dtype=i32)
        tiles, row_token = torch.zeros(local + 1, dtype=i32), torch.zeros(tokens * top_k, dtype=i32)
        logits, bias = torch.randn(tokens, experts), torch.randn(experts).bfloat16()
        spare = torch.zeros(1, dtype=i32)
        weights = torch.zeros(tokens, top_k)
        route_torch(
            logits, bias, ids, weights, slots, rows, bounds, tiles, row_token, spare, spare, offset, 2.5, 4, 2, tile
        )
        permute_torch(slots, rows, bounds, tiles, row_token, spare, tile)
        x, scale = fp8(tokens, hidden), torch.randn(hidden // 128, tokens)
        for starts in (tiles[:-1] * tile, torch.arange(local, dtype=i32) * 48):
            both = []
            for place in (steps.place_rows, steps.place_rows_torch):
                out = [
                    poison(local * 48, hidden, dtype=FP8),
                    poison(local * 48, hidden // 128),
                    torch.full((local * 48,), -1, dtype=i32),
                    torch.full((tokens, top_k), -9, dtype=i32),
                ]
                place(ids, rows, bounds, starts, x, scale, *out, offset)
                both.append(out)
            for got, want in zip(*both, strict=True):
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
            payload, places = both[0][0].view(torch.uint8), both[0][3]
            for token, slot in torch.nonzero(rows >= 0).tolist():
                at = int(places[token, slot])
                assert torch.equal(payload[at], x.view(torch.uint8)[token])
                assert torch.equal(both[0][1][at], scale[:, token])
                assert int(both[0][2][at]) == int(ids[token, slot]) - offset
            assert int((both[0][2] >= 0).sum()) == int((rows >= 0).sum()) and bool((places[rows < 0] == -1).all())


def swiglu_quantize() -> None:
    """Several blocks a program, a width that ends inside one, a block of zeros, padding left alone, either order."""
    for rows, intermediate, gate_first in ((3, 128, False), (5, 1152, False), (5, 256, True)):
        both = torch.randn(rows, 2 * intermediate).bfloat16()
        both[0, :128] = 0
        owner = None if gate_first else torch.tensor([0, -1, 3, 0, -1][:rows], dtype=torch.int32)
        got = [poison(rows, intermediate, dtype=FP8), poison(rows, intermediate // 128)]
        want = [each.clone() for each in got]
        steps.swiglu_quantize(both, owner, *got, gate_first)
        steps.swiglu_quantize_torch(both, owner, *want, gate_first)
        real = torch.ones(rows, dtype=torch.bool) if owner is None else owner >= 0
        near(got[1][real], want[1][real], ACCUMULATION)
        values = [q[real].float() * s[real].repeat_interleave(128, 1) for q, s in (got, want)]
        near(values[0], values[1], E4M3_SLACK)
        up, gate = both[real].float().chunk(2, 1)[:: -1 if gate_first else 1]
        near(values[1], torch.nn.functional.silu(gate) * up, E4M3_SLACK)
        assert float(want[1][0, 0]) == float(got[1][0, 0]) == 1.0
        assert bool(got[1][~real].isnan().all()) and bool((got[0][~real].view(torch.uint8) == 0x7F).all())


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in (dequantize, localize, place_rows, swiglu_quantize):
        case()
