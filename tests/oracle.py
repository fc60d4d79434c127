"""A second oracle, written apart from moeref: numpy float64, loops over tokens and chosen experts, Python sorting.

Shares no code with moeref.reference or moeref.quant: e4m3 is decoded from its bit layout, scales are looked up element
by element's block, the two halves of gemm1 are multiplied apart, and nothing is permuted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

F64 = NDArray[np.float64]


@dataclass
class Answer:
    """What the oracle finds."""

    ids: list[list[int]]  # a token's chosen experts, best first
    weights: F64  # [T, K]
    output: F64  # [T, H], not rounded
    spread: F64  # [T, H] how far a relative error of 1 in every product of gemm1 can move the output
    size: F64  # [T, H] the sums of gemm2 and combine over magnitudes
    rows: dict[tuple[int, int], dict[str, F64]]  # (token, global expert) -> up, gate, act, down


def decode_e4m3(byte: int) -> float:
    """Value of an e4m3fn byte: sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinity; 0x7f and 0xff are NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * (mantissa / 8.0) * 2.0**-6
    return sign * (1.0 + mantissa / 8.0) * 2.0 ** (exponent - 7)


DECODED: F64 = np.array([decode_e4m3(byte) for byte in range(256)])


def fp8(tensor: torch.Tensor) -> F64:
    """Values of an e4m3 tensor."""
    return DECODED[tensor.contiguous().view(torch.uint8).numpy()]


def choose(biased: list[float], n_group: int, topk_group: int, top_k: int) -> list[int]:
    """The chosen experts of one token, best first; among equals the lower id."""
    size = len(biased) // n_group
    group_score = [sum(sorted(biased[i * size : (i + 1) * size], reverse=True)[:2]) for i in range(n_group)]
    kept = sorted(range(n_group), key=lambda group: (-group_score[group], group))[:topk_group]
    reachable = [expert for expert in range(len(biased)) if expert // size in kept]
    return sorted(reachable, key=lambda expert: (-biased[expert], expert))[:top_k]


def weights_of(scores: list[float], factor: float) -> list[float]:
    """Routing weights of the chosen experts' unbiased scores."""
    total = 0.0
    for score in scores:
        total += score
    return [score / (total + 1e-20) * factor for score in scores]


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    if x >= 0:
        return 1.0 / (1.0 + float(np.exp(-x)))
    grown = float(np.exp(x))
    return grown / (1.0 + grown)


def route(inputs: Any, given: list[list[int]] | None = None) -> tuple[list[list[int]], F64]:
    """ids and weights of every token; the weights of the given ids where there are some."""
    g = inputs.geometry
    bias = [float(b) for b in inputs.routing_bias]
    ids, weights = [], []
    for token, row in enumerate(inputs.routing_logits.tolist()):
        scores = [sigmoid(logit) for logit in row]
        biased = [s + b for s, b in zip(scores, bias, strict=True)]
        chosen = given[token] if given is not None else choose(biased, g.n_group, g.topk_group, g.top_k)
        ids.append(chosen)
        weights.append(weights_of([scores[e] for e in chosen], inputs.routed_scaling_factor))
    return ids, np.array(weights, dtype=np.float64).reshape(len(ids), g.top_k)


def _expanded(scale: F64, rows: int, columns: int) -> F64:
    """A block scale for each element, by index."""
    return scale[np.ix_(np.arange(rows) // 128, np.arange(columns) // 128)]


@dataclass
class _Expert:
    up: F64  # [I, H]
    gate: F64  # [I, H]
    down: F64  # [H, I]


def _expert(inputs: Any, slot: int) -> _Expert:
    hidden, inner = inputs.geometry.hidden_size, inputs.geometry.intermediate_size
    first = fp8(inputs.gemm1_weights[slot])
    first = first * _expanded(inputs.gemm1_weights_scale[slot].double().numpy(), 2 * inner, hidden)
    second = fp8(inputs.gemm2_weights[slot])
    second = second * _expanded(inputs.gemm2_weights_scale[slot].double().numpy(), hidden, inner)
    return _Expert(first[:inner], first[inner:], second)


def experts(inputs: Any, ids: list[list[int]], weights: F64) -> Answer:
    """The expert part for a given routing."""
    g = inputs.geometry
    output, spread, size = (np.zeros((len(ids), g.hidden_size)) for _ in range(3))
    rows: dict[tuple[int, int], dict[str, F64]] = {}
    known: dict[int, tuple[_Expert, _Expert]] = {}
    for token, chosen in enumerate(ids):
        scale = inputs.hidden_states_scale[:, token].double().numpy()
        x = fp8(inputs.hidden_states[token]) * scale[np.arange(g.hidden_size) // 128]
        for expert in sorted(chosen):
            slot = expert - inputs.local_expert_offset
            if not 0 <= slot < g.num_local_experts:
                continue
            if slot not in known:
                it = _expert(inputs, slot)
                known[slot] = it, _Expert(np.abs(it.up), np.abs(it.gate), np.abs(it.down))
            it, magnitude = known[slot]
            up, gate = it.up @ x, it.gate @ x
            act = up * gate * np.array([sigmoid(value) for value in gate])
            down = it.down @ act
            weight = weights[token, chosen.index(expert)]
            output[token] += weight * down
            # |silu'| <= 1.1 and |silu(g)| <= |g|
            moved = 1.1 * (magnitude.gate @ np.abs(x)) * np.abs(up) + np.abs(gate) * (magnitude.up @ np.abs(x))
            spread[token] += abs(weight) * (magnitude.down @ moved)
            size[token] += abs(weight) * (magnitude.down @ np.abs(act))
            rows[token, expert] = {"up": up, "gate": gate, "act": act, "down": down}
    return Answer(ids, weights, output, spread, size, rows)


def moe(inputs: Any) -> Answer:
    """The whole layer."""
    return experts(inputs, *route(inputs))
