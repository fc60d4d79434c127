"""The adapters' own kernels: beside their twins under Triton's interpreter, and compiled for sm_90 and sm_100."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import test_kernels_compile as compiling  # noqa: E402

from moe_fast.kernels import adapter_steps as steps  # noqa: E402

CASES = Path(__file__).with_name("interpreted_adapter_steps.py")
I32, F32, FP8, BF16, U8 = "*i32", "*fp32", "*fp8e4nv", "*bf16", "*u8"
KERNELS: dict[str, tuple[Any, Mapping[str, str], dict[str, Any], int, bool]] = {
    "dequantize": (
        steps.dequantize_kernel,
        {"hidden_states": FP8, "hidden_states_scale": F32, "output": BF16, "num_tokens": "i32"},
        {"H": 7168, "BLOCK_H": 1024},
        4,
        False,
    ),
    "localize": (
        steps.localize_kernel,
        {"topk_ids": I32, "topk_weights": F32, "local_ids": I32, "local_weights": BF16}
        | {"local_expert_offset": "i32", "pairs": "i32"},
        {"L": 32, "ABSENT": -1, "BLOCK": 512},
        4,
        False,
    ),
    "place_rows": (
        steps.place_rows_kernel,
        {"topk_ids": I32, "token_rows": I32, "expert_offsets": I32, "starts": I32, "hidden_states": U8}
        | {"hidden_states_scale": F32, "rows": U8, "rows_scale": F32, "row_expert": I32, "placed_rows": I32}
        | {"local_expert_offset": "i32", "num_tokens": "i32"},
        {"H": 7168, "K": 8, "BLOCK_H": 2048, "BLOCK_S": 64},
        4,
        False,
    ),
    "swiglu_quantize": (
        steps.swiglu_quantize_kernel,
        {"gemm1_out": BF16, "row_expert": I32, "quantized": FP8, "scale": F32},
        {"I": 2048, "BLOCKS": 8, "GATE_FIRST": False},
        4,
        False,
    ),
}


def test_kernels_do_what_their_twins_do() -> None:
    """In a child process with the interpreter on: evidence of indexing, not of numerics."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(CASES.parent.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(CASES)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_compile_without_spills(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiling.CASES, name, KERNELS[name])
    registers, spills, shared = compiling.spilled(compiling.build(name, capability))
    assert spills == 0, f"{name}: {spills} bytes spilled at {registers} registers"
    assert shared <= 227 * 1024
