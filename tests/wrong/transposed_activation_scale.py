"""hidden_states_scale [H/128, T] read as if it were [T, H/128]. Must fail where T > 1.

Stands for vLLM #53338: the stride of the column-major scale is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from _layer import trace_of


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    scale = ten[3]
    return trace_of(
        (*ten[:3], scale.reshape(scale.shape[::-1]).T.contiguous(), *ten[4:]), n_group, topk_group, top_k
    ).output
