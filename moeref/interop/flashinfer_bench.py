"""FlashInfer-Bench's data sets: read and verified, written, and their captured routing taken as a routing kind.

The files' format is its own (PyPI: flashinfer-bench); that package is not needed here. Public names:

    data = read_data_set(Path("flashinfer-trace"))             # definitions, workloads, solutions; what is broken
    ready = prepare(workload, data.definitions[name], data.root)
    judge_one(runner, solution, ready.workload.short, ready.problem, options, make=ready.make)    # moeref.verify
    append_traces(path, [trace(ready.workload, solution, outcome.verdict, "published", "cpu")])
    export(problem, Path("my-data-set"))
    name = capture_file(Path("routing.safetensors"))           # a routing kind, captured_DIGEST
"""

from __future__ import annotations

from moeref.interop.fib.captured import Captured, capture, capture_file
from moeref.interop.fib.dataset import Broken, DataSet, SolutionFile, capture_routing, is_data_set, read_data_set
from moeref.interop.fib.definition import (
    Definition,
    definition_json,
    definition_name,
    is_moe,
    read_definition,
)
from moeref.interop.fib.export import Exported, export, export_size
from moeref.interop.fib.files import FibError, FibUnsupported
from moeref.interop.fib.trace import NOT_TRACED, append_traces, trace
from moeref.interop.fib.workload import Blob, Workload, parse_workload, read_workloads
from moeref.interop.fib.workload_inputs import Prepared, prepare

__all__ = [
    "NOT_TRACED",
    "Blob",
    "Broken",
    "Captured",
    "DataSet",
    "Definition",
    "Exported",
    "FibError",
    "FibUnsupported",
    "Prepared",
    "SolutionFile",
    "Workload",
    "append_traces",
    "capture",
    "capture_file",
    "capture_routing",
    "definition_json",
    "definition_name",
    "export",
    "export_size",
    "is_data_set",
    "is_moe",
    "parse_workload",
    "prepare",
    "read_data_set",
    "read_definition",
    "read_workloads",
    "trace",
]
