"""Gate and up swapped: silu is taken of gemm1's first half. Must fail.

Stands for sglang #32430 (0 % instead of 93.9 % on GSM8K), Megatron-LM #6045 and TensorRT-LLM #1842: the halves of the
first GEMM lie [gate ; up] in one place and [up ; gate] in another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from _layer import inputs_of

from moeref.reference import moe
from moeref.spec import BLOCK


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    inputs = inputs_of(ten, n_group, topk_group, top_k)
    half = inputs.geometry.intermediate_size
    swapped = inputs.gemm1_weights.view(torch.uint8).roll(half, dims=1).view(inputs.gemm1_weights.dtype)
    scale = inputs.gemm1_weights_scale.roll(half // BLOCK, dims=1)
    return moe(replace(inputs, gemm1_weights=swapped, gemm1_weights_scale=scale)).output
