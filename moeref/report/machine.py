"""Outcomes as JSON: everything that was measured, for other programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moeref.verify import Diagnosis, Outcome, ShardVerdict

SCHEMA = 1


def to_json(
    outcomes: Sequence[Outcome], found: Sequence[Diagnosis], candidate: str, left_out: Sequence[str]
) -> dict[str, Any]:
    """{schema, candidate, environment, left_out, outcomes: [{problem, status, checks, ...}], diagnosis: [...]}."""
    return {
        "schema": SCHEMA,
        "candidate": candidate,
        "environment": environment(),
        "left_out": list(left_out),
        "outcomes": [
            {
                "label": outcome.label,
                "problem": outcome.verdict.problem,
                "status": outcome.verdict.status,
                "recipe": outcome.verdict.recipe,
                "recipe_found": outcome.verdict.recipe_found,
                "message": outcome.verdict.message,
                "failed": list(outcome.verdict.failed),
                "missed": list(outcome.verdict.missed),
                "checks": [asdict(check) for check in outcome.verdict.checks],
                "figures": asdict(outcome.verdict.figures),
                "seconds": outcome.seconds,
                "call_seconds": list(outcome.call_seconds),
                "repeat": outcome.repeat,
                "shards": [_shard(one) for one in outcome.shards],
            }
            for outcome in outcomes
        ],
        "diagnosis": [
            {"kind": one.kind, "status": one.status, "repeat": one.repeat, **asdict(one.finding)} for one in found
        ],
    }


def _shard(one: ShardVerdict) -> dict[str, Any]:
    verdict = one.verdict
    return {
        "shard": one.shard,
        "experts": list(one.experts),
        "rank": one.rank,
        "status": verdict.status,
        "sign": one.sign,
        "detail": one.detail,
        "recipe": verdict.recipe,
        "message": verdict.message,
        "failed": list(verdict.failed),
        "figures": asdict(verdict.figures),
        "call_seconds": list(one.call_seconds),
    }


def environment() -> dict[str, str]:
    """Versions and hardware that figures depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write(
    path: Path, outcomes: Sequence[Outcome], found: Sequence[Diagnosis], candidate: str, left_out: Sequence[str]
) -> None:
    """Write `to_json` to a file. Infinite figures are written as strings, since JSON has none."""
    path.write_text(json.dumps(_plain(to_json(outcomes, found, candidate, left_out)), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
