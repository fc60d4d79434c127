"""The last local expert with rows contributes nothing. Must fail where an expert has rows.

Stands for vLLM #51632: the experts at the end of the range are taken for invalid ones.
"""

from __future__ import annotations

from typing import Any

import torch
from _layer import inputs_of

from moeref.reference import combine, expert_spans, moe


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    inputs = inputs_of(ten, n_group, topk_group, top_k)
    trace = moe(inputs)
    spans = expert_spans(trace.permutation.expert_offsets)
    gemm2_out = trace.gemm2_out.clone()
    if spans:
        gemm2_out[spans[-1][1]] = 0
    return combine(gemm2_out, trace.routing, trace.permutation).to(torch.bfloat16)
