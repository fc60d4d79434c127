"""The current CUDA device and stream, without the objects that torch makes of them: those cost microseconds a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def current_stream(index: int) -> int:
    """The driver's handle of device `index`'s current stream; what triton's launcher asks, too."""
    return torch._C._cuda_getCurrentRawStream(index)


def run_on(device: torch.device, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call a function with this CUDA device as the current one: kernels go there, wherever the tensors are."""
    if device.index == torch.cuda.current_device():
        return function(*arguments, **named)
    with torch.cuda.device(device):
        return function(*arguments, **named)
