"""Which cases there are: problems and recipes by name. Standard library only.

A small case's name is its problem's name, with '@' and the recipe where that is not 'exact'; a published one's is the
first eight characters of the workload's uuid. Problems are chosen so that no float rounding can decide their routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeref.spec import EXACT, Problem, Recipe, SpecError
from moeref.workloads import WORKLOADS

SMALL, PUBLISHED = "small", "published"
"""Folders below the golden folder: every stage in full; digests, norms and sampled rows."""

SHORT_SEQ_LEN = 16
"""Published cases up to this seq_len are checked by default: seconds each on two cores, the others take minutes."""

_EXACT = (
    # DeepSeek-V3's structure: 32 experts in 4 groups, two of them kept, top 4, 8 experts a rank
    "small-t16-o8-iid-published-s0",
    "small-t16-o0-iid-model_like-s0",
    "small-t8-o16-iid-heterogeneous-s0",
    "small-t8-o24-iid-zero_block-s0",
    "small-t8-o8-iid-tiny-s0",
    "small-t8-o16-iid-huge-s0",
    "small-t8-o0-iid-outlier-s0",
    "small-t12-o24-deepseek_like-model_like-s0",
    "small-t8-o8-balanced-heterogeneous-s0",
    "small-t16-o16-skewed-model_like-s0",
    "small-t17-o8-one_expert-heterogeneous-s0",
    "small-t7-o8-no_local_work-model_like-s0",
    "small-t8-o8-near_ties-model_like-s0",
    "small-t8-o0-all_negative-model_like-s0",
    "small-t3-o8-underflow-model_like-s0",
    "small-t6-o16-large_bias-model_like-s0",
    "small-t12-o28-deepseek_like-heterogeneous-s0",  # the last four local experts lie past the end
    "small-t5-o-3-iid-model_like-s0",  # the first three lie before the start
    "small-t8-o8-iid-model_like-s0-f1.0",
    "small-t0-o8-iid-model_like-s0",
    # Kimi-K2's: one group, 24 experts, top 4, 6 a rank
    "small_kimi-t8-o6-deepseek_like-model_like-s0",
    "small_kimi-t12-o0-iid-published-s0",
    "small_kimi-t12-o18-ties-heterogeneous-s0",
    "small_kimi-t8-o18-skewed-zero_block-s0",
    # three sizes that differ: H, I and 2I are told apart
    "e16l4h384i128k4g4t2-t12-o4-iid-model_like-s0",
)
_ROUNDED = (  # the reference's own roundings
    "small-t5-o8-iid-model_like-s1@requant",
    "small-t5-o8-iid-heterogeneous-s1@requant+ue8m0",
    "small-t5-o8-iid-model_like-s1@requant2",
    "small-t5-o8-iid-model_like-s1@bf16_gemm1",
    "small-t5-o8-iid-published-s1@bf16_gemm1+requant",
    "small_kimi-t5-o6-deepseek_like-model_like-s1@requant2+ue8m0+bf16_weights",
)
NAMES = (*_EXACT, *_ROUNDED, *(one.short for one in WORKLOADS))
"""Every case of the project's golden folder, small ones first."""


@dataclass(frozen=True)
class Spec:
    """What a case's name means."""

    name: str
    problem: Problem
    recipe: Recipe
    folder: str  # SMALL or PUBLISHED

    @property
    def short(self) -> bool:
        """Whether it is checked by default."""
        return self.folder == SMALL or self.problem.seq_len <= SHORT_SEQ_LEN

    def manifest(self, root: Path) -> Path:
        """Where its manifest lies below a golden folder; its tensors lie beside it."""
        return root / self.folder / f"{self.name}.json"


def spec_of(name: str) -> Spec:
    """The case of a name: PROBLEM, PROBLEM@RECIPE or the start of a published uuid's. Raises SpecError."""
    for workload in WORKLOADS:
        if workload.short == name:
            return Spec(name, workload.problem(), EXACT, PUBLISHED)
    text, _, rounding = name.partition("@")
    try:
        problem = Problem.parse(text)
        recipe = Recipe.parse(rounding) if rounding else EXACT
    except SpecError as error:
        raise SpecError(
            f"case '{name}': expected PROBLEM, PROBLEM@RECIPE or a published uuid's first eight characters; {error}"
        ) from None
    canonical = problem.name + ("" if recipe == EXACT else f"@{recipe.name}")
    if canonical != name:
        raise SpecError(f"case '{name}': written '{canonical}'")
    return Spec(name, problem, recipe, SMALL)
