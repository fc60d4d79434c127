"""The last token with local work gets one NaN. Must fail.

Stands for vLLM #38148 and flashinfer #3650: a padding row holds NaN, and 0 * NaN reaches the sum.
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
        output[tokens.max(), -1] += 0 * float("nan")
    return output
