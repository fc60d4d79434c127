"""Integers from published, stable streams, and the integer tables that turn them into values.

The only source of randomness is the raw word stream of Philox4x64-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) as numpy's bit generator emits it, whose stream numpy keeps stable; no distribution code of
numpy or torch is used. Words index tables built from integers, so a value never depends on a library's version,
on the device, or on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

FIXED_POINT = 20
"""Normal draws are integers times 2**-20: exact in float32, |x| < 4.33."""


class Stream:
    """Raw words of one Philox stream, keyed by (seed, field, index). Reading goes on where the last read ended."""

    def __init__(self, seed: int, field: int, index: int = 0) -> None:
        key = np.array([seed, (field << 32) | (index & 0xFFFFFFFF)], dtype=np.uint64)
        self._philox = np.random.Philox(key=key)

    def octets(self, count: int) -> U8:
        """The next `count` bytes, little-endian within a word; a last partial word is used up."""
        words: NDArray[np.uint64] = self._philox.random_raw((count + 7) // 8).astype("<u8", copy=False)
        return words.view(np.uint8)[:count]

    def u32(self, count: int) -> NDArray[np.uint32]:
        """The next `count` 32-bit integers."""
        return self.octets(4 * count).view("<u4")

    def below(self, limit: int, count: int) -> NDArray[np.int64]:
        """`count` integers in 0 .. limit-1, by multiply and shift (bias below 2**-20 for limit < 2**12)."""
        return ((self.u32(count).astype(np.uint64) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)

    def normals(self, count: int) -> I32:
        """`count` standard normal draws as integers in units of 2**-FIXED_POINT, within +-4.33 (the last quantile)."""
        word = self.u32(count)
        coarse = _normal_table()[word >> np.uint32(16)]  # units of 2**-16
        draws: I32 = coarse * np.int32(16) + (word & np.uint32(15)).astype(np.int32)
        return draws

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A permutation of 0 .. count-1: the order of 64-bit words, ties (never seen) by position."""
        return np.argsort(self.octets(8 * count).view("<u8"), kind="stable")


@lru_cache(maxsize=1)
def _normal_table() -> I32:
    """[65536] inverse normal distribution at (i + 1/2) / 65536, rounded to units of 2**-16, odd-symmetric."""
    normal = NormalDist()
    half = [round(normal.inv_cdf((i + 0.5) / 65536 + 0.5) * 65536) for i in range(32768)]
    return np.array([-value for value in reversed(half)] + half, dtype=np.int32)


@lru_cache(maxsize=1)
def e4m3_grid() -> tuple[float, ...]:
    """The 127 finite non-negative e4m3fn values; position is the byte (0x00 .. 0x7e)."""
    subnormal = [mantissa * 2.0**-9 for mantissa in range(8)]
    normal = [(8 + byte % 8) * 2.0 ** (byte // 8 - 10) for byte in range(8, 127)]
    return tuple(subnormal + normal)


def e4m3_byte(value: float) -> int:
    """The e4m3fn byte nearest to value: ties to even, saturating at 448."""
    grid = e4m3_grid()
    magnitude = min(abs(value), grid[-1])
    byte = min(range(len(grid)), key=lambda i: (abs(grid[i] - magnitude), i % 2))
    return byte | (0x80 if value < 0 else 0)


@lru_cache(maxsize=32)
def e4m3_normal_table(std: float, clip: float) -> bytes:
    """256 e4m3 bytes at equal-probability quantiles of a normal of that std, clipped to +-clip; byte -> e4m3 byte."""
    normal = NormalDist()
    magnitudes = [min(std * normal.inv_cdf((i + 0.5) / 256 + 0.5), clip) for i in range(128)]
    return bytes(e4m3_byte(m) for m in magnitudes) + bytes(e4m3_byte(m) | 0x80 for m in magnitudes)


def translate(octets: U8, table: bytes) -> U8:
    """Each byte looked up in a 256-entry table (bytes.translate: one pass, no index array)."""
    return np.frombuffer(octets.tobytes().translate(table), dtype=np.uint8)
