"""Compile CUDA C++ at run time, keep the cubin on disk, load and launch it through the driver.

The compiler is NVRTC (through cuda.bindings, which torch's CUDA wheels bring along) or, without it, nvcc on the PATH.
Sources use no header but their own, which are inlined here, so that neither compiler needs a toolkit's include folder.
Cubins lie under $MOE_FAST_CACHE, or moe_fast/ in the user's cache folder, named by a hash of everything they depend on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "cuda"
ARCH = "sm_90a"
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)


class CompilerNotFoundError(RuntimeError):
    """Neither NVRTC nor nvcc is there."""


# ------------------------------------------------------------------------------------------------ compiling
def source_text(name: str) -> str:
    """A source of the cuda folder with its own headers inlined, each once."""
    seen: set[str] = set()

    def inline(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = (SOURCES / file).read_text().replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: inline(match.group(1)), text)

    return inline(name)


@functools.cache
def compiler() -> str:
    """'nvrtc 13.0' or what `nvcc --version` says last. Raises CompilerNotFoundError."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
        if status == nvrtc.nvrtcResult.NVRTC_SUCCESS:
            return f"nvrtc {major}.{minor}"
    except (ImportError, RuntimeError):  # no bindings, or no libnvrtc
        pass
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CompilerNotFoundError("no NVRTC (package cuda-bindings) and no nvcc on the PATH")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + said.strip().splitlines()[-1]


def compile_nvrtc(text: str, defines: Sequence[str], arch: str) -> bytes:
    """Source text -> cubin by NVRTC. Raises RuntimeError with the compiler's log."""
    from cuda.bindings import nvrtc

    def done(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC: {result[0]}")
        return result[1] if len(result) > 1 else None

    program = done(nvrtc.nvrtcCreateProgram(text.encode(), b"moe_fast.cu", 0, [], []))
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", *(f"-D{d}".encode() for d in defines)]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * done(nvrtc.nvrtcGetProgramLogSize(program))
        done(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC: {status}\n{log.decode(errors='replace')}")
    cubin = b" " * done(nvrtc.nvrtcGetCUBINSize(program))
    done(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def compile_nvcc(text: str, defines: Sequence[str], arch: str) -> tuple[bytes, str]:
    """Source text -> (cubin, ptxas's resource report) by nvcc. Raises RuntimeError with the compiler's log."""
    virtual = arch.replace("sm_", "compute_")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "moe_fast.cu", Path(folder) / "moe_fast.cubin"
        source.write_text(text)
        command = ["nvcc", "-cubin", f"-gencode=arch={virtual},code={arch}", "-std=c++17", "-Xptxas", "-v"]
        command += [*(f"-D{d}" for d in defines), str(source), "-o", str(target)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        return target.read_bytes(), ran.stderr


def cache_folder() -> Path:
    """Where cubins are kept."""
    given = os.environ.get("MOE_FAST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "moe_fast"


def cubin(name: str, defines: Mapping[str, int], arch: str = ARCH) -> bytes:
    """The compiled source, from the cache folder where it is there already."""
    text = source_text(name)
    flags = [f"{key}={value}" for key, value in sorted(defines.items())]
    if os.environ.get("MOE_FAST_EVERY_LANE_ARRIVES") == "1":  # for racecheck: see hopper.cuh
        flags.append("EVERY_LANE_ARRIVES=1")
    key = hashlib.sha256("\0".join([text, *flags, arch, compiler()]).encode()).hexdigest()[:24]
    kept = cache_folder() / f"{Path(name).stem}-{arch}-{key}.cubin"
    if kept.exists():
        return kept.read_bytes()
    nvrtc = compiler().startswith("nvrtc")
    binary = compile_nvrtc(text, flags, arch) if nvrtc else compile_nvcc(text, flags, arch)[0]
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")  # renamed when complete: other processes may look for it
        partial.write_bytes(binary)
        partial.replace(kept)
    except OSError:
        pass  # a read-only home costs a compilation a process, nothing else
    return binary


# ------------------------------------------------------------------------------------------------ driver
class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


class TensorMap(ctypes.Structure):
    """CUtensorMap; the driver wants it at a multiple of 64 bytes, which `tensor_map` sees to."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


COOPERATIVE = 2
PROGRAMMATIC_STREAM_SERIALIZATION = 6
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


@functools.cache
def driver() -> ctypes.CDLL:
    """libcuda."""
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, what: str) -> None:
    """Raise RuntimeError with the driver's name of an error."""
    if status:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{what}: {(name.value or b'?').decode()} ({status})")


class Kernel:
    """One function of a loaded cubin, with its grid-independent launch settings. Several threads may launch it."""

    def __init__(self, module: ctypes.c_void_p, name: str, threads: int, shared_bytes: int) -> None:
        self.name, self.threads, self.shared_bytes = name, threads, shared_bytes
        self.function = ctypes.c_void_p()
        self._launch = driver().cuLaunchKernelEx
        self._lock = threading.Lock()
        self._configs: dict[tuple[bool, bool], LaunchConfig] = {}
        check(driver().cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()), name)
        if shared_bytes > 48 * 1024:
            status = driver().cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            check(status, f"{name}: {shared_bytes} bytes of shared memory")

    def launch(
        self,
        blocks: int,
        arguments: Sequence[ctypes.Structure],
        stream: int,
        pdl: bool = False,
        cooperative: bool = False,
    ) -> None:
        """Enqueue on a stream. pdl: may start before the stream's previous kernel has ended. cooperative: all blocks
        run at once. Raises RuntimeError with the driver's error, so where they can't."""
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        with self._lock:  # the driver copies all it is given before it returns
            config = self._configs.get((pdl, cooperative))
            if config is None:
                config = self._configs[pdl, cooperative] = self.config(pdl, cooperative)
            config.grid[0], config.stream = blocks, stream
            status = self._launch(ctypes.byref(config), self.function, pointers, None)
        if status:
            check(status, self.name)

    def config(self, pdl: bool = False, cooperative: bool = False) -> LaunchConfig:
        """Settings of a launch of one block on the default stream."""
        chosen = [PROGRAMMATIC_STREAM_SERIALIZATION] * pdl + [COOPERATIVE] * cooperative
        attributes = (LaunchAttribute * max(len(chosen), 1))(*(LaunchAttribute(id=number) for number in chosen))
        for attribute in attributes:
            attribute.value[0] = 1
        grid, block = (ctypes.c_uint * 3)(1, 1, 1), (ctypes.c_uint * 3)(self.threads, 1, 1)
        return LaunchConfig(grid, block, self.shared_bytes, None, attributes, len(chosen))


class PreparedLaunch:
    """A launch of which only the argument's values and the stream change from call to call: 2 us.

    The kernel takes one structure by value, packed as `layout` says. May be called from several threads.
    """

    def __init__(self, kernel: Kernel, blocks: int, layout: struct.Struct) -> None:
        self._name, self._function, self._layout = kernel.name, kernel.function, layout
        self._lock = threading.Lock()
        self._values = ctypes.create_string_buffer(layout.size)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._values))
        self._config = kernel.config()
        self._config.grid[0] = blocks
        self._config_reference = ctypes.byref(self._config)
        self._launch = driver().cuLaunchKernelEx

    def __call__(self, stream: int, *values: float) -> None:
        """Enqueue on a stream of the kernel's device, which must be the current one."""
        with self._lock:  # the driver copies the values before it returns
            self._layout.pack_into(self._values, 0, *values)
            self._config.stream = stream
            status = self._launch(self._config_reference, self._function, self._pointers, None)
        if status:
            check(status, self._name)


@functools.cache
def load(
    name: str, defines: tuple[tuple[str, int], ...], function: str, threads: int, shared_bytes: int, device: int
) -> Kernel:
    """A kernel of a source, compiled if need be, loaded into a device's primary context."""
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()  # torch makes its context current
        return Kernel(_module(name, defines, device), function, threads, shared_bytes)


@functools.cache
def _module(name: str, defines: tuple[tuple[str, int], ...], device: int) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    check(driver().cuModuleLoadData(ctypes.byref(module), cubin(name, dict(defines))), f"loading {name}")
    return module


def tensor_map(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> tuple[TensorMap, ctypes.Array[ctypes.c_char]]:
    """(map, the memory it lies in) of a tensor of bytes: sizes from the fastest axis, strides in bytes from the second.

    Boxes of at most 128 bytes along the fastest axis land in shared memory with the 128-byte swizzle.
    """
    memory = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    made = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 64)
    rank = len(sizes)
    status = driver().cuTensorMapEncodeTiled(
        ctypes.byref(made),
        0,  # bytes
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,  # no interleave
        3,  # swizzle 128 bytes
        3,  # L2 promotion 256 bytes
        0,  # zeros outside
    )
    check(status, f"tensor map of {sizes}")
    return made, memory
