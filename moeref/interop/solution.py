"""FlashInfer-Bench solution files: read, checked as data, written to a folder and imported."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from moeref.interop.candidates import Candidate, CandidateError, from_module, import_guarded, runs_anywhere

DEFINITIONS = re.compile(r"moe_fp8_block_scale_ds_routing_\w+")
"""Definitions with the ten inputs that moeref makes."""

LANGUAGES = ("python", "triton")
"""What runs without a build step."""


@dataclass(frozen=True)
class Solution:
    """What moeref uses of a solution JSON."""

    name: str
    definition: str
    author: str
    language: str
    entry_file: str
    entry_function: str
    destination_passing: bool
    sources: dict[str, str]  # relative path -> content


def read(path: Path) -> Solution:
    """The solution of a JSON file. Raises CandidateError that names every wrong field."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CandidateError(f"{path}: expected a FlashInfer-Bench solution in JSON: {error}") from error
    wrong: list[str] = []

    def field(holder: Any, name: str, kind: type, default: Any = None) -> Any:
        value = holder.get(name, default) if isinstance(holder, dict) else default
        if not isinstance(value, kind):
            wrong.append(f"{name}: expected {kind.__name__}, got {'nothing' if value is None else repr(value)[:60]}")
            return kind()
        return value

    name, definition, author = (field(data, key, str) for key in ("name", "definition", "author"))
    spec = field(data, "spec", dict)
    language = field(spec, "language", str)
    entry_file, _, entry_function = field(spec, "entry_point", str).partition("::")
    destination_passing = field(spec, "destination_passing_style", bool, True)
    sources: dict[str, str] = {}
    for source in field(data, "sources", list):
        sources[field(source, "path", str)] = field(source, "content", str)
    if not wrong and language.lower() in LANGUAGES:
        if not entry_function or entry_file not in sources:
            wrong.append(f"entry_point: expected FILE::FUNCTION with FILE one of {', '.join(sources) or 'no sources'}")
        wrong += [f"sources: the path {one!r} leads out of its folder" for one in sources if _escapes(one)]
    if not wrong and not DEFINITIONS.fullmatch(definition):
        wrong.append(f"definition: expected moe_fp8_block_scale_ds_routing_..., got {definition}")
    if wrong:
        raise CandidateError(f"{path} is no usable solution: " + "; ".join(wrong))
    return Solution(
        name, definition, author, language.lower(), entry_file, entry_function, destination_passing, sources
    )


def _escapes(path: str) -> bool:
    """Whether a source's path is absolute, empty, or climbs out of the folder it is written to."""
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    parts = {*posix.parts, *windows.parts}
    return not posix.parts or posix.is_absolute() or bool(windows.anchor) or ".." in parts or "\0" in path


def load_solution(path: Path, folder: Path) -> Candidate:
    """The candidate of a solution JSON; its sources are written below `folder` as a package, as the benchmark does.

    A language that needs a build gives a candidate that is unsupported everywhere. Raises CandidateError.
    """
    solution = read(path)
    summary = f"{solution.name} by {solution.author}, {solution.language}"
    if solution.language not in LANGUAGES:
        reason = f"language {solution.language}: only {' and '.join(LANGUAGES)} solutions run without a build step"
        return Candidate(
            solution.name, lambda *inputs: None, summary=summary, unsupported=lambda geometry, device: reason
        )
    content = json.dumps(solution.sources, sort_keys=True).encode()
    package = f"moeref_solution_{hashlib.sha256(content).hexdigest()[:16]}"
    root = folder.resolve() / package
    for relative, text in solution.sources.items():
        target = root / relative
        if not target.resolve().is_relative_to(root):  # a link below the folder could still lead out
            raise CandidateError(f"{path}: the source path {relative!r} leads out of its folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder.resolve()))
    importlib.invalidate_caches()
    module_name = ".".join((package, *PurePosixPath(solution.entry_file).with_suffix("").parts))
    module = import_guarded(str(path), lambda: importlib.import_module(module_name))
    candidate = from_module(str(path), module, solution.entry_function, name=solution.name, summary=summary)
    return replace(
        candidate, destination_passing=solution.destination_passing, unsupported=runs_anywhere, summary=summary
    )
