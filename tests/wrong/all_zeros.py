"""The answer is always zero. Must fail where any token has local work.

Stands for flashinfer #3547 (the offset subtracted twice: bit-exact zeros on every rank but the first). A loose absolute
tolerance, or a shard without work, lets it pass.
"""

from __future__ import annotations

from typing import Any

import torch


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    return torch.zeros_like(ten[2], dtype=torch.bfloat16)
