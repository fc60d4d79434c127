"""Routing kinds: how routing_logits [T, E] and routing_bias [E] are drawn. One small function a kind.

A kind takes a Problem and returns (logits float32 [T, E], bias float32 [E], exact in bfloat16). The first t tokens
of a problem are the same for every seq_len >= t, so a failure can be shrunk by dropping tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moeref.draw import F32, FIXED_POINT, Stream
from moeref.spec import Problem, SpecError

LOGITS, BIAS, ORDER = 1, 2, 3  # Philox fields
UNIT = np.float32(2.0**-FIXED_POINT)

Routing = tuple[F32, F32]
ROUTINGS: dict[str, Callable[[Problem], Routing]] = {}

ELSEWHERE: dict[str, Callable[[Problem], Routing]] = {}
"""Kinds that a data set brings: known by name, drawn by no suite or fuzzer. moeref.interop.fib adds captured_DIGEST."""

CAPTURED = "captured_"
"""What the name of a kind that was read from a file starts with; the digest of its tensors follows."""


def _kind(draw: Callable[[Problem], Routing]) -> Callable[[Problem], Routing]:
    ROUTINGS[draw.__name__] = draw
    return draw


def draw_routing(problem: Problem) -> Routing:
    """The problem's logits [T, E] and bias [E], both float32. Raises SpecError for an unknown or impossible kind."""
    logits, bias = routing_kind(problem.routing)(problem)
    return logits.astype(np.float32, copy=False), _bf16(bias)


def routing_kind(name: str) -> Callable[[Problem], Routing]:
    """What draws, or has read, the kind of that name. Raises SpecError for an unknown one."""
    found = ROUTINGS.get(name) or ELSEWHERE.get(name)
    if found is not None:
        return found
    if name.startswith(CAPTURED):
        raise SpecError(
            f"routing kind '{name}' is read from files: name the data set or the safetensors file that holds it with "
            "--routing-from"
        )
    raise SpecError(f"unknown routing kind '{name}': expected one of {', '.join(ROUTINGS)}")


def _normals(problem: Problem, field: int, *shape: int) -> F32:
    """Standard normal float32 of that shape, exact multiples of 2**-20."""
    draws = Stream(problem.seed, field).normals(int(np.prod(shape)))
    return draws.astype(np.float32).reshape(shape) * UNIT


def _logit_noise(problem: Problem) -> F32:
    return _normals(problem, LOGITS, problem.seq_len, problem.geometry.num_experts)


def _bf16(values: NDArray[np.floating]) -> F32:
    """Truncated to bfloat16's eight leading mantissa bits."""
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def _distinct_bf16(problem: Problem, lowest: float) -> F32:
    """E different bfloat16 numbers from `lowest` upwards, consecutive ones, in a drawn order.

    The two largest go to two neighbouring local experts (of one group, where the shard has two such), so that a
    choice by bias alone leaves local work.
    """
    first = int(np.array([lowest], dtype=np.float32).view(np.uint32)[0]) >> 16
    steps = Stream(problem.seed, ORDER).permutation(problem.geometry.num_experts)
    real, size = problem.real_experts, problem.geometry.group_size
    target = real[len(real) // 2]
    partner = next((e for e in (target + 1, target - 1) if e in real and e // size == target // size), target)
    for expert, step in ((partner, len(steps) - 2), (target, len(steps) - 1)):
        other = int(np.argmax(steps == step))
        steps[[expert, other]] = steps[[other, expert]]
    return ((first + steps).astype(np.uint32) << np.uint32(16)).view(np.float32)


@_kind
def iid(problem: Problem) -> Routing:
    """Logits N(0, 1), a small bias N(0, 0.1)."""
    return _logit_noise(problem), _normals(problem, BIAS, problem.geometry.num_experts) * np.float32(0.1)


@_kind
def deepseek_like(problem: Problem) -> Routing:
    """Bias at or above 2 everywhere, as in DeepSeek-V3's checkpoints; experts differ in popularity."""
    experts = problem.geometry.num_experts
    popularity = _normals(problem, ORDER, experts) * np.float32(0.5)
    bias = np.float32(2.015625) + np.abs(_normals(problem, BIAS, experts)) * np.float32(0.03)
    return _logit_noise(problem) + popularity - np.float32(1.0), bias


def _prefer(problem: Problem, chosen: NDArray[np.int64], lift: float = 4.0) -> Routing:
    """Logits near -2, those of chosen [T, K] near -2 + lift, with enough noise that weights differ; no bias."""
    logits = _logit_noise(problem) * np.float32(0.25) - np.float32(2.0)
    np.put_along_axis(logits, chosen, np.take_along_axis(logits, chosen, 1) + np.float32(lift), 1)
    return logits, np.zeros(problem.geometry.num_experts, dtype=np.float32)


@_kind
def balanced(problem: Problem) -> Routing:
    """Every expert gets the same number of tokens, up to one: groups in turn, members in turn.

    Where the groups that a token visits can not share top_k evenly, the last one of each token gets fewer.
    """
    g = problem.geometry
    token = np.arange(problem.seq_len)[:, None]
    slot = np.arange(g.top_k)[None, :]
    per_group = -(-g.top_k // g.topk_group)
    visit = token * -(-g.top_k // per_group) + slot // per_group  # counts visits of a token to a group
    group, rounds = visit % g.n_group, visit // g.n_group  # rounds: times that all groups were visited
    member = (rounds * per_group + slot % per_group) % g.group_size
    return _prefer(problem, group * g.group_size + member)


def _fixed_set(problem: Problem, wanted: list[int]) -> list[int]:
    """top_k experts holding `wanted` and no other local one where possible, within topk_group groups."""
    g = problem.geometry
    local = set(problem.real_experts)
    free = [e for e in range(g.num_experts) if e not in local]
    groups = {e // g.group_size for e in wanted}
    by_room = sorted(range(g.n_group), key=lambda i: (i not in groups, -sum(e // g.group_size == i for e in free), i))
    kept = set(by_room[: g.topk_group])
    spread = [e for e in free if e // g.group_size in kept]
    chosen = (wanted + spread)[: g.top_k]
    if len(chosen) < g.top_k:  # too few non-local experts within reach: fill up with local ones
        rest = [e for e in sorted(local) if e // g.group_size in kept and e not in chosen]
        chosen += rest[: g.top_k - len(chosen)]
    return chosen


@_kind
def one_expert(problem: Problem) -> Routing:
    """Every token picks the same local expert; the other choices are not local where the shard leaves enough."""
    target = problem.real_experts[len(problem.real_experts) // 2]
    chosen = np.array([_fixed_set(problem, [target])] * problem.seq_len, dtype=np.int64)
    return _prefer(problem, chosen.reshape(problem.seq_len, problem.geometry.top_k))


@_kind
def no_local_work(problem: Problem) -> Routing:
    """No token picks a local expert: the whole output is zero. Needs a shard that leaves top_k others in reach."""
    fixed = _fixed_set(problem, [])
    if set(fixed) & set(problem.real_experts):
        raise SpecError(
            f"routing kind 'no_local_work' is impossible for {problem.geometry.name} at offset {problem.offset}: "
            f"fewer than top_k={problem.geometry.top_k} experts of other ranks lie in topk_group groups"
        )
    chosen = np.array([fixed] * problem.seq_len, dtype=np.int64)
    return _prefer(problem, chosen.reshape(problem.seq_len, problem.geometry.top_k))


@_kind
def ties(problem: Problem) -> Routing:
    """Logits and bias from three levels each, so that many biased scores are exactly equal, at the cut too."""
    g = problem.geometry
    level = Stream(problem.seed, LOGITS).below(3, problem.seq_len * g.num_experts)
    step = Stream(problem.seed, BIAS).below(3, g.num_experts)
    return (level.reshape(problem.seq_len, g.num_experts) - 1).astype(np.float32), step.astype(np.float32) * np.float32(
        0.5
    )


@_kind
def near_ties(problem: Problem) -> Routing:
    """A token's logits are 1 + rank * 2**-14: distinct in float32, but bfloat16 keeps only multiples of 2**-7 there.

    Ranks run through the groups in turn, so that group scores differ by two steps too: nothing is tied exactly.
    """
    g = problem.geometry
    noise = _logit_noise(problem).reshape(problem.seq_len, g.n_group, g.group_size)
    member = np.argsort(noise, axis=2, kind="stable")
    group = np.argsort(noise[:, :, 0], axis=1, kind="stable")
    rank = (member * g.n_group + group[:, :, None]).reshape(problem.seq_len, g.num_experts)
    logits = np.float32(1.0) + rank.astype(np.float32) * np.float32(2.0**-14)
    return logits, np.zeros(g.num_experts, dtype=np.float32)


@_kind
def all_negative(problem: Problem) -> Routing:
    """Every biased score is below zero: a mask of 0 instead of the lowest finite number outranks them."""
    bias = np.float32(-3.0) - np.abs(_normals(problem, BIAS, problem.geometry.num_experts)) * np.float32(0.5)
    return _logit_noise(problem), bias


@_kind
def underflow(problem: Problem) -> Routing:
    """Sigmoids that are tiny or exactly 0 (logits -30, -44, -120 in turn): the weights' sum meets its 1e-20."""
    depth = np.array([-30.0, -44.0, -120.0], dtype=np.float32)[np.arange(problem.seq_len) % 3]
    return _logit_noise(problem) + depth[:, None], _distinct_bf16(problem, 0.5)


@_kind
def large_bias(problem: Problem) -> Routing:
    """Sigmoids near 4e-8 beside biases of 8 and more: (s + bias) - bias cancels to nothing."""
    return _logit_noise(problem) - np.float32(17.0), _distinct_bf16(problem, 8.0)


@_kind
def skewed(problem: Problem) -> Routing:
    """A few experts are popular (logits fall with a drawn rank), so runs of very different length come about."""
    order = Stream(problem.seed, ORDER).permutation(problem.geometry.num_experts).astype(np.float32)
    slope = np.float32(3.0) * (np.float32(1.0) - order / np.float32(problem.geometry.num_experts))
    return _logit_noise(problem) * np.float32(0.75) + slope - np.float32(1.5), np.zeros_like(order)


def fib_random(problem: Problem) -> Routing:
    """As FlashInfer-Bench draws inputs of type 'random': logits N(0, 1), bias N(0, 1) rounded towards zero."""
    return _logit_noise(problem), _normals(problem, BIAS, problem.geometry.num_experts)


ELSEWHERE["fib_random"] = fib_random
