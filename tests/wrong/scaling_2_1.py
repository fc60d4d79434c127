"""routed_scaling_factor 2.1 for 2.5: everything 16 % too small. Must fail; the published criterion passes it.

Stands for the factor's bugs, such as vLLM #43769 (hard-coded) and #24119 (applied twice), at a size within rtol 0.2.
"""

from __future__ import annotations

from typing import Any

import torch
from _layer import trace_of


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    return trace_of((*ten[:9], ten[9] * 2.1 / 2.5), n_group, topk_group, top_k).output
