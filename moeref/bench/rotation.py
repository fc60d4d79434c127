"""Other inputs with the same work: what timed calls rotate over, so that nothing learnt from one call helps the next.

Rotation 0 is the problem itself. Rotation r has other activations (drawn with seed + r) and another routing: the
local experts of each group exchange their logits and biases cyclically. Group scores stay as they are, so every token
still reaches as many local experts as before, but other ones: the floor is the same, the weights that are read are
not. (Exact ties may be decided otherwise; the work is counted for each rotation.) Weights and scales are the problem's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from moeref.inputs import FP8, Inputs
from moeref.make import Allocate, make_inputs
from moeref.reference import permute, route
from moeref.spec import Geometry, Problem
from moeref.values import draw_hidden, draw_weights

ROTATED = ("routing_logits", "routing_bias", "hidden_states", "hidden_states_scale")
"""The inputs that differ between rotations."""


@dataclass(frozen=True)
class Work:
    """What any implementation has to do for some inputs; averages where it stands for several."""

    local_rows: float
    experts_hit: float
    weight_bytes: float  # e4m3 weights of the experts hit
    flops: float  # of the two GEMMs

    @classmethod
    def of(cls, geometry: Geometry, rows_of_expert: torch.Tensor) -> Work:
        """From the rows of each local expert, [L] int64. One expert is 3HI bytes, one row 6HI operations."""
        rows, hit = int(rows_of_expert.sum()), int((rows_of_expert > 0).sum())
        size = geometry.hidden_size * geometry.intermediate_size
        return cls(rows, hit, hit * 3 * size, rows * 6 * size)

    @classmethod
    def mean(cls, several: list[Work]) -> Work:
        """The average of each figure."""
        columns = zip(*(vars(one).values() for one in several), strict=True)
        return cls(*(sum(column) / len(several) for column in columns))


def make_rotations(problem: Problem, count: int, allocate: Allocate) -> list[Inputs]:
    """`count` inputs that share their weights, on the CPU; the first is the problem's.

    allocate   as for moeref.make.make_inputs; called anew for the rotated tensors of each rotation.
    """
    first = make_inputs(problem, allocate=allocate)
    filled = _hit(problem, first)
    made = [first]
    for rotation in range(1, count):
        other = _rotated(problem, first, rotation, count, allocate)
        wanted = _hit(problem, other)
        _fill_weights(problem, first, wanted - filled)
        filled |= wanted
        made.append(other)
    return made


def exchanged(problem: Problem, rotation: int, count: int) -> torch.Tensor:
    """[E] int64: which expert's logit and bias each expert gets.

    Example: E 8 in two groups, local experts 4..7, rotation 1 of 3: [0, 1, 2, 3, 5, 6, 7, 4].
    """
    g = problem.geometry
    order = torch.arange(g.num_experts)
    for start in range(0, g.num_experts, g.group_size):
        mine = [expert for expert in range(start, start + g.group_size) if expert in problem.real_experts]
        if mine:
            step = max(1, len(mine) // count)
            order[mine] = torch.tensor(mine).roll(-rotation * step)
    return order


def _rotated(problem: Problem, first: Inputs, rotation: int, count: int, allocate: Allocate) -> Inputs:
    order = exchanged(problem, rotation, count)
    payload, scale = draw_hidden(replace(problem, seed=(problem.seed + rotation) % 2**63))
    values = {
        "routing_logits": first.routing_logits[:, order],
        "routing_bias": first.routing_bias[order],
        "hidden_states": torch.from_numpy(np.array(payload)).view(FP8),
        "hidden_states_scale": torch.from_numpy(np.array(scale.T, order="C")),
    }
    tensors = {name: allocate(name, tuple(value.shape), value.dtype) for name, value in values.items()}
    for name, value in values.items():
        tensors[name].view(torch.uint8).copy_(value.contiguous().view(torch.uint8))
    return replace(first, **tensors)  # type: ignore[arg-type]


def rows_of_expert(inputs: Inputs) -> torch.Tensor:
    """Rows of each local expert, [L] int64."""
    routing = route(inputs.routing_logits, inputs.routing_bias, inputs.geometry, inputs.routed_scaling_factor)
    return permute(routing.topk_ids, inputs.geometry, inputs.local_expert_offset).expert_offsets.diff()


def _hit(problem: Problem, inputs: Inputs) -> set[int]:
    """Global ids of the local experts that a token chose."""
    return {problem.offset + slot for slot in rows_of_expert(inputs).nonzero().flatten().tolist()}


def _fill_weights(problem: Problem, inputs: Inputs, experts: Iterable[int]) -> None:
    for expert in sorted(experts):
        slot = expert - problem.offset
        for target, octets in zip(
            (inputs.gemm1_weights, inputs.gemm2_weights), draw_weights(problem, expert), strict=True
        ):
            np.copyto(target[slot].view(torch.uint8).numpy(), octets)
