"""Laws: relations between answers of the candidate itself. No reference decides them."""

from __future__ import annotations

import pytest

from moeref.diagnose.laws import LAWS
from moeref.testing.items import Judge

pytestmark = pytest.mark.moe_laws


@pytest.mark.parametrize("law", list(LAWS))
def test_law(law: str, judge: Judge) -> None:
    """One law of moeref.diagnose.laws."""
    judge(lambda session: session.law(law))
