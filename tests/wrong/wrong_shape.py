"""The right values transposed, [H, T]. Must fail.

Stands for flashinfer #3103 and #3574: the output's strides are not what the kernel takes them for.
"""

from __future__ import annotations

from typing import Any

import torch
from _layer import trace_of


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    return trace_of(ten, n_group, topk_group, top_k).output.T.contiguous()
