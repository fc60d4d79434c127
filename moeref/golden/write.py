"""Recording a case: what the reference gives on this machine, with the reason."""

from __future__ import annotations

from typing import Any

import torch

from moeref import reference
from moeref.golden import tolerance
from moeref.golden.case import Case, GoldenError
from moeref.golden.margin import open_tokens, routing_gaps, safe_gap
from moeref.golden.record import environment, hit_experts, input_digests, summary
from moeref.golden.sampled import STRIDE, choose, clear_mask, integer_digests, integers, norms, part_of, samples
from moeref.golden.whole import FLOATS, flatten
from moeref.inputs import Inputs
from moeref.judge.noise import PEAK
from moeref.judge.verdict import PASS
from moeref.make import make_inputs
from moeref.reference import Trace
from moeref.spec import SpecError


def write_case(case: Case, reason: str, force: bool = False) -> bool:
    """Record a case from this machine's reference; returns False, and writes nothing, where the recorded one holds.

    reason   one sentence, kept in the manifest.
    force    record anew also where nothing diverges: other float noise would show as a change for nothing.
    Raises SpecError for an empty reason, and for a small problem whose routing float rounding could turn.
    """
    from moeref.golden.check import check_case

    reason = " ".join(reason.split())
    if not reason:
        raise SpecError('golden write needs --reason "why the recorded values change": it is kept in the manifest')
    if not force and case.path.is_file() and check_case(case).status == PASS:
        return False
    inputs = make_inputs(case.spec.problem)
    gaps = routing_gaps(inputs)
    undecided = open_tokens(inputs).tolist()
    if undecided and not case.sampled:
        raise SpecError(
            f"case '{case.name}': the routing of token {undecided[0]} hangs on a gap of {float(gaps.min()):.2g}, below "
            f"{safe_gap(inputs):.2g}: another machine may choose otherwise; take another seed"
        )
    trace = reference.moe(inputs, case.spec.recipe)
    smallest = float(gaps.min()) if len(gaps) else float("inf")
    manifest: dict[str, Any] = {
        "reason": reason,
        "replaces": _digest_of(case),
        "written": environment(),
        "routing": {
            "smallest_gap": smallest if smallest < float("inf") else None,
            "safe_gap": safe_gap(inputs),
            "open_tokens": undecided,
        },
        "inputs": input_digests(inputs, hit_experts(trace.permutation.expert_offsets)),
    }
    parts = _sampled(inputs, trace, undecided) if case.sampled else _whole(trace)
    case.save({**manifest, **parts[0]}, parts[1])
    return True


def _digest_of(case: Case) -> str | None:
    """Of the manifest that is there, or None."""
    try:
        return str(case.manifest()["digest"])
    except GoldenError:
        return None


def _whole(trace: Trace) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    stages = flatten(trace)
    figures = {name: summary(stages[name]) for name in FLOATS}
    limits = {
        "topk_weights": f"{2 * (14 + trace.routing.topk_weights.shape[1])} U of the value",
        "gemm1_out": f"{PEAK:g} sqrt(2 H / 3) U of the rms over the 128-block",
        "swiglu_out": f"{2 * tolerance.SWIGLU_ROUNDINGS} U of the value",
        "requantized": "equal",
        "gemm2_out": f"{PEAK:g} sqrt(2 I / 3) U of the rms over the 128-block",
        "unrounded": f"{2 * (trace.routing.topk_weights.shape[1] + 1)} U of the sum of magnitudes",
        "output": "equal",
    }
    return {
        "tolerance": {"derived_in": DERIVED_IN, "U": "2**-24", "each stage from the recorded one before it": limits},
        "rows_by_expert": trace.permutation.expert_offsets.diff().tolist(),
        "floats": figures,
    }, stages


def _sampled(inputs: Inputs, trace: Trace, undecided: list[int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    clear = clear_mask(inputs.seq_len, undecided)
    tokens = choose(trace.permutation, clear)
    part = part_of(trace, tokens)
    g = inputs.geometry
    found = integers(trace.routing, trace.permutation, clear)
    largest = {
        name: float(f"{float((limit / _rms(limit, getattr(part, name))).max()):.2g}")
        for name, limit in tolerance.through(part, g.hidden_size, g.intermediate_size).items()
    }
    return {
        "tolerance": {
            "derived_in": DERIVED_IN,
            "norms": tolerance.norm_tolerance(g.hidden_size),
            "samples, largest over the row's rms": largest,
        },
        "integers": integer_digests(found),
        "rows_by_expert": found["expert_offsets"].diff().tolist(),
        "norms": norms(trace, clear),
        "sampled_tokens": tokens.tolist(),
        "sampled_columns": f"every {STRIDE}th",
        "floats": {name: summary(getattr(part, name)) for name in FLOATS[1:]},
    }, samples(part)


DERIVED_IN = "docs/numerics.md, Golden files"


def _rms(like: torch.Tensor, stage: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row, for shape's sake [rows, N]."""
    return stage.float().square().mean(1, keepdim=True).sqrt().clamp(min=tolerance.TINY).expand_as(like)
