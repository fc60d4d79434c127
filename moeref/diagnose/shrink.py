"""From a failing problem to the smallest one that still fails, by moves that know what a problem is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from moeref.routings import ROUTINGS, draw_routing
from moeref.spec import BLOCK, DEFAULT_SCALING, Geometry, Problem, SpecError
from moeref.values import VALUES

PLAIN_ROUTINGS = ("one_expert", "balanced", "iid", "deepseek_like", "skewed")
PLAIN_VALUES = ("model_like", "published", "heterogeneous")
FEW_TOKENS = 40
"""Below this every smaller seq_len is tried in turn: what fails at 17 rows need not fail at 18."""


def shrink(problem: Problem, fails: Callable[[Problem], bool], budget: int = 600) -> tuple[Problem, int]:
    """(the smallest failing problem found, how many problems were tried). `fails(problem)` is taken to be True.

    Moves are tried plainest result first; the first that still fails is kept, and all are tried again from there,
    until none helps or `budget` problems were tried.
    """
    tried: set[Problem] = {problem}
    moved = True
    while moved and len(tried) <= budget:
        moved = False
        for smaller in _moves(problem):
            if smaller in tried or not possible(smaller):
                continue
            tried.add(smaller)
            if fails(smaller):
                problem, moved = smaller, True
                break
            if len(tried) > budget:
                break
    return problem, len(tried) - 1


def _moves(problem: Problem) -> Iterator[Problem]:
    """Plainer problems, the boldest first: one expert that gets every token, at every small number of rows."""
    smallest = Geometry(1, 1, BLOCK, BLOCK, 1, 1, 1)
    if problem.geometry != smallest:
        for seq_len in dict.fromkeys((problem.seq_len, *_fewer(problem.seq_len))):
            yield from _valid(problem, geometry=smallest, offset=0, routing=PLAIN_ROUTINGS[0], seq_len=seq_len)
    for geometry in _geometries(problem.geometry):
        for offset in dict.fromkeys((0, problem.offset, geometry.num_experts - geometry.num_local_experts)):
            for routing in dict.fromkeys((PLAIN_ROUTINGS[0], problem.routing)):
                yield from _valid(problem, geometry=geometry, offset=offset, routing=routing)
    for routing in _before(problem.routing, (*PLAIN_ROUTINGS, *ROUTINGS)):
        yield from _valid(problem, routing=routing)
    for seq_len in _fewer(problem.seq_len):
        yield from _valid(problem, seq_len=seq_len)
    for values in _before(problem.values, (*PLAIN_VALUES, *VALUES)):
        yield from _valid(problem, values=values)
    for change in ({"offset": 0}, {"factor": DEFAULT_SCALING}, {"seed": 0}):
        yield from _valid(problem, **change)


def _geometries(g: Geometry) -> Iterator[Geometry]:
    """Smaller geometries: one block of H, of I; one local expert; one group; fewer experts and choices."""
    narrow = {"hidden_size": BLOCK, "intermediate_size": BLOCK}
    halved = g.num_experts // 2
    changes: tuple[dict[str, int], ...] = (
        narrow,
        {"hidden_size": BLOCK},
        {"intermediate_size": BLOCK},
        {"num_local_experts": 1},
        {"n_group": 1, "topk_group": 1},
        {"top_k": 1},
        {"num_experts": halved, "num_local_experts": min(g.num_local_experts, halved)},
        {"num_local_experts": g.num_local_experts // 2},
        {"top_k": g.top_k - 1},
    )
    for change in changes:
        try:
            smaller = replace(g, **change)
        except SpecError:
            continue
        if smaller != g:
            yield smaller


def _fewer(seq_len: int) -> Iterator[int]:
    """Smaller seq_lens: halves while there are many, then each from the least on."""
    if seq_len > FEW_TOKENS:
        yield from (seq_len // 4, seq_len // 2, 3 * seq_len // 4, seq_len - seq_len % 16, seq_len - 16)
    yield from range(1, min(seq_len, FEW_TOKENS))
    if seq_len > FEW_TOKENS:
        yield seq_len - 1


def _before(kind: str, order: tuple[str, ...]) -> list[str]:
    """The kinds that are plainer than this one."""
    names = list(dict.fromkeys(order))
    return names[: names.index(kind)]


def _valid(problem: Problem, **change: object) -> Iterator[Problem]:
    try:
        yield replace(problem, **change)  # type: ignore[arg-type]
    except SpecError:
        return


def possible(problem: Problem) -> bool:
    """False where the routing kind cannot be had at this geometry and offset."""
    try:
        draw_routing(replace(problem, seq_len=0))
    except SpecError:
        return False
    return True
