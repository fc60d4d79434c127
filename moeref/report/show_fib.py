"""`moeref fib show` as lines of text: a FlashInfer-Bench data set, or one file of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeref.interop.fib.files import parse, read_text
from moeref.interop.flashinfer_bench import (
    DataSet,
    Definition,
    FibError,
    Workload,
    capture_file,
    prepare,
    read_data_set,
    read_definition,
    read_workloads,
)
from moeref.interop.solution import Solution, read
from moeref.spec import Geometry


def describe(path: Path) -> list[str]:
    """Lines about a folder, a definition, a solution, a file of workloads, or captured routing.

    Lines that start with 'ERROR ' name what can't be used. Raises FibError, or CandidateError for a broken solution.
    """
    if path.is_dir():
        return _data_set(read_data_set(path))
    if not path.is_file():
        raise FibError(f"no file or folder {path}: expected a FlashInfer-Bench data set or a file of one")
    if path.suffix == ".jsonl":
        return _workloads(read_workloads(path))
    if path.suffix == ".safetensors":
        name = capture_file(path)
        return [
            f"routing kind {name}",
            f"use: moeref verify --problem dsv3-tT-oOFFSET-{name}-published-s0 --routing-from {path}",
        ]
    if path.suffix != ".json":
        raise FibError(f"{path}: expected a folder, .json, .jsonl or .safetensors")
    data = parse(read_text(path, "JSON"), str(path), "a definition or a solution")
    return _solution(read(path)) if "spec" in data or "sources" in data else _definition(read_definition(path))


def _data_set(data: DataSet) -> list[str]:
    lines = [f"{data.root}: MoE definitions: {len(data.definitions)}"]
    for name, definition in data.definitions.items():
        workloads, solutions = data.workloads.get(name, []), data.solutions.get(name, [])
        lines += ["", *_definition(definition), f"workloads: {len(workloads)}"]
        lines += _workloads(workloads, data)
        lines.append(f"solutions: {len(solutions)}")
        lines += [f"  {line}" for one in solutions for line in _solution(one.solution)]
    return lines + [f"ERROR {one.message}" for one in data.broken]


def _definition(definition: Definition) -> list[str]:
    return [f"definition {definition.name}", f"geometry {_sizes(definition.geometry)}"]


def _sizes(g: Geometry) -> str:
    return (
        f"{g.name}: E={g.num_experts} L={g.num_local_experts} H={g.hidden_size} I={g.intermediate_size} "
        f"top_k={g.top_k} n_group={g.n_group} topk_group={g.topk_group}"
    )


def _solution(solution: Solution) -> list[str]:
    style = "destination-passing" if solution.destination_passing else "value-returning"
    return [f"solution {solution.name} by {solution.author}, {solution.language}, {style}, for {solution.definition}"]


def _workloads(workloads: Sequence[Workload], data: DataSet | None = None) -> list[str]:
    lines = [f"  {'uuid':<10} {'seq_len':>7} {'offset':>6}  inputs read from files; problem"] if workloads else []
    for one in workloads:
        files = ", ".join(one.blobs) or "none"
        lines.append(f"  {one.short:<10} {one.seq_len:>7} {one.offset:>6}  {files}{_problem(one, data)}")
    return lines


def _problem(workload: Workload, data: DataSet | None) -> str:
    """'; the problem's name' where the workload's files can be read, or why not."""
    if data is None:
        return ""
    try:
        ready = prepare(workload, data.definitions[workload.definition], data.root)
    except FibError as error:
        return f"; can't be judged: {error}"
    return f"; {ready.problem.name}" if not ready.from_files else ""
