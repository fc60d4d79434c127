"""Workloads: one JSON line each, which says for every input whether it is drawn, given, or read from a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeref.inputs import FIELDS, TENSOR_FIELDS
from moeref.interop.fib.files import FibError, Fields, numbered_lines, parse, shown

WHAT = "workload"


@dataclass(frozen=True)
class Blob:
    """One tensor in a safetensors file of the data set."""

    path: str  # relative to the data set's root
    tensor_key: str


@dataclass(frozen=True)
class Workload:
    """One workload of an MoE definition. Tensors without a blob are of type 'random'."""

    definition: str
    uuid: str
    seq_len: int
    offset: int
    factor: float
    blobs: dict[str, Blob]  # by input
    as_read: dict[str, Any]  # the 'workload' object as it stands in the file, which a trace repeats

    @property
    def short(self) -> str:
        """The uuid's first eight characters."""
        return self.uuid[:8]


def read_workloads(path: Path) -> list[Workload]:
    """The workloads of a JSONL file. Raises FibError for the first line that is none."""
    workloads = []
    for one in workload_lines(path):
        if isinstance(one, FibError):
            raise one
        workloads.append(one)
    return workloads


def workload_lines(path: Path) -> Iterator[Workload | FibError]:
    """Each line's workload, or what is wrong with the line. Raises FibError where the file can't be read at all."""
    for where, line in numbered_lines(path, "FlashInfer-Bench workloads, one JSON object a line,"):
        try:
            yield parse_workload(line, where)
        except FibError as error:
            yield error


def parse_workload(line: str, where: str) -> Workload:
    """The workload of one JSON line. Raises FibError that names every wrong field."""
    data = parse(line, where, f"a {WHAT}")
    fields = Fields(where, WHAT)
    definition = fields.take(data, "definition", str)
    workload = fields.take(data, "workload", dict)
    for key in ("solution", "evaluation"):
        if data.get(key) is not None:
            fields.wrong.append(f"{key}: expected null in a workload, got {shown(data[key])}")
    fields.check()
    uuid = fields.take(workload, "uuid", str)
    axes, inputs = fields.take(workload, "axes", dict), fields.take(workload, "inputs", dict)
    seq_len = fields.take(axes, "seq_len", int)
    if seq_len < 0:
        fields.wrong.append(f"seq_len: expected 0 or more, got {seq_len}")
    if not uuid:
        fields.wrong.append("uuid: expected a string that is not empty")
    unknown = [name for name in inputs if name not in FIELDS]
    if unknown:
        fields.wrong.append(f"inputs: expected some of {', '.join(FIELDS)}, got {shown(unknown)}")
    blobs = {}
    for name in TENSOR_FIELDS:
        blob = _blob(fields, name, inputs.get(name, {"type": "random"}))
        if blob is not None:
            blobs[name] = blob
    offset = _scalar(fields, inputs, "local_expert_offset")
    factor = _scalar(fields, inputs, "routed_scaling_factor")
    if offset != int(offset):
        fields.wrong.append(f"local_expert_offset: expected a whole number, got {offset!r}")
    fields.check()
    return Workload(definition, uuid, seq_len, int(offset), float(factor), blobs, workload)


def _blob(fields: Fields, name: str, spec: Any) -> Blob | None:
    kind = spec.get("type") if isinstance(spec, dict) else None
    if kind == "safetensors":
        return Blob(fields.take(spec, "path", str, f"{name}.path"), fields.take(spec, "tensor_key", str, f"{name}.key"))
    if kind != "random":
        fields.wrong.append(f"{name}: expected type random or safetensors, got {shown(spec)}")
    return None


def _scalar(fields: Fields, inputs: dict[str, Any], name: str) -> float:
    spec = inputs.get(name)
    value = spec.get("value") if isinstance(spec, dict) and spec.get("type") == "scalar" else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        fields.wrong.append(f"{name}: expected type scalar with a finite number, got {shown(spec)}")
        return 0
    return value
