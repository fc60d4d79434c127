"""A candidate in its own process, as laws and read-outs see it: moeref.diagnose.result.Call over a Runner."""

from __future__ import annotations

import torch

from moeref.inputs import Inputs
from moeref.interop.observe import CandidateRun
from moeref.interop.runner import Runner


class CallFailed(RuntimeError):
    """The candidate did not run: it raised, hung or died. The message says how."""


class IsolatedCall:
    """Implements Call. Raises CallFailed where the candidate gives no output."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """The output for these ten inputs, on their device."""
        return self._only(self.runner.run(inputs, poisons=(0.0,)), inputs)

    def refill(self, first: Inputs, then: Inputs) -> torch.Tensor:
        """The output after `then` was copied over `first` in the very buffers of an earlier call."""
        return self._only(self.runner.run(first, poisons=(0.0, 0.0), then=then), then)

    def poisoned(self, inputs: Inputs, value: float) -> torch.Tensor | None:
        """The output written into a buffer full of `value`; None for a candidate that takes no buffer."""
        run = self.runner.run(inputs, poisons=(value,))
        output = self._only(run, inputs)
        return output if run.poisoned else None

    @staticmethod
    def _only(run: CandidateRun, inputs: Inputs) -> torch.Tensor:
        """The last output. Whatever it is, Guarded checks its form."""
        if run.status != "ok":
            raise CallFailed(run.message)
        output: torch.Tensor = run.outputs[-1]
        return output.to(inputs.device)
