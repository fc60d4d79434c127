"""The word stream is Philox4x64-10 as published, and the tables are the pinned ones."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeref import values
from moeref.draw import FIXED_POINT, Stream, _normal_table, e4m3_byte, e4m3_grid, e4m3_normal_table, translate

WORD = 2**64

# Once published, these never change: every pinned digest and golden file stands on them.
PINNED_WORDS = ["0x68f2a1cb1907a6f3", "0x78b3b0d75598e6fc", "0xb354779561a88e46"]
PINNED_NORMAL = "ee46eda6f743ea9b"
PINNED_TABLES = {
    "_ACTIVATION": "1008592439d00767",
    "_WEIGHT": "224cf3abf1725ea3",
    "_PUBLISHED": "eef50a3d6d7293f1",
    "_OUTLIER": "891c62d0d81b301f",
}


def philox(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox4x64-10 (Salmon et al., SC 2011), in plain integers."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x0, WORD)
        high1, low1 = divmod(0xCA5A826395121157 * x2, WORD)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return [x0, x1, x2, x3]


# The three known answers of Random123's kat_vectors for philox4x64 10: counter, key, result.
KNOWN_ANSWERS = [
    (
        [0] * 4,
        [0] * 2,
        [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
    ),
    (
        [WORD - 1] * 4,
        [WORD - 1] * 2,
        [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
    ),
    (
        [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
        [0x452821E638D01377, 0xBE5466CF34E90C6C],
        [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_plain_philox_gives_the_published_known_answers(counter: list[int], key: list[int], words: list[int]):
    assert philox(counter, key) == words


@given(seed=st.integers(0, 2**63 - 1), field=st.integers(0, 99), index=st.integers(-50, 2**20))
def test_a_stream_is_philox_from_counter_one_on(seed: int, field: int, index: int) -> None:
    """Key (seed, field * 2**32 + index mod 2**32); numpy counts up before each block."""
    key = [seed, (field << 32) | (index % 2**32)]
    expected = [word for block in (1, 2, 3) for word in philox([block, 0, 0, 0], key)]
    octets = Stream(seed, field, index).octets(96)
    assert octets.tobytes() == b"".join(word.to_bytes(8, "little") for word in expected)


def test_first_words_are_the_pinned_ones() -> None:
    first = [hex(int(Stream(*key).octets(8).view("<u8")[0])) for key in ((0, 1), (7, 13, 5), (2**63 - 1, 17, -1))]
    assert first == PINNED_WORDS


def test_reads_go_on_where_the_last_one_ended() -> None:
    whole, parts = Stream(3, 4).octets(64), Stream(3, 4)
    assert np.concatenate([parts.octets(16), parts.octets(48)]).tolist() == whole.tolist()
    parts = Stream(3, 4)
    parts.octets(3)  # uses up its word
    assert parts.octets(8).tolist() == whole[8:16].tolist()
    assert Stream(3, 4).octets(0).shape == (0,)


def test_u32_and_below_and_permutation_are_functions_of_the_octets() -> None:
    octets = Stream(9, 2).octets(4000).tobytes()
    words = [int.from_bytes(octets[i : i + 4], "little") for i in range(0, 4000, 4)]
    assert Stream(9, 2).u32(1000).tolist() == words
    assert Stream(9, 2).below(48, 1000).tolist() == [word * 48 // 2**32 for word in words]
    keys = [int.from_bytes(octets[i : i + 8], "little") for i in range(0, 4000, 8)]
    assert Stream(9, 2).permutation(500).tolist() == sorted(range(500), key=keys.__getitem__)
    table = _normal_table()
    drawn = [int(table[word >> 16]) * 16 + word % 16 for word in words]
    assert Stream(9, 2).normals(1000).tolist() == drawn


def test_normals_are_normal() -> None:
    draws = Stream(1, 1).normals(100_000).astype(np.float64) * 2.0**-FIXED_POINT
    # 100,000 draws: the mean's standard error is 0.0032, the variance's 0.0045; five of each
    assert abs(draws.mean()) < 0.016 and abs(draws.var() - 1) < 0.023
    assert np.abs(draws).max() < 4.33
    assert (draws.astype(np.float32) == draws).all()  # exact in float32


# --- tables


def digest(octets: bytes) -> str:
    return hashlib.sha256(octets).hexdigest()[:16]


def test_the_normal_table_is_the_pinned_one() -> None:
    table = _normal_table()
    assert table.shape == (65536,) and digest(table.astype("<i4").tobytes()) == PINNED_NORMAL
    assert (table == -table[::-1]).all() and (np.diff(table) >= 0).all()


def distance_to_a_boundary(value: float) -> float:
    """How far a value is from where round() changes its answer."""
    return abs(value - math.floor(value) - 0.5)


def test_no_table_entry_depends_on_the_last_bits_of_a_library() -> None:
    """Every entry is rounded from at least 1e-7 away from a boundary; libm's functions are good to 1e-10 here (values
    below 3e5, 2**-52 relative, some units in the last place)."""
    normal = NormalDist()
    exact = [normal.inv_cdf((i + 0.5) / 65536 + 0.5) * 65536 for i in range(32768)]
    assert min(map(distance_to_a_boundary, exact)) > 1e-7
    assert min(distance_to_a_boundary(2.0 ** (i / 64 - 0.5) * 4096) for i in range(64)) > 1e-7
    grid = e4m3_grid()
    boundaries = [(a + b) / 2 for a, b in pairwise(grid)]
    for std in (1.0, 8.0, 104.0, 160.0):
        quantiles = [std * normal.inv_cdf((i + 0.5) / 256 + 0.5) for i in range(128)]
        assert min(abs(q - b) / b for q in quantiles for b in boundaries) > 1e-7


@pytest.mark.parametrize("name", ["_ACTIVATION", "_WEIGHT", "_PUBLISHED", "_OUTLIER"])
def test_the_payload_tables_are_the_pinned_ones(name: str) -> None:
    table = getattr(values, name)
    assert len(table) == 256 and digest(table) == PINNED_TABLES[name]
    assert 0x7F not in table and 0xFF not in table  # NaN


@pytest.mark.parametrize(("std", "clip"), [(1.0, 2.0), (104.0, 448.0), (0.01, 448.0)])
def test_a_normal_table_is_odd_and_ascending(std: float, clip: float) -> None:
    table = e4m3_normal_table(std, clip)
    assert [byte | 0x80 for byte in table[:128]] == list(table[128:])
    magnitudes = oracle.DECODED[list(table[:128])]
    assert (np.diff(magnitudes) >= 0).all() and magnitudes.max() <= clip
    # quantiles rounded to 3 mantissa bits: each within 2**-4, or half of the subnormals' 2**-9
    exact = np.array([min(std * NormalDist().inv_cdf((i + 0.5) / 256 + 0.5), clip) for i in range(128)])
    assert (np.abs(magnitudes - exact) <= np.maximum(exact * 2.0**-4, 2.0**-10)).all()


def test_translate_looks_up() -> None:
    table = bytes(reversed(range(256)))
    assert translate(np.array([0, 1, 255, 7], dtype=np.uint8), table).tolist() == [255, 254, 0, 248]


# --- e4m3


def torch_byte(value: float) -> int:
    return int(torch.tensor([value], dtype=torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)[0])


def test_the_grid_is_e4m3() -> None:
    assert list(e4m3_grid()) == oracle.DECODED[:127].tolist()
    octets = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert octets.double().tolist() == list(e4m3_grid())


def test_e4m3_byte_of_every_representable_value_and_midpoint() -> None:
    grid = e4m3_grid()
    for byte, value in enumerate(grid):
        assert e4m3_byte(value) == byte == torch_byte(value)
        assert value == 0 or e4m3_byte(-value) == byte | 0x80 == torch_byte(-value)
    for low, high in pairwise(grid):
        middle = (low + high) / 2  # exact in float32: one more bit
        for value in (middle, middle * (1 - 2.0**-20), middle * (1 + 2.0**-20)):
            assert e4m3_byte(value) == torch_byte(value)


@given(st.floats(-448, 448, width=32).filter(lambda value: value != 0))
def test_e4m3_byte_is_torch_s_cast(value: float) -> None:
    """Down to -0, which e4m3_byte has for small negative numbers and torch too."""
    assert e4m3_byte(value) == torch_byte(value)
    assert e4m3_byte(-value) == e4m3_byte(value) ^ 0x80


@given(st.floats(448, 1e30))
def test_e4m3_byte_saturates(value: float) -> None:
    assert e4m3_byte(value) == 0x7E and e4m3_byte(-value) == 0xFE
