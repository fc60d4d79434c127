"""One file per backend, found by listing this folder: a new backend is a new file that defines BACKEND.

A file whose backend has named variants defines BACKENDS, a tuple of them all. Files that start with _ are helpers.

A backend module must import without triton or a GPU: what it needs, it imports inside `run`, and says in
`unsupported` why it can't run somewhere. A module that fails to import is listed with that reason.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moeref.spec import Geometry

if TYPE_CHECKING:
    from moeref.interop.candidates import Candidate


ALIGNMENT = 16
"""Bytes; what bulk copies and vector loads ask of an address."""


@dataclass(frozen=True)
class Backend:
    """An implementation of the ten-input function.

    run(ten inputs, out=None, *, n_group, topk_group, top_k) -> output [T, H] bfloat16, which is `out` when given.
    The inputs are taken as checked.
    """

    name: str
    run: Callable[..., torch.Tensor]
    recipe: str  # a moeref Recipe's name
    deterministic: bool  # the same bytes on every call
    unsupported: Callable[[Geometry, torch.device], str | None]  # why it can't run there, or None
    priority: int  # of those that can run, the highest is taken
    summary: str
    choices: tuple[Backend, ...] = ()  # of one that stands for others: the first that can run is taken
    workspace: Callable[[Geometry, int], int | None] | None = None  # bytes kept by a call of so many tokens
    aligned: tuple[str, ...] = ()  # inputs, or out, whose address must be a multiple of ALIGNMENT


class NoBackend(RuntimeError):
    """No backend can run this geometry on this device; the message lists each one's reason."""


@functools.cache
def backends() -> dict[str, Backend]:
    """Every backend by name, highest priority first. Broken modules come last, unsupported everywhere."""
    found: list[Backend] = []
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        try:
            loaded = importlib.import_module(f"{__name__}.{module.name}")
            mine = loaded.BACKENDS if hasattr(loaded, "BACKENDS") else (loaded.BACKEND,)
            for backend in mine:
                assert isinstance(backend, Backend), f"BACKEND is {type(backend).__name__}"
        except Exception as error:
            mine = (_broken(module.name, f"its module can't be imported: {type(error).__name__}: {error}"),)
        found += mine
    return {backend.name: backend for backend in sorted(found, key=lambda one: (-one.priority, one.name))}


def _broken(name: str, reason: str) -> Backend:
    def run(*inputs: object, **options: object) -> torch.Tensor:
        raise NoBackend(f"backend {name}: {reason}")

    return Backend(name, run, "exact", False, lambda geometry, device: reason, -1000, "")


def pick(geometry: Geometry, device: torch.device) -> Backend:
    """The backend of highest priority that can run there. Raises NoBackend."""
    reasons = []
    for backend in backends().values():
        reason = backend.unsupported(geometry, device)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise NoBackend(f"no backend runs {geometry.name} on {device}: " + "; ".join(reasons))


def by_name(name: str) -> Backend:
    """The backend of that name. Raises ValueError that lists the names."""
    if name not in backends():
        raise ValueError(f"unknown backend '{name}': expected one of {', '.join(backends())}")
    return backends()[name]


def release_workspaces() -> None:
    """Give back what the pipelines keep between calls in this process; captured graphs keep theirs."""
    for name, module in list(sys.modules.items()):
        if name.startswith("moe_fast.pipelines.") and hasattr(module, "release_workspaces"):
            module.release_workspaces()


def _resolve(chooser: Backend, geometry: Geometry, device: torch.device) -> Candidate:
    """The candidate that a backend with choices stands for there, under the chooser's name."""
    from moeref.interop.candidates import Candidate

    chosen = next(one for one in chooser.choices if one.unsupported(geometry, device) is None)
    return Candidate(
        chooser.name,
        chosen.run,
        recipe=chosen.recipe,
        deterministic=chosen.deterministic,
        summary=f"{chooser.summary}; here {chosen.name}",
        release=release_workspaces,
    )


def candidates() -> dict[str, Candidate]:
    """Every backend as a candidate, and 'moe_fast', the one that moe_fast.moe picks (entry point of moeref)."""
    import moe_fast
    from moeref.interop.candidates import Candidate

    found = {
        backend.name: Candidate(
            backend.name,
            backend.run,
            recipe=backend.recipe,
            deterministic=backend.deterministic,
            unsupported=backend.unsupported,
            summary=backend.summary,
            workspace=backend.workspace,
            release=release_workspaces,
            resolve=functools.partial(_resolve, backend) if backend.choices else None,
        )
        for backend in backends().values()
    }

    def unsupported(geometry: Geometry, device: torch.device) -> str | None:
        try:
            pick(geometry, device)
        except NoBackend as error:
            return str(error)
        return None

    def resolve(geometry: Geometry, device: torch.device) -> Candidate:
        backend = pick(geometry, device)
        summary = f"moe_fast.moe, which picks {backend.name} here"
        return replace(auto, recipe=backend.recipe, deterministic=backend.deterministic, summary=summary, resolve=None)

    auto = Candidate(
        "moe_fast",
        moe_fast.moe,
        unsupported=unsupported,
        summary="moe_fast.moe: the fastest backend that can run here",
        release=release_workspaces,
        resolve=resolve,
    )
    return {**found, "moe_fast": auto}
