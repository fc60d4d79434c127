"""Read-outs: crafted inputs that make a fused black box show its inside, one item for each thing that is read."""

from __future__ import annotations

import pytest

from moeref.diagnose.readout import READOUTS
from moeref.testing.items import Judge

pytestmark = pytest.mark.moe_readouts

FINDINGS = [(one.name, finding) for one in READOUTS.values() for finding in one.findings]


@pytest.mark.parametrize(("readout", "finding"), FINDINGS, ids=[finding for _, finding in FINDINGS])
def test_readout(readout: str, finding: str, judge: Judge) -> None:
    """One finding of moeref.diagnose.readout."""
    judge(lambda session: session.readout(readout, finding))
