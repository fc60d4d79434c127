"""The right answer, but a weight scale is changed on the way. Must fail.

Stands for flashinfer #3025 (the autotuner corrupts the model's weights) and #4186 (a tile is written past its end).
"""

from __future__ import annotations

from typing import Any

import torch
from _layer import trace_of


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    output = trace_of(ten, n_group, topk_group, top_k).output
    ten[7][-1, -1, -1] += 1.0
    return output
