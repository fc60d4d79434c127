"""What the machine has. The only place that asks."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """One device and the compilers beside it."""

    kind: str  # 'cpu' or 'cuda'
    name: str  # the card's name; 'cpu'
    capability: tuple[int, int] | None  # CUDA compute capability, e.g. (9, 0)
    sm_count: int  # multiprocessors; CPU: torch's threads
    memory: int  # bytes of device memory; CPU: 0
    triton: str | None  # installed version of triton

    @property
    def is_hopper(self) -> bool:
        """Compute capability 9.x."""
        return self.capability is not None and self.capability[0] == 9

    @property
    def is_blackwell(self) -> bool:
        """Data-centre Blackwell, compute capability 10.x."""
        return self.capability is not None and self.capability[0] == 10


def target_of(device: torch.device | str | None = None) -> Target:
    """The target of a device; None: the current CUDA device where there is one, else the CPU.

    Raises ValueError for a device that is neither a CPU nor a CUDA device of this machine.
    """
    if isinstance(device, torch.device) and device.index is not None:
        return _target_of(device)
    chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and chosen.index is None and torch.cuda.is_available():
        chosen = torch.device("cuda", torch.cuda.current_device())
    return _target_of(chosen)


@functools.cache
def has_module(name: str) -> bool:
    """Whether a top-level module is installed; it is not imported."""
    return importlib.util.find_spec(name) is not None


@functools.cache
def _target_of(device: torch.device) -> Target:
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device}: expected cpu, or a CUDA device of this machine")
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    if device.type == "cpu":
        return Target("cpu", "cpu", None, torch.get_num_threads(), 0, triton)
    card = torch.cuda.get_device_properties(device)
    return Target("cuda", card.name, (card.major, card.minor), card.multi_processor_count, card.total_memory, triton)
