"""From what a candidate returned to a verdict: every check, the figures, one status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from moeref.inputs import Inputs
from moeref.judge import checks
from moeref.judge.checks import Check
from moeref.judge.compare import CRITERIA, Criterion, largest_errors, matched_per_token, row_errors
from moeref.judge.noise import Fit, Noise, fit, output_noise
from moeref.judge.recipes import Emulations, emulate, nearest_recipes
from moeref.judge.ties import adopt
from moeref.judge.vacuity import vacuity
from moeref.reference import Trace
from moeref.spec import Recipe

PASS, FAIL, ERROR, UNSUPPORTED, INCONCLUSIVE = "PASS", "FAIL", "ERROR", "UNSUPPORTED", "INCONCLUSIVE"
AUTO = "auto"


class Observed(Protocol):
    """What a run of a candidate on one problem left behind (moeref.interop.runner.CandidateRun has this shape)."""

    status: str  # 'ok', 'error' or 'unsupported'
    message: str
    outputs: list[Any]  # one per call; from the second call on the output buffer was poisoned otherwise
    poisoned: bool  # outputs were written into a buffer that we had filled
    changed_inputs: list[str]
    aliased_inputs: list[str]
    overwritten_result: bool
    deterministic: bool  # the candidate promises the same bytes on every call


@dataclass(frozen=True)
class Figures:
    """What was measured on one problem, judged or not."""

    seq_len: int
    offset: int
    active_tokens: int
    local_rows: int
    experts_hit: int
    matched: dict[str, float] = field(default_factory=dict)  # criterion -> matched ratio over all elements
    matched_active: dict[str, float] = field(default_factory=dict)  # the same over active tokens alone
    matched_worst_token: float | None = None  # of the judged criterion
    max_absolute_error: float | None = None  # over all elements
    max_relative_error: float | None = None  # abs / (|ref| + 1e-8)
    worst_row: float | None = None  # largest relative error of an active row
    worst_row_token: int | None = None
    median_row: float | None = None
    noise_z: float | None = None  # root mean square error in units of what the recipe costs
    ambiguous_tokens: int = 0
    other_choice_tokens: int = 0
    blind: tuple[str, ...] = ()  # stages that the problem's data could not have shown to be wrong


@dataclass(frozen=True)
class Verdict:
    """The judgement of one problem."""

    problem: str
    status: str
    checks: tuple[Check, ...]
    recipe: str  # judged under this one; '' where nothing was judged
    recipe_found: bool  # True: found from the errors; False: declared
    figures: Figures
    message: str  # one paragraph
    missed: tuple[str, ...] = ()  # checks that failed but that the chosen criterion does not look at

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the failed checks."""
        return tuple(check.name for check in self.checks if check.passed is False)


class Known:
    """What judging one problem needs of its reference, computed once, whoever is judged."""

    def __init__(self, trace: Trace, inputs: Inputs) -> None:
        self.trace = trace
        self.inputs = inputs
        self.active = torch.unique(trace.permutation.permuted_idx_to_token_idx)  # int64, ascending
        self._noise: dict[Recipe, Noise] = {}
        self._emulations: Emulations | None = None

    def noise(self, recipe: Recipe) -> Noise:
        """The recipe's noise around the trace."""
        if recipe not in self._noise:
            self._noise[recipe] = output_noise(self.trace, self.inputs, recipe)
        return self._noise[recipe]

    def emulations(self) -> Emulations:
        """A sample under every legal recipe; needs an active token."""
        if self._emulations is None:
            self._emulations = emulate(self.trace, self.inputs, self.active)
        return self._emulations


Look = Callable[[torch.Tensor, Known, str, Fit | None], None]
"""Called as look(output [T, H], known, recipe, fit): the output that lies worst, of several different ones; recipe ''
and fit None where no token is active."""


def judge(
    problem: str,
    inputs: Inputs,
    trace: Trace,
    observed: Observed,
    recipe: str = AUTO,
    criterion: Criterion = CRITERIA["published"],
    matched_ratio_alone: bool = False,
    known: Known | None = None,
    look: Look | None = None,
) -> Verdict:
    """Judge what a candidate did with `inputs` (CPU or GPU), given the exact float32 reference trace of them.

    recipe: a recipe's name, or 'auto' to find the nearest legal one. matched_ratio_alone: decide by form, finiteness
    and `criterion` as the published evaluator does, and list in `missed` what else failed. known: of the same trace and
    inputs, kept by a caller who judges many candidates on one problem. look: called with what the values were judged
    by, where they could be compared at all.
    """
    base = _base(inputs, trace)
    if observed.status != "ok":
        status = UNSUPPORTED if observed.status == "unsupported" else ERROR
        return Verdict(problem, status, (), "", False, base, observed.message)
    if not bool(torch.isfinite(trace.unrounded).all()):
        where = (~torch.isfinite(trace.unrounded)).any(1).nonzero()[0].item()
        message = f"the reference itself holds NaN or inf (first in token {where}): this problem can judge nobody"
        return Verdict(problem, ERROR, (), "", False, base, message)
    found = [checks.form(observed.outputs, inputs.seq_len, inputs.geometry.hidden_size)]
    found += checks.conduct(observed)
    if not checks.comparable(observed.outputs, inputs.seq_len, inputs.geometry.hidden_size):
        return conclude(problem, found, "", False, base, matched_ratio_alone)
    outputs = _different(observed.outputs, trace.unrounded.device)
    trace, ambiguous, other = adopt(inputs, trace, outputs[0])
    if known is None or known.trace is not trace:
        known = Known(trace, inputs)
    active = known.active
    found += checks.written(observed)
    found += checks.repeated(observed)
    found += checks.content(outputs, active)
    measured = measure(_base(inputs, trace), outputs, trace.output, active, criterion)
    blind = vacuity(inputs, trace).blind
    measured = replace(measured, ambiguous_tokens=ambiguous, other_choice_tokens=other, blind=blind)
    found.append(checks.matched(measured.matched[criterion.name], criterion))
    name, was_found, behaves = "", False, ""
    if len(active):
        name, was_found, fits = _fit_recipe(outputs, known, recipe)
        at = max(range(len(fits)), key=lambda at: (not fits[at].passed, fits[at].rows.value))
        worst = fits[at]
        found += checks.noise(worst, name)
        behaves = "" if was_found or worst.passed else _behaves_like(outputs, known, name)
        measured = replace(measured, noise_z=worst.overall.value)
        if look is not None:
            look(outputs[at], known, name, worst)
    elif look is not None:
        look(outputs[0], known, "", None)
    silent = not (trace.output.numel() and float(trace.output.abs().max()))
    vacuous = _why_vacuous(measured) if silent else ""
    verdict = conclude(problem, found, name, was_found, measured, matched_ratio_alone, vacuous)
    return replace(verdict, message=f"{verdict.message}; {behaves}") if behaves and verdict.message else verdict


def _behaves_like(outputs: list[torch.Tensor], known: Known, declared: str) -> str:
    """What a candidate that does not fit its declared recipe fits instead; '' where it fits none."""
    name, _, fits = _fit_recipe(outputs, known, AUTO)
    if name == declared or not all(one.passed for one in fits):
        return ""
    return f"it does not keep its declared recipe {declared}, but behaves like {name}: declare that if it is meant"


def _base(inputs: Inputs, trace: Trace) -> Figures:
    """What a trace says before anything is compared with it."""
    rows_of_expert = trace.permutation.expert_offsets.diff()
    return Figures(
        seq_len=inputs.seq_len,
        offset=inputs.local_expert_offset,
        active_tokens=len(torch.unique(trace.permutation.permuted_idx_to_token_idx)),
        local_rows=int(rows_of_expert.sum()),
        experts_hit=int((rows_of_expert > 0).sum()),
    )


def _why_vacuous(figures: Figures) -> str:
    if not figures.seq_len:
        return "no token: only the output's form was tested"
    if not figures.active_tokens:
        return "no token chose a local expert: only that the output is zero was tested"
    return "the reference's output is all zero: only that was tested"


def conclude(
    problem: str,
    found: Sequence[Check],
    recipe: str,
    recipe_found: bool,
    figures: Figures,
    matched_ratio_alone: bool,
    vacuous: str = "",
) -> Verdict:
    """One status and one paragraph from all checks. vacuous: why nothing could be tested; '' where something could."""
    published = ("form", "finite", "matched_ratio")
    failed = [check for check in found if check.passed is False]
    missed: list[Check] = []
    if matched_ratio_alone:
        missed = [check for check in failed if check.name not in published]
        failed = [check for check in failed if check.name in published]
    if failed:
        status, message = FAIL, "; ".join(f"{check.name}: {check.detail}" for check in failed)
        ratio = figures.matched.get("published")
        if ratio is not None and ratio >= CRITERIA["published"].required and not figures_blocked(failed):
            message += f"; the published criterion alone would have passed it (matched {ratio:.4f} >= 0.85)"
    elif vacuous:
        status, message = INCONCLUSIVE, vacuous
    else:
        status, message = PASS, ""
        if missed:
            message = "the matched ratio does not see: " + "; ".join(
                f"{check.name}: {check.detail}" for check in missed
            )
    names = tuple(check.name for check in missed)
    return Verdict(problem, status, tuple(found), recipe, recipe_found, figures, message, names)


def figures_blocked(failed: Sequence[Check]) -> bool:
    """True if one of the failed checks is one that the published evaluator makes as well."""
    return any(check.name in ("form", "finite", "matched_ratio") for check in failed)


def _different(outputs: list[Any], device: torch.device) -> list[torch.Tensor]:
    """The outputs without byte-equal repeats, on the reference's device."""
    kept: list[torch.Tensor] = []
    for output in outputs:
        if not any(torch.equal(_octets(output), _octets(other)) for other in kept):
            kept.append(output)
    return [output.to(device) for output in kept]


def _octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def measure(
    base: Figures, outputs: list[torch.Tensor], reference: torch.Tensor, active: torch.Tensor, criterion: Criterion
) -> Figures:
    """Matched ratios and row errors; of several different outputs the worst one counts."""
    matched, matched_active, worst_token = {}, {}, None
    for one in CRITERIA.values():
        per_token = [matched_per_token(output, reference, one) for output in outputs]
        matched[one.name] = min((float(share.mean()) for share in per_token if len(share)), default=1.0)
        if len(active):
            matched_active[one.name] = min(float(share[active].mean()) for share in per_token)
            if one.name == criterion.name:
                worst_token = min(float(share[active].min()) for share in per_token)
    errors_of = torch.tensor([largest_errors(output, reference) for output in outputs]).amax(0)
    measured = replace(
        base,
        matched=matched,
        matched_active=matched_active,
        matched_worst_token=worst_token,
        max_absolute_error=float(errors_of[0]),
        max_relative_error=float(errors_of[1]),
    )
    if len(active):
        errors = torch.stack([row_errors(output[active], reference[active]) for output in outputs]).amax(0)
        errors = errors.nan_to_num(nan=torch.inf)
        worst = int(errors.argmax())
        measured = replace(
            measured,
            worst_row=float(errors[worst]),
            worst_row_token=int(active[worst]),
            median_row=float(errors.median()),
        )
    return measured


def _fit_recipe(outputs: list[torch.Tensor], known: Known, recipe: str) -> tuple[str, bool, list[Fit]]:
    """(recipe judged under, whether it was found, the fit of each output).

    'auto' takes the recipe whose emulation lies nearest. Where the output does not fit that one, it may still be an
    honest kernel that re-quantises once in a way of its own (say, after weighting): then its errors must pass every
    gate of a plain re-quantisation. Two re-quantisations are accepted only where their emulation is the nearest.
    """

    def fits(one: Recipe) -> list[Fit]:
        return [fit(output, known.trace, known.noise(one), known.active) for output in outputs]

    if recipe != AUTO:
        return Recipe.parse(recipe).name, False, fits(Recipe.parse(recipe))
    nearest = nearest_recipes(outputs[0], known.emulations())[0].recipe
    first = fits(nearest)
    if nearest.requantize == 0 and not all(one.passed for one in first):
        own_way = Recipe(requantize=1)
        second = fits(own_way)
        if all(one.passed for one in second) and min(one.overall.value for one in second) > OWN_WAY_FLOOR:
            return own_way.name, True, second
    return nearest.name, True, first


OWN_WAY_FLOOR = 0.5
"""A kernel taken as re-quantising in its own way must show at least half of that noise: an exact kernel with a small
systematic error would otherwise be excused by noise that it does not have."""
