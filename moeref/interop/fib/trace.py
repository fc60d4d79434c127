"""Traces: a verdict as the JSON line that FlashInfer-Bench's own models load."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moeref.interop.fib.workload import Workload
from moeref.judge.verdict import ERROR, FAIL, INCONCLUSIVE, PASS, UNSUPPORTED, Verdict

NOT_TRACED = (UNSUPPORTED, INCONCLUSIVE)
"""Statuses without a counterpart: nothing was run, or nothing was there to test. No line is written for them."""

NOT_TIMED = "judged by moeref, not timed: performance is 0"


def trace(
    workload: Workload, solution: str, verdict: Verdict, preset: str, device: str, cause: str = ""
) -> dict[str, Any]:
    """One trace as JSON data.

    preset  the criterion whose matched ratio stands under correctness.extra.
    cause   of an ERROR: 'import' or 'timeout' where it was that (Outcome.cause).
    The format wants figures of performance beside every PASSED; they are its defaults, 0, which rank below every timed
    trace. Raises ValueError for a status of NOT_TRACED.
    """
    if verdict.status in NOT_TRACED:
        raise ValueError(f"{verdict.status} has no counterpart among FlashInfer-Bench's statuses: write no trace")
    status = _status(verdict, cause)
    evaluation: dict[str, Any] = {
        "status": status,
        "environment": environment(device),
        "timestamp": datetime.now(UTC).isoformat(),
        "log": "; ".join(part for part in (verdict.message, NOT_TIMED if verdict.status == PASS else "") if part),
    }
    if status in ("PASSED", "INCORRECT_NUMERICAL"):
        evaluation["correctness"] = _correctness(verdict, preset)
    if status == "PASSED":
        evaluation["performance"] = {"latency_ms": 0.0, "reference_latency_ms": 0.0, "speedup_factor": 0.0}
    return {
        "definition": workload.definition,
        "workload": workload.as_read,
        "solution": solution,
        "evaluation": evaluation,
    }


def _status(verdict: Verdict, cause: str) -> str:
    if verdict.status == PASS:
        return "PASSED"
    if verdict.status == ERROR:
        return {"import": "COMPILE_ERROR", "timeout": "TIMEOUT"}.get(cause, "RUNTIME_ERROR")
    assert verdict.status == FAIL
    form = next((check.detail for check in verdict.checks if check.name == "form" and not check.passed), "")
    if "expected shape" in form or "expected a tensor" in form:
        return "INCORRECT_SHAPE"
    return "INCORRECT_DTYPE" if form else "INCORRECT_NUMERICAL"


def _correctness(verdict: Verdict, preset: str) -> dict[str, Any]:
    figures = verdict.figures
    extra = {
        "matched_ratio": figures.matched.get(preset),
        "moeref": {
            "problem": verdict.problem,
            "criterion": preset,
            "recipe": verdict.recipe,
            "failed": list(verdict.failed),
            "missed": list(verdict.missed),
            "worst_row": _finite(figures.worst_row),
            "noise_z": _finite(figures.noise_z),
        },
    }
    return {
        "max_relative_error": _number(figures.max_relative_error),
        "max_absolute_error": _number(figures.max_absolute_error),
        "extra": extra,
    }


def _number(value: float | None) -> float | str:
    """A number of JSON; NaN and infinity as the strings that the format writes."""
    if value is None or math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else "Infinity"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions, as the format names them."""
    one = torch.device(device)
    hardware = torch.cuda.get_device_name(one) if one.type == "cuda" else _cpu_name()
    libs: dict[str, str] = {"torch": str(torch.__version__)}
    for name in ("triton", "moeref"):
        try:
            libs[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        libs["cuda"] = torch.version.cuda
    return {"hardware": hardware, "libs": libs}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "CPU"


def append_traces(path: Path, traces: Sequence[dict[str, Any]]) -> None:
    """Add one JSON line a trace to a file, which may be there already."""
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        before = file.read()
        if before and not before.endswith("\n"):
            file.write("\n")
        for one in traces:
            file.write(json.dumps(one, allow_nan=False) + "\n")
