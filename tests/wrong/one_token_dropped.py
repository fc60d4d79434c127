"""The last token with local work gets a row of zeros. Must fail; the published criterion passes it.

Stands for intel-xpu-triton #7776 and MLX #3922: the last rows or tiles are never written.
"""

from __future__ import annotations

from typing import Any

import torch
from _layer import trace_of


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    trace = trace_of(ten, n_group, topk_group, top_k)
    tokens = trace.permutation.permuted_idx_to_token_idx
    output = trace.output.clone()
    if len(tokens):
        output[tokens.max()] = 0
    return output
