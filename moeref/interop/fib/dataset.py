"""A data-set folder: which MoE definitions, workloads and solutions it holds, and what of it can't be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moeref.interop.candidates import CandidateError
from moeref.interop.fib.captured import capture_file
from moeref.interop.fib.definition import Definition, is_moe, read_definition
from moeref.interop.fib.files import FibError, inside, parse, read_text
from moeref.interop.fib.workload import Workload, workload_lines
from moeref.interop.fib.workload_inputs import ROUTING, prepare
from moeref.interop.solution import Solution, read

PARTS = ("definitions", "workloads", "solutions")


@dataclass(frozen=True)
class SolutionFile:
    """A solution and the file that it was read from, by which a candidate is loaded."""

    solution: Solution
    path: Path


@dataclass(frozen=True)
class Broken:
    """A file, or a line of one, that can't be used."""

    where: str  # relative to the data set's root
    message: str


@dataclass
class DataSet:
    """What a folder holds of DeepSeek-routing FP8 block-scale MoE; everything else in it is left unread."""

    root: Path
    definitions: dict[str, Definition] = field(default_factory=dict)
    workloads: dict[str, list[Workload]] = field(default_factory=dict)  # by definition
    solutions: dict[str, list[SolutionFile]] = field(default_factory=dict)  # by definition
    broken: list[Broken] = field(default_factory=list)


def is_data_set(path: Path) -> bool:
    """Whether the folder has one of a data set's parts."""
    return any((path / part).is_dir() for part in PARTS)


def read_data_set(root: Path) -> DataSet:
    """Read definitions/OP/DEF.json, workloads/OP/DEF.jsonl and solutions/AUTHOR/OP/DEF/NAME.json below a folder.

    A file concerns MoE if its name or folder says so, as the format lays files out, or else its content. Nothing of a
    solution is executed or written. What can't be used stands in `broken`, and the rest is read on. Raises FibError
    where the folder is no data set.
    """
    if not root.is_dir():
        raise FibError(f"no folder {root}: expected a FlashInfer-Bench data set")
    if not is_data_set(root):
        raise FibError(f"{root} is no FlashInfer-Bench data set: expected one of the folders {', '.join(PARTS)} in it")
    found = DataSet(root)
    for path in _files(found, "definitions", "*.json", lambda path: path.stem, "name"):
        _add_definition(found, path)
    for path in _files(found, "workloads", "*.jsonl", lambda path: path.stem, "definition"):
        _add_workloads(found, path)
    for path in _files(found, "solutions", "*.json", lambda path: path.parent.name, "definition"):
        _add_solution(found, path)
    return found


def _files(found: DataSet, part: str, pattern: str, named: Callable[[Path], str], key: str) -> Iterator[Path]:
    """The part's regular files that concern MoE, sorted; of those, links that lead out are noted as broken."""
    for path in sorted((found.root / part).rglob(pattern)):
        by_name = is_moe(named(path))
        try:
            inside(found.root, str(path.relative_to(found.root)), part)
            if by_name or _says_moe(path, key):
                yield path
        except FibError as error:
            if by_name:
                _note(found, path, str(error))


def _says_moe(path: Path, key: str) -> bool:
    """Whether the content of a file of another name names an MoE definition; False for one that can't be read."""
    try:
        text = read_text(path, "JSON")
        data = parse(text.partition("\n")[0] if path.suffix == ".jsonl" else text, str(path), "JSON")
    except FibError:
        return False
    return isinstance(data.get(key), str) and is_moe(data[key])


def _note(found: DataSet, path: Path, message: str) -> None:
    found.broken.append(Broken(str(path.relative_to(found.root)), message))


def _add_definition(found: DataSet, path: Path) -> None:
    try:
        definition = read_definition(path)
    except FibError as error:
        return _note(found, path, str(error))
    if definition.name in found.definitions:
        return _note(found, path, f"{path}: the definition {definition.name} stands in the data set twice")
    found.definitions[definition.name] = definition


def _add_workloads(found: DataSet, path: Path) -> None:
    seen = {one.uuid for several in found.workloads.values() for one in several}
    try:
        for one in workload_lines(path):
            if isinstance(one, FibError):
                _note(found, path, str(one))
            elif one.uuid in seen:
                _note(found, path, f"{path}: the workload {one.uuid} stands in the data set twice")
            elif one.definition not in found.definitions:
                message = (
                    f"{path}: workload {one.short}: no definition {one.definition} that can be used in the data set"
                )
                _note(found, path, message)
            else:
                seen.add(one.uuid)
                found.workloads.setdefault(one.definition, []).append(one)
    except FibError as error:
        _note(found, path, str(error))


def _add_solution(found: DataSet, path: Path) -> None:
    try:
        solution = read(path)
    except CandidateError as error:
        return _note(found, path, str(error))
    if any(solution.name == one.solution.name for several in found.solutions.values() for one in several):
        return _note(found, path, f"{path}: the solution {solution.name} stands in the data set twice")
    if solution.definition not in found.definitions:
        message = f"{path}: no definition {solution.definition} that can be used in the data set"
        return _note(found, path, message)
    found.solutions.setdefault(solution.definition, []).append(SolutionFile(solution, path))


def capture_routing(path: Path, seed: int = 0) -> list[str]:
    """Make routing kinds of all captured routing of a data set, or of one safetensors file; returns their names.

    Workloads that can't be used are passed over: the kind that a problem asks for is then missing, which is said there.
    seed: of what a workload draws where it captures only one of logits and bias. Raises FibError.
    """
    if path.is_file():
        return [capture_file(path)]
    found, names = read_data_set(path), []
    for name, workloads in found.workloads.items():
        for workload in workloads:
            if not any(one in workload.blobs for one in ROUTING):
                continue
            try:
                names.append(prepare(workload, found.definitions[name], found.root, seed).problem.routing)
            except FibError:
                continue
    return names
