"""Windows of rows on a GPU: whether they share a launch or not, the bytes are the same, on every call and replay."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from judging import verdict

from moe_fast.pipelines import hopper_cuda
from moeref.make import make_inputs
from moeref.spec import Problem

NAME = "small-t{}-o8-{}-model_like-s0"
CAPTURED = """
import torch
from moe_fast.pipelines import hopper_cuda
from moeref.make import make_inputs
from moeref.spec import Problem
hopper_cuda.ROW_BUFFER_BYTES = 1
hopper_cuda.USUAL_SHARE = 0.0
def call(inputs, out):
    g = inputs.geometry
    hopper_cuda.run(*inputs.args(), out, n_group=g.n_group, topk_group=g.topk_group, top_k=g.top_k)
short, long = (make_inputs(Problem.parse("small-t{}-o8-iid-model_like-s0".format(t))).to("cuda") for t in (4, 900))
out = torch.full((900, long.geometry.hidden_size), torch.nan, dtype=torch.bfloat16, device="cuda")
call(short, out[:4])
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    call(long, out)
out.fill_(torch.nan)
graph.replay()
replayed = out.clone()
call(long, out.fill_(torch.nan))
assert replayed.isfinite().all() and torch.equal(replayed, out)
"""
"""A process of its own: within this one other tests may have loaded the kernels."""


def test_a_short_call_loads_what_a_longer_one_may_need_within_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []

    class Asked(Exception):
        pass

    def kernel_for(top_k: int, device: torch.device, cluster: int) -> None:
        loaded.append(top_k)
        raise Asked

    monkeypatch.setattr(hopper_cuda, "kernel_for", kernel_for)
    none = torch.empty(0)
    states = type("OnACard", (), {"shape": (4, 256), "device": torch.device("cuda")})()
    weights = type("Weights", (), {"shape": (8, 256, 256)})()
    with pytest.raises(Asked):
        hopper_cuda.run(none, none, states, none, none, none, weights, none, 0, 2.5, none, top_k=4)
    assert loaded == [4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_longer_call_may_be_captured_after_a_short_one() -> None:
    done = subprocess.run([sys.executable, "-c", CAPTURED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("routing", ["iid", "one_expert"])
@pytest.mark.parametrize("tokens", [150, 900])
def test_windows_that_share_a_launch_give_the_same_bytes(
    tokens: int, routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = NAME.format(tokens, routing)
    inputs = make_inputs(Problem.parse(name)).to("cuda")
    g = inputs.geometry
    monkeypatch.setattr(hopper_cuda, "ROW_BUFFER_BYTES", 1)  # 512 rows a window
    shape = hopper_cuda.Shape(tokens, g.num_local_experts, g.top_k, g.hidden_size, g.intermediate_size)
    outputs = []
    for share in (100.0, 0.0):
        monkeypatch.setattr(hopper_cuda, "USUAL_SHARE", share)
        assert shape.usual_windows(g.num_experts) == (shape.windows.count if share else 1) > 0
        hopper_cuda.release_workspaces()
        out = torch.empty(tokens, g.hidden_size, dtype=torch.bfloat16, device="cuda")

        def call(out: torch.Tensor = out) -> None:
            hopper_cuda.run(*inputs.args(), out, n_group=g.n_group, topk_group=g.topk_group, top_k=g.top_k)

        for _ in range(3):
            out.fill_(torch.nan)
            call()
            outputs.append(out.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for _ in range(3):
            out.fill_(torch.nan)
            graph.replay()
            outputs.append(out.clone())
        assert all((space.counters == 0).all() for space in hopper_cuda._workspaces.values())
    assert tokens < 900 or sum(o > 0 for o in _rows()) > 1  # more than one window has rows
    assert all(torch.equal(out.view(torch.int16), outputs[0].view(torch.int16)) for out in outputs[1:])
    assert verdict(name, outputs[0].cpu(), recipe="requant").status == "PASS"


def _rows() -> list[int]:
    """Rows of each window of the last call that no graph made."""
    (space,) = hopper_cuda._workspaces.values()
    return [int(rows) for rows in space.expert_offsets[:, -1]]
