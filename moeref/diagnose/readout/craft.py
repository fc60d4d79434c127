"""What crafted inputs are made of: zeros, single payloads, experts chosen at will.

Every read-out puts a few e4m3 values into weights and activations that are zero elsewhere, so that one output element
shows one number of the inside. Sizes are chosen so that every legal recipe's roundings are known there:

- A block with a single value, or a few whose ratios to the largest are small powers of two, is re-quantised without
  loss: the largest magnitude over amax/448 is 448 up to 2**-23, and an e4m3 value.
- silu(x) is x in float32 for x >= 32, since exp(-32) < 2**-46.
- bfloat16 holds all of them; only the output's rounding remains: at most 2**-8 of it, or 2**-7 where it is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeref.diagnose.result import Guarded
from moeref.inputs import FP8, Inputs, expected_layout
from moeref.spec import DEFAULT_SCALING, Geometry, Problem

GATE = 64.0
"""Gate value where silu is linear; a power of two, so that it costs no bits."""

WANTED, UNWANTED = 2.0, -8.0
"""Logits of experts that a crafted token chooses and of those that it does not: no other choice comes near."""


@dataclass(frozen=True)
class Stand:
    """One candidate on one geometry and shard."""

    call: Guarded
    problem: Problem
    device: torch.device

    @property
    def geometry(self) -> Geometry:
        """The problem's sizes."""
        return self.problem.geometry

    @property
    def factor(self) -> float:
        """The problem's routed_scaling_factor; the usual one where that is 0 and would hide everything."""
        return self.problem.factor or DEFAULT_SCALING

    def blank(self, seq_len: int, factor: float | None = None) -> Inputs:
        """Zero payloads and bias, scales of one, no expert wanted, at the problem's offset."""
        g = self.geometry
        fill = {name: 1.0 if name.endswith("_scale") else 0.0 for name in expected_layout(g, 0)}
        fill["routing_logits"] = UNWANTED
        tensors = {}
        for name, (shape, dtype) in expected_layout(g, seq_len).items():
            if dtype == FP8:
                tensors[name] = torch.zeros(shape, dtype=torch.uint8, device=self.device).view(FP8)
            else:
                tensors[name] = torch.full(shape, fill[name], dtype=dtype, device=self.device)
        factor = self.factor if factor is None else factor
        return Inputs(**tensors, local_expert_offset=self.problem.offset, routed_scaling_factor=factor, geometry=g)

    def middle_expert(self) -> int:
        """Global id of the local expert in the middle of those that exist."""
        real = self.problem.real_experts
        return real[len(real) // 2]


Index = int | slice | torch.Tensor


def put(payload: torch.Tensor, index: tuple[Index, ...], values: float | torch.Tensor) -> None:
    """Write numbers that e4m3 holds into an e4m3 tensor, in place."""
    cast = torch.as_tensor(values, dtype=torch.float32).to(FP8).view(torch.uint8)
    payload.view(torch.uint8)[index] = cast.to(payload.device)


def companions(g: Geometry, expert: int) -> list[int]:
    """top_k experts with `expert` first: the next ones of its group, then those of the following groups.

    They fill whole groups, so they lie in at most topk_group of them.
    """
    size = g.group_size
    home, place = divmod(expert, size)
    order = [home * size + (place + step) % size for step in range(size)]
    for step in range(1, g.n_group):
        order += range((home + step) % g.n_group * size, ((home + step) % g.n_group + 1) * size)
    return order[: g.top_k]


def locals_together(g: Geometry, real: range) -> list[int]:
    """top_k experts of topk_group groups with as many of the local ones `real` as possible, those first."""
    size = g.group_size
    by_room = sorted(range(g.n_group), key=lambda i: (-sum(e // size == i for e in real), i))
    reach = [e for group in by_room[: g.topk_group] for e in range(group * size, (group + 1) * size)]
    return sorted(reach, key=lambda e: (e not in real, e))[: g.top_k]


def choose(inputs: Inputs, chosen: Sequence[Sequence[int]]) -> None:
    """Let token t choose the experts chosen[t], all with equal weight, in place."""
    ids = torch.tensor(chosen, device=inputs.device)
    inputs.routing_logits.scatter_(1, ids, WANTED)
