"""What the driver is asked for when a kernel is launched."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from moe_fast.kernels import cuda_build
from moe_fast.kernels.cuda_build import COOPERATIVE, PROGRAMMATIC_STREAM_SERIALIZATION, Kernel, PreparedLaunch


class Pair(ctypes.Structure):
    """An argument by value."""

    _fields_ = (("first", ctypes.c_int), ("second", ctypes.c_int))


class Driver:
    """Stands in for libcuda: notes every launch, and what lay behind its pointers then."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.shared: list[int] = []
        self.status = 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        self.shared.append(value)
        return 0

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_OF_THE_TEST"
        return 0

    def cuLaunchKernelEx(self, reference: Any, function: Any, pointers: Any, extra: None) -> int:
        config = reference._obj
        attributes = [(config.attributes[i].id, config.attributes[i].value[0]) for i in range(config.num_attributes)]
        pairs = [Pair.from_address(pointer) for pointer in pointers]
        self.launches.append(
            {
                "grid": list(config.grid),
                "block": list(config.block),
                "shared": config.shared_bytes,
                "stream": config.stream or 0,
                "attributes": attributes,
                "arguments": [(pair.first, pair.second) for pair in pairs],
            }
        )
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(cuda_build, "driver", lambda: made)
    return made


def asked(blocks: int, stream: int, arguments: list[tuple[int, int]], *attributes: int) -> dict[str, Any]:
    return {
        "grid": [blocks, 1, 1], "block": [96, 1, 1], "shared": 50_000, "stream": stream,
        "attributes": [(number, 1) for number in attributes], "arguments": arguments,
    }  # fmt: skip


def test_launches_of_one_kernel_share_nothing(driver: Driver) -> None:
    kernel = Kernel(ctypes.c_void_p(1), "kernel", 96, 50_000)
    kernel.launch(7, (Pair(1, 2), Pair(3, 4)), 11)
    kernel.launch(8, (Pair(5, 6),), 12, pdl=True)
    kernel.launch(9, (Pair(7, 8),), 0, cooperative=True)
    kernel.launch(10, (Pair(9, 9),), 13, pdl=True, cooperative=True)
    kernel.launch(7, (Pair(1, 2),), 11)
    assert driver.launches == [
        asked(7, 11, [(1, 2), (3, 4)]),
        asked(8, 12, [(5, 6)], PROGRAMMATIC_STREAM_SERIALIZATION),
        asked(9, 0, [(7, 8)], COOPERATIVE),
        asked(10, 13, [(9, 9)], PROGRAMMATIC_STREAM_SERIALIZATION, COOPERATIVE),
        asked(7, 11, [(1, 2)]),
    ]
    assert driver.shared == [50_000]  # more than 48 KB are asked for, once


def test_a_prepared_launch_takes_values_and_a_stream(driver: Driver) -> None:
    launch = PreparedLaunch(Kernel(ctypes.c_void_p(1), "kernel", 96, 50_000), 5, struct.Struct("2i"))
    launch(21, 1, 2)
    launch(22, 3, 4)
    assert driver.launches == [asked(5, 21, [(1, 2)]), asked(5, 22, [(3, 4)])]


def test_the_drivers_error_is_named(driver: Driver) -> None:
    kernel = Kernel(ctypes.c_void_p(1), "kernel", 96, 0)
    driver.status = 700
    for launch in (lambda: kernel.launch(1, (), 0), lambda: PreparedLaunch(kernel, 1, struct.Struct("2i"))(0, 1, 2)):
        with pytest.raises(RuntimeError, match=r"kernel: CUDA_ERROR_OF_THE_TEST \(700\)"):
            launch()
