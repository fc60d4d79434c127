"""Laws about memory: the same answer again, whatever the output held and whatever was computed in between."""

from __future__ import annotations

from dataclasses import replace

import torch

from moeref.diagnose.laws_bench import ORDER, Bench, law, not_applicable
from moeref.diagnose.result import Finding
from moeref.inputs import FP8, TENSOR_FIELDS, Inputs
from moeref.judge.checks import POISONS
from moeref.reference import permute, route


@law("combine", "state")
def repeat(bench: Bench) -> Finding:
    """Three calls give the same bytes, or, without that promise, differ by the order of additions alone."""
    first, *others = bench.answers
    for count, other in enumerate(others, start=2):
        finding = bench.compare("repeat", other, first, ORDER)
        if bench.deterministic and not finding.exact:
            finding = replace(finding, passed=False, suspects=("combine", "state"))
        if not finding.exact:
            return replace(finding, detail=f"call {count} against call 1: {finding.detail}")
    return finding


@law("output", "combine")
def poisoned_output(bench: Bench) -> Finding:
    """What the output buffer held before does not matter."""
    finding = not_applicable("poisoned_output", "the candidate returns its own memory")
    for value in POISONS:
        answer = bench.call.poisoned(bench.inputs, value)
        if answer is None:
            return finding
        finding = bench.compare("poisoned_output", answer, bench.answer)
        if finding.passed is False:
            return replace(finding, detail=f"buffer full of {value:g}: {finding.detail}")
    return finding


@law("state", "permute")
def other_call_between(bench: Bench) -> Finding:
    """After a call with twice the tokens and other routing, the first inputs give the first answer again."""
    inputs = bench.inputs
    tokens = torch.arange(inputs.seq_len, device=inputs.device)
    other = inputs.take(torch.cat([tokens, tokens]))
    bench.call(replace(other, routing_logits=other.routing_logits.flip(1)))
    return bench.compare("other_call_between", bench.call(inputs), bench.answer)


def _other_contents(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Another tensor of the same size for each of the eight, made of the first one's own values.

    Payloads and logits are turned round; scales besides doubled, so that a single one changes too; the bias besides
    raised by 1/2 for every second expert, so that choices change.
    """
    other = {}
    for name, tensor in inputs.tensors().items():
        axes = tuple(range(1 if name.startswith("gemm") else 0, tensor.dim()))
        if tensor.dtype == FP8:
            other[name] = tensor.view(torch.uint8).flip(axes).view(FP8)
        else:
            other[name] = tensor.flip(axes) * (2 if name.endswith("_scale") else 1)
    steps = 0.5 * (torch.arange(len(inputs.routing_bias), device=inputs.device) % 2)
    other["routing_bias"] = (other["routing_bias"].float() + steps).bfloat16()
    return other


def _same_rows(one: Inputs, other: Inputs) -> bool:
    """Whether both ask for the same local work."""
    rows = []
    for inputs in (one, other):
        g = inputs.geometry
        routing = route(inputs.routing_logits, inputs.routing_bias, g, inputs.routed_scaling_factor)
        rows.append(permute(routing.topk_ids, g, inputs.local_expert_offset))
    return torch.equal(rows[0].expert_offsets, rows[1].expert_offsets) and torch.equal(
        rows[0].permuted_idx_to_token_idx, rows[1].permuted_idx_to_token_idx
    )


def _renewed(bench: Bench, name: str, changes: dict[str, Inputs]) -> Finding:
    """Each of the changed inputs, refilled over the base ones, must give the answer that fresh buffers give.

    That answer must differ from the base one: a candidate that ignores the change altogether gives the old one twice.
    """
    stale, worst = [], Finding(name, True, f"{len(changes)} changes seen")
    for what, then in changes.items():
        want = bench.call(then)
        if torch.equal(want, bench.answer):
            if what in ("routing_bias", "routing_logits", "local_expert_offset") and _same_rows(bench.inputs, then):
                continue  # it was no change for this rank
            stale.append(f"{what} (also in fresh buffers)")
            continue
        finding = bench.compare(name, bench.call.refill(bench.inputs, then), want, inputs=then)
        if finding.passed is False:
            stale.append(what)
            worst = finding
    if stale:
        detail = f"answers from an earlier call's {', '.join(stale)}: {worst.detail}"
        return Finding(name, False, detail, ("state",), exact=False, z=worst.z)
    return worst


@law("state")
def refilled_buffers(bench: Bench) -> Finding:
    """The same buffers with other contents, each of the eight tensors in turn and all, give the new answer."""
    other = _other_contents(bench.inputs)
    changes = {}
    for name in TENSOR_FIELDS:
        changes[name] = replace(bench.inputs, **{name: other[name]})  # type: ignore[arg-type]
    changes["all eight"] = replace(bench.inputs, **other)  # type: ignore[arg-type]
    return _renewed(bench, "refilled_buffers", changes)


@law("state", "offset", "weights")
def changed_scalars(bench: Bench) -> Finding:
    """The same buffers with another local_expert_offset or routed_scaling_factor give the new answer."""
    inputs, g = bench.inputs, bench.geometry
    here = inputs.local_expert_offset
    steps = (g.num_local_experts, -g.num_local_experts, 1, -1)
    offset = next((here + s for s in steps if 0 <= here + s <= g.num_experts - g.num_local_experts), here)
    changes = {"routed_scaling_factor": replace(inputs, routed_scaling_factor=1.5 * inputs.routed_scaling_factor)}
    if offset != here:
        changes["local_expert_offset"] = replace(inputs, local_expert_offset=offset)
    return _renewed(bench, "changed_scalars", changes)
