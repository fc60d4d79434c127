"""Helpers of the tests of laws and read-outs: the problem that most of them run on, and what failed."""

from __future__ import annotations

from moeref.diagnose.result import Finding
from moeref.spec import Problem

SMALL = Problem.parse("small-t24-o8-iid-model_like-s0")


def failing(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.detail for finding in findings if finding.passed is False}
