"""What moved between two versions of the golden files: folders, or revisions of the project in git."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moeref.golden.case import DEFAULT_FOLDER, Case, GoldenError, cases
from moeref.golden.whole import STAGES
from moeref.spec import SpecError

COMPARED = ("inputs", "integers", "norms", "rows_by_expert", "sampled_tokens", "routing", "written")
"""Parts of a manifest that may move beside the tensors."""


@contextmanager
def opened(text: str) -> Iterator[Path]:
    """The folder that `text` means: a path, a git revision of this project, or '' for the project's own folder.

    Raises SpecError for what is neither.
    """
    if not text or Path(text).is_dir():
        yield Path(text) if text else DEFAULT_FOLDER
        return
    with tempfile.TemporaryDirectory(prefix="moeref-golden-") as place:
        archive = None if text.startswith("-") else _git("archive", f"{text}:golden")
        if archive is None:
            raise SpecError(f"'{text}': expected a golden folder, or a git revision of the project that has golden/")
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(place, filter="data")
        yield Path(place)


def _git(*words: str) -> bytes | None:
    """What git says in the project's folder; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", *words], cwd=DEFAULT_FOLDER.parent, capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def differences(old: Path, new: Path) -> tuple[list[str], int]:
    """(lines for reading, number of cases that moved, came or went)."""
    before, after = _by_name(old), _by_name(new)
    lines: list[str] = []
    moved = 0
    for name in dict.fromkeys([*after, *before]):
        if name not in before:
            found = [f"{name}: new: {_reason(after[name])}"]
        elif name not in after:
            found = [f"{name}: gone"]
        else:
            found = _case(before[name], after[name])
        lines += found
        moved += bool(found)
    lines.append(f"{moved} cases moved, {len(set(before) | set(after)) - moved} the same")
    return lines, moved


def _by_name(root: Path) -> dict[str, Case]:
    try:
        return {case.name: Case(case.spec, root) for case in cases(root, everything=True)}
    except GoldenError:
        return {}  # a version before the first case


def _reason(case: Case) -> str:
    try:
        return str(case.manifest()["reason"])
    except GoldenError as error:
        return str(error)


def _case(old: Case, new: Case) -> list[str]:
    """Lines about one case that both versions have; none where it is the same."""
    try:
        first, second = old.manifest(), new.manifest()
        if first["digest"] == second["digest"] and _octets(old) == _octets(new):
            return []
        tensors = old.tensors(first), new.tensors(second)
    except GoldenError as error:
        return [f"{new.name}: can't be compared: {error}"]
    lines = [f"{new.name}: {second['reason']}"]
    lines += [f"    {part}: {text}" for part in COMPARED for text in _parts(first.get(part), second.get(part))]
    order = [*STAGES, *(name for name in tensors[0] if name not in STAGES)]
    for name in order:
        if name in tensors[0] and name in tensors[1]:
            lines += [f"    {name}: {text}" for text in _tensor(tensors[0][name], tensors[1][name])]
        elif name in tensors[0] or name in tensors[1]:
            lines.append(f"    {name}: {'gone' if name in tensors[0] else 'new'}")
    return lines if len(lines) > 1 else [*lines, "    only the record (reason, tolerance or layout) differs"]


def _octets(case: Case) -> bytes:
    path = case.path.with_suffix(".safetensors")
    return path.read_bytes() if path.is_file() else b""


def _parts(first: Any, second: Any) -> list[str]:
    """What differs in one part of the manifest: the keys, or the whole where it has none."""
    if first == second:
        return []
    if not isinstance(first, dict) or not isinstance(second, dict):
        return [f"{first} -> {second}"]
    keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
    return [f"{key}: {_short(first.get(key))} -> {_short(second.get(key))}" for key in keys]


def _short(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['shape']} {value['sha256']}"
    return str(value)


def _tensor(first: torch.Tensor, second: torch.Tensor) -> list[str]:
    """One line where two recorded tensors differ: how many elements, how far, where the most."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return [f"{first.dtype} {list(first.shape)} -> {second.dtype} {list(second.shape)}"]
    error = (second.double() - first.double()).abs().nan_to_num(nan=torch.inf)
    count = int((error > 0).sum())
    if not count:
        return []
    place = tuple(int(part) for part in (error == error.max()).nonzero()[0])
    text = f"{count} of {error.numel()} elements moved, most at {list(place)}: {first[place].item():.9g} -> "
    text += f"{second[place].item():.9g}"
    if first.is_floating_point():
        norm = float(first.double().norm())
        text += f"; {float(error.norm()) / norm if norm else float('inf'):.2g} of the stage's norm"
    return [text]
