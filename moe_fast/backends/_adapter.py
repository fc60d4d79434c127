"""What adapters to other libraries share: the ten inputs as one object, needs, kept buffers and kept layouts.

An adapter is a function compute(library, layer, out) that calls nothing but `library`'s functions, moe_fast's adapter
steps and torch. `library` is a namespace of functions with the real library's signatures, so a test can hand in others
that compute the same in torch, and only the library itself is left untested without its GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moe_fast.backends import Backend
from moe_fast.target import has_module, target_of
from moeref.interop.candidates import Unsupported
from moeref.spec import Geometry

PRIORITY = -1000
"""moe_fast.moe never picks an adapter by itself: torch_grouped, which runs anywhere, stands above."""

Compute = Callable[[SimpleNamespace, "Layer", torch.Tensor], None]

ARCHITECTURES = {9: "Hopper GPU (9.x, e.g. an H100)", 10: "Blackwell GPU (10.x, e.g. a B200)"}


@dataclass(frozen=True)
class Layer:
    """The ten inputs and the routing groups."""

    routing_logits: torch.Tensor  # [T, E] float32
    routing_bias: torch.Tensor  # [E] bfloat16
    hidden_states: torch.Tensor  # [T, H] e4m3
    hidden_states_scale: torch.Tensor  # [H/128, T]
    gemm1_weights: torch.Tensor  # [L, 2I, H] e4m3
    gemm1_weights_scale: torch.Tensor  # [L, 2I/128, H/128]
    gemm2_weights: torch.Tensor  # [L, H, I] e4m3
    gemm2_weights_scale: torch.Tensor  # [L, H/128, I/128]
    local_expert_offset: int
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    top_k: int

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.hidden_states.device

    @property
    def tokens(self) -> int:
        """T."""
        return self.hidden_states.shape[0]

    @property
    def hidden(self) -> int:
        """H."""
        return self.hidden_states.shape[1]

    @property
    def experts(self) -> int:
        """E."""
        return self.routing_logits.shape[1]

    @property
    def local(self) -> int:
        """L."""
        return self.gemm2_weights.shape[0]

    @property
    def intermediate(self) -> int:
        """I."""
        return self.gemm2_weights.shape[2]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialised tensor on the layer's device."""
        return torch.empty(shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Needs:
    """What an adapter needs of the machine and of the problem."""

    modules: tuple[str, ...]  # importable names
    install: str  # what to type for a missing one
    majors: tuple[int, ...]  # CUDA compute capabilities' first numbers
    geometry: Callable[[Geometry], str | None] = lambda geometry: None  # why the library can't do it, or None

    def unmet(self, geometry: Geometry, device: torch.device) -> str | None:
        """One sentence about the first need that is not met, or None."""
        cards = " or a ".join(ARCHITECTURES[major] for major in self.majors)
        if device.type != "cuda":
            return f"needs a {cards}: this is a CPU"
        target = target_of(device)
        if target.capability is None or target.capability[0] not in self.majors:
            return f"needs a {cards}: {target.name} is {'.'.join(map(str, target.capability or ()))}"
        missing = [name for name in self.modules if not has_module(name)]
        if missing:
            return f"needs {' and '.join(missing)}: {self.install}"
        return self.geometry(geometry)


def entry(load: Callable[[], SimpleNamespace], compute: Compute) -> Callable[..., torch.Tensor]:
    """The ten-input function of an adapter. load() gives the library's functions; it is called at the first call."""
    library = functools.cache(load)

    def run(
        *ten: Any, out: torch.Tensor | None = None, n_group: int = 8, topk_group: int = 4, top_k: int = 8
    ) -> torch.Tensor:
        """The ten inputs -> output [T, H] bfloat16, written into `out` when given. The inputs are taken as checked."""
        layer = Layer(*ten, n_group, topk_group, top_k)
        if out is None:
            out = layer.empty(layer.tokens, layer.hidden, dtype=torch.bfloat16)
        if layer.tokens:
            compute(library(), layer, out)
        return out

    return run


def backend(
    name: str, load: Callable[[], SimpleNamespace], compute: Compute, recipe: str, needs: Needs, summary: str
) -> Backend:
    """A Backend of an adapter. No library promises the same bytes on every call, so none is declared deterministic."""

    def unsupported(geometry: Geometry, device: torch.device) -> str | None:
        reason = needs.unmet(geometry, device)
        return reason if reason is not None else _unloadable(load)

    return Backend(name, entry(load, compute), recipe, False, unsupported, PRIORITY, summary)


@functools.cache
def _unloadable(load: Callable[[], SimpleNamespace]) -> str | None:
    try:
        load()
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        return f"its library is installed but can't be used: {type(error).__name__}: {reason}"
    return None


def chooser(name: str, choices: tuple[Backend, ...], summary: str) -> Backend:
    """A Backend that stands for the first of `choices` that can run on the machine."""

    def run(
        *ten: Any, out: torch.Tensor | None = None, n_group: int = 8, topk_group: int = 4, top_k: int = 8
    ) -> torch.Tensor:
        """The ten inputs -> output [T, H] bfloat16. Raises Unsupported where none of the choices can run."""
        experts, (local, hidden, intermediate) = ten[0].shape[1], ten[6].shape
        geometry = Geometry(experts, local, hidden, intermediate, top_k, n_group, topk_group)
        chosen = next((one for one in choices if one.unsupported(geometry, ten[2].device) is None), None)
        if chosen is None:
            raise Unsupported(str(unsupported(geometry, ten[2].device)))
        return chosen.run(*ten, out=out, n_group=n_group, topk_group=topk_group, top_k=top_k)

    def unsupported(geometry: Geometry, device: torch.device) -> str | None:
        reasons = [(one.name, one.unsupported(geometry, device)) for one in choices]
        if any(reason is None for _, reason in reasons):
            return None
        if len({reason for _, reason in reasons}) == 1:
            return reasons[0][1]
        return "; ".join(f"{one}: {reason}" for one, reason in reasons)

    return Backend(name, run, choices[0].recipe, False, unsupported, PRIORITY, summary, choices)


class Prepared:
    """Weights in another layout, made at the first call with them and again whenever they have changed.

    A conversion is kept as long as the memory that it was made from lives, and is made anew after an in-place write.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kept: dict[Any, tuple[tuple[StorageWeakRef, ...], tuple[int, ...], Any]] = {}

    def __call__(self, *weights: torch.Tensor) -> Any:
        """make(*weights), from an earlier call where nothing has changed."""
        if any(weight.is_inference() for weight in weights):
            return self._make(*weights)  # writes to them are not counted
        storages = tuple(StorageWeakRef(weight.untyped_storage()) for weight in weights)
        key = tuple((ref.cdata, w.storage_offset(), *w.shape) for ref, w in zip(storages, weights, strict=True))
        versions = tuple(weight._version for weight in weights)
        found = self._kept.get(key)
        if found is None or found[1] != versions:
            self._kept = {k: v for k, v in self._kept.items() if not any(ref.expired() for ref in v[0])}
            self._kept[key] = found = (storages, versions, self._make(*weights))
        return found[2]


class KeptBuffers:
    """The buffers of the last size of call, by device and stream: made once, used by every call of that size.

    Within a graph capture they come fresh from the graph's own memory, so that no later call frees or overwrites them.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kept: dict[tuple[torch.device, int], tuple[tuple[Any, ...], Any]] = {}

    def __call__(self, device: torch.device, *sizes: Any) -> Any:
        """make(device, *sizes), or what an earlier call of these sizes made."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._make(device, *sizes)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        place = (device, stream)
        found = self._kept.get(place)
        if found is None or found[0] != sizes:
            self._kept.pop(place, None)
            self._kept[place] = found = (sizes, self._make(device, *sizes))
        return found[1]


def step(name: str, device: torch.device) -> Callable[..., None]:
    """One of moe_fast.kernels.adapter_steps: the kernel on a GPU, its twin on a CPU."""
    from moe_fast.kernels import adapter_steps

    return getattr(adapter_steps, name if device.type == "cuda" else f"{name}_torch")  # type: ignore[no-any-return]
