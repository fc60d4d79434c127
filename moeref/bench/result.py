"""What a benchmark found, as data: written as JSON, read again, shown by moeref.report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moeref.bench.ceilings import Ceilings
from moeref.bench.stats import Spread

SCHEMA = 1
KIND = "moeref bench"


class BenchFileError(ValueError):
    """A file that is no result of `moeref bench`."""


@dataclass(frozen=True)
class Latency:
    """One way of calling: 'graph cold', 'graph warm', 'eager cold' or 'eager warm'. Seconds."""

    device: Spread
    host: Spread | None  # until the call returned; eager calls on a GPU only


@dataclass(frozen=True)
class Row:
    """One candidate on one problem. Without a PASS no figure of speed is there."""

    label: str
    problem: str
    candidate: str
    status: str
    message: str  # why it is no PASS; '' for a PASS
    repeat: str
    seq_len: int
    offset: int
    local_rows: float  # means over the rotations
    experts_hit: float
    weight_bytes: float
    flops: float
    floor: float  # seconds
    bound: str  # 'memory' or 'arithmetic'
    reference: float | None  # seconds
    recipe: str = ""
    worst_row: float | None = None  # of the judged outputs of all rotations
    latencies: dict[str, Latency] = field(default_factory=dict)
    primary: str = ""  # the latency that the figures below are made from
    ratio: float | None = None  # this candidate's time over the first candidate's, both primary and called alike
    kernels: float | None = None
    copies: float | None = None
    workspace: int | None = None  # bytes
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """The primary median."""
        return self.latencies[self.primary].device.median if self.primary else None

    @property
    def speedup(self) -> float | None:
        """Over the reference."""
        return self.reference / self.seconds if self.seconds and self.reference else None

    @property
    def gbps(self) -> float | None:
        """10**9 bytes of hit experts' weights a second."""
        return self.weight_bytes / self.seconds / 1e9 if self.seconds else None

    @property
    def tflops(self) -> float | None:
        """10**12 operations of the two GEMMs a second."""
        return self.flops / self.seconds / 1e12 if self.seconds else None

    @property
    def times_floor(self) -> float | None:
        """Multiple of the floor."""
        return self.seconds / self.floor if self.seconds and self.floor else None


@dataclass(frozen=True)
class Result:
    """A whole run."""

    environment: dict[str, str]
    device: str
    options: dict[str, Any]
    ceilings: Ceilings
    reference: str  # 'moeref', 'published' or 'none'
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; derived figures stand beside what they are made from."""
        data = {"kind": KIND, "schema": SCHEMA, **asdict(self)}
        for row, plain in zip(self.rows, data["rows"], strict=True):
            for name in ("seconds", "speedup", "gbps", "tflops", "times_floor"):
                plain[name] = getattr(row, name)
        return data

    @classmethod
    def from_json(cls, data: Any) -> Result:
        """The inverse of to_json. Raises BenchFileError."""
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise BenchFileError("expected a file that `moeref bench --json` wrote")
        if data.get("schema") != SCHEMA:
            raise BenchFileError(f"schema {data.get('schema')}: expected {SCHEMA}; run the benchmark again")
        try:
            rows = tuple(_row(plain) for plain in data["rows"])
            rest = {name: data[name] for name in ("environment", "device", "options", "reference")}
            return cls(**rest, ceilings=Ceilings(**data["ceilings"]), rows=rows, left_out=tuple(data["left_out"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise BenchFileError(f"a field is missing or wrong: {error}") from error

    def write(self, path: Path) -> None:
        """To a JSON file."""
        path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Result:
        """From a JSON file. Raises BenchFileError."""
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise BenchFileError(f"{path}: {error}") from error


def _row(plain: dict[str, Any]) -> Row:
    known = {one.name: plain[one.name] for one in fields(Row)}
    known["notes"] = tuple(known["notes"])
    known["latencies"] = {
        name: Latency(Spread(**one["device"]), Spread(**one["host"]) if one["host"] else None)
        for name, one in known["latencies"].items()
    }
    return Row(**known)
