"""Problems drawn by Hypothesis, in items of up to 25, so that workers share them; each item is repeated by its seed."""

from __future__ import annotations

import pytest

from moeref.testing.items import Judge

pytestmark = pytest.mark.moe_fuzz

MOST = 25


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As many items as --moe-examples needs."""
    examples = metafunc.config.getoption("moe_examples")
    first = metafunc.config.getoption("moe_seed")
    sizes = [min(MOST, examples - done) for done in range(0, examples, MOST)]
    drawn = [(first * 10_000 + number, size) for number, size in enumerate(sizes)]
    metafunc.parametrize(("seed", "examples"), drawn, ids=[f"seed{seed}x{size}" for seed, size in drawn])


def test_fuzz(seed: int, examples: int, judge: Judge) -> None:
    """As `moeref fuzz`."""
    judge(lambda session: session.fuzz(seed, examples))
