"""Routing kinds read from files: captured_DIGEST stands for the logits and bias that have these bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moeref.draw import F32
from moeref.interop.fib.blobs import read_tensor
from moeref.routings import CAPTURED, ELSEWHERE, Routing
from moeref.spec import Problem, SpecError


@dataclass(frozen=True)
class Captured:
    """Logits float32 [T, E] and bias float32 [E] (exact in bfloat16) as a routing kind: a problem's first tokens."""

    name: str
    logits: F32
    bias: F32

    def __call__(self, problem: Problem) -> Routing:
        """The first seq_len tokens. Raises SpecError where the file has fewer, or is of another number of experts."""
        tokens, experts = self.logits.shape
        if problem.geometry.num_experts != experts:
            raise SpecError(
                f"routing kind '{self.name}' has {experts} experts, {problem.geometry.name} has "
                f"{problem.geometry.num_experts}: it can't be used there"
            )
        if problem.seq_len > tokens:
            raise SpecError(f"routing kind '{self.name}' has {tokens} tokens: expected seq_len up to that")
        return self.logits[: problem.seq_len], self.bias


def capture(logits: torch.Tensor, bias: torch.Tensor) -> str:
    """Make a routing kind of logits float32 [T, E] and bias bfloat16 [E]; returns its name, the same for same bytes."""
    digest = hashlib.sha256(str(tuple(logits.shape)).encode())
    for tensor in (logits, bias):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    name = f"{CAPTURED}{digest.hexdigest()[:16]}"
    ELSEWHERE[name] = Captured(name, np.array(logits.numpy()), bias.float().numpy())
    return name


def capture_file(path: Path) -> str:
    """The routing kind of a safetensors file with routing_logits and routing_bias. Raises FibError."""
    logits = read_tensor(path, "routing_logits", "routing_logits", (None, None), torch.float32)
    bias = read_tensor(path, "routing_bias", "routing_bias", (logits.shape[1],), torch.bfloat16)
    return capture(logits, bias)
