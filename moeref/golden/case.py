"""One case on disk: a readable manifest (JSON) and, beside it, its tensors (safetensors). Reading, sealing, finding.

A manifest carries a digest of its own content, and of every tensor: a hand edit, a truncated file and a flipped bit
are told apart and said in one sentence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import moeref
from moeref.golden.catalogue import NAMES, PUBLISHED, SMALL, Spec, spec_of
from moeref.interop.candidates import near
from moeref.make import digest
from moeref.spec import EXACT, SpecError

SCHEMA = 1
"""Of the manifest. Another number is refused, not guessed at."""

_SHIPPED = Path(__file__).parent / "recorded"  # of an installed wheel: see setup.py
DEFAULT_FOLDER = _SHIPPED if _SHIPPED.is_dir() else Path(moeref.__file__).parents[1] / "golden"
"""The project's own cases."""


class GoldenError(ValueError):
    """A golden file that can't be trusted: missing, truncated, of another schema, or edited. Says which and what to do.

    `stage` names the tensor that was changed, where it is one.
    """

    def __init__(self, message: str, stage: str = "") -> None:
        super().__init__(message)
        self.stage = stage


def seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, whatever its layout: keys sorted, without its own `digest`."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class Case:
    """A case by name in a golden folder. Nothing is read before `manifest` or `tensors` is called."""

    spec: Spec
    root: Path

    @property
    def name(self) -> str:
        """The case's name."""
        return self.spec.name

    @property
    def path(self) -> Path:
        """Its manifest."""
        return self.spec.manifest(self.root)

    @property
    def sampled(self) -> bool:
        """Whether only digests, norms and sampled rows are held, not every stage."""
        return self.spec.folder == PUBLISHED

    @property
    def judges_candidates(self) -> bool:
        """Whether candidates can be held to it: a case of another recipe holds the reference's own roundings."""
        return self.spec.recipe == EXACT

    def manifest(self) -> dict[str, Any]:
        """The manifest, found whole and untouched. Raises GoldenError."""
        restore = f"restore it (git checkout -- {self.path.name}) or record it anew with `moeref golden write`"
        if not self.path.is_file():
            raise GoldenError(f"{self.path}: the manifest is missing; {restore}")
        try:
            manifest: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise GoldenError(f"{self.path}: not whole JSON, the file is truncated ({error}); {restore}") from None
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise GoldenError(
                f"{self.path}: schema version {schema!r}, this moeref reads {SCHEMA}; use the moeref that wrote it, or "
                "record the case anew with `moeref golden write`"
            )
        if manifest.get("digest") != seal(manifest):
            raise GoldenError(f"{self.path}: edited by hand, its content does not give its own digest; {restore}")
        recorded = (manifest["case"], manifest["problem"], manifest["recipe"])
        if recorded != (self.name, self.spec.problem.name, self.spec.recipe.name):
            raise GoldenError(f"{self.path}: holds the case {manifest['case']}, not {self.name}: {restore}")
        return manifest

    def tensors(self, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Every recorded tensor, its bytes held to the manifest's digests. Raises GoldenError with the stage's name."""
        path = self.path.with_suffix(".safetensors")
        restore = f"restore it (git checkout -- {path.name}) or record it anew with `moeref golden write`"
        if not path.is_file():
            raise GoldenError(f"{path}: the tensors are missing; {restore}")
        size, expected = path.stat().st_size, manifest["tensors"]["bytes"]
        if size != expected:
            what = "truncated" if size < expected else "longer than written"
            raise GoldenError(f"{path}: {what}, {size} bytes of {expected}; {restore}")
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise GoldenError(f"{path}: no readable safetensors file ({error}); {restore}") from None
        recorded = manifest["tensors"]["stages"]
        if set(found) != set(recorded):
            odd = ", ".join(sorted(set(found) ^ set(recorded)))
            raise GoldenError(f"{path}: other tensors than the manifest names: {odd}; {restore}")
        for name, tensor in found.items():
            if describe(tensor) != recorded[name]:
                raise GoldenError(
                    f"{path}: stage {name} is not what was recorded: {_difference(tensor, recorded[name])}; {restore}",
                    stage=name,
                )
        return found

    def save(self, manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Write both files: fills in schema, names, tensors and digest."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        path = self.path.with_suffix(".safetensors")
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
        described = {name: describe(tensor) for name, tensor in tensors.items()}
        manifest = {
            "schema": SCHEMA,
            "case": self.name,
            "problem": self.spec.problem.name,
            "recipe": self.spec.recipe.name,
            **manifest,
            "tensors": {"file": path.name, "bytes": path.stat().st_size, "stages": described},
        }
        manifest["digest"] = seal(manifest)
        self.path.write_text(layout(manifest) + "\n", encoding="utf-8")


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, dtype and digest of a tensor."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "sha256": digest(tensor)}


def _difference(tensor: torch.Tensor, recorded: dict[str, Any]) -> str:
    now = describe(tensor)
    return ", ".join(f"{key} {now[key]}, recorded {recorded[key]}" for key in recorded if now[key] != recorded[key])


def layout(value: Any, depth: int = 0) -> str:
    """JSON for reading: objects one key a line, lists and objects of plain values on one line where they fit."""
    inner = json.dumps(value, allow_nan=False)
    if not isinstance(value, dict) or (depth and len(inner) <= 110):
        return inner
    pad = " " * (depth + 1)
    lines = [f"{pad}{json.dumps(key)}: {layout(item, depth + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def cases(folder: Path | None = None, everything: bool = False) -> list[Case]:
    """The cases of a golden folder, small ones first: those checked by default, or all of them.

    folder   None: the project's own, where every case of the catalogue is expected, so that a lost file shows.
    Raises GoldenError for a folder without a case.
    """
    root = folder or DEFAULT_FOLDER
    if not root.is_dir():
        hint = "a source checkout has them in golden/; give --dir" if folder is None else "give a folder of cases"
        raise GoldenError(f"no golden files at {root}: {hint}")
    found = [path.stem for part in (SMALL, PUBLISHED) for path in sorted((root / part).glob("*")) if _is_case(path)]
    names = [*NAMES, *found] if folder is None else sorted(set(found), key=_order)
    chosen = [Case(spec_of(name), root) for name in dict.fromkeys(names)]
    if not chosen:
        raise GoldenError(f"no case in {root}: expected {SMALL}/NAME.json or {PUBLISHED}/NAME.json")
    return [case for case in chosen if everything or case.spec.short]


def _is_case(path: Path) -> bool:
    return path.suffix in (".json", ".safetensors")


def _order(name: str) -> tuple[int, str]:
    return (NAMES.index(name) if name in NAMES else len(NAMES), name)


def find(names: Iterable[str], folder: Path | None = None) -> list[Case]:
    """The cases of these names, in their order. Raises SpecError for an unknown one, with near names."""
    known = {case.name: case for case in cases(folder, everything=True)}
    for name in names:
        if name not in known:
            hint = near(name, known) or f"; `moeref golden show` lists all {len(known)}"
            raise SpecError(f"unknown case '{name}'{hint}")
    return [known[name] for name in dict.fromkeys(names)]
