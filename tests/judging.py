"""Helpers of the judge's tests: an observed run without a process, and problems of every kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from moeref.inputs import Inputs
from moeref.judge.verdict import Verdict, judge
from moeref.make import make_inputs
from moeref.reference import Trace, moe
from moeref.spec import Problem


@dataclass
class Run:
    """A stand-in for CandidateRun."""

    outputs: list[Any]
    status: str = "ok"
    message: str = ""
    poisoned: bool = False
    changed_inputs: list[str] = field(default_factory=list)
    aliased_inputs: list[str] = field(default_factory=list)
    overwritten_result: bool = False
    deterministic: bool = False


def prepare(name: str) -> tuple[Inputs, Trace]:
    """Inputs and exact trace of a problem's name."""
    inputs = make_inputs(Problem.parse(name))
    return inputs, moe(inputs)


def verdict(name: str, output: torch.Tensor, **options: Any) -> Verdict:
    """Judge one output of one problem."""
    inputs, trace = prepare(name)
    return judge(name, inputs, trace, Run([output]), **options)
