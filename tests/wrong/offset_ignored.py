"""local_expert_offset ignored: this rank computes experts 0 .. L-1 whatever its offset. Must fail where offset > 0.

Stands for flashinfer #3066 (dispatch drops the offset) and vllm-xpu-kernels #405 (the test's own reference did).
"""

from __future__ import annotations

from typing import Any

import torch
from _layer import trace_of


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    return trace_of((*ten[:8], 0, ten[9]), n_group, topk_group, top_k).output
