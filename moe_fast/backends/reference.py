"""moeref's readable reference as a backend: right, slow, any device."""

from __future__ import annotations

from typing import Any

import torch

from moe_fast.backends import Backend
from moeref.inputs import FIELDS, Inputs
from moeref.reference import moe
from moeref.spec import Geometry


def run(
    *inputs: Any, out: torch.Tensor | None = None, n_group: int = 8, topk_group: int = 4, top_k: int = 8
) -> torch.Tensor:
    """The ten inputs -> output [T, H] bfloat16, written into `out` when given."""
    logits, gemm2_weights = inputs[0], inputs[6]
    n_local, hidden, intermediate = gemm2_weights.shape
    geometry = Geometry(logits.shape[1], n_local, hidden, intermediate, top_k, n_group, topk_group)
    output = moe(Inputs(**dict(zip(FIELDS, inputs, strict=True)), geometry=geometry)).output
    return output if out is None else out.copy_(output)


BACKEND = Backend(
    name="reference",
    run=run,
    recipe="exact",
    deterministic=True,
    unsupported=lambda geometry, device: None,
    priority=-100,
    summary="moeref.reference.moe, the definition itself",
)
