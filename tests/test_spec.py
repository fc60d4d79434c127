"""Names and what they stand for: round trips, and refusals that help."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeref.routings import ROUTINGS
from moeref.spec import DEFAULT_SCALING, EXACT, PRESETS, Geometry, Problem, Recipe, SpecError
from moeref.values import VALUES

SMALL = PRESETS["small"]


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any sizes at all that do not contradict each other."""
    n_group, size = draw(st.integers(1, 64)), draw(st.integers(1, 500))
    topk_group = draw(st.integers(1, n_group))
    return Geometry(
        num_experts=n_group * size,
        num_local_experts=draw(st.integers(1, n_group * size)),
        hidden_size=128 * draw(st.integers(1, 200)),
        intermediate_size=128 * draw(st.integers(1, 200)),
        top_k=draw(st.integers(1, topk_group * size)),
        n_group=n_group,
        topk_group=topk_group,
    )


@st.composite
def any_problems(draw: st.DrawFn) -> Problem:
    geometry = draw(st.one_of(geometries(), st.sampled_from(sorted(PRESETS.values(), key=astuple))))
    return Problem(
        geometry,
        seq_len=draw(st.integers(0, 10**6)),
        offset=draw(st.integers(1 - geometry.num_local_experts, geometry.num_experts - 1)),
        routing=draw(st.sampled_from(sorted(ROUTINGS))),
        values=draw(st.sampled_from(sorted(VALUES))),
        seed=draw(st.integers(0, 2**63 - 1)),
        factor=draw(st.one_of(st.just(2.5), st.integers(-5, 5), st.floats(allow_nan=False, allow_infinity=False))),
    )


@given(any_problems())
def test_a_problem_s_name_gives_the_problem_back(problem: Problem) -> None:
    again = Problem.parse(problem.name)
    assert again == problem and again.name == problem.name
    assert str(again.factor) == str(float(problem.factor))  # -0.0 too


@given(any_problems(), any_problems())
def test_different_problems_have_different_names(one: Problem, other: Problem) -> None:
    assert (one == other) == (one.name == other.name) or one.factor == other.factor == 0


@given(geometries())
def test_a_geometry_s_code_and_name_give_it_back(geometry: Geometry) -> None:
    assert Geometry.parse(geometry.code) == geometry == Geometry.parse(geometry.name)
    assert geometry.group_size * geometry.n_group == geometry.num_experts


def test_presets_are_the_models_they_are_named_after() -> None:
    assert PRESETS["dsv3"].code == "e256l32h7168i2048k8g8t4"
    assert PRESETS["kimi"].code == "e384l48h7168i2048k8g1t1"
    assert PRESETS["kimi_full"].code == "e384l384h7168i2048k8g1t1"
    for name, preset in PRESETS.items():
        assert preset.name == name and Geometry.parse(name) == preset == Geometry.parse(preset.code)


def test_known_names() -> None:
    problem = Problem(PRESETS["dsv3"], 16, 32, "iid", "published", 0)
    assert problem.name == "dsv3-t16-o32-iid-published-s0" and problem.factor == DEFAULT_SCALING == 2.5
    assert replace(problem, offset=-3, factor=1e-5).name == "dsv3-t16-o-3-iid-published-s0-f1e-05"
    assert replace(problem, factor=2).name == "dsv3-t16-o32-iid-published-s0-f2.0"


@pytest.mark.parametrize(("offset", "real"), [(-5, range(0, 3)), (0, range(0, 8)), (24, range(24, 32)), (30, [30, 31])])
def test_real_experts_are_those_that_exist(offset: int, real: range | list[int]) -> None:
    assert list(Problem(SMALL, 1, offset, "iid", "published", 0).real_experts) == list(real)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"num_experts": 0}, "every count must be at least 1"),
        ({"num_local_experts": 0}, "every count must be at least 1"),
        ({"top_k": 0}, "every count must be at least 1"),
        ({"n_group": 0}, "every count must be at least 1"),
        ({"topk_group": -1}, "every count must be at least 1"),
        ({"num_experts": 30}, "E=30 must be a multiple of n_group=4"),
        ({"topk_group": 5}, "topk_group=5 exceeds n_group=4"),
        ({"top_k": 17}, "top_k=17 exceeds the 16 experts of 2 groups"),
        ({"num_local_experts": 33}, "L=33 exceeds E=32"),
        ({"hidden_size": 200}, "H=200 must be a positive multiple of 128"),
        ({"hidden_size": 0}, "H=0 must be a positive multiple of 128"),
        ({"intermediate_size": -128}, "I=-128 must be a positive multiple of 128"),
    ],
)
def test_a_geometry_that_contradicts_itself_says_where(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(SpecError, match=f"geometry e.*: .*{says}"):
        replace(SMALL, **sizes)


def test_all_contradictions_are_said_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        Geometry(32, 33, 100, 100, 99, 4, 2)
    for part in ("top_k=99", "L=33", "H=100", "I=100"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "dsv4", "e16l4h256i128k4g4", "e16l4h256i128k4g4t2x", "E16L4H256I128K4G4T2", " small"]
)
def test_an_unknown_geometry_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(SpecError, match=r"unknown geometry .*: expected one of dsv3, kimi, .*or a code like e16l4"):
        Geometry.parse(text)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "unknown problem '': expected GEOMETRY-tT-oOFFSET-ROUTING-VALUES-sSEED"),
        ("small", "expected GEOMETRY-tT-oOFFSET-ROUTING-VALUES-sSEED.*e.g. dsv3-t16-o32-iid-published-s0"),
        ("small-t-o8-iid-published-s0", "unknown problem"),
        ("small-t-1-o8-iid-published-s0", "unknown problem"),
        ("small-t5-o8-iid-published", "unknown problem"),
        ("small-t5-o8-iid-published-s0-f", "unknown problem"),
        ("small-t5-o8-iid-published-s0-fnan", "unknown problem"),
        ("small-t5-o8-iid-published-s0-finf", "unknown problem"),
        ("small-t5-o8-iid-published-s0 ", "unknown problem"),
        ("small-t5-o8-iid-published-s0\n", "unknown problem"),
        ("small-t5-o8-iid-published-s-1", "unknown problem"),
        ("small-t5-o8-iid-published-s0-f1.2.3", "factor '1.2.3' is no number"),
        ("small-t5-o8-iid-published-s0-f1e999", "factor=inf: expected a finite"),
        ("tiny-t5-o8-iid-published-s0", "unknown geometry 'tiny'"),
        ("small-t5-o32-iid-published-s0", "offset=32: expected -7..31, so that at least one of the 8 local experts"),
        ("small-t5-o-8-iid-published-s0", "offset=-8: expected -7..31"),
        (f"small-t5-o8-iid-published-s{2**63}", "expected 0 <= seed < 2"),
        ("e16l4h256i100k4g4t2-t5-o8-iid-published-s0", "I=100 must be a positive multiple of 128"),
    ],
)
def test_a_bad_problem_name_is_refused_with_what_was_expected(name: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Problem.parse(name)


@given(st.text(max_size=40))
def test_any_text_is_a_problem_or_a_spec_error(text: str) -> None:
    try:
        problem = Problem.parse(text)
    except SpecError:
        return
    assert Problem.parse(problem.name) == problem


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seq_len": -1}, "seq_len=-1: expected 0 or more"),
        ({"seed": -1}, "seed=-1: expected 0 <= seed"),
        ({"factor": float("nan")}, "factor=nan: expected a finite"),
        ({"factor": float("-inf")}, "factor=-inf: expected a finite"),
    ],
)
def test_a_problem_that_can_not_be_is_refused(changed: dict[str, float], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        replace(Problem(SMALL, 5, 8, "iid", "published", 0), **changed)  # type: ignore[arg-type]


# --- recipes

RECIPES = [
    Recipe(gemm1, times, scale, weights)
    for gemm1 in ("fp32", "bf16")
    for times in (0, 1, 2)
    for scale in ("fp32", "ue8m0")
    for weights in ("fp32", "bf16")
    if times or scale == "fp32"
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_s_name_gives_the_recipe_back(recipe: Recipe) -> None:
    assert Recipe.parse(recipe.name) == recipe
    backwards = "+".join(reversed(recipe.name.split("+")))
    assert Recipe.parse(backwards) == recipe


def test_recipe_names_differ() -> None:
    assert len(RECIPES) == len({recipe.name for recipe in RECIPES}) == 20
    assert Recipe() == EXACT and EXACT.name == "exact"
    assert Recipe("bf16", 2, "ue8m0", "bf16").name == "bf16_gemm1+requant2+ue8m0+bf16_weights"


@pytest.mark.parametrize(
    "text",
    ["", "Exact", "fp8", "requant+", "requant+requant", "requant+requant2", "exact+requant", "exact+exact", "requant3"],
)
def test_an_unknown_recipe_is_refused_with_the_known_parts(text: str) -> None:
    with pytest.raises(SpecError, match=r"unknown recipe '.*': expected 'exact', or parts of .*requant.* joined by \+"):
        Recipe.parse(text)


def test_ue8m0_needs_a_requantisation() -> None:
    for attempt in (lambda: Recipe.parse("ue8m0"), lambda: Recipe(scale="ue8m0")):
        with pytest.raises(SpecError, match="set requantize to 1 or 2"):
            attempt()


@pytest.mark.parametrize("changed", [{"gemm1_out": "fp16"}, {"requantize": 3}, {"scale": ""}, {"topk_weights": "fp8"}])
def test_a_recipe_of_unknown_values_is_refused(changed: dict[str, object]) -> None:
    ((field, value),) = changed.items()
    with pytest.raises(SpecError, match=f"recipe {field}={value!r}: expected one of"):
        Recipe(**changed)  # type: ignore[arg-type]
