"""route_permute.cu: its twin against the reference, its own source on the CPU against the twin, and on a GPU the
kernel."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_on_host import HostKernels, on_host
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_on_host import instead, without
from test_cuda_route import GEOMETRIES, POISON, draw_routing, ints

from moe_fast.kernels import cuda_route_permute
from moe_fast.kernels.cuda_build import ARCH, compile_nvcc, source_text
from moe_fast.kernels.cuda_route_permute import MAX_TOKENS, route_permute, route_permute_torch
from moeref import reference
from moeref.spec import Geometry

needs_host_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
TILE_ROWS = 16


def run(
    shape: Geometry,
    tokens: int,
    offset: int,
    seed: int,
    twin: bool = True,
    device: str = "cpu",
    banned: bool = False,
    extreme: bool = False,
) -> dict[str, torch.Tensor]:
    """Everything that is given and written, poisoned before; room behind the rows that must keep its poison."""
    _, logits, bias = draw_routing(shape, tokens, seed, banned, extreme)
    local, top_k = shape.num_local_experts, shape.top_k
    made = {
        "routing_logits": logits.to(device),
        "routing_bias": bias.to(device),
        "topk_ids": ints(tokens, top_k, device=device),
        "topk_weights": torch.full((tokens, top_k), torch.nan, device=device),
        "token_rows": ints(tokens, top_k, device=device),
        "expert_offsets": ints(local + 1, device=device),
        "tile_offsets": ints(local + 1, device=device),
        "permuted_idx_to_token_idx": ints(tokens * top_k + 8, device=device),
        "counters": ints(700, device=device),
    }
    call = route_permute_torch if twin else route_permute
    call(*made.values(), offset, 2.5, shape.n_group, shape.topk_group, TILE_ROWS)
    return made


def differences(want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs; weights may by the last bits of exp and of a sum of 8."""
    found = []
    for name, value in want.items():
        rtol = 1e-6 if name == "topk_weights" else 0.0
        if not torch.allclose(got[name], value, rtol=rtol, atol=0.0, equal_nan=True):
            found.append(name)
    return found


@pytest.mark.parametrize("shape", GEOMETRIES, ids=lambda shape: shape.code)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_twin_agrees_with_the_reference(shape: Geometry, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, MAX_TOKENS))
    offset = data.draw(st.integers(-shape.num_local_experts + 1, shape.num_experts - 1))
    made = run(shape, tokens, offset, data.draw(st.integers(0, 99)), banned=data.draw(st.booleans()))
    routing = reference.route(made["routing_logits"], made["routing_bias"], shape, 2.5)
    want = reference.permute(routing.topk_ids, shape, offset)
    rows = len(want.permuted_idx_to_token_idx)
    assert torch.equal(made["topk_ids"].long(), routing.topk_ids)
    torch.testing.assert_close(made["topk_weights"], routing.topk_weights, rtol=1e-6, atol=0)
    assert torch.equal(made["permuted_idx_to_token_idx"][:rows].long(), want.permuted_idx_to_token_idx)
    assert (made["permuted_idx_to_token_idx"][rows:] == POISON).all()
    assert made["expert_offsets"].tolist() == want.expert_offsets.tolist()
    tiles = (want.expert_offsets.diff() + TILE_ROWS - 1) // TILE_ROWS
    assert made["tile_offsets"].tolist() == [0, *tiles.cumsum(0).tolist()]
    token_rows = torch.full((tokens, shape.top_k), -1)
    token_rows[want.permuted_idx_to_token_idx, want.permuted_idx_to_slot] = torch.arange(rows)
    assert torch.equal(made["token_rows"].long(), token_rows)
    assert not made["counters"].any()


@needs_host_compiler
@pytest.mark.parametrize("shape", GEOMETRIES, ids=lambda shape: shape.code)
def test_the_source_on_the_host_does_what_its_twin_does(
    shape: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host(monkeypatch, HostKernels(tmp_path), cuda_route_permute)
    for seed, tokens in enumerate((1, 8, 33, MAX_TOKENS)):
        offset = (0, shape.num_local_experts, -1, shape.num_experts - 1)[seed]
        special = {"banned": seed == 1, "extreme": seed == 2}
        want = run(shape, tokens, offset, seed, **special)
        assert differences(want, run(shape, tokens, offset, seed, twin=False, **special)) == [], tokens


# None of them writes far outside of its tensors: that would end the test's process.
BROKEN: dict[str, Callable[[str], str]] = {
    "nothing": str,
    "bits only for the first CTA": instead("or_in_cta(word, r,", "or_in_cta(word, 0,"),
    "bits only for its own CTA": instead("or_in_cta(word, r,", "or_in_cta(word, rank,"),
    "bits that are zeroed afterwards": lambda text: without("    cluster_arrive();\n")(
        without("    cluster_wait();  // every CTA's bits are zero\n")(text)
    ),
    "rows before all have chosen": instead("    cluster_sync();  // nothing", "    __syncthreads();  // nothing"),
    "rows from other tokens of the word": instead("((1u << token % 32) - 1)", "((2u << token % 32) - 1)"),
    "only a token's own word counts": without(
        "        for (int w = 0; w < token / 32; ++w) row += __popc(words[w]);\n"
    ),
    "tiles are rounded down": instead("(mine + p.tile_rows - 1) / p.tile_rows", "mine / p.tile_rows"),
    "experts beyond the shard are local": instead(
        "    if (local >= LOCAL) local = -1;\n", "    local = min(local, LOCAL - 1);\n"
    ),
    "the last counter stays": instead("i < p.num_counters;", "i < p.num_counters - 1;"),
    "offsets of every 32 experts begin anew": without("        rows += __shfl_sync(ALL, upto, 31);\n"),
}


@needs_host_compiler
@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_source_is_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host(monkeypatch, HostKernels(tmp_path, BROKEN[what]), cuda_route_permute)
    shape = GEOMETRIES[4]  # 48 local experts
    found = []
    for seed, offset in ((1, 0), (2, -24)):
        try:
            got = run(shape, 100, offset, seed, twin=False)
        except AssertionError as error:  # the host saw it: threads that hang, or what no thread may do
            found.append(str(error))
        else:
            found += differences(run(shape, 100, offset, seed), got)
    assert bool(found) == (what != "nothing"), found


@pytest.mark.parametrize("tokens", [0, MAX_TOKENS + 1])
def test_other_numbers_of_tokens_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to {MAX_TOKENS} tokens, got {tokens}"):
        run(GEOMETRIES[2], tokens, 0, 0, twin=False)


@needs_nvcc
@pytest.mark.parametrize("shape", GEOMETRIES[:2], ids=lambda shape: shape.code)
def test_it_compiles_without_spills(shape: Geometry) -> None:
    sizes = (shape.num_experts, shape.n_group, shape.topk_group, shape.top_k, shape.num_local_experts)
    flags = [f"{key}={value}" for key, value in cuda_route_permute.defines(*sizes)]
    _, report = compile_nvcc(source_text("route_permute.cu"), flags, ARCH)
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", GEOMETRIES, ids=lambda shape: shape.code)
def test_the_kernel_does_what_its_twin_does(shape: Geometry) -> None:
    for seed, tokens in enumerate((1, 7, 8, 9, 17, 32, 33, 80, 159, MAX_TOKENS) * 4):
        offset = (0, shape.num_local_experts, -1, shape.num_experts - 1)[seed % 4]
        special = {"banned": seed % 5 == 1, "extreme": seed % 5 == 2}
        want = run(shape, tokens, offset, seed, device="cuda", **special)
        got = run(shape, tokens, offset, seed, twin=False, device="cuda", **special)
        assert differences(want, got) == [], (tokens, seed)
