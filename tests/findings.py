"""Helpers of the tests of laws and read-outs: the problems that most of them run on, and what failed."""

from __future__ import annotations

from moeref.diagnose.kernel import Kernel
from moeref.diagnose.readout import run_readouts
from moeref.diagnose.result import Finding, LocalCall
from moeref.spec import Problem

SMALL = Problem.parse("small-t24-o8-iid-model_like-s0")
THREE_BLOCKS = Problem.parse("e8l4h384i512k4g2t1-t4-o4-iid-model_like-s1")


def failing(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.detail for finding in findings if finding.passed is False}


def read(kernel: Kernel, problem: Problem = SMALL, *names: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in run_readouts(LocalCall(kernel), problem, names=names)}
