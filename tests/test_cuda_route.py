"""Route and place in CUDA C++: they compile, their twins agree with the reference, windows hold any routing."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_fast.kernels import cuda_route
from moe_fast.kernels.cuda_build import ARCH, compile_nvcc, source_text
from moe_fast.kernels.cuda_route import GROUP_TOKENS, MAX_WINDOWS, Windows
from moeref import reference
from moeref.spec import Geometry

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
POISON = -77


def ints(*size: int, device: str = "cpu") -> torch.Tensor:
    """Poisoned int32."""
    return torch.full(size, POISON, dtype=torch.int32, device=device)


def draw_routing(
    geometry: Geometry, tokens: int, seed: int, banned: bool = False, extreme: bool = False
) -> tuple[torch.Generator, torch.Tensor, torch.Tensor]:
    """A generator, and logits and bias drawn from it, a third of the logits rounded, with odd seeds the bias, too, so
    that scores tie. banned: the bias of most experts is minus infinity, so that experts of groups that were not kept
    are chosen before them. extreme: a quarter of the logits are out of the ordinary, some of the first tokens NaN."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, geometry.num_experts, generator=draw)
    logits[: tokens // 3] = (logits[: tokens // 3] * 2).round() / 2
    if extreme:
        odd = torch.tensor([-200.0, -103.0, -88.5, -87.4, -30.0, 30.0, 100.0, -torch.inf, torch.inf])
        drawn = odd[torch.randint(len(odd), logits.shape, generator=draw)]
        logits = torch.where(torch.rand(logits.shape, generator=draw) < 0.25, drawn, logits)
        nan = torch.rand(logits.shape, generator=draw) < 0.05
        logits[: tokens // 4] = torch.where(nan, torch.nan, logits)[: tokens // 4]
    bias = torch.randn(geometry.num_experts, generator=draw).bfloat16()
    if seed % 2:
        bias = (bias * 2).round() / 2
    if banned:
        bias[torch.randperm(geometry.num_experts, generator=draw)[geometry.num_experts // 32 :]] = -torch.inf
    return draw, logits, bias


def run_both(
    geometry: Geometry,
    tokens: int,
    offset: int,
    limit: int,
    seed: int,
    twin: bool = True,
    device: str = "cpu",
    banned: bool = False,
    extreme: bool = False,
) -> dict[str, torch.Tensor]:
    """Every output of route and place on what `draw_routing` gives."""
    draw, logits, bias = draw_routing(geometry, tokens, seed, banned, extreme)
    scale = torch.randn(3 + 7 * (seed % 3), tokens + 3, generator=draw).to(device)  # 3, 10 or 17 blocks
    local, top_k = geometry.num_local_experts, geometry.top_k
    windows = Windows.for_tokens(tokens, min(top_k, local), limit)
    made = {
        "routing_logits": logits.to(device),
        "routing_bias": bias.to(device),
        "scale": scale[:, :tokens],  # rows further apart than they are long
        "token_scales": torch.full((tokens, cuda_route.scale_columns(128 * len(scale))), torch.nan, device=device),
        "topk_ids": ints(tokens, top_k, device=device),
        "topk_weights": torch.full((tokens, top_k), torch.nan, device=device),
        "token_rows": ints(tokens, top_k, device=device),
        "token_weights": torch.full((tokens, top_k), torch.nan, device=device),
        "local_mask": ints(cuda_route.mask_words(local), tokens, device=device),
        "permuted_idx_to_token_idx": ints(windows.count, windows.capacity, device=device),
        "row_targets": ints(windows.count, windows.capacity, 2, device=device),
        "expert_offsets": ints(windows.count, local + 1, device=device),
        "combine_tokens": ints(tokens, device=device),
        "combine_offsets": ints(windows.count + 1, device=device),
        "idle_tokens": ints(tokens, device=device),
        "idle_count": ints(1, device=device),
        "tiles_done": ints(9, device=device),
    }
    first = ("routing_logits", "routing_bias", "token_rows", "token_weights", "local_mask")
    second = (
        "local_mask", "token_rows", "token_weights", "permuted_idx_to_token_idx", "row_targets", "expert_offsets",
        "combine_tokens", "combine_offsets", "idle_tokens", "idle_count", "tiles_done",
    )  # fmt: skip
    route = cuda_route.route_torch if twin else cuda_route.route
    place = cuda_route.place_torch if twin else cuda_route.place
    pairs = (made["scale"], made["token_scales"]), (made["topk_ids"], made["topk_weights"])
    route(*(made[name] for name in first), local, offset, 2.5, geometry.n_group, geometry.topk_group, *pairs)
    place(*(made[name] for name in second))
    return made


def geometry(experts: int, n_group: int, topk_group: int, top_k: int, local: int) -> Geometry:
    """One whose hidden sizes do not matter here."""
    return Geometry(experts, local, 128, 128, top_k=top_k, n_group=n_group, topk_group=topk_group)


GEOMETRIES = [
    geometry(256, 8, 4, 8, 32),
    geometry(384, 1, 1, 8, 48),
    geometry(16, 4, 2, 4, 4),
    geometry(18, 3, 2, 2, 6),  # a group is no power of two of lanes
    geometry(48, 6, 3, 4, 48),
    geometry(30, 3, 2, 3, 10),
    geometry(64, 8, 4, 4, 8),  # the kept groups are half of the lanes, as DeepSeek-V3's
]


@pytest.mark.parametrize("shape", GEOMETRIES, ids=lambda shape: shape.code)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_twins_agree_with_the_reference(shape: Geometry, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 150))
    offset = data.draw(st.integers(-shape.num_local_experts + 1, shape.num_experts - 1))
    rows_per_token = min(shape.top_k, shape.num_local_experts)
    limit = data.draw(st.sampled_from([10**6, 2 * GROUP_TOKENS * rows_per_token]))
    banned = data.draw(st.booleans())
    made = run_both(shape, tokens, offset, limit, data.draw(st.integers(0, 99)), banned=banned)
    routing = reference.route(made["routing_logits"], made["routing_bias"], shape, 2.5)
    assert torch.equal(made["topk_ids"].long(), routing.topk_ids)
    torch.testing.assert_close(
        made["topk_weights"], routing.topk_weights, rtol=1e-6, atol=0
    )  # another order of 8 terms
    check_rows(made, shape, offset)


def window_bounds(rows: list[int], windows: int, slack: int) -> list[int]:
    """First token of each window, and the token count: a window a multiple of slack in the rows of earlier groups."""
    bounds = [0] + [len(rows)] * windows
    for begin in reversed(range(0, len(rows), GROUP_TOKENS)):
        bounds[sum(rows[:begin]) // slack if windows > 1 else 0] = begin
    return bounds


def check_rows(made: dict[str, torch.Tensor], shape: Geometry, offset: int) -> None:
    """Windows cover the tokens once, each a permutation of the reference's, and nothing else is written."""
    ids, local = made["topk_ids"].long(), shape.num_local_experts
    count, capacity = made["permuted_idx_to_token_idx"].shape
    here = (ids >= offset) & (ids < offset + local)
    bounds = window_bounds(here.sum(1).tolist(), count, capacity - GROUP_TOKENS * min(shape.top_k, local))
    several = (here.sum(1) >= 2).nonzero().squeeze(1)
    assert made["combine_offsets"].tolist() == [int((several < begin).sum()) for begin in bounds]
    assert torch.equal(made["combine_tokens"][: len(several)].long(), several)
    assert (made["combine_tokens"][len(several) :] == POISON).all()
    for window in range(count):
        begin, end = bounds[window], bounds[window + 1]
        want = reference.permute(ids[begin:end], shape, offset)
        rows = len(want.permuted_idx_to_token_idx)
        assert rows <= capacity
        assert made["expert_offsets"][window].tolist() == want.expert_offsets.tolist()
        placed = made["permuted_idx_to_token_idx"][window]
        assert torch.equal(placed[:rows].long(), want.permuted_idx_to_token_idx + begin)
        assert (placed[rows:] == POISON).all()
        token_rows = torch.full((end - begin, shape.top_k), -1)
        token_weights = torch.full((end - begin, shape.top_k), torch.nan)
        targets = torch.full((capacity, 2), POISON, dtype=torch.int32)
        pairs = zip(want.permuted_idx_to_token_idx.tolist(), want.permuted_idx_to_slot.tolist(), strict=True)
        for row, (token, slot) in enumerate(pairs):
            at = int((token_rows[token] >= 0).sum())
            token_rows[token, at] = row
            token_weights[token, at] = made["topk_weights"][begin + token, slot]
            alone = here[begin + token].sum() == 1
            targets[row, 0] = begin + token if alone else -1
            targets[row, 1:] = token_weights[token, at : at + 1].view(torch.int32) if alone else 0
        assert torch.equal(made["token_rows"][begin:end].long(), token_rows)
        assert torch.equal(made["token_weights"][begin:end].view(torch.int32), token_weights.view(torch.int32))
        assert torch.equal(made["row_targets"][window], targets)
    blocks = len(made["scale"])
    assert torch.equal(made["token_scales"][:, :blocks], made["scale"].T) and not made["token_scales"][:, blocks:].any()
    idle = (made["token_rows"] < 0).all(1).nonzero().squeeze(1)
    assert made["idle_tokens"][: len(idle)].tolist() == idle.tolist() and made["idle_count"].item() == len(idle)
    assert (made["idle_tokens"][len(idle) :] == POISON).all()
    assert (made["tiles_done"] == 0).all()
    bits = made["local_mask"].long() & 0xFFFFFFFF
    for token in range(len(ids)):
        chosen = {e - offset for e in ids[token].tolist() if 0 <= e - offset < local}
        assert {e for e in range(local) if bits[e // 32, token] >> e % 32 & 1} == chosen


@given(tokens=st.integers(0, 10**6), rows_per_token=st.integers(1, 8), limit=st.integers(512, 10**6))
def test_windows_hold_the_most_rows(tokens: int, rows_per_token: int, limit: int) -> None:
    try:
        windows = Windows.for_tokens(tokens, rows_per_token, limit)
    except ValueError:
        assert tokens * rows_per_token > MAX_WINDOWS * (limit - GROUP_TOKENS * rows_per_token)
        return
    assert 1 <= windows.count <= MAX_WINDOWS and windows.capacity <= limit
    if windows.count == 1:
        assert windows.capacity >= tokens * rows_per_token
        return
    # Every window but the last is left with more than its capacity less two groups' rows, so they are enough.
    most, slack = tokens * rows_per_token, windows.capacity - GROUP_TOKENS * rows_per_token
    assert (max(most - 1, 0)) // slack < windows.count


@needs_nvcc
@pytest.mark.parametrize("shape", [GEOMETRIES[0], GEOMETRIES[1], GEOMETRIES[3]], ids=lambda shape: shape.code)
def test_route_and_place_compile_without_spills(shape: Geometry) -> None:
    both = {
        "route.cu": cuda_route.route_defines(
            shape.num_experts, shape.n_group, shape.topk_group, shape.top_k, shape.num_local_experts
        ),
        "place.cu": cuda_route.place_defines(shape.top_k, shape.num_local_experts),
    }
    for name, defines in both.items():
        _, report = compile_nvcc(source_text(name), [f"{key}={value}" for key, value in defines], ARCH)
        assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", GEOMETRIES, ids=lambda shape: shape.code)
@pytest.mark.parametrize("tokens", [1, 31, 33, 333, 5000])
def test_kernels_agree_with_their_twins_on_a_gpu(shape: Geometry, tokens: int) -> None:
    for seed, offset in enumerate((0, shape.num_local_experts, -1, shape.num_experts - 1)):
        limit = max(2 * GROUP_TOKENS * shape.top_k, tokens * shape.top_k // 5)
        special = {"banned": seed == 1, "extreme": seed == 2}
        want = run_both(shape, tokens, offset, limit, seed, device="cuda", **special)
        got = run_both(shape, tokens, offset, limit, seed, twin=False, device="cuda", **special)
        for name, value in want.items():
            if name in ("topk_weights", "token_weights"):
                torch.testing.assert_close(got[name], value, rtol=1e-6, atol=0, equal_nan=True)
            elif name == "row_targets":
                assert torch.equal(got[name][..., 0], value[..., 0]), name
                weights = (t[..., 1].contiguous().view(torch.float32) for t in (got[name], value))
                torch.testing.assert_close(*weights, rtol=1e-6, atol=0, equal_nan=True)
            else:
                torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)
