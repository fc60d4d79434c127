"""What is to be explained, and everything that does not depend on the candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeref.diagnose.explain.hypotheses import Hypotheses
from moeref.diagnose.explain.panel import PANEL, Prepared, Steps, regrouped_steps
from moeref.diagnose.explain.separate import Bank
from moeref.inputs import Inputs
from moeref.judge.verdict import AUTO
from moeref.reference import Trace
from moeref.spec import Geometry, Problem

ASKED = "small-t24-o16-iid-model_like-s0"
"""The problem that is asked about where none is named; the panel is asked in any case."""


@dataclass(frozen=True)
class Case:
    """What is to be explained."""

    candidate: str
    problem: Problem | None = None  # None: ASKED, or the like of it where the candidate knows its own groups alone
    recipe: str = AUTO
    device: str = "cpu"
    inexact: frozenset[str] = frozenset()
    laws: bool = True  # run laws and read-outs where they are needed
    shrink_seconds: float = 6.0  # time for looking for a smaller problem; 0: none
    replay: Callable[[Sequence[str]], str] = " ".join  # problems' names -> the command line that judges them in turn
    traced: Callable[[Inputs], Trace | None] = lambda inputs: None  # every stage, of a candidate that returns them
    say: Callable[[str], None] = lambda text: None  # is told what is being done


class Library:
    """Everything that does not depend on the candidate: the panel with its hypotheses. Kept by who explains many."""

    def __init__(self, device: str = "cpu", panel: Steps = PANEL, like: Geometry | None = None) -> None:
        self.panel = Prepared(regrouped_steps(panel, like), device)
        self.bank = Bank(device, like)
        self.like = like  # the model whose routing groups all problems have; None: each its own
        self._hypotheses: dict[bool, Hypotheses] = {}

    def hypotheses(self, takes_out: bool) -> Hypotheses:
        """Of the panel, for candidates that take an output buffer or not."""
        if takes_out not in self._hypotheses:
            self._hypotheses[takes_out] = Hypotheses(self.panel, takes_out)
        return self._hypotheses[takes_out]
