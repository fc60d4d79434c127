"""Recorded cases: the candidate held to what the reference once computed; with --moe-all the long ones too."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeref.golden import Case, GoldenError, cases
from moeref.judge.verdict import UNSUPPORTED
from moeref.testing.items import Judge
from moeref.testing.session import Result

pytestmark = pytest.mark.moe_golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item a case; without any, one that says so."""
    folder = metafunc.config.getoption("moe_golden")
    found: list[Case | str]
    try:
        every = cases(Path(folder) if folder else None, everything=metafunc.config.getoption("moe_all"))
        found = [case for case in every if case.judges_candidates]
    except GoldenError as error:
        found = [str(error).replace("--dir", "--moe-golden")]
    metafunc.parametrize("case", found, ids=[case.name if isinstance(case, Case) else "none" for case in found])


def test_golden(case: Case | str, judge: Judge) -> None:
    """One case of moeref.golden."""
    if isinstance(case, str):
        judge(lambda session: Result(UNSUPPORTED, case))
    else:
        judge(lambda session: session.golden(case))
