"""Problem -> Inputs: the same bytes on every machine, device and library version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from moeref.inputs import FP8, Inputs, expected_layout
from moeref.reference import route
from moeref.routings import draw_routing
from moeref.spec import Problem
from moeref.values import draw_hidden, draw_weight_scales, draw_weights

Allocate = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]


def zeros(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed tensor whose pages are not touched yet (large ones come fresh from the system)."""
    return (
        torch.from_numpy(np.zeros(shape, dtype=np.uint8)).view(dtype)
        if dtype == FP8
        else torch.zeros(shape, dtype=dtype)
    )


def make_inputs(
    problem: Problem,
    experts: str = "hit",
    allocate: Allocate = zeros,
    routed_as: Problem | None = None,
    drawn: set[int] | None = None,
) -> Inputs:
    """The problem's ten inputs on the CPU.

    experts   'hit': weights only of local experts that a token chose, the others stay zero and cost no memory;
              'all': of every local expert. Scales are drawn for all. A local slot outside 0..E-1 stays zero.
    allocate  called once a tensor with (name, shape, dtype); must return zeroed memory on the CPU.
    routed_as the problem that logits and bias are drawn for, by default this one. Some routing kinds aim at the shard:
              the shards of one layer have to see the same tokens.
    drawn     global ids whose weights `allocate`'s tensors hold already, from an earlier problem that differs in its
              tokens alone; those drawn now are added.
    Raises SpecError for an unknown kind.
    """
    g = problem.geometry
    tensors = {name: allocate(name, *layout) for name, layout in expected_layout(g, problem.seq_len).items()}
    logits, bias = draw_routing(routed_as or problem)
    tensors["routing_logits"].copy_(torch.from_numpy(logits))
    tensors["routing_bias"].copy_(torch.from_numpy(bias))  # exact: the kinds return bfloat16 values
    payload, scale = draw_hidden(problem)
    _fill(tensors["hidden_states"], payload)
    tensors["hidden_states_scale"].copy_(torch.from_numpy(scale).T)
    wanted = set(problem.real_experts)
    if experts == "hit":
        routing = route(tensors["routing_logits"], tensors["routing_bias"], g, problem.factor)
        wanted &= set(routing.topk_ids.flatten().tolist())
    elif experts != "all":
        raise ValueError(f"experts={experts!r}: expected 'hit' or 'all'")
    if drawn is not None:
        wanted -= drawn
        drawn |= wanted
    for slot in range(g.num_local_experts):
        expert = problem.offset + slot
        scale1, scale2 = draw_weight_scales(problem, expert)
        tensors["gemm1_weights_scale"][slot].copy_(torch.from_numpy(scale1))
        tensors["gemm2_weights_scale"][slot].copy_(torch.from_numpy(scale2))
        if expert in wanted:
            gemm1, gemm2 = draw_weights(problem, expert)
            _fill(tensors["gemm1_weights"][slot], gemm1)
            _fill(tensors["gemm2_weights"][slot], gemm2)
    return Inputs(**tensors, local_expert_offset=problem.offset, routed_scaling_factor=problem.factor, geometry=g)


def _fill(target: torch.Tensor, octets: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    np.copyto(target.view(torch.uint8).numpy(), octets)


def digest(tensor: torch.Tensor) -> str:
    """First 16 hex digits of the SHA-256 of a tensor's bytes, row-major, little-endian."""
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(octets.tobytes()).hexdigest()[:16]
