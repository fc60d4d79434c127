"""The ten inputs as data, and the check that names every wrong field in one message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from moeref.spec import BLOCK, Geometry

FIELDS = (
    "routing_logits",
    "routing_bias",
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm2_weights",
    "gemm2_weights_scale",
    "local_expert_offset",
    "routed_scaling_factor",
)
TENSOR_FIELDS = FIELDS[:8]

FP8 = torch.float8_e4m3fn


class InputError(ValueError):
    """One or more of the ten inputs are not what the definition says. `problems` holds a line a field."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = f"{len(problems)} wrong input" + ("s" if len(problems) > 1 else "")
        super().__init__(f"{count}:\n  " + "\n  ".join(problems))


@dataclass(frozen=True)
class Inputs:
    """The ten inputs in the definition's order, and the geometry that their shapes do not hold (routing groups)."""

    routing_logits: torch.Tensor  # [T, E] float32
    routing_bias: torch.Tensor  # [E] bfloat16
    hidden_states: torch.Tensor  # [T, H] float8_e4m3fn
    hidden_states_scale: torch.Tensor  # [H/128, T] float32
    gemm1_weights: torch.Tensor  # [L, 2I, H] float8_e4m3fn, rows [up ; gate]
    gemm1_weights_scale: torch.Tensor  # [L, 2I/128, H/128] float32
    gemm2_weights: torch.Tensor  # [L, H, I] float8_e4m3fn
    gemm2_weights_scale: torch.Tensor  # [L, H/128, I/128] float32
    local_expert_offset: int
    routed_scaling_factor: float
    geometry: Geometry

    @property
    def seq_len(self) -> int:
        """T."""
        return self.routing_logits.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.hidden_states.device

    def args(self) -> tuple[Any, ...]:
        """The ten positional arguments of a candidate."""
        return tuple(getattr(self, name) for name in FIELDS)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The eight tensors by name."""
        return {name: getattr(self, name) for name in TENSOR_FIELDS}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """Every tensor changed alike, e.g. `inputs.map(torch.Tensor.cuda)`."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})  # type: ignore[arg-type]

    def to(self, device: str | torch.device) -> Inputs:
        """The same inputs on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def take(self, tokens: torch.Tensor) -> Inputs:
        """Only these tokens, in this order. tokens: int64 [n], may repeat."""
        return replace(
            self,
            routing_logits=self.routing_logits[tokens].contiguous(),
            # indexed as bytes: not every device gathers e4m3
            hidden_states=self.hidden_states.view(torch.uint8)[tokens].contiguous().view(FP8),
            hidden_states_scale=self.hidden_states_scale[:, tokens].contiguous(),
        )

    def check(self) -> None:
        """Raise InputError, naming every wrong field at once."""
        problems = find_problems(self.geometry, *self.args())
        if problems:
            raise InputError(problems)


def expected_layout(geometry: Geometry, seq_len: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the eight tensors: name -> (shape, dtype)."""
    e, n_local = geometry.num_experts, geometry.num_local_experts
    h, i = geometry.hidden_size, geometry.intermediate_size
    return {
        "routing_logits": ((seq_len, e), torch.float32),
        "routing_bias": ((e,), torch.bfloat16),
        "hidden_states": ((seq_len, h), FP8),
        "hidden_states_scale": ((h // BLOCK, seq_len), torch.float32),
        "gemm1_weights": ((n_local, 2 * i, h), FP8),
        "gemm1_weights_scale": ((n_local, 2 * i // BLOCK, h // BLOCK), torch.float32),
        "gemm2_weights": ((n_local, h, i), FP8),
        "gemm2_weights_scale": ((n_local, h // BLOCK, i // BLOCK), torch.float32),
    }


def find_problems(geometry: Geometry, *ten: Any, values: bool = True) -> list[str]:
    """A line for every wrong field: its name, what was expected, what came. Empty when all is well.

    `ten`: the ten inputs in the definition's order, anything at all. T is what most of the three tensors that have it
    say, hidden_states first. The device expected of all is that of most of the tensors.
    values=False reads no tensor's data, so nothing waits for a GPU: scales are not held to be finite.
    """
    if len(ten) != len(FIELDS):
        return [f"arguments: expected the {len(FIELDS)} inputs {', '.join(FIELDS)}; got {len(ten)}"]
    given = dict(zip(FIELDS, ten, strict=True))
    tensors = {name: given[name] for name in TENSOR_FIELDS if isinstance(given[name], torch.Tensor)}
    axis_of_tokens = {"hidden_states": 0, "routing_logits": 0, "hidden_states_scale": 1}
    votes = [tensors[n].shape[axis] for n, axis in axis_of_tokens.items() if n in tensors and tensors[n].dim() == 2]
    layout = expected_layout(geometry, max(votes, key=votes.count) if votes else 0)
    devices = [str(tensor.device) for tensor in tensors.values()]
    device = max(devices, key=devices.count) if devices else "cpu"
    problems = []
    for name, (shape, dtype) in layout.items():
        problems += [f"{name}: {text}" for text in _tensor_problems(name, given[name], shape, dtype, device, values)]
    problems += _scalar_problems(geometry, given["local_expert_offset"], given["routed_scaling_factor"])
    return problems


def _tensor_problems(
    name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str, values: bool
) -> list[str]:
    if not isinstance(value, torch.Tensor):
        return [f"expected a tensor {list(shape)} {_short(dtype)}, got {type(value).__name__}"]
    found = []
    if tuple(value.shape) != shape:
        hint = ""
        if tuple(value.shape) == shape[::-1] and len(shape) == 2:
            hint = " (transposed?)"
        found.append(f"expected shape {list(shape)}, got {list(value.shape)}{hint}")
    if value.dtype != dtype:
        found.append(f"expected dtype {_short(dtype)}, got {_short(value.dtype)}")
    if str(value.device) != device:
        found.append(f"expected device {device} as the other inputs, got {value.device}")
    if value.layout != torch.strided:
        found.append(f"expected a dense tensor, got layout {_short(value.layout)}")
    elif not value.is_contiguous():
        found.append(f"expected a contiguous tensor, got strides {list(value.stride())}: call .contiguous()")
    if not found and device == "meta":
        found.append("expected a tensor with data, got device meta")
    if not found and values and name.endswith("_scale"):
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            where = torch.nonzero(~torch.isfinite(value))[0].tolist()
            found.append(f"expected finite scales, got {bad} NaN or inf, the first at {where}")
    return found


def _scalar_problems(geometry: Geometry, offset: Any, factor: Any) -> list[str]:
    problems = []
    low, high = 1 - geometry.num_local_experts, geometry.num_experts - 1
    if isinstance(offset, bool) or not isinstance(offset, int):
        problems.append(f"local_expert_offset: expected an int, got {type(offset).__name__}")
    elif not low <= offset <= high:
        problems.append(
            f"local_expert_offset: expected {low}..{high}, so that a local expert is one of 0..{high}, got {offset}"
        )
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        problems.append(f"routed_scaling_factor: expected a float, got {type(factor).__name__}")
    elif factor != factor or factor in (float("inf"), float("-inf")):
        problems.append(f"routed_scaling_factor: expected a finite number, got {factor}")
    return problems


def _short(what: torch.dtype | torch.layout) -> str:
    return str(what).removeprefix("torch.")


assert tuple(f.name for f in fields(Inputs))[:10] == FIELDS
