"""Hypothesis strategies that draw Problems: integers and names, never tensors, so that failures shrink and print.

Everything shrinks towards the plainest problem: few tokens, one group, one local expert, H = I = 128, offset 0, the
first routing and value kind of the lists below, seed 0.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from moeref.diagnose.shrink import PLAIN_ROUTINGS, PLAIN_VALUES, possible
from moeref.routings import ROUTINGS
from moeref.spec import BLOCK, Geometry, Problem
from moeref.values import VALUES

EDGES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
"""Row counts beside which kernels' tiles end."""


def _plainest_first(kinds: tuple[str, ...], everything: dict[str, object]) -> list[str]:
    return [*kinds, *(name for name in everything if name not in kinds)]


routing_kinds = st.sampled_from(_plainest_first(PLAIN_ROUTINGS, dict(ROUTINGS)))
"""Names of ROUTINGS."""

value_kinds = st.sampled_from(_plainest_first(PLAIN_VALUES, dict(VALUES)))
"""Names of VALUES."""


def seq_lens(most: int) -> st.SearchStrategy[int]:
    """0 .. most tokens, half of the time beside a tile's edge."""
    edges = [edge for edge in EDGES if edge <= most]
    return st.one_of(st.integers(0, most), st.sampled_from(edges)) if edges else st.integers(0, most)


@st.composite
def geometries(draw: Callable[[st.SearchStrategy[int]], int], most_blocks: int = 3) -> Geometry:
    """Valid geometries: up to 8 groups of up to 8 experts, H and I of up to `most_blocks` blocks of 128."""
    top_k = draw(st.integers(1, 8))
    n_group = draw(st.sampled_from([1, 2, 4, 8]))
    topk_group = draw(st.integers(1, n_group))
    least = -(-top_k // topk_group)
    group_size = draw(st.integers(least, max(8, least)))
    num_experts = n_group * group_size
    return Geometry(
        num_experts=num_experts,
        num_local_experts=draw(st.integers(1, num_experts)),
        hidden_size=BLOCK * draw(st.integers(1, most_blocks)),
        intermediate_size=BLOCK * draw(st.integers(1, most_blocks)),
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
    )


@st.composite
def problems(
    draw: Callable[[st.SearchStrategy[object]], object],
    geometry: st.SearchStrategy[Geometry] | None = None,
    most_tokens: int = 80,
) -> Problem:
    """Problems of every kind; `geometry` narrows the geometries, e.g. st.just(PRESETS['dsv3'])."""
    shape = draw(geometry if geometry is not None else geometries())
    assert isinstance(shape, Geometry)
    seq_len = draw(seq_lens(most_tokens))
    offset = draw(st.integers(1 - shape.num_local_experts, shape.num_experts - 1))
    routing, values = draw(routing_kinds), draw(value_kinds)
    seed, factor = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([2.5, 1.0, 2.827]))
    assert isinstance(seq_len, int) and isinstance(offset, int) and isinstance(seed, int)
    assert isinstance(routing, str) and isinstance(values, str) and isinstance(factor, float)
    problem = Problem(shape, seq_len, offset, routing, values, seed, factor)
    if not possible(problem):
        problem = Problem(shape, seq_len, offset, "iid", values, seed, factor)
    return problem
