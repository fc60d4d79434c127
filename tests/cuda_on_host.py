"""Builds CUDA sources for the host (tests/host_cuda) and runs them on CPU tensors, under drawn schedules."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_fast.kernels import cuda_few_tokens as few
from moe_fast.kernels.cuda_build import SOURCES
from moe_fast.kernels.cuda_route import clamp_offset
from moeref.inputs import Inputs

HERE = Path(__file__).with_name("host_cuda")
STANDS_IN = {"hopper.cuh": "cuda_on_host.h", "few_multiply.cuh": "few_multiply_on_host.h"}
PATIENCE = 2_000_000
"""Turns without progress: a run's longest quiet stretch is some ten thousand."""


def inlined(file: str) -> str:
    """A source with its headers inlined and Hopper's own replaced."""
    seen: set[str] = set()

    def inline(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        path = HERE / STANDS_IN[name] if name in STANDS_IN else SOURCES / name
        text = path.read_text().replace("#pragma once\n", "")
        text = re.sub(r'^#include "([^"]+)"$', lambda match: inline(match.group(1)), text, flags=re.MULTILINE)
        return inline("few_layout.cuh") + text if name == "few_multiply.cuh" else text

    return re.sub(r"^#pragma unroll.*$", "", inline(file), flags=re.MULTILINE)


def launcher(kernel: str, dynamic_bytes: str, static_bytes: str) -> str:
    """What follows a source: the host's launcher."""
    names = f"KERNEL {kernel}", f"DYNAMIC_BYTES ({dynamic_bytes})", f"STATIC_BYTES ({static_bytes})"
    return "".join(f"#define {name}\n" for name in names) + (HERE / "launch.h").read_text()


_built: dict[tuple[str, tuple[tuple[str, int], ...]], Callable[..., int]] = {}


def build(folder: Path, code: str, defines: Mapping[str, int]) -> Callable[..., int]:
    """The compiled launcher's entry, run_on_host of launch.h; kept, for a test's folder may go."""
    key = code, tuple(defines.items())
    if key not in _built:
        _built[key] = compiled(folder, code, defines)
    return _built[key]


def compiled(folder: Path, code: str, defines: Mapping[str, int]) -> Callable[..., int]:
    """See `build`."""
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(code)
    flags = [f"-D{key}={value}" for key, value in defines.items()]
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *flags, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(library)).run_on_host  # type: ignore[no-any-return]


def few_tokens_source() -> str:
    """few_tokens.cu for the host."""
    text = inlined("few_tokens.cu")
    shared = "host::now->cta->shared.data()"
    for wanted, given in (
        ("extern __shared__ __align__(128) u8 slots[];", f"u8* slots = {shared};"),
        ("__shared__ Shared s;", f"Shared& s = *reinterpret_cast<Shared*>({shared} + STAGES * SLOT);"),
    ):
        assert text.count(wanted) == 1, wanted
        text = text.replace(wanted, given)
    return text + launcher("few_tokens_kernel", "STAGES * SLOT", "sizeof(Shared)")


class OnHost:
    """The one-launch kernel for a geometry and a grid. change: an edit of the source, so that a check can fail."""

    def __init__(
        self, folder: Path, inputs: Inputs, blocks: int, slots: int | None = None, change: Callable[[str], str] = str
    ) -> None:
        g = inputs.geometry
        sizes = (g.num_local_experts, g.hidden_size, g.intermediate_size)
        defines = dict(few.defines(g.num_experts, g.n_group, g.topk_group, g.top_k, *sizes, blocks))
        defines |= {} if slots is None else {"STAGES": slots}
        self._run = build(folder, change(few_tokens_source()), defines)
        self._blocks = blocks

    def __call__(self, inputs: Inputs, seed: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(0, or what is wrong as launch.h says; output; counters) under the seed's schedule."""
        g, tensors = inputs.geometry, inputs.args()[:8]
        output = torch.full((inputs.seq_len, g.hidden_size), torch.nan, dtype=torch.bfloat16)
        rows = few.rows_kept(g.top_k, g.num_local_experts) * few.TOKENS
        swiglu_out, counters = torch.full((rows, g.intermediate_size), torch.nan), torch.zeros(4, dtype=torch.int32)
        pointers = [tensor.data_ptr() for tensor in (*tensors, output, swiglu_out, counters)]
        offset, factor = clamp_offset(inputs.local_expert_offset), inputs.routed_scaling_factor
        packed = few.LAYOUT.pack(*pointers, inputs.seq_len, offset, factor, inputs.hidden_states_scale.stride(0))
        params = ctypes.create_string_buffer(packed, len(packed))
        status = self._run(params, self._blocks, ctypes.c_uint(seed), ctypes.c_long(PATIENCE))
        return status, output, counters


class HostKernels:
    """Stands in for cuda_build.load: kernels of one Params each, built for the host and kept.

    change: an edit of every source. A CTA has WARPS warps where the source says so in a line of its own: a CTA of 32
    warps is a thousand fibers. A source that asks for blockDim gets the threads of its launch; a cluster is the grid.
    Each launch has another schedule.
    """

    WARPS = 3

    def __init__(self, folder: Path, change: Callable[[str], str] = str) -> None:
        self._folder, self._change = folder, change
        self.launches = 0

    def load(
        self, name: str, defines: tuple[tuple[str, int], ...], kernel: str, threads: int, shared: int, device: int
    ) -> HostKernel:
        """As cuda_build.load."""
        text, warps = re.subn(r"^constexpr int WARPS = \d+;$", self._few_warps, inlined(name), flags=re.MULTILINE)
        variables = iter(range(100))
        text = re.sub(
            r"__shared__ (\w+) (\w+)(\[[^;]+\]);",
            lambda found: f"auto& {found[2]} = shared_variable<{found[1]}{found[3]}>({next(variables)});",
            text,
        )
        if "blockDim.x" in text:
            text = f"constexpr int THREADS = {threads};\n" + text.replace("blockDim.x", "THREADS")
        threads_line = "constexpr int THREADS = WARPS * 32;\n" if warps else ""
        code = self._change(text) + threads_line + launcher(kernel, f"{next(variables)} * VARIABLE_BYTES", "0")
        return HostKernel(self, build(self._folder / f"{Path(name).stem}-{threads}", code, dict(defines)))

    def _few_warps(self, found: re.Match[str]) -> str:
        return f"constexpr int WARPS = {self.WARPS};" if found[0].endswith("32;") else found[0]


class HostKernel:
    """Stands in for cuda_build.Kernel."""

    def __init__(self, owner: HostKernels, run: Callable[..., int]) -> None:
        self._owner, self._run = owner, run

    def launch(self, blocks: int, arguments: Sequence[ctypes.Structure], stream: int, pdl: bool = False) -> None:
        """Run the grid to its end. Raises AssertionError where threads hang or break a rule."""
        (params,) = arguments
        self._owner.launches += 1
        seed = ctypes.c_uint(self._owner.launches)
        status = self._run(ctypes.byref(params), blocks, seed, ctypes.c_long(PATIENCE))
        assert status == 0, f"{status} threads never end, or what launch.h says of it"


def on_host(monkeypatch: Any, kernels: HostKernels, *modules: Any) -> None:
    """Let these modules of moe_fast.kernels launch on the host, which has one multiprocessor."""

    class Target:
        sm_count = 1

    for module in modules:
        monkeypatch.setattr(module, "load", kernels.load)
        monkeypatch.setattr(module, "current_stream", lambda index: 0)
        if hasattr(module, "target_of"):
            monkeypatch.setattr(module, "target_of", lambda device: Target)
