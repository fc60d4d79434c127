"""What the suite's tests share: the session with the candidate, and the fixture that makes its answers outcomes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from moeref.testing.plugin import PLUGIN, SUITE, WHAT_TO_PASS

if TYPE_CHECKING:  # torch is not waited for where only WHAT_TO_PASS is said
    from moeref.testing.items import Ask, Judge
    from moeref.testing.session import Session


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Without the plugin or a candidate there is nothing to test: said where the command line did not show it."""
    if not collector.config.pluginmanager.hasplugin(PLUGIN):
        raise pytest.UsageError(f"{SUITE} needs its plugin: install moeref, or pass -p {PLUGIN}")
    if not collector.config.getoption("moe_candidate"):
        raise pytest.UsageError(WHAT_TO_PASS)


@pytest.fixture(scope="session")
def moe_session(pytestconfig: pytest.Config) -> Iterator[Session]:
    """The candidate, in a process of its own that serves all items of this one."""
    from moeref.spec import Geometry
    from moeref.testing.items import device_of
    from moeref.testing.session import Session
    from moeref.verify import Options

    option = pytestconfig.getoption
    options = Options(device_of(pytestconfig), option("moe_recipe"), timeout=option("moe_timeout"))
    geometry = Geometry.parse(option("moe_geometry")) if option("moe_geometry") else None
    with Session(option("moe_candidate"), options, geometry, option("moe_seed")) as session:
        yield session


@pytest.fixture
def judge(moe_session: Session, request: pytest.FixtureRequest) -> Judge:
    """judge(ask): what `ask` answers about the candidate becomes this item's outcome."""
    from moeref.testing.items import judge_item

    def run(ask: Ask) -> None:
        judge_item(request.node, moe_session, ask)

    return run
