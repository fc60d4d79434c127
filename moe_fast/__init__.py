"""Fast implementations of the DeepSeek-V3 FP8 block-scale MoE layer, judged by moeref.

from moe_fast import moe
output = moe(routing_logits, routing_bias, ..., local_expert_offset, routed_scaling_factor)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from moe_fast.backends import ALIGNMENT, Backend, by_name, pick
from moe_fast.tuning import tune
from moeref.inputs import FIELDS, InputError, find_problems
from moeref.spec import Geometry, SpecError

__all__ = ["RoutingConstants", "moe", "routing_constants", "tune"]


@dataclass(frozen=True)
class RoutingConstants:
    """What a model fixes and the ten inputs do not hold."""

    top_k: int
    n_group: int
    topk_group: int


_CONSTANTS = {256: RoutingConstants(8, 8, 4), 384: RoutingConstants(8, 1, 1)}  # DeepSeek-V3/R1, Kimi-K2


def routing_constants(num_experts: int) -> RoutingConstants:
    """Those of the model with so many experts: 256 DeepSeek-V3, 384 Kimi-K2. Raises ValueError for another."""
    if num_experts not in _CONSTANTS:
        raise ValueError(
            f"E={num_experts}: the routing groups are known for {' and '.join(map(str, _CONSTANTS))} experts; "
            "pass n_group=, topk_group= and top_k="
        )
    return _CONSTANTS[num_experts]


def moe(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    out: torch.Tensor | None = None,
    *,
    n_group: int | None = None,
    topk_group: int | None = None,
    top_k: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """This rank's part of the layer's output, [T, H] bfloat16; it is `out` when that is given.

    routing_logits [T, E] float32, routing_bias [E] bfloat16, hidden_states [T, H] e4m3 with hidden_states_scale
    [H/128, T] float32, gemm1_weights [L, 2I, H] e4m3 (rows [up ; gate]) with gemm1_weights_scale [L, 2I/128, H/128],
    gemm2_weights [L, H, I] e4m3 with gemm2_weights_scale [L, H/128, I/128]; local experts are
    local_expert_offset .. local_expert_offset + L - 1.
    n_group, topk_group, top_k: by default the model's with E experts (routing_constants). backend: a name of
    moe_fast.backends.backends(); by default the fastest one that can run here.
    Raises moeref.inputs.InputError naming every field of wrong shape, dtype, device, layout or, where the backend needs
    it, address (values are not read: nothing waits for the device), ValueError for an unknown backend, RuntimeError
    where none can run.
    """
    ten = (
        routing_logits,
        routing_bias,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        local_expert_offset,
        routed_scaling_factor,
    )
    form = (*map(_form, ten), _form(out), n_group, topk_group, top_k, backend)
    found = _checked.get(form)
    if found is None:
        found = _check(ten, out, n_group, topk_group, top_k, backend)
        if len(_checked) >= MAX_CHECKED:
            _checked.clear()
        _checked[form] = found
    geometry, chosen = found
    return chosen.run(*ten, out=out, n_group=geometry.n_group, topk_group=geometry.topk_group, top_k=geometry.top_k)


MAX_CHECKED = 256
_checked: dict[tuple[Any, ...], tuple[Geometry, Backend]] = {}
"""Calls of these forms were found right: checking takes longer than launching the kernels."""


def _form(value: Any) -> Any:
    """All that is checked of an input: of a tensor its layout, of a number its value; anything else equals nothing."""
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.dim() > 0:
        return value.shape, value.stride(), value.dtype, value.device, value.data_ptr() % ALIGNMENT
    return (type(value), value) if value is None or type(value) in (int, float) else object()


def _check(
    ten: tuple[Any, ...],
    out: Any,
    n_group: int | None,
    topk_group: int | None,
    top_k: int | None,
    backend: str | None,
) -> tuple[Geometry, Backend]:
    """Geometry and backend of a call. Raises what `moe` says."""
    geometry = geometry_of(ten, n_group, topk_group, top_k)
    problems = find_problems(geometry, *ten, values=False)
    if out is not None:
        problems += _output_problems(out, ten[2])
    if problems:
        raise InputError(problems)
    device = ten[2].device
    chosen = by_name(backend) if backend is not None else pick(geometry, device)
    if backend is not None and (reason := chosen.unsupported(geometry, device)) is not None:
        raise RuntimeError(f"backend {backend} can't run {geometry.name} on {device}: {reason}")
    if problems := _misaligned({**dict(zip(FIELDS, ten, strict=True)), "out": out}, chosen):
        raise InputError(problems)
    return geometry, chosen


_AXES = {"E": ((0, 1), (1, 0)), "L": ((4, 0), (6, 0), (5, 0)), "H": ((2, 1), (4, 2), (6, 1)), "I": ((6, 2),)}
"""Axis -> (input, dimension) that have it, in order of trust."""

_RANKS = (2, 1, 2, 2, 3, 3, 3, 3)


def geometry_of(
    ten: tuple[Any, ...], n_group: int | None = None, topk_group: int | None = None, top_k: int | None = None
) -> Geometry:
    """The geometry that most of the ten inputs agree on. Raises InputError where there is none."""
    sizes: dict[str, int] = {}
    for axis, places in _AXES.items():
        votes = [
            int(ten[at].shape[dim])
            for at, dim in places
            if isinstance(ten[at], torch.Tensor) and ten[at].dim() == _RANKS[at]
        ]
        if not votes:
            tensors = " or ".join(FIELDS[at] for at, _ in places)
            what = ", ".join(f"{FIELDS[at]} is {_describe(ten[at])}" for at, _ in places)
            raise InputError([f"{axis} can't be told: expected {tensors} with {_RANKS[places[0][0]]} axes; {what}"])
        sizes[axis] = Counter(votes).most_common(1)[0][0]
    try:
        groups = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
        if None in groups.values():
            groups = {**vars(routing_constants(sizes["E"])), **{k: v for k, v in groups.items() if v is not None}}
        return Geometry(sizes["E"], sizes["L"], sizes["H"], sizes["I"], **groups)  # type: ignore[arg-type]
    except (SpecError, ValueError) as error:
        raise InputError([str(error)]) from error


def _describe(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _misaligned(tensors: dict[str, Any], backend: Backend) -> list[str]:
    wrong = []
    for field in backend.aligned:
        past = 0 if tensors[field] is None else tensors[field].data_ptr() % ALIGNMENT
        if past:
            wanted = f"expected an address that is a multiple of {ALIGNMENT} bytes, as backend {backend.name} needs"
            wrong.append(f"{field}: {wanted}, got one {past} bytes past; clone() gives such a tensor")
    return wrong


def _output_problems(out: Any, hidden_states: torch.Tensor) -> list[str]:
    if not isinstance(out, torch.Tensor):
        return [f"out: expected a tensor or None, got {type(out).__name__}"]
    wrong = []
    if isinstance(hidden_states, torch.Tensor):
        if out.shape != hidden_states.shape:
            wrong.append(f"out: expected shape {list(hidden_states.shape)}, got {list(out.shape)}")
        if out.device != hidden_states.device:
            wrong.append(f"out: expected device {hidden_states.device} as the inputs, got {out.device}")
    if out.dtype != torch.bfloat16:
        wrong.append(f"out: expected dtype bfloat16, got {str(out.dtype).removeprefix('torch.')}")
    if not out.is_contiguous():
        wrong.append(f"out: expected a contiguous tensor, got strides {list(out.stride())}")
    return wrong
