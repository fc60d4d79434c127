"""Value kinds: how hidden_states, weights and their scales are drawn. One entry of VALUES a kind.

Payloads are e4m3 bytes looked up in 256-entry tables; scales are integers times powers of two. Each expert's weights
come from streams of its own, keyed by its global id, so shards of one model agree and unhit experts cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeref.draw import F32, FIXED_POINT, U8, Stream, e4m3_normal_table, translate
from moeref.spec import BLOCK, Geometry, Problem, SpecError

HIDDEN, HIDDEN_SCALE, GEMM1, GEMM1_SCALE, GEMM2, GEMM2_SCALE, ZEROS = 11, 12, 13, 14, 15, 16, 17  # Philox fields
UNIT = np.float32(2.0**-FIXED_POINT)

Scale = Callable[[Stream, int, float], F32]


@dataclass(frozen=True)
class Values:
    """One value kind. A table holds 256 e4m3 bytes; a scale function maps (stream, count, typical size) to float32."""

    hidden_table: bytes
    weight_table: bytes
    hidden_scale: Scale
    weight_scale: Scale
    hidden_size: Callable[[Geometry], float]  # typical scale of an activation block
    gemm1_size: Callable[[Geometry], float]
    gemm2_size: Callable[[Geometry], float]
    zero_blocks: bool = False


def _signed_normal(stream: Stream, count: int, size: float) -> F32:
    """size * N(0, 1): half of the scales are negative."""
    return stream.normals(count).astype(np.float32) * UNIT * np.float32(size)


def _jittered(stream: Stream, count: int, size: float) -> F32:
    """size * 2**u with u one of 64 steps in [-1/2, 1/2): as amax/448 of real blocks varies."""
    draws: F32 = _jitter_table()[stream.below(64, count)] * np.float32(size)
    return draws


def _jitter_table() -> F32:
    """[64] 2**(i/64 - 1/2), rounded to multiples of 2**-12."""
    return np.array([round(2.0 ** (i / 64 - 0.5) * 4096) for i in range(64)], dtype=np.float32) / np.float32(4096)


def _powers(stream: Stream, count: int, size: float) -> F32:
    """size * 2**{-4 .. 3}: neighbouring blocks differ by up to 128, so a scale from the wrong block shows."""
    draw = stream.below(512, count)  # one word a scale, so that the first scales do not depend on count
    power, step = (draw >> 6).astype(np.int32) - 4, draw & 63
    draws: F32 = np.ldexp(_jitter_table()[step], power) * np.float32(size)
    return draws


# Payload widths. A block's largest magnitude is 448 by construction of amax/448; for n normal draws amax is about
# 2.8 std (n = 128) and 4.3 std (n = 128 * 128).
_ACTIVATION = e4m3_normal_table(160.0, 448.0)
_WEIGHT = e4m3_normal_table(104.0, 448.0)
_PUBLISHED = e4m3_normal_table(1.0, 2.0)
_OUTLIER = e4m3_normal_table(8.0, 448.0)[:127] + b"\x7e" + e4m3_normal_table(8.0, 448.0)[128:255] + b"\xfe"

_ACTIVATION_STD = 160.0
_WEIGHT_STD = 104.0
GATE_STD = 1.7
"""Spread of gemm1's result under model-like values: silu is curved there, neither linear nor a ramp."""


def _power_of_two(value: float) -> float:
    """The power of two nearest below: sizes stay exact in float32 whatever the platform's sqrt."""
    return float(2.0 ** math.floor(math.log2(value)))


def _unit_activation(geometry: Geometry) -> float:
    return 2.0**-7  # times 160 gives 1.25


def _gemm1(geometry: Geometry) -> float:
    return _power_of_two(GATE_STD / (math.sqrt(geometry.hidden_size) * _WEIGHT_STD * 1.25)) * 1.25


def _gemm2(geometry: Geometry) -> float:
    return _power_of_two(1.0 / (math.sqrt(geometry.intermediate_size) * _WEIGHT_STD)) * 1.25


def _one(geometry: Geometry) -> float:
    return 1.0


def _model(
    hidden_size: Callable[[Geometry], float] = _unit_activation,
    scale: Scale = _jittered,
    hidden_table: bytes = _ACTIVATION,
    zero_blocks: bool = False,
) -> Values:
    return Values(hidden_table, _WEIGHT, scale, scale, hidden_size, _gemm1, _gemm2, zero_blocks)


VALUES: dict[str, Values] = {
    # as FlashInfer-Bench draws 'random': fp8 of a normal clamped to +-2, every scale a plain normal
    "published": Values(_PUBLISHED, _PUBLISHED, _signed_normal, _signed_normal, _one, _one, _one),
    # realistic sizes, quantised by amax/448; gates of spread 1.7
    "model_like": _model(),
    # block scales over eight powers of two
    "heterogeneous": _model(scale=_powers),
    # zero tokens, zero activation blocks, zero weight blocks; every fourth expert's gemm1 weights are all zero
    "zero_block": _model(zero_blocks=True),
    # outputs near 1e-9: any absolute tolerance hides everything, and float16 does not hold the activations' scales
    "tiny": _model(lambda g: 2.0**-22),
    # outputs far above 65504, float16's largest
    "huge": _model(lambda g: 2.0**5),
    # one value in 128 is +-448, the rest below 30: a coarser amax or a clipped one shows
    "outlier": _model(lambda g: 2.0**-5, hidden_table=_OUTLIER),
}


def kind_of(problem: Problem) -> Values:
    """The problem's value kind. Raises SpecError for an unknown one."""
    if problem.values not in VALUES:
        raise SpecError(f"unknown value kind '{problem.values}': expected one of {', '.join(VALUES)}")
    return VALUES[problem.values]


def draw_hidden(problem: Problem) -> tuple[U8, F32]:
    """hidden_states bytes [T, H] and scales [T, H/128] (not yet transposed)."""
    kind, g, tokens = kind_of(problem), problem.geometry, problem.seq_len
    blocks = g.hidden_size // BLOCK
    payload = translate(Stream(problem.seed, HIDDEN).octets(tokens * g.hidden_size), kind.hidden_table)
    payload = payload.reshape(tokens, g.hidden_size)
    scale = kind.hidden_scale(Stream(problem.seed, HIDDEN_SCALE), tokens * blocks, kind.hidden_size(g))
    if kind.zero_blocks:
        payload = payload.copy()
        draws = Stream(problem.seed, ZEROS).below(8, tokens * blocks).reshape(tokens, blocks)
        payload.reshape(tokens, blocks, BLOCK)[draws == 0] = 0
        payload[3::5] = 0  # whole tokens
    return payload, scale.reshape(tokens, blocks)


def draw_weights(problem: Problem, expert: int) -> tuple[U8, U8]:
    """gemm1_weights bytes [2I, H] and gemm2_weights bytes [H, I] of the expert with that global id."""
    kind, g = kind_of(problem), problem.geometry
    up_gate, hidden, inner = 2 * g.intermediate_size, g.hidden_size, g.intermediate_size
    gemm1 = translate(Stream(problem.seed, GEMM1, expert).octets(up_gate * hidden), kind.weight_table)
    gemm2 = translate(Stream(problem.seed, GEMM2, expert).octets(hidden * inner), kind.weight_table)
    gemm1, gemm2 = gemm1.reshape(up_gate, hidden), gemm2.reshape(hidden, inner)
    if kind.zero_blocks:
        gemm1, gemm2 = gemm1.copy(), gemm2.copy()
        zero = Stream(problem.seed, ZEROS, expert + 1)
        _clear_blocks(gemm1, zero, everything=expert % 4 == 3)
        _clear_blocks(gemm2, zero, everything=False)
    return gemm1, gemm2


def _clear_blocks(payload: U8, stream: Stream, everything: bool) -> None:
    """Zero one 128x128 block in eight, or all, in place."""
    rows, columns = payload.shape[0] // BLOCK, payload.shape[1] // BLOCK
    hit = (stream.below(8, rows * columns).reshape(rows, columns) == 0) | everything
    for row, column in np.argwhere(hit):
        payload[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = 0


def draw_weight_scales(problem: Problem, expert: int) -> tuple[F32, F32]:
    """gemm1_weights_scale [2I/128, H/128] and gemm2_weights_scale [H/128, I/128] of that global id."""
    kind, g = kind_of(problem), problem.geometry
    n1, n2, k = 2 * g.intermediate_size // BLOCK, g.intermediate_size // BLOCK, g.hidden_size // BLOCK
    gemm1 = kind.weight_scale(Stream(problem.seed, GEMM1_SCALE, expert), n1 * k, kind.gemm1_size(g))
    gemm2 = kind.weight_scale(Stream(problem.seed, GEMM2_SCALE, expert), k * n2, kind.gemm2_size(g))
    return gemm1.reshape(n1, k), gemm2.reshape(k, n2)
