"""Planted faults: every file of tests/wrong/ fails, by a named check; some pass the published criterion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moeref.judge.compare import CRITERIA
from moeref.spec import Problem
from moeref.suites import small_suite
from moeref.verify import Options, verify

FOLDER = Path(__file__).parent / "wrong"
PROBLEMS = [
    "small-t24-o8-iid-model_like-s7",
    "small-t64-o8-deepseek_like-heterogeneous-s3",
]

# file -> the check that must be among those that fail
CHECKS = {
    "gate_up_swapped": "noise_rows",
    "offset_ignored": "noise_rows",
    "biased_weights": "noise_rows",
    "transposed_activation_scale": "noise_rows",
    "all_zeros": "noise_rows",
    "one_token_dropped": "noise_rows",
    "scaling_2_1": "noise_gain",
    "last_expert_dropped": "noise_rows",
    "unwritten_rows": "written",
    "stale_output": "noise_rows",
    "nan_output": "finite",
    "wrong_dtype": "form",
    "wrong_shape": "form",
    "mutates_input": "inputs_unchanged",
    "returns_input_view": "no_alias",
}
PASS_THE_PUBLISHED_RULE = ("one_token_dropped", "scaling_2_1")


def test_the_table_names_every_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_planted_fault_fails_by_its_check(name: str) -> None:
    problems = [(problem, Problem.parse(problem)) for problem in PROBLEMS]
    outcomes = list(verify(f"{FOLDER / name}.py:run", problems, Options(timeout=60)))
    verdicts = [outcome.verdict for outcome in outcomes]
    assert "FAIL" in [verdict.status for verdict in verdicts], [(v.status, v.message) for v in verdicts]
    assert any(CHECKS[name] in verdict.failed for verdict in verdicts), [verdict.failed for verdict in verdicts]
    if name in PASS_THE_PUBLISHED_RULE:
        ratios = [verdict.figures.matched["published"] for verdict in verdicts]
        assert max(ratios) >= CRITERIA["published"].required
        assert any("the published criterion alone would have passed it" in verdict.message for verdict in verdicts)


@pytest.fixture(scope="module")
def small() -> Iterator[dict[str, str]]:
    """Statuses of the small suite for the backends that must pass it."""
    problems = [(problem.name, problem) for problem in small_suite()]
    found = {}
    for candidate in ("reference", "torch_grouped", "moe_fast"):
        for outcome in verify(candidate, problems, Options()):
            found[f"{candidate} {outcome.label}"] = f"{outcome.verdict.status} {outcome.verdict.message}"
    yield found


def test_the_small_suite_passes_for_right_candidates(small: dict[str, str]) -> None:
    allowed = ("-no_local_work-", "-t0-")  # nothing to test there
    wrong = {k: v for k, v in small.items() if not v.startswith("PASS")}
    assert all(v.startswith("INCONCLUSIVE") and any(part in k for part in allowed) for k, v in wrong.items()), wrong
    assert len(small) == 3 * len(small_suite()) and len(wrong) < len(small) / 8
