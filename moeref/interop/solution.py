"""FlashInfer-Bench solution files: read, checked as data, written to a folder and imported."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from moeref.interop.candidates import Candidate, CandidateError, from_module, import_guarded
from moeref.spec import Geometry

if TYPE_CHECKING:
    import torch

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
    dependencies: tuple[str, ...] = ()  # packages that it declares to need


def read(path: Path) -> Solution:
    """The solution of a JSON file. Raises CandidateError that names every wrong field."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
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
    dependencies = field(spec, "dependencies", list, [])
    sources: dict[str, str] = {}
    for source in field(data, "sources", list):
        source_path = field(source, "path", str)
        if source_path in sources:
            wrong.append(f"sources: the path {source_path!r} stands there twice")
        sources[source_path] = field(source, "content", str)
    wrong += [f"sources: the path {one!r} leads out of its folder" for one in sources if leads_out(one)]
    if not wrong and language.lower() in LANGUAGES:
        if not entry_function or entry_file not in sources:
            wrong.append(f"entry_point: expected FILE::FUNCTION with FILE one of {', '.join(sources) or 'no sources'}")
        elif not all(part.isidentifier() for part in PurePosixPath(entry_file).with_suffix("").parts):
            wrong.append(f"entry_point: expected a Python file that can be imported, got {entry_file!r}")
    if not wrong and not DEFINITIONS.fullmatch(definition):
        wrong.append(f"definition: expected moe_fp8_block_scale_ds_routing_..., got {definition}")
    if wrong:
        raise CandidateError(f"{path} is no usable solution: " + "; ".join(wrong))
    return Solution(
        name,
        definition,
        author,
        language.lower(),
        entry_file,
        entry_function,
        destination_passing,
        sources,
        tuple(str(one) for one in dependencies),
    )


def leads_out(path: str) -> bool:
    """Whether a relative path is absolute, empty, or climbs out of the folder that it is meant to lie in."""
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    parts = {*posix.parts, *windows.parts}
    return not posix.parts or posix.is_absolute() or bool(windows.anchor) or ".." in parts or "\0" in path


def load_solution(path: Path, folder: Path) -> Candidate:
    """The candidate of a solution JSON; its sources are written below `folder` as a package, as the benchmark does.

    What can't run here, a language that needs a build or a declared dependency that is missing, gives a candidate that
    is unsupported everywhere, and nothing of it is written. Raises CandidateError.
    """
    solution = read(path)
    summary = f"{solution.name} by {solution.author}, {solution.language}"
    reason = _cannot_run(solution)
    if reason:
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
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:  # a file where another path wants a folder; a name too long
            raise CandidateError(f"{path}: the source {relative!r} can't be written: {error}") from error
    sys.path.insert(0, str(folder.resolve()))
    importlib.invalidate_caches()
    module_name = ".".join((package, *PurePosixPath(solution.entry_file).with_suffix("").parts))
    module = import_guarded(str(path), lambda: importlib.import_module(module_name))
    candidate = from_module(str(path), module, solution.entry_function, name=solution.name, summary=summary)
    declared = replace(candidate, destination_passing=solution.destination_passing, summary=summary)
    takes_any = bool(declared.geometry_keywords)

    def unsupported(geometry: Geometry, device: torch.device) -> str | None:
        if solution.language == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "a Triton solution needs a GPU, or TRITON_INTERPRET=1 in the environment: no device is cuda here"
        return None if takes_any else _other_geometry(solution.definition, geometry)

    return replace(declared, unsupported=unsupported)


def _cannot_run(solution: Solution) -> str:
    """Why a solution can't run on this machine whatever the device; '' where it can."""
    if solution.language not in LANGUAGES:
        return f"language {solution.language}: only {' and '.join(LANGUAGES)} solutions run without a build step"
    missing = [name for name in solution.dependencies if not _installed(name)]
    return f"it declares to need {', '.join(missing)}, not installed here" if missing else ""


def _installed(requirement: str) -> bool:
    """Whether a declared dependency, a distribution's or a module's name with or without a version, is here."""
    name = re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]
    try:
        importlib.metadata.version(name)
        return True
    except (importlib.metadata.PackageNotFoundError, ValueError):
        module = name.replace("-", "_")
        return module.isidentifier() and importlib.util.find_spec(module) is not None


def _other_geometry(definition: str, geometry: Geometry) -> str | None:
    """Why a solution of that definition can't be given another geometry; None where it is the definition's own.

    The ten inputs do not hold top_k and the routing groups, so a solution has its definition's built in.
    """
    found = re.search(r"_topk(\d+)_ng(\d+)_kg(\d+)_", definition)
    own = tuple(map(int, found.groups())) if found else None
    asked = (geometry.top_k, geometry.n_group, geometry.topk_group)
    if own is None or own == asked:
        return None
    return (
        f"it is written for {definition}: top_k, n_group, topk_group {own}; the problem has {asked} and its function "
        "takes no n_group, topk_group and top_k"
    )
