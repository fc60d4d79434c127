"""How a diagnosis sees a candidate, and what it finds: Call, LocalCall, Finding. Needs no reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from moeref.inputs import TENSOR_FIELDS, Inputs

GEOMETRY_KEYWORDS = ("n_group", "topk_group", "top_k")


@dataclass(frozen=True)
class Finding:
    """What one law or read-out saw."""

    name: str
    passed: bool | None  # None: not applicable here, `detail` says why
    detail: str  # what was seen, with numbers; also where it passed
    suspects: tuple[str, ...] = ()  # stages, the likeliest first; empty where it passed
    exact: bool | None = None  # the relation held bit for bit; None where that was not the question
    z: float | None = None  # root mean square of what was judged by the noise model


class Call(Protocol):
    """A candidate as a black box. Every answer is a fresh copy on the inputs' device."""

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """The output for these ten inputs."""

    def refill(self, first: Inputs, then: Inputs) -> torch.Tensor:
        """Run on `first`; copy `then`'s tensors into the very same buffers; run again: the second output.

        `first` and `then` have the same shapes and are both left as they were.
        """

    def poisoned(self, inputs: Inputs, value: float) -> torch.Tensor | None:
        """The output written into a buffer full of `value`; None for a candidate that returns its own memory."""


class LocalCall:
    """A Call of a plain Python function in this process.

    run: takes the ten inputs by position, and by keyword, where its signature has them, `out`, `n_group`, `topk_group`
    and `top_k`. It returns the output, or None where it wrote into `out`.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        parameters = inspect.signature(run).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._geometry = tuple(name for name in GEOMETRY_KEYWORDS if anything or name in parameters)
        self._takes_out = "out" in parameters
        self._needs_out = self._takes_out and parameters["out"].default is inspect.Parameter.empty

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        return self._answer(inputs, _buffer(inputs) if self._needs_out else None)

    def refill(self, first: Inputs, then: Inputs) -> torch.Tensor:
        buffers = first.map(torch.Tensor.clone)
        self(buffers)
        for name in TENSOR_FIELDS:
            getattr(buffers, name).copy_(getattr(then, name))
        scalars = {name: getattr(then, name) for name in ("local_expert_offset", "routed_scaling_factor")}
        return self(replace(buffers, **scalars))

    def poisoned(self, inputs: Inputs, value: float) -> torch.Tensor | None:
        return self._answer(inputs, _buffer(inputs).fill_(value)) if self._takes_out else None

    def _answer(self, inputs: Inputs, out: torch.Tensor | None) -> torch.Tensor:
        keywords: dict[str, Any] = {name: getattr(inputs.geometry, name) for name in self._geometry}
        if out is not None:
            keywords["out"] = out
        answer = self.run(*inputs.args(), **keywords)
        answer = out if answer is None else answer
        if not isinstance(answer, torch.Tensor):
            raise TypeError(f"expected a tensor to be returned, got {type(answer).__name__}")
        return answer.clone()


def _buffer(inputs: Inputs) -> torch.Tensor:
    shape = (inputs.seq_len, inputs.geometry.hidden_size)
    return torch.empty(shape, dtype=torch.bfloat16, device=inputs.device)


class Broken(Exception):
    """A candidate raised, or returned something that is no output."""


class Guarded:
    """A Call that counts its runs and raises Broken for whatever is no floating tensor [T, H]."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.runs = 0

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """As Call."""
        return self._checked(inputs, 1, lambda: self.call(inputs))

    def refill(self, first: Inputs, then: Inputs) -> torch.Tensor:
        """As Call."""
        return self._checked(then, 2, lambda: self.call.refill(first, then))

    def poisoned(self, inputs: Inputs, value: float) -> torch.Tensor | None:
        """As Call."""
        answer: list[torch.Tensor | None] = []

        def once() -> torch.Tensor | None:
            answer.append(self.call.poisoned(inputs, value))
            return torch.zeros(inputs.seq_len, inputs.geometry.hidden_size) if answer[0] is None else answer[0]

        checked = self._checked(inputs, 1, once)
        return None if answer[0] is None else checked

    def _checked(self, inputs: Inputs, runs: int, run: Callable[[], Any]) -> torch.Tensor:
        self.runs += runs
        try:
            answer = run()
        except Exception as error:
            raise Broken(f"the call raised {type(error).__name__}: {error}") from error
        shape = [inputs.seq_len, inputs.geometry.hidden_size]
        if not isinstance(answer, torch.Tensor):
            raise Broken(f"expected a tensor {shape}, got {type(answer).__name__}")
        if list(answer.shape) != shape or not answer.is_floating_point():
            raise Broken(f"expected a floating tensor {shape}, got {list(answer.shape)} {answer.dtype}")
        return answer
