"""The tables that `moe_fast.tune()` keeps: one JSON file a card and geometry, in the folder of compiled kernels.

`saved` is what the pipelines ask in every call: one lookup in a dict. A file is read once a process, at the first call
of its card and geometry. It holds only for the kernels, the Triton and the card that it was measured with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_fast.kernels.cuda_build import cache_folder
from moe_fast.target import Target, target_of
from moeref.spec import Geometry

if TYPE_CHECKING:
    from moe_fast.kernels.experts import Tiling

VARIABLE = "MOE_FAST_TUNING"
"""Environment variable: 0 turns saved tables off."""

PIPELINES = ("hopper_few_tokens", "hopper_triton", "hopper_cuda")
"""Backends that an entry may name."""

REACH = 4
"""An entry for n tokens serves calls of n / REACH to n tokens: one with fewer has another shape of work."""

KIND, SCHEMA = "moe_fast tuning", 1
LARGEST = 1024
"""No number of a tiling is larger; a file that says otherwise is none of ours."""


class TableError(ValueError):
    """A file that holds no table for this card, geometry and kernels; one clause that says why."""


@dataclass(frozen=True)
class Entry:
    """What was found for one number of tokens."""

    tokens: int
    pipeline: str  # of PIPELINES, the fastest one
    tiling: Tiling | None  # the fastest one of hopper_triton, whatever the pipeline is; None where none could be tuned
    us: float  # a call with these, microseconds
    shipped_us: float | None  # a call without a table; None where that failed


@dataclass(frozen=True)
class Key:
    """What a table holds for. All of it stands in the file; `path` names the card and the geometry alone."""

    card: str
    multiprocessors: int
    geometry: str  # its code
    triton: str | None
    sources: str  # hash of the kernels and pipelines

    @classmethod
    def of(cls, target: Target, geometry: Geometry) -> Key:
        """The key of a device, a geometry, and what is installed."""
        return cls(target.name, target.sm_count, geometry.code, target.triton, source_hash())

    @property
    def path(self) -> Path:
        """Where its table lies."""
        card = re.sub(r"[^a-z0-9]+", "-", self.card.lower()).strip("-")
        return cache_folder() / f"tuning-{card}-{self.multiprocessors}sm-{self.geometry}.json"


@functools.cache
def source_hash() -> str:
    """Of every file that a kernel is made of, and of those that put kernels together: 16 hexadecimal digits."""
    found = hashlib.sha256()
    root = Path(__file__).parents[1]
    for folder in ("kernels", "pipelines"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".cu", ".cuh"):
                found.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


# ---- in every call


@functools.lru_cache(maxsize=4096)
def saved(
    tokens: int,
    device: torch.device,
    num_experts: int,
    num_local_experts: int,
    hidden: int,
    intermediate: int,
    top_k: int,
    n_group: int,
    topk_group: int,
) -> Entry | None:
    """The entry that serves a call of so many tokens; None where the shipped choice does."""
    if device.type != "cuda":
        return None
    sizes = (num_experts, num_local_experts, hidden, intermediate, top_k, n_group, topk_group)
    return entry_for(tokens, _loaded(device, sizes))


def entry_for(tokens: int, entries: Sequence[Entry]) -> Entry | None:
    """The one of the nearest tuned count at or above, if that is within REACH."""
    above = [entry for entry in entries if tokens <= entry.tokens <= REACH * tokens]
    return min(above, key=lambda entry: entry.tokens, default=None)


@functools.cache
def _loaded(device: torch.device, sizes: tuple[int, ...]) -> tuple[Entry, ...]:
    """The table of a device and a geometry; empty, with a warning, where its file can't be used."""
    if os.environ.get(VARIABLE) == "0":
        return ()
    key = Key.of(target_of(device), Geometry(*sizes))
    try:
        return load(key)
    except TableError as error:
        warnings.warn(
            f"{key.path} is ignored: {error}; moe_fast.tune() makes a new one, moe_fast.tuning.forget() removes it",
            RuntimeWarning,
            stacklevel=2,
        )
        return ()


def reread() -> None:
    """Read files again when they are asked for next."""
    saved.cache_clear()
    _loaded.cache_clear()


# ---- files


def load(key: Key) -> tuple[Entry, ...]:
    """The entries of a key's file by tokens; none where there is no file. Raises TableError."""
    try:
        text = key.path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"it can't be read ({type(error).__name__}: {error})") from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise TableError(f"it is no JSON ({error})") from error
    if not isinstance(data, dict) or data.get("kind") != KIND or data.get("schema") != SCHEMA:
        raise TableError(f"expected kind '{KIND}' and schema {SCHEMA}")
    for name, value in asdict(key).items():
        if data.get(name) != value:
            raise TableError(f"it was measured with {name} {data.get(name)}, here is {value}")
    entries = data.get("entries")
    if not isinstance(entries, list):
        raise TableError("expected a list of entries")
    found = tuple(sorted((_entry(one) for one in entries), key=lambda entry: entry.tokens))
    if len({entry.tokens for entry in found}) < len(found):
        raise TableError("two entries have the same tokens")
    return found


def _entry(data: Any) -> Entry:
    try:
        tokens, pipeline, tiling = data["tokens"], data["pipeline"], data["tiling"]
        us, shipped = float(data["us"]), data["shipped_us"]
        right = isinstance(tokens, int) and tokens > 0 and pipeline in PIPELINES
        if not right or (pipeline == "hopper_triton" and tiling is None):
            raise ValueError(f"tokens {tokens}, pipeline {pipeline}")
        return Entry(tokens, pipeline, _tiling(tiling), us, None if shipped is None else float(shipped))
    except (KeyError, TypeError, ValueError, ImportError) as error:
        raise TableError(f"an entry is not as expected ({type(error).__name__}: {error})") from error


def _tiling(data: Any) -> Tiling | None:
    if data is None:
        return None
    from moe_fast.kernels.experts import Tiling  # needs triton

    for name, value in data.items():
        right = isinstance(value, bool) if name == "pdl" else type(value) is int and 0 < value <= LARGEST
        if not right:
            raise ValueError(f"tiling's {name} {value}")
    return Tiling(**data)


def save(key: Key, entries: Sequence[Entry]) -> Path:
    """Keep entries; those of other numbers of tokens that the file holds already stay. Raises OSError.

    Returns the file. It is complete whenever another process looks for it.
    """
    try:
        kept = {entry.tokens: entry for entry in load(key)}
    except TableError:
        kept = {}
    kept.update({entry.tokens: entry for entry in entries})
    ordered = [asdict(kept[tokens]) for tokens in sorted(kept)]
    path = key.path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    text = json.dumps({"kind": KIND, "schema": SCHEMA, **asdict(key), "entries": ordered}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    reread()
    return path


def forget() -> list[Path]:
    """Remove every table, of every card and geometry; returns the files that are gone. Raises OSError."""
    found = sorted(cache_folder().glob("tuning-*.json"))
    for path in found:
        path.unlink(missing_ok=True)
    reread()
    return found
