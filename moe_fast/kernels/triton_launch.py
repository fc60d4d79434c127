"""Launching a Triton kernel as it was launched before, without Triton's look at every argument.

That look decides what the kernel is specialised for, and takes 20 to 40 us a launch; the launch itself takes 10.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

from moe_fast.current import current_stream

ALIGNMENT = 16  # bytes; Triton asks of a tensor's address whether it is a multiple
MAX_KEPT = 4096

_address = torch.Tensor.data_ptr
_dtype = operator.attrgetter("dtype")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv, which kernels may call, too, takes microseconds; so does next_power_of_2."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()


class Launcher:
    """One jitted kernel, whose parameters are tensors, then numbers, then constants.

    A compiled kernel holds for a device, dtypes, constants, options, aligned tensors and its numbers. A launch that
    agrees in all of these with an earlier one goes to that one's kernel; any other is Triton's own, which compiles if
    need be. Triton's own are also all launches under its interpreter.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._kept: dict[tuple[object, ...], Callable[..., None]] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[int | float, ...],
        constants: dict[str, Any],
        **options: Any,
    ) -> None:
        """Launch on the current stream of the current device, which must be the tensors'.

        constants: all of them, by name, in the kernel's order. options: Triton's, such as num_warps. Raises TypeError
        where the arguments are not the kernel's.
        """
        addresses = [*map(_address, tensors)]
        values = (*numbers, *constants.values())
        index = tensors[0].get_device()
        key = (grid, index, *values, *options.values(), *map(_dtype, tensors))
        aligned = functools.reduce(operator.or_, addresses) % ALIGNMENT == 0
        kept = self._kept.get(key) if aligned else None
        if kept is not None:
            kept(*addresses, *values, stream=current_stream(index))
            return
        compiled = self.kernel[grid](*tensors, *numbers, **constants, **options)
        if aligned and compiled is not None:
            self._check(len(tensors) + len(numbers), constants)
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = compiled[(*grid, 1, 1)[:3]]

    def _check(self, before: int, constants: dict[str, Any]) -> None:
        """What was given by name will be given by place."""
        expected = list(self.kernel.arg_names)[before:]
        if expected != list(constants):
            name = self.kernel.__name__
            raise TypeError(f"{name}: expected its constants in their order, {expected}; got {list(constants)}")
