"""A candidate's Trace, stage by stage: each one judged from the candidate's own stage before.

The first wrong stage is then the cause, and not the echo of one before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeref.diagnose.explain.distance import row_distance
from moeref.diagnose.explain.geometry import Fact
from moeref.inputs import Inputs
from moeref.judge.ties import ambiguous_tokens
from moeref.reference import Trace, combine, gemm1, gemm2, permute, route, swiglu

PRODUCT = 1e-5
"""Largest squared row distance of a stage that at most rounds its result to bfloat16: that alone makes 6e-7, and
accumulators of 13 fraction bits add 2**-26."""

CAST = 2e-3
"""Of a stage that may cast to e4m3 with a scale per 1x128 block: 0.00025 a cast, 0.0005 with a scale of 2**k,
and at most three casts (gate, up, their product)."""


def judge_trace(trace: Trace, inputs: Inputs) -> list[Fact]:
    """A fact for every stage that does not follow from the one before it, in order; empty where all do."""
    right = route(inputs.routing_logits, inputs.routing_bias, inputs.geometry, inputs.routed_scaling_factor)
    clear = torch.ones(inputs.seq_len, dtype=torch.bool, device=inputs.device)
    clear[ambiguous_tokens(inputs, right)] = False
    ids, order = trace.routing.topk_ids.sort(1)
    due, due_order = right.topk_ids.sort(1)
    found = []
    wrong = (ids != due).any(1) & clear
    if bool(wrong.any()):
        text = (
            f"topk_ids are wrong for {int(wrong.sum())} of {len(wrong)} tokens, the first is {int(wrong.nonzero()[0])}"
        )
        found.append(Fact(text, ("topk", "groups", "bias")))
    weights, due_weights = trace.routing.topk_weights.float().gather(1, order), right.topk_weights.gather(1, due_order)
    off = ((weights - due_weights).abs() > 2**-7 * due_weights.abs()).any(1) & clear & ~wrong
    if bool(off.any()):
        text = f"topk_weights are wrong for {int(off.sum())} tokens whose topk_ids are right"
        found.append(Fact(text, ("weights", "weights")))
    own = permute(trace.routing.topk_ids, inputs.geometry, inputs.local_expert_offset)
    if any(not torch.equal(getattr(own, name), getattr(trace.permutation, name)) for name in vars(own)):
        return [*found, Fact("the permutation is not that of its topk_ids", ("permute", "offset"))]
    stages: tuple[tuple[str, Tensor, Callable[[], Tensor], float, tuple[str, ...]], ...] = (
        (
            "gemm1_out",
            trace.gemm1_out,
            lambda: gemm1(inputs, own),
            PRODUCT,
            ("gemm1", "gemm1_scale", "activation_scale"),
        ),
        ("swiglu_out", trace.swiglu_out, lambda: swiglu(trace.gemm1_out.float()), CAST, ("swiglu", "swiglu")),
        ("requantized", trace.requantized, lambda: trace.swiglu_out, CAST, ("requantize", "requantize")),
        (
            "gemm2_out",
            trace.gemm2_out,
            lambda: gemm2(trace.requantized.float(), inputs, own),
            PRODUCT,
            ("gemm2", "gemm2_scale"),
        ),
        (
            "output",
            trace.output,
            lambda: combine(trace.gemm2_out.float(), trace.routing, own),
            PRODUCT,
            ("combine", "output"),
        ),
    )
    for name, got, make, limit, suspects in stages:
        wanted = make()
        if got.shape != wanted.shape:
            text = f"{name} has the shape {list(got.shape)}, expected {list(wanted.shape)}"
            return [*found, Fact(text, suspects)]
        far = row_distance(got, wanted)
        bad = ~(far <= limit)
        if bool(bad.any()):
            text = f"{name} does not follow from the stage before in {int(bad.sum())} of {len(bad)} rows, by "
            found.append(Fact(f"{text}{float(far.max()) ** 0.5:.2g} of a row's size at most", suspects))
    return found
