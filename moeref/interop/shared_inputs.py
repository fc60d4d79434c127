"""The ten inputs and a candidate's outputs in memory that two processes map.

The judging process allocates; the candidate's process maps the same pages copy-on-write, so that whatever it does to
its inputs, the judge's stay as they were. On Linux the memory is anonymous (memfd), is not limited by /dev/shm, and
pages that nobody touches cost nothing; elsewhere it is a temporary file.
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeref.inputs import TENSOR_FIELDS, Inputs
from moeref.spec import Geometry


class SharedFile:
    """Memory with a path by which another process of this user can open it, as long as this one has not closed it."""

    def __init__(self, size: int = 0) -> None:
        self._unlink: str | None = None
        if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
            self.fd = os.memfd_create("moeref")
            self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        else:
            self.fd, self.path = tempfile.mkstemp(prefix="moeref-")
            self._unlink = self.path
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        """Give the memory up; what is mapped stays until its tensors are gone. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._unlink is not None:
            Path(self._unlink).unlink(missing_ok=True)
            self._unlink = None


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a path, a byte offset there, its shape and dtype."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str  # 'float32'

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Place:
        """The inverse of to_json."""
        return cls(data["path"], data["offset"], tuple(data["shape"]), data["dtype"])

    def open(self, access: int) -> torch.Tensor:
        """The tensor, mapped with mmap.ACCESS_READ, ACCESS_COPY (private) or ACCESS_WRITE (shared).

        Without a path: zeros that take no memory.
        """
        if not self.path:
            return torch.zeros((), dtype=_dtype(self.dtype)).expand(self.shape)
        fd = os.open(self.path, os.O_RDWR if access == mmap.ACCESS_WRITE else os.O_RDONLY)
        try:
            return _map(fd, self.offset, self.shape, _dtype(self.dtype), access)
        finally:
            os.close(fd)


def _map(fd: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype, access: int) -> torch.Tensor:
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    if not size:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(fd, size, access=access, offset=offset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors; the read-only ones here are only compared
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Description:
    """Ten inputs as places and numbers: what another process needs to open them."""

    geometry: str  # its code
    local_expert_offset: int
    routed_scaling_factor: float
    tensors: dict[str, Place]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "tensors": {name: place.to_json() for name, place in self.tensors.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Description:
        """The inverse of to_json."""
        tensors = {name: Place.from_json(place) for name, place in data["tensors"].items()}
        return cls(data["geometry"], data["local_expert_offset"], data["routed_scaling_factor"], tensors)


class SharedInputs:
    """Allocates the eight tensors of one problem; a context manager that gives them up at its end.

    with SharedInputs() as shared:
        inputs = make_inputs(problem, allocate=shared.allocate)
        runner.run(shared.describe(inputs))

    kept   where some of the tensors may have been allocated too, to be used for several problems
    """

    def __init__(self, kept: SharedInputs | None = None) -> None:
        self._files: dict[int, SharedFile] = {}  # by the tensor's address
        self._kept = kept

    def __enter__(self) -> SharedInputs:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory up; tensors that are still held stay valid here, no other process can open them any more."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed CPU tensor whose pages are not touched yet (moeref.make's `allocate`)."""
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        if not size:
            return torch.zeros(shape, dtype=dtype)
        file = SharedFile(size)
        tensor = _map(file.fd, 0, shape, dtype, mmap.ACCESS_WRITE)
        self._files[tensor.data_ptr()] = file
        return tensor

    def describe(self, inputs: Inputs) -> Description:
        """What opens these inputs elsewhere. Tensors that were not allocated here are copied first."""
        places = {}
        files = {**self._kept._files, **self._files} if self._kept is not None else self._files
        for name, tensor in inputs.tensors().items():
            path = ""
            if tensor.numel() and tensor.device.type == "cpu" and tensor.data_ptr() in files:
                path = files[tensor.data_ptr()].path
            elif tensor.numel():
                copy = self.allocate(name, tuple(tensor.shape), tensor.dtype)
                copy.view(torch.uint8).copy_(tensor.contiguous().view(torch.uint8))
                path = self._files[copy.data_ptr()].path
            places[name] = Place(path, 0, tuple(tensor.shape), _dtype_name(tensor.dtype))
        geometry, offset, factor = inputs.geometry, inputs.local_expert_offset, inputs.routed_scaling_factor
        return Description(geometry.code, offset, factor, places)


@dataclass(frozen=True)
class Opened:
    """The same ten inputs mapped twice."""

    inputs: Inputs  # copy-on-write: for the candidate
    pristine: Inputs  # read-only: what they were, to compare with. Writing to it ends the process


def open_shared(description: Description) -> Opened:
    """Map described inputs. Raises OSError when their owner has given them up."""

    def mapped(access: int) -> Inputs:
        tensors: dict[str, Any] = {name: place.open(access).contiguous() for name, place in description.tensors.items()}
        assert tuple(tensors) == TENSOR_FIELDS
        return Inputs(
            **tensors,
            local_expert_offset=description.local_expert_offset,
            routed_scaling_factor=description.routed_scaling_factor,
            geometry=Geometry.parse(description.geometry),
        )

    return Opened(mapped(mmap.ACCESS_COPY), mapped(mmap.ACCESS_READ))


class OutputWriter:
    """Keeps copies of tensors in a file that the judging process has created."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.places: list[Place] = []
        self._size = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU copy of the tensor's values, which lies in the file."""
        place = Place(self.path, self._size, tuple(tensor.shape), _dtype_name(tensor.dtype))
        self.places.append(place)
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        grain = mmap.ALLOCATIONGRANULARITY
        self._size += -(-tensor.nbytes // grain) * grain
        os.truncate(self.path, self._size)
        return place.open(mmap.ACCESS_WRITE).copy_(tensor)

    def note(self, tensor: torch.Tensor) -> None:
        """Only the tensor's shape and dtype; it is read back as one number, expanded."""
        self.places.append(Place("", 0, tuple(tensor.shape), _dtype_name(tensor.dtype)))


def written_to(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of copy-on-write mapped tensors of which a page was written since they were mapped.

    Asked of the kernel, which is far cheaper than comparing and touches no page; all names where it can't tell.
    """
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return set(tensors)
    spans = {name: (t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in tensors.items() if t.numel()}
    inside: list[str] = []
    seen: set[str] = set()
    written: set[str] = set()
    for line in lines:
        header = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if header:
            low, high = (int(part, 16) for part in header.groups())
            inside = [name for name, (start, stop) in spans.items() if start < high and low < stop]
            seen.update(inside)
        elif inside and line.startswith(("Anonymous:", "Swap:")) and int(line.split()[1]):
            written.update(inside)
    return written | (set(spans) - seen)
