"""Destination-passing, but rows of tokens without local work are left as they were. Must fail by what they held.

Stands for the rows that vLLM #12583 (write_zeros_to_output) guards: without it idle tokens keep what the memory held
before, which is zero on a fresh allocation and garbage in a server.
"""

from __future__ import annotations

from typing import Any

import torch
from _layer import trace_of

MOEREF = {"destination_passing": True}


def run(*ten_and_output: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> None:
    *ten, output = ten_and_output
    trace = trace_of(tuple(ten), n_group, topk_group, top_k)
    written = torch.unique(trace.permutation.permuted_idx_to_token_idx)
    output[written] = trace.output[written]
