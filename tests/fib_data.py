"""Data-set folders and solutions for the FlashInfer-Bench tests, written by hand so that they need no package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moeref.interop.fib.reference_source import reference_source
from moeref.interop.flashinfer_bench import definition_json, definition_name
from moeref.spec import PRESETS, Geometry

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
"""The published definitions and workloads, which are not part of this project; tests skip where they are absent."""

SMALL = PRESETS["small"]
TEN = (
    "routing_logits, routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, "
    "gemm2_weights, gemm2_weights_scale, local_expert_offset, routed_scaling_factor"
)
DESTINATION = f"""
from .core import run as core

def run({TEN}, output):
    output.copy_(core({TEN}))
"""
TRITON = f"""
import torch
import triton
import triton.language as tl
from .core import run as core

@triton.jit
def copy(source, target, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)

def run({TEN}, output):
    result = core({TEN}).view(torch.int16)
    copy[(triton.cdiv(result.numel(), 256),)](result, output.view(torch.int16), result.numel(), BLOCK=256)
"""


def solution_json(name: str, geometry: Geometry = SMALL, **changes: Any) -> dict[str, Any]:
    """A value-returning Python solution that is right; `spec` in changes is merged, the rest replaces."""
    spec = {"language": "python", "target_hardware": ["cpu"], "entry_point": "main.py::run", "dependencies": []}
    spec |= {"destination_passing_style": False, **changes.pop("spec", {})}
    sources = [{"path": "main.py", "content": reference_source(geometry)}]
    whole = {"name": name, "definition": definition_name(geometry), "author": "tester", "spec": spec}
    return {**whole, "sources": sources, **changes}


def with_core(name: str, main: str, geometry: Geometry = SMALL, **spec: Any) -> dict[str, Any]:
    """A destination-passing solution of two files: main.py, which imports the right one as core.py."""
    sources = [{"path": "main.py", "content": main}, {"path": "core.py", "content": reference_source(geometry)}]
    return solution_json(name, geometry, spec={"destination_passing_style": True, **spec}, sources=sources)


def put(root: Path, relative: str, data: Any) -> Path:
    """Write JSON data, or text as it is, below the folder."""
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def put_definition(root: Path, geometry: Geometry = SMALL, **changes: Any) -> Path:
    data = {**definition_json(geometry), **changes}
    return put(root, f"definitions/moe/{definition_name(geometry)}.json", data)


def put_solution(root: Path, data: dict[str, Any]) -> Path:
    return put(root, f"solutions/tester/moe/{definition_name(SMALL)}/{data['name']}.json", data)


def workload_json(uuid: str, seq_len: int = 6, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A workload line at offset 8, factor 2.5; what `inputs` does not name is random."""
    drawn: dict[str, Any] = {name.strip(): {"type": "random"} for name in TEN.split(",")[:8]}
    drawn["local_expert_offset"] = {"type": "scalar", "value": 8}
    drawn["routed_scaling_factor"] = {"type": "scalar", "value": 2.5}
    workload = {"uuid": uuid, "axes": {"seq_len": seq_len}, "inputs": drawn | (inputs or {})}
    return {"definition": definition_name(SMALL), "solution": None, "workload": workload, "evaluation": None}


def put_workloads(root: Path, *lines: dict[str, Any] | str) -> Path:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    return put(root, f"workloads/moe/{definition_name(SMALL)}.jsonl", text)


def blob(path: str, key: str) -> dict[str, Any]:
    return {"type": "safetensors", "path": path, "tensor_key": key}


def put_routing(root: Path, relative: str = "blob/routing.safetensors", seq_len: int = 6) -> dict[str, Any]:
    """Captured-like routing in a file; returns what a workload's inputs say of it."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(seq_len, SMALL.num_experts, generator=generator)
    bias = torch.randn(SMALL.num_experts, generator=generator).bfloat16()
    (root / relative).parent.mkdir(parents=True, exist_ok=True)
    save_file({"routing_logits": logits, "routing_bias": bias}, root / relative)
    return {name: blob(relative, name) for name in ("routing_logits", "routing_bias")}
