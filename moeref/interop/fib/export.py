"""A problem as a workload of a data set: definition, JSONL line and blobs that FlashInfer-Bench can run."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moeref.inputs import TENSOR_FIELDS, expected_layout
from moeref.interop.fib.definition import OP_TYPE, definition_json, definition_name, read_definition
from moeref.interop.fib.files import FibError, inside
from moeref.interop.fib.workload import read_workloads
from moeref.interop.fib.workload_inputs import RANDOM_VALUES, ROUTING
from moeref.make import make_inputs
from moeref.routings import draw_routing
from moeref.spec import Problem

NAMESPACE = uuid.UUID("5d1c2f0e-6a0b-5c0e-9f57-0d6c1c9b7a3e")
"""uuid5 of a problem's name in this namespace is its workload's uuid."""


@dataclass(frozen=True)
class Exported:
    """What one export wrote; paths relative to the data set."""

    uuid: str
    definition: str
    workload: str
    blob: str
    bytes: int  # of the blob's tensors


def export_size(problem: Problem, only_routing: bool = False) -> int:
    """Bytes of the tensors that an export writes; nothing is made."""
    layout = expected_layout(problem.geometry, problem.seq_len)
    names = ROUTING if only_routing else TENSOR_FIELDS
    return sum(torch.empty(shape, dtype=dtype, device="meta").nbytes for shape, dtype in (layout[n] for n in names))


def export(problem: Problem, root: Path, *, only_routing: bool = False, experts: str = "hit") -> Exported:
    """Write a problem as a workload below `root`, making the folder where there is none.

    only_routing  write logits and bias alone; FlashInfer-Bench then draws the other tensors, as in its own data set.
                  Only for the value kind 'published', which draws as it does.
    experts       as for moeref.make.make_inputs: 'hit' leaves the weights zero of experts that no token chose.
    Raises FibError where the data set has that workload, or another definition of that name; nothing is written then.
    """
    if only_routing and problem.values != RANDOM_VALUES:
        raise FibError(
            f"only the routing of {problem.name} was to be written, and its values are {problem.values}: "
            f"FlashInfer-Bench would draw the rest as the value kind {RANDOM_VALUES} does; use that kind, or write all"
        )
    name = definition_name(problem.geometry)
    number = str(uuid.uuid5(NAMESPACE, problem.name + ("/only-routing" if only_routing else "")))
    definition = f"definitions/{OP_TYPE}/{name}.json"
    workload = f"workloads/{OP_TYPE}/{name}.jsonl"
    blob = f"blob/workloads/{OP_TYPE}/{name}/{name}_{number}.safetensors"
    for relative in (definition, workload, blob):
        _check_target(root, relative)
    if (root / definition).exists():
        geometry = read_definition(root / definition).geometry
        if geometry != problem.geometry:
            raise FibError(
                f"{root / definition} is of geometry {geometry.code}, the problem of {problem.geometry.code}"
            )
    if (root / workload).exists() and any(one.uuid == number for one in read_workloads(root / workload)):
        raise FibError(f"{root / workload} holds the workload {number} of {problem.name} already")
    tensors = _routing(problem) if only_routing else make_inputs(problem, experts=experts).tensors()
    for relative in (definition, workload, blob):
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, root / blob)
    if not (root / definition).exists():
        text = json.dumps(definition_json(problem.geometry), indent=1)
        (root / definition).write_text(text + "\n", encoding="utf-8")
    line = _workload_json(problem, name, number, blob, list(tensors))
    with (root / workload).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return Exported(number, definition, workload, blob, sum(tensor.nbytes for tensor in tensors.values()))


def _routing(problem: Problem) -> dict[str, torch.Tensor]:
    logits, bias = (torch.from_numpy(part) for part in draw_routing(problem))
    return dict(zip(ROUTING, (logits.contiguous(), bias.bfloat16()), strict=True))


def _check_target(root: Path, relative: str) -> None:
    """Raise FibError where writing below `root` would go elsewhere, through a link."""
    if not (root / relative).resolve().is_relative_to(root.resolve()):
        raise FibError(
            f"{root / relative} is, or lies behind, a link that leads out of the data set: nothing was written"
        )
    if (root / relative).exists():
        inside(root, relative, "export")


def _workload_json(problem: Problem, definition: str, number: str, blob: str, stored: list[str]) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        name: {"type": "safetensors", "path": f"./{blob}", "tensor_key": name} if name in stored else {"type": "random"}
        for name in TENSOR_FIELDS
    }
    inputs["local_expert_offset"] = {"type": "scalar", "value": problem.offset}
    inputs["routed_scaling_factor"] = {"type": "scalar", "value": problem.factor}
    workload = {"uuid": number, "axes": {"seq_len": problem.seq_len}, "inputs": inputs}
    return {"definition": definition, "solution": None, "workload": workload, "evaluation": None}
