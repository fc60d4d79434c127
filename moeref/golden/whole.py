"""A small case: every stage in full. Each stage of the reference is run on the recorded stage before it.

So a change in one stage shows in that stage alone, and no stage carries another one's float noise.
"""

from __future__ import annotations

from typing import Any

import torch

from moeref import reference
from moeref.golden import tolerance
from moeref.golden.record import check_cast, check_inputs, hit_experts
from moeref.golden.stages import Locate, StageResult, close, equal, position, rounded
from moeref.inputs import Inputs
from moeref.reference import Permutation, Routing, Trace
from moeref.spec import EXACT, Recipe

INTEGERS = ("topk_ids", "expert_offsets", "permuted_idx_to_token_idx", "permuted_idx_to_slot")
FLOATS = ("topk_weights", "gemm1_out", "swiglu_out", "requantized", "gemm2_out", "unrounded", "output")
STAGES = (INTEGERS[0], FLOATS[0], *INTEGERS[1:], *FLOATS[1:])
"""The tensors of a case, in the order in which they come about."""


def flatten(trace: Trace) -> dict[str, torch.Tensor]:
    """A trace's stages by name, in the order of STAGES."""
    parts = {**vars(trace.routing), **vars(trace.permutation), **vars(trace)}
    return {name: parts[name] for name in STAGES}


def unflatten(stages: dict[str, torch.Tensor], inputs: Inputs) -> Trace:
    """The recorded trace. Its routing margins, which no case holds, are this machine's."""
    here = _route(inputs, EXACT)
    return Trace(
        routing=Routing(stages["topk_ids"], stages["topk_weights"], here.expert_margin, here.group_margin),
        permutation=Permutation(*(stages[name] for name in INTEGERS[1:])),
        **{name: stages[name] for name in FLOATS[1:]},
    )


def _route(inputs: Inputs, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Routing:
    return reference.route(
        inputs.routing_logits, inputs.routing_bias, inputs.geometry, inputs.routed_scaling_factor, recipe, dtype
    )


def check_whole(
    manifest: dict[str, Any], stages: dict[str, torch.Tensor], inputs: Inputs, recipe: Recipe
) -> list[StageResult]:
    """Every input and stage of one small case, in the order in which they come about; last, how moe() joins them."""
    golden = unflatten(stages, inputs)
    given = check_inputs(manifest, inputs, hit_experts(golden.permutation.expert_offsets))
    found = check_stages(golden, inputs, recipe)
    results = [check_cast(manifest)]
    results += [result for name, result in given.items() if not name.endswith("_weights")]
    for name in STAGES:
        weights = name.replace("_out", "_weights")
        results += [given[weights]] if weights != name and weights in given else []
        results.append(found[name])
    return [*results, _joined(inputs, recipe)]


def check_stages(golden: Trace, inputs: Inputs, recipe: Recipe) -> dict[str, StageResult]:
    """Each stage of a trace beside what the reference's function makes of the trace's own stage before it."""
    found = [*_routing(golden, inputs, recipe), *_first_half(golden, inputs, recipe), *_second_half(golden, inputs)]
    return {result.stage: result for result in found}


def _joined(inputs: Inputs, recipe: Recipe) -> StageResult:
    """Whether moe() joins the stages as they were tested one by one: its trace must agree with itself."""
    for name, result in check_stages(reference.moe(inputs, recipe), inputs, recipe).items():
        if not result.passed:
            return StageResult("moe", False, f"moe() takes {name} from another stage than its own: {result.detail}")
    return StageResult("moe", True)


def _routing(golden: Trace, inputs: Inputs, recipe: Recipe) -> list[StageResult]:
    found = _route(inputs, recipe)
    want = golden.routing
    results = [equal("topk_ids", found.topk_ids, want.topk_ids, _at("token", "slot"))]
    limit = tolerance.weights_tolerance(want.topk_weights)
    weights = ("topk_weights", found.topk_weights, want.topk_weights)
    if recipe.topk_weights == "bf16":
        exact = _route(inputs, EXACT, torch.float64).topk_weights
        results.append(rounded(*weights, exact, limit, _at("token", "slot")))
    else:
        results.append(close(*weights, limit, _at("token", "slot")))
    permutation = reference.permute(want.topk_ids, inputs.geometry, inputs.local_expert_offset)
    for name, tensor in vars(permutation).items():
        locate = _at("local expert") if name == "expert_offsets" else _at("row")
        results.append(equal(name, tensor, getattr(golden.permutation, name), locate))
    return results


def _first_half(golden: Trace, inputs: Inputs, recipe: Recipe) -> list[StageResult]:
    rows, g = _rows(golden), inputs.geometry
    found = reference.gemm1(inputs, golden.permutation, recipe)
    limit = tolerance.gemm1_tolerance(golden.gemm1_out, g.hidden_size)
    if recipe.gemm1_out == "bf16":
        exact = reference.gemm1(inputs, golden.permutation, EXACT, torch.float64)
        results = [rounded("gemm1_out", found, golden.gemm1_out, exact, limit, rows)]
    else:
        results = [close("gemm1_out", found, golden.gemm1_out, limit, rows)]
    found = reference.swiglu(golden.gemm1_out, recipe)
    limit = tolerance.swiglu_tolerance(golden.gemm1_out, golden.swiglu_out)
    results.append(close("swiglu_out", found, golden.swiglu_out, limit, rows))
    found = reference.requantize(golden.swiglu_out, recipe)
    return [*results, equal("requantized", found, golden.requantized, rows)]


def _second_half(golden: Trace, inputs: Inputs) -> list[StageResult]:
    rows, tokens = _rows(golden), _at("token", "column")
    found = reference.gemm2(golden.requantized, inputs, golden.permutation)
    limit = tolerance.gemm2_tolerance(golden.gemm2_out, inputs.geometry.intermediate_size)
    results = [close("gemm2_out", found, golden.gemm2_out, limit, rows)]
    found = reference.combine(golden.gemm2_out, golden.routing, golden.permutation)
    limit = tolerance.combine_tolerance(golden)
    results.append(close("unrounded", found, golden.unrounded, limit, tokens))
    cast = golden.unrounded.to(torch.bfloat16)
    return [*results, equal("output", cast, golden.output, tokens)]


def _at(*axes: str) -> Locate:
    """Says an index by the names of its axes."""
    return lambda index: ", ".join(f"{axis} {part}" for axis, part in zip(axes, index, strict=True))


def _rows(trace: Trace) -> Locate:
    """Says a permuted row by its token and local expert, and the column."""
    offsets, tokens = trace.permutation.expert_offsets, trace.permutation.permuted_idx_to_token_idx

    def locate(index: tuple[int, ...]) -> str:
        row, column = index
        if row >= len(tokens):
            return position(index)
        expert = int(torch.searchsorted(offsets, row, right=True)) - 1
        return f"row {row} (token {int(tokens[row])}, local expert {expert}), column {column}"

    return locate
