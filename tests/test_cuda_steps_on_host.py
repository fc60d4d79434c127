"""route.cu, place.cu and combine.cu, their own sources, run on the CPU under drawn schedules: against their twins."""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import test_cuda_route
import torch
from cuda_on_host import HostKernels, on_host
from test_cuda_on_host import instead
from test_cuda_route import GEOMETRIES, POISON, run_both

from moe_fast.kernels import cuda_combine, cuda_route
from moeref.spec import Geometry

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")


def differences(want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> list[str]:
    """Names of outputs that differ; weights may by the last bits of exp and of a sum of 8."""
    found = []
    for name, value in want.items():
        if name in ("topk_weights", "token_weights"):
            same = torch.allclose(got[name], value, rtol=1e-6, atol=0, equal_nan=True)
        elif name == "row_targets":
            weights = (t[..., 1].contiguous().view(torch.float32) for t in (got[name], value))
            same = torch.equal(got[name][..., 0], value[..., 0])
            same &= torch.allclose(*weights, rtol=1e-6, atol=0, equal_nan=True)
        else:
            same = torch.equal(*(t.contiguous().view(torch.uint8) for t in (got[name], value)))
        if not same:
            found.append(name)
    return found


class Guards:
    """Poisoned int32 tensors, each within a larger one that must keep its poison."""

    ROOM = 64

    def __init__(self) -> None:
        self.rooms: list[torch.Tensor] = []

    def ints(self, *size: int, device: str = "cpu") -> torch.Tensor:
        """As test_cuda_route.ints."""
        count = math.prod(size)
        self.rooms.append(torch.full((count + 2 * self.ROOM,), POISON, dtype=torch.int32))
        return self.rooms[-1][self.ROOM : self.ROOM + count].view(size)

    def kept(self) -> bool:
        """Whether nothing was written outside."""
        return all((end == POISON).all() for room in self.rooms for end in (room[: self.ROOM], room[-self.ROOM :]))


def compare(
    monkeypatch: pytest.MonkeyPatch,
    shape: Geometry,
    tokens: int,
    offset: int,
    limit: int,
    seed: int,
    banned: bool = False,
    extreme: bool = False,
) -> list[str]:
    """What differs between route and place, and their twins; and whether they wrote outside of their tensors."""
    guards = Guards()
    monkeypatch.setattr(test_cuda_route, "ints", guards.ints)
    want = run_both(shape, tokens, offset, limit, seed, banned=banned, extreme=extreme)
    got = run_both(shape, tokens, offset, limit, seed, twin=False, banned=banned, extreme=extreme)
    found = differences(want, got)
    return found if guards.kept() else [*found, "outside"]


@pytest.mark.parametrize("shape", [GEOMETRIES[2], GEOMETRIES[3], GEOMETRIES[5]], ids=lambda shape: shape.code)
def test_route_and_place(shape: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host(monkeypatch, HostKernels(tmp_path), cuda_route)
    tight = 2 * cuda_route.GROUP_TOKENS * shape.top_k  # several windows
    for seed, (tokens, limit) in enumerate([(1, 10**6), (33, 10**6), (150, 10**6), (150, tight), (990, tight)]):
        offset = (0, shape.num_local_experts, -1)[seed % 3]
        assert compare(monkeypatch, shape, tokens, offset, limit, seed) == [], (tokens, limit)


@pytest.mark.parametrize("shape", [GEOMETRIES[0], GEOMETRIES[6]], ids=lambda shape: shape.code)
@pytest.mark.parametrize("banned", [False, True])
def test_route_where_half_of_the_lanes_are_kept(
    shape: Geometry, banned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host(monkeypatch, HostKernels(tmp_path), cuda_route)
    for seed in range(3):
        assert compare(monkeypatch, shape, 60, 0, 10**6, seed, banned) == [], seed


BROKEN_SHARES: dict[str, tuple[bool, Callable[[str], str]]] = {
    "nothing": (False, str),
    "equals from the highest id": (
        False,
        instead("mine[j + 1] > mine[j];", "mine[j + 1] > mine[j] || (mine[j + 1] == mine[j] && id[j + 1] > id[j]);"),
    ),
    "half of the turns": (False, instead("turn < SHARE; ++turn", "turn < SHARE / 2; ++turn")),
    "half of the experts": (False, instead("lane & 1 ? high : low", "low")),
    "a lane gives its first once more": (False, instead("!taken ? mine[j]", "!taken || j == 0 ? mine[j]")),
    "masked experts are forgotten": (True, instead("mine[SHARE - 1] > masked_key()", "mine[0] > 0")),
}


@pytest.mark.parametrize("what", list(BROKEN_SHARES))
def test_a_broken_share_is_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    banned, change = BROKEN_SHARES[what]
    kernels = HostKernels(tmp_path, lambda text: change(text) if "route_kernel" in text else text)
    on_host(monkeypatch, kernels, cuda_route)
    found = [name for seed in (1, 3, 5, 7) for name in compare(monkeypatch, GEOMETRIES[0], 90, 0, 10**6, seed, banned)]
    assert ("topk_ids" in found) == (what != "nothing"), found


BROKEN_ROUTE = {
    "nothing": str,
    "sigmoids out of the ordinary": instead("usual && divisor < 8.507059e37f", "usual"),
    "the other half of a word of biases": instead("bias[j + 1] = high_bf16(b.x)", "bias[j + 1] = low_bf16(b.x)"),
    "weights as they were chosen": instead("TOP_K + lower] = weight;", "TOP_K + lane] = weight;"),
}


@pytest.mark.parametrize("what", list(BROKEN_ROUTE))
def test_a_broken_route_is_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = BROKEN_ROUTE[what]
    kernels = HostKernels(tmp_path, lambda text: change(text) if "route_kernel" in text else text)
    on_host(monkeypatch, kernels, cuda_route)
    found = [name for seed in (1, 2) for name in compare(monkeypatch, GEOMETRIES[0], 60, 0, 10**6, seed, extreme=True)]
    assert bool(found) == (what != "nothing"), found


# None of them writes far outside of its tensors: that would end the test's process.
BROKEN = {
    "a slice forgets what lies before it": instead(" + int(__reduce_add_sync(ALL, u32(skipped.own)))", ""),
    "a token with one row goes to combine": instead("count.own = count.all >= 2;", "count.own = count.all >= 1;"),
    "a token's rows out of order": instead("p.token_rows[at] = row;", "p.token_rows[at ^ 1] = row;"),
    "another choice's weight": instead("p.token_weights + at)", "p.token_weights + (at ^ 1))"),
    "a window never ends": instead("if (all_before >= (window + 1) * slack) ++window;", ""),
    "tokens past the last are idle": instead("count.own = real && count.all == 0;", "count.own = count.all == 0;"),
    "offsets count from the first window": instead(
        "offsets[expert] = to.below - from.below;", "offsets[expert] = to.below;"
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_place_is_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = BROKEN[what]
    kernels = HostKernels(tmp_path, lambda text: change(text) if "place_kernel" in text else text)
    on_host(monkeypatch, kernels, cuda_route)
    shape = GEOMETRIES[2]
    limit = 2 * cuda_route.GROUP_TOKENS * shape.top_k if "window" in what else 10**6
    tokens = 990 if "window" in what else 333  # so many that a CTA places several groups of a warp's
    seen = any(compare(monkeypatch, shape, tokens, 4, limit, seed) for seed in range(3))
    assert seen, f"{what}: not seen in three schedules"


def combine_both(top_k: int, hidden: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """combine and its twin on drawn rows, the first and the last token of the list outside of its bounds."""
    draw = torch.Generator().manual_seed(tokens)
    count = torch.randint(0, top_k + 1, (tokens,), generator=draw)
    token_rows = torch.randint(0, 50, (tokens, top_k), generator=draw, dtype=torch.int32)
    token_rows[torch.arange(top_k) >= count[:, None]] = -1
    weights = torch.randn(tokens, top_k, generator=draw)
    weights[token_rows < 0] = torch.nan  # not to be read
    listed = torch.randperm(tokens, generator=draw).to(torch.int32)
    bounds = torch.tensor([1, tokens - 1], dtype=torch.int32)
    gemm2_out = torch.randn(50, hidden, generator=draw).bfloat16()
    outputs = []
    for call in (cuda_combine.combine, cuda_combine.combine_torch):
        output = torch.full((tokens, hidden), 7.0, dtype=torch.bfloat16)
        call(gemm2_out, weights, token_rows, listed, bounds, output)
        outputs.append(output)
    return outputs[0], outputs[1]


@pytest.mark.parametrize(("top_k", "hidden", "tokens"), [(8, 7168, 9), (8, 128, 40), (1, 384, 13), (3, 4096, 7)])
def test_combine(top_k: int, hidden: int, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host(monkeypatch, HostKernels(tmp_path), cuda_combine)
    got, want = combine_both(top_k, hidden, tokens)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


BROKEN_COMBINE: dict[str, Callable[[str], str]] = {
    "nothing": str,
    "the next item is said where this one is read": instead("say(items[~count & 1]);", "say(items[count & 1]);"),
    "nobody waits for the next item": instead("        __syncthreads();\n", ""),
    "a row is weighted as the one before": instead("item.weights[start + r];", "item.weights[start];"),
    "a second pair of rows is left out": instead("start += ROWS_AT_ONCE)", "start += TOP_K)"),
}


@pytest.mark.parametrize("what", list(BROKEN_COMBINE))
def test_a_broken_combine_is_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = HostKernels(tmp_path, BROKEN_COMBINE[what])
    on_host(monkeypatch, kernels, cuda_combine)
    kernels.load("combine.cu", cuda_combine.defines(8), "combine_kernel", 224, 0, 0)  # built here, or the test fails

    def differs() -> None:
        faulthandler.disable()
        equal = [torch.equal(*(t.view(torch.int16) for t in combine_both(8, 256, tokens))) for tokens in (20, 21, 22)]
        os._exit(0 if all(equal) else 1)

    # A token that was never said is an address anywhere: such a kernel may end its process.
    child = multiprocessing.get_context("fork").Process(target=differs)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    assert (child.exitcode == 0) == (what == "nothing"), f"{what}: exit code {child.exitcode} after three schedules"
