"""The right values in float32, not in bfloat16. Must fail.

Stands for flashinfer #3925 and #3644: what the kernel writes and what the buffer is labelled are different types.
"""

from __future__ import annotations

from typing import Any

import torch
from _layer import trace_of


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    return trace_of(ten, n_group, topk_group, top_k).output.float()
