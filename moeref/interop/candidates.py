"""Candidates: the implementations under test, and how a text names one. No torch here: candidates bring their own.

A candidate is called with the ten inputs in the definition's order. It may return the output or, destination-passing,
write it into an eleventh argument. Parameters named n_group, topk_group and top_k get the problem's routing groups,
which the ten inputs do not hold; a function without them answers for its own model's groups.

A file or a function may declare what its signature can't say, as a dict of any of the fields in DECLARABLE:

    MOEREF = {"recipe": "requant", "deterministic": True}      # in the module, for all its functions
    run.MOEREF = {"recipe": "requant"}                         # on one function, which wins
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeref.spec import Geometry, Recipe, SpecError

if TYPE_CHECKING:
    import torch

GROUP = "moeref.candidates"
"""Entry-point group: each entry is a function that returns {name: Candidate}."""

BUNDLED = {"moe_fast": "moe_fast.backends:candidates"}
"""Entries taken when no installed distribution declares them: a source checkout on the path has no metadata."""

OBVIOUS = ("run", "kernel", "moe")
"""Function names looked for when a file is given without one."""

DECLARABLE = ("recipe", "deterministic", "destination_passing", "inexact", "summary")
"""Keys of a MOEREF dict."""

NUM_INPUTS = 10
GEOMETRY_KEYWORDS = ("n_group", "topk_group", "top_k")
OUTPUT_NAMES = ("out", "output")


class CandidateError(ValueError):
    """No candidate is meant by this text, or what it names can't be one; says what was expected and what to do."""


class Unsupported(RuntimeError):
    """A candidate raises this in a call that it can't do, where only the call's own values show it, such as an offset.

    The message is one sentence that says why; the problem is then UNSUPPORTED, not failed.
    """


class CandidateBroken(CandidateError):
    """The candidate's code was found, but importing it failed. `traceback` holds the details."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.traceback = details


def runs_anywhere(geometry: Geometry, device: torch.device) -> str | None:
    """The default of Candidate.unsupported: no reason against any geometry or device."""
    return None


@dataclass(frozen=True)
class Candidate:
    """Something to judge. What is None or empty is found out from the signature of `run`."""

    name: str
    run: Callable[..., Any]
    recipe: str = "auto"  # a Recipe's name, or 'auto': found from the errors
    deterministic: bool = False  # the same bytes on every call is promised, and hence checked
    destination_passing: bool | None = None
    takes_geometry: bool | None = None  # n_group, topk_group and top_k are passed by keyword
    unsupported: Callable[[Geometry, torch.device], str | None] = runs_anywhere  # why it can't run there, or None
    inexact: str = ""  # laws judged by noise, not bit for bit; comma-separated, e.g. "permutation,duplicates"
    summary: str = ""
    workspace: Callable[[Geometry, int], int | None] | None = (
        None  # bytes that a call of so many tokens keeps, if known
    )
    release: Callable[[], None] | None = None  # gives back what is kept between calls
    resolve: Callable[[Geometry, torch.device], Candidate] | None = None  # for one that stands for others: its pick

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise CandidateError(f"{self.name}: expected a function, got {type(self.run).__name__}")
        if self.recipe != "auto":
            try:
                Recipe.parse(self.recipe)
            except SpecError as error:
                raise CandidateError(f"{self.name}: {error}; or 'auto'") from error

    @functools.cached_property
    def output_argument(self) -> str | None:
        """How the output buffer is passed: None not at all, '' as eleventh positional, else by this keyword.

        Without a declaration, a buffer is taken by a parameter named out or output, or by an eleventh positional
        parameter without a default.
        """
        if self.destination_passing is False:
            return None
        positional, keywords = _parameters(self.run)
        for name in OUTPUT_NAMES:
            if name in keywords and name not in [p.name for p in positional[:NUM_INPUTS]]:
                return name
        needed = [p for p in positional if p.default is p.empty and p.name not in GEOMETRY_KEYWORDS]
        return "" if self.destination_passing or len(needed) > NUM_INPUTS else None

    @functools.cached_property
    def geometry_keywords(self) -> tuple[str, ...]:
        """Those of n_group, topk_group and top_k that are passed by keyword: all three, or none."""
        if self.takes_geometry is None:
            _, keywords = _parameters(self.run)
            return GEOMETRY_KEYWORDS if keywords.issuperset(GEOMETRY_KEYWORDS) else ()
        return GEOMETRY_KEYWORDS if self.takes_geometry else ()


def _parameters(function: Callable[..., Any]) -> tuple[list[inspect.Parameter], set[str]]:
    """(positional parameters, names that can be passed by keyword); both empty where there is no signature."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [], set()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in parameters if p.kind in by_position], {p.name for p in parameters if p.kind in by_keyword}


def known() -> dict[str, Candidate]:
    """Every candidate that has a name: what the installed entry points of group 'moeref.candidates' return.

    An entry that fails to load stands under its own name, unsupported with the reason, and hides no other.
    """
    entries = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=GROUP)}
    found: dict[str, Candidate] = {}
    for name, value in {**BUNDLED, **entries}.items():
        try:
            module, _, function = value.partition(":")
            found |= getattr(importlib.import_module(module), function)()
        except Exception as error:
            if name in entries or not isinstance(error, ModuleNotFoundError):
                found[name] = _unloadable(name, f"entry point {value} failed: {type(error).__name__}: {error}")
    return found


def _unloadable(name: str, reason: str) -> Candidate:
    return Candidate(name, lambda *inputs: None, unsupported=lambda geometry, device: reason)


def locate(text: str) -> None:
    """Raise CandidateError if nothing can be meant by `text`. Runs no code of a file or module that it names."""
    kind, target, _ = _split(text)
    if kind == "file":
        _existing_file(target)
    elif kind == "solution":
        from moeref.interop.solution import read

        read(_existing_file(target))
    elif kind == "name" and target not in (names := known()):
        raise CandidateError(
            f"unknown candidate '{text}': expected path/to/file.py:function, package.module:function, "
            f"a FlashInfer-Bench solution.json, or one of {', '.join(sorted(names))}{near(target, names)}"
        )


def load(text: str, folder: Path | None = None) -> Candidate:
    """The candidate that `text` names.

    text     path/to/file.py[:function], package.module:function, a name of known(), or path/to/solution.json.
             Without a function the file must define exactly one of run, kernel, moe.
    folder   where a solution's sources are written; default a fresh temporary one, which stays.
    Raises CandidateError; CandidateBroken where the code is there but can't be imported.
    """
    locate(text)
    kind, target, function = _split(text)
    if kind == "name":
        return known()[target]
    if kind == "solution":
        from moeref.interop.solution import load_solution

        return load_solution(Path(target), folder or Path(tempfile.mkdtemp(prefix="moeref-")))
    if kind == "file":
        module = import_guarded(text, lambda: _import_file(Path(target)))
    else:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a console script has not got it, python -m has
        module = import_guarded(text, lambda: importlib.import_module(target))
    return from_module(text, module, function)


def _split(text: str) -> tuple[str, str, str]:
    """(kind 'file', 'solution', 'module' or 'name'; path, module or name; function or '')."""
    left, colon, right = text.replace("::", ":").rpartition(":")
    path, function = (left, right) if colon and "/" not in right and "\\" not in right else (text, "")
    if path.endswith(".py"):
        return "file", path, function
    if text.endswith(".json"):
        return "solution", text, ""
    if right and left and all(part.isidentifier() for part in left.split(".")):
        return "module", left, right
    if not text or "/" in text or "\\" in text or colon:
        raise CandidateError(
            f"candidate '{text}': expected path/to/file.py:function, package.module:function, a name of "
            "`moeref backends`, or path/to/solution.json"
        )
    return "name", text, ""


def _existing_file(target: str) -> Path:
    path = Path(target)
    if path.is_file():
        return path
    if not path.parent.is_dir():
        raise CandidateError(f"no file {target}: the folder {path.parent} does not exist here ({Path.cwd()})")
    siblings = [item.name for item in path.parent.iterdir() if item.suffix == path.suffix]
    raise CandidateError(f"no file {target} (in {path.parent.resolve()}){near(path.name, siblings)}")


_numbers = itertools.count()


def _import_file(path: Path) -> Any:
    """The file as a module of a name of its own; its folder can be imported from, as for a script."""
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"{path.stem}_moeref_{next(_numbers)}"  # two candidates may have files of one name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def import_guarded(text: str, load_module: Callable[[], Any]) -> Any:
    """What `load_module` returns; whatever it raises becomes CandidateBroken with one sentence."""
    try:
        return load_module()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: importing must not end the caller
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            what = f"it needs the module '{error.name}', which is not installed here"
        elif isinstance(error, SyntaxError):
            what = f"syntax error: {error.msg} (line {error.lineno})"
        elif isinstance(error, SystemExit):
            what = f"it called sys.exit({error.code}) while it was imported"
        raise CandidateBroken(f"candidate {text} can't be imported: {what}", traceback.format_exc()) from error


def from_module(text: str, module: Any, function: str, name: str = "", summary: str = "") -> Candidate:
    """The candidate of a loaded module's function, with what its MOEREF dicts declare. Raises CandidateError."""
    names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    own = [n for n in names if getattr(getattr(module, n), "__module__", None) in (module.__name__, None)]
    if not function:
        obvious = [n for n in OBVIOUS if n in names]
        if len(obvious) != 1:
            what = f"it has {', '.join(obvious)}" if obvious else f"it has none of {', '.join(OBVIOUS)}"
            raise CandidateError(f"{text} names no function and {what}: write {text}:FUNCTION; found {_list(own)}")
        function = obvious[0]
    target = module
    for part in function.split("."):
        if not hasattr(target, part):
            raise CandidateError(f"{text}: no function '{function}'{near(function, names)}; found {_list(own)}")
        target = getattr(target, part)
    if not callable(target):
        raise CandidateError(
            f"{text}: expected a function, '{function}' is {type(target).__name__}; found {_list(own)}"
        )
    declared = {**_declaration(text, module), **_declaration(text, target)}
    summary = str(declared.pop("summary", summary))
    return Candidate(name or text, target, summary=summary, **declared)


def _declaration(text: str, holder: Any) -> dict[str, Any]:
    """A checked copy of the holder's own MOEREF dict."""
    declared = getattr(holder, "MOEREF", {})
    if not isinstance(declared, dict):
        raise CandidateError(f"{text}: MOEREF must be a dict, got {type(declared).__name__}")
    for key, value in declared.items():
        if key not in DECLARABLE:
            raise CandidateError(
                f"{text}: MOEREF has an unknown key {key!r}{near(str(key), DECLARABLE)}; expected {_list(DECLARABLE)}"
            )
        kind = bool if key in ("deterministic", "destination_passing") else str
        if not isinstance(value, kind):
            raise CandidateError(f"{text}: MOEREF[{key!r}] must be a {kind.__name__}, got {value!r}")
    return dict(declared)


def near(word: str, names: Iterable[str]) -> str:
    """'; did you mean X?' for close names, else ''."""
    close = difflib.get_close_matches(word, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _list(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") if shown else "no function"
