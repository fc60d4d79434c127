"""The 19 published workloads at the real geometry; on a CPU those up to seq_len 80 unless --moe-all."""

from __future__ import annotations

import pytest

from moeref.suites import published
from moeref.testing.items import Judge, device_of
from moeref.workloads import Workload

pytestmark = pytest.mark.moe_published


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item a workload."""
    on_cpu = device_of(metafunc.config) == "cpu"
    chosen, _ = published(on_cpu, metafunc.config.getoption("moe_all"))
    metafunc.parametrize("workload", chosen, ids=[f"{one.short}-t{one.seq_len}" for one in chosen])


def test_published(workload: Workload, judge: Judge, pytestconfig: pytest.Config) -> None:
    """Every check of `moeref verify`."""
    values = pytestconfig.getoption("moe_values")
    judge(lambda session: session.problem(workload.short, workload.problem(values, session.seed)))
