"""Builds cuda/few_tokens.cu for the host (tests/host_cuda) and runs it on CPU tensors, under drawn schedules."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from moe_fast.kernels import cuda_few_tokens as few
from moe_fast.kernels.cuda_build import SOURCES
from moe_fast.kernels.cuda_route import clamp_offset
from moeref.inputs import Inputs

HERE = Path(__file__).with_name("host_cuda")
STANDS_IN = {"hopper.cuh": "cuda_on_host.h", "few_multiply.cuh": "few_multiply_on_host.h"}
PATIENCE = 2_000_000
"""Turns without progress: a run's longest quiet stretch is some ten thousand."""


def source() -> str:
    """few_tokens.cu with its headers inlined, Hopper's own replaced, and the host's launcher after it."""
    seen: set[str] = set()

    def inline(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        file = HERE / STANDS_IN[name] if name in STANDS_IN else SOURCES / name
        text = file.read_text().replace("#pragma once\n", "")
        text = re.sub(r'^#include "([^"]+)"$', lambda match: inline(match.group(1)), text, flags=re.MULTILINE)
        return inline("few_layout.cuh") + text if name == "few_multiply.cuh" else text

    text = re.sub(r"^#pragma unroll.*$", "", inline("few_tokens.cu"), flags=re.MULTILINE)
    shared = "host::now->cta->shared.data()"
    for wanted, given in (
        ("extern __shared__ __align__(128) u8 slots[];", f"u8* slots = {shared};"),
        ("__shared__ Shared s;", f"Shared& s = *reinterpret_cast<Shared*>({shared} + STAGES * SLOT);"),
    ):
        assert text.count(wanted) == 1, wanted
        text = text.replace(wanted, given)
    names = "KERNEL few_tokens_kernel", "DYNAMIC_BYTES (STAGES * SLOT)", "STATIC_BYTES sizeof(Shared)"
    return text + "".join(f"#define {name}\n" for name in names) + (HERE / "launch.h").read_text()


class OnHost:
    """The kernel for one geometry and grid. change: an edit of the source, to see that the checks can fail."""

    def __init__(
        self, folder: Path, inputs: Inputs, blocks: int, slots: int | None = None, change: Callable[[str], str] = str
    ) -> None:
        g = inputs.geometry
        sizes = (g.num_local_experts, g.hidden_size, g.intermediate_size)
        defines = dict(few.defines(g.num_experts, g.n_group, g.topk_group, g.top_k, *sizes, blocks))
        defines |= {} if slots is None else {"STAGES": slots}
        folder.mkdir(parents=True, exist_ok=True)
        code, library = folder / "kernel.cpp", folder / "kernel.so"
        code.write_text(change(source()))
        flags = [f"-D{key}={value}" for key, value in defines.items()]
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *flags, str(code), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        self._run = ctypes.CDLL(str(library)).run_on_host
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
