"""How far two answers lie apart, row by row: scale-free, and defined for NaN and inf.

The squared distance of two rows x and y is |x - y|^2 / (|x|^2 + |y|^2): 0 for equal rows, 1 for unrelated ones and
where one of them is zero, 2 for opposite ones. An element that is finite in one row only adds 1 / H.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_distance(one: Tensor, other: Tensor) -> Tensor:
    """Squared distance of each row, [R] float64. one, other: [..., R, H]; broadcast over leading axes."""
    x, y = one.double(), other.double()
    both = torch.isfinite(x) & torch.isfinite(y)
    same = (x == y) | (torch.isnan(x) & torch.isnan(y))
    broken = (~both & ~same).double().mean(-1)
    x, y = x.masked_fill(~both, 0), y.masked_fill(~both, 0)
    largest = torch.maximum(x.abs().amax(-1, keepdim=True), y.abs().amax(-1, keepdim=True))
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))  # 1e-200 squared is not a number any more
    x, y = x / scale, y / scale
    size = x.square().sum(-1) + y.square().sum(-1)
    far = (x - y).square().sum(-1) / torch.where(size > 0, size, torch.ones_like(size))
    return far + broken


def live_rows(*answers: Tensor) -> Tensor:
    """Rows [R] bool that are not all zero in some of the answers [R, H]."""
    return torch.stack([(one != 0).any(-1) for one in answers]).any(0)


def direction(error: Tensor, other: Tensor) -> Tensor:
    """Squared cosine of each row's angle, 0 where a row is zero or not finite. error, other: [R, H] -> [R] float64."""
    x, y = error.double().nan_to_num(0, 0, 0), other.double().nan_to_num(0, 0, 0)
    product = (x * y).sum(-1).square()
    size = x.square().sum(-1) * y.square().sum(-1)
    return torch.where(size > 0, product / torch.where(size > 0, size, torch.ones_like(size)), torch.zeros_like(size))
