"""Definitions: the JSON that says which operation a data set's workloads and solutions are about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeref.inputs import FIELDS, expected_layout
from moeref.interop.fib.files import FibError, Fields, parse, read_text, shown
from moeref.interop.fib.reference_source import reference_source
from moeref.interop.solution import DEFINITIONS
from moeref.spec import BLOCK, Geometry, SpecError

OP_TYPE = "moe"

NAME = re.compile(
    r"moe_fp8_block_scale_ds_routing_topk(\d{1,6})_ng(\d{1,6})_kg(\d{1,6})_e(\d{1,6})_h(\d{1,6})_i(\d{1,6})"
)
"""top_k, n_group, topk_group, L, H, I: the routing groups stand in the name alone."""

CONSTANTS = ("num_experts", "num_local_experts", "hidden_size", "intermediate_size")
SCALARS = {"local_expert_offset": "int32", "routed_scaling_factor": "float32"}
OUTPUT = "output"

_ANY_SEQ_LEN = 1_000_003  # stands for the axis seq_len where shapes are compared: a prime that no other axis has


@dataclass(frozen=True)
class Definition:
    """A definition with the ten inputs of DeepSeek's FP8 block-scale MoE."""

    name: str
    geometry: Geometry


def is_moe(name: str) -> bool:
    """Whether a definition of that name is one of DeepSeek-routing FP8 block-scale MoE."""
    return DEFINITIONS.fullmatch(name) is not None


def definition_name(geometry: Geometry) -> str:
    """The name under which FlashInfer-Bench knows a geometry. E does not stand in it."""
    g = geometry
    return (
        f"moe_fp8_block_scale_ds_routing_topk{g.top_k}_ng{g.n_group}_kg{g.topk_group}_e{g.num_local_experts}"
        f"_h{g.hidden_size}_i{g.intermediate_size}"
    )


def read_definition(path: Path) -> Definition:
    """The definition of a JSON file; a reference in it is not run, nor needed.

    Raises FibError that names every field which is not as the ten inputs have it.
    """
    fields = Fields(str(path), "definition")
    data = parse(read_text(path, "a FlashInfer-Bench definition"), str(path), "a FlashInfer-Bench definition")
    name = fields.take(data, "name", str)
    axes, inputs, outputs = (fields.take(data, key, dict) for key in ("axes", "inputs", "outputs"))
    fields.check()
    found = NAME.fullmatch(name)
    if not found:
        raise FibError(
            f"{path}: name: expected moe_fp8_block_scale_ds_routing_topkK_ngG_kgG_eL_hH_iI, which holds the routing "
            f"groups, got {shown(name)}"
        )
    top_k, n_group, topk_group, *in_name = (int(size) for size in found.groups())
    experts, *others = (_constant(fields, axes, axis) for axis in CONSTANTS)
    fields.check()
    for axis, size, came in zip(CONSTANTS[1:], in_name, others, strict=True):
        if came != size:
            fields.wrong.append(f"axis {axis}: expected {size} as in the name, got {came}")
    fields.check()
    n_local, hidden, inner = others
    try:
        geometry = Geometry(experts, n_local, hidden, inner, top_k, n_group, topk_group)
    except SpecError as error:
        raise FibError(f"{path}: {error}") from error
    _check_other_axes(fields, axes, geometry)
    _check_tensors(fields, axes, inputs, outputs, geometry)
    fields.check()
    return Definition(name, geometry)


def _constant(fields: Fields, axes: dict[str, Any], axis: str) -> int:
    value: int = fields.take(axes.get(axis), "value", int, f"axis {axis}")
    return value


def _check_other_axes(fields: Fields, axes: dict[str, Any], geometry: Geometry) -> None:
    expected = _derived_axes(geometry) | {"top_k": geometry.top_k}
    for axis, size in expected.items():
        if axis in axes and _constant(fields, axes, axis) != size:
            fields.wrong.append(f"axis {axis}: expected {size}, got {shown(axes[axis])}")
    seq_len = axes.get("seq_len")
    if not isinstance(seq_len, dict) or seq_len.get("type") != "var":
        fields.wrong.append(f"axis seq_len: expected a variable one, got {shown(seq_len)}")


def _derived_axes(g: Geometry) -> dict[str, int]:
    return {
        "gemm1_out_size": 2 * g.intermediate_size,
        "num_hidden_blocks": g.hidden_size // BLOCK,
        "num_intermediate_blocks": g.intermediate_size // BLOCK,
        "num_gemm1_out_blocks": 2 * g.intermediate_size // BLOCK,
    }


def _check_tensors(
    fields: Fields, axes: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Any], geometry: Geometry
) -> None:
    if list(inputs) != list(FIELDS):
        fields.wrong.append(f"inputs: expected {', '.join(FIELDS)} in this order, got {', '.join(map(str, inputs))}")
        return
    if list(outputs) != [OUTPUT]:
        fields.wrong.append(f"outputs: expected {OUTPUT} alone, got {', '.join(map(str, outputs)) or 'none'}")
        return
    sizes = {axis: one.get("value") for axis, one in axes.items() if isinstance(one, dict)} | {"seq_len": _ANY_SEQ_LEN}
    expected: dict[str, tuple[list[int] | None, str]] = {
        name: (list(shape), str(dtype).removeprefix("torch."))
        for name, (shape, dtype) in expected_layout(geometry, _ANY_SEQ_LEN).items()
    }
    expected |= {name: (None, dtype) for name, dtype in SCALARS.items()}
    expected[OUTPUT] = ([_ANY_SEQ_LEN, geometry.hidden_size], "bfloat16")
    for name, (shape, dtype) in expected.items():
        one = outputs[name] if name == OUTPUT else inputs[name]
        named = one.get("shape") if isinstance(one, dict) else "nothing"
        came = (
            [sizes.get(axis) if isinstance(axis, str) else axis for axis in named] if isinstance(named, list) else named
        )
        if came != shape:
            want = "a scalar" if shape is None else _symbolic(shape)
            got = f"{shown(named)} = {_symbolic(came)}" if isinstance(came, list) else shown(named)
            fields.wrong.append(f"{name}: expected shape {want}, got {got}")
        if isinstance(one, dict) and one.get("dtype") != dtype:
            fields.wrong.append(f"{name}: expected dtype {dtype}, got {shown(one.get('dtype'))}")


def _symbolic(shape: list[Any]) -> str:
    return "[" + ", ".join("seq_len" if size == _ANY_SEQ_LEN else str(size) for size in shape) + "]"


def definition_json(geometry: Geometry) -> dict[str, Any]:
    """A geometry's definition as JSON data, with a reference that FlashInfer-Bench can run."""
    g = geometry
    sizes = (g.num_experts, g.num_local_experts, g.hidden_size, g.intermediate_size)
    constants = dict(zip(CONSTANTS, sizes, strict=True)) | {"top_k": g.top_k} | _derived_axes(g)
    tokens, experts, hidden = "seq_len", "num_local_experts", "hidden_size"
    inner, blocks, inner_blocks = "intermediate_size", "num_hidden_blocks", "num_intermediate_blocks"
    axes_of = {
        "routing_logits": [tokens, "num_experts"],
        "routing_bias": ["num_experts"],
        "hidden_states": [tokens, hidden],
        "hidden_states_scale": [blocks, tokens],
        "gemm1_weights": [experts, "gemm1_out_size", hidden],
        "gemm1_weights_scale": [experts, "num_gemm1_out_blocks", blocks],
        "gemm2_weights": [experts, hidden, inner],
        "gemm2_weights_scale": [experts, blocks, inner_blocks],
    }
    layout = expected_layout(g, 0)
    inputs: dict[str, Any] = {
        name: {"shape": axes, "dtype": str(layout[name][1]).removeprefix("torch.")} for name, axes in axes_of.items()
    }
    inputs |= {name: {"shape": None, "dtype": dtype} for name, dtype in SCALARS.items()}
    return {
        "name": definition_name(g),
        "op_type": OP_TYPE,
        "description": f"FP8 block-scale MoE with DeepSeek's routing, geometry {g.name} of moeref.",
        "tags": ["quantization:float8_e4m3fn"],
        "axes": {"seq_len": {"type": "var"}} | {axis: {"type": "const", "value": n} for axis, n in constants.items()},
        "inputs": inputs,
        "outputs": {OUTPUT: {"shape": [tokens, hidden], "dtype": "bfloat16"}},
        "reference": reference_source(g),
    }
