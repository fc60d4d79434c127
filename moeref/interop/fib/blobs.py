"""Tensors out of a data set's safetensors files, held to their shape and dtype before their bytes are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moeref.interop.fib.files import FibError, FibUnsupported, inside, shown

LFS = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, which stands in a clone where the file was not fetched."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}  # the header's names


def read_blob(
    root: Path, relative: str, key: str, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The tensor `key` of the file `relative` below `root`, for the input `name`; a CPU tensor of that shape and dtype.

    Raises FibUnsupported for a Git LFS pointer, else FibError: a path that leads out, a missing file or key, a file
    that is no safetensors, another shape or dtype, values that are not finite.
    """
    return read_tensor(inside(root, relative, name), key, name, shape, dtype)


def check_blob(root: Path, relative: str, key: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise what read_blob would raise, by the file's header alone: no value is read."""
    with _opened(inside(root, relative, name), key, name, shape, dtype):
        pass


def read_tensor(path: Path, key: str, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> torch.Tensor:
    """As read_blob, of a file that is known to be safe to open. None in `shape`: any size."""
    with _opened(path, key, name, shape, dtype) as file:
        tensor: torch.Tensor = file.get_tensor(key).contiguous()
    if dtype != torch.float8_e4m3fn:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise FibError(f"{name}: expected finite values, {shown(key)} of {path} holds {bad} NaN or inf")
    return tensor


@contextmanager
def _opened(path: Path, key: str, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Iterator[Any]:
    """The open safetensors file, which holds `key` with that shape and dtype."""
    check_no_pointer(path, name)
    try:
        with safe_open(path, framework="pt") as file:
            _check_header(file, path, key, name, shape, dtype)
            yield file
    except (SafetensorError, OSError) as error:
        raise FibError(f"{name}: {path} is no safetensors file that can be read: {error}") from error


def _check_header(
    file: Any, path: Path, key: str, name: str, shape: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    keys = list(file.keys())
    if key not in keys:
        raise FibError(f"{name}: {path} has no tensor {shown(key)}; it has {shown(keys)}")
    header = file.get_slice(key)
    came, kind = list(header.get_shape()), header.get_dtype()
    fits = len(came) == len(shape) and all(want in (size, None) for size, want in zip(came, shape, strict=True))
    if not fits or _DTYPES.get(kind) != dtype:
        want = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        got = str(_DTYPES.get(kind, kind)).removeprefix("torch.")
        raise FibError(
            f"{name}: expected {want} {str(dtype).removeprefix('torch.')}, {shown(key)} of {path} is {came} {got}"
        )


def check_no_pointer(path: Path, name: str) -> None:
    """Raise FibUnsupported where the file is a Git LFS pointer, FibError where it can't be opened."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise FibError(f"{name}: {path} can't be opened: {error}") from error
    if start.startswith(LFS):
        size = next((line[5:].decode() for line in start.splitlines() if line.startswith(b"size ")), "?")
        raise FibUnsupported(
            f"{name}: {path} is a Git LFS pointer to {size} bytes, not the blob itself: run `git lfs pull` in the data "
            "set"
        )
