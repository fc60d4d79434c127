"""What a fault is, and the one decorator that adds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from moeref.diagnose.kernel import HOOKS, USUAL, Kernel
from moeref.spec import Recipe

STAGES = (
    "routing",
    "bias",
    "groups",
    "topk",
    "weights",
    "offset",
    "permute",
    "activation_scale",
    "gemm1_scale",
    "gemm1",
    "swiglu",
    "requantize",
    "gemm2_scale",
    "gemm2",
    "combine",
    "output",
    "state",
)
"""Where a fault can lie, in the order of the data; `state` is what one call leaves behind for the next."""

SYNTHETIC = "synthetic"
"""The source of a fault that stands for no single public bug."""

Hook = TypeVar("Hook", bound=Callable[..., Any])


@dataclass(frozen=True)
class Fault:
    """A kernel with one thing wrong."""

    name: str
    stage: str  # one of STAGES
    source: str  # the real bug, 'repository #number', several joined by ', '; or SYNTHETIC
    summary: str  # what the kernel does, as one phrase
    hook: str  # the step of Kernel that is replaced
    body: Callable[..., Any]

    def build(self, recipe: Recipe = USUAL) -> Kernel:
        """A fresh candidate that has the fault; it keeps its own memory."""
        kernel_class: type[Kernel] = type(self.name, (Kernel,), {self.hook: self.body, "__doc__": self.summary})
        return kernel_class(recipe)


FAULTS: dict[str, Fault] = {}
"""Every fault by name, in the order of the files."""


def fault(*, stage: str, hook: str, source: str, summary: str) -> Callable[[Hook], Hook]:
    """Register the decorated function, a replacement of Kernel.<hook>, as the fault of its own name."""

    def register(body: Hook) -> Hook:
        name: str = body.__name__
        if name in FAULTS or stage not in STAGES or hook not in HOOKS or not source or not summary:
            raise ValueError(f"fault {name}: expected a new name, a stage of {STAGES} and a hook of {HOOKS}")
        FAULTS[name] = Fault(name, stage, source, summary, hook, body)
        return body

    return register
