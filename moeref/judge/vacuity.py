"""What a problem was able to test: a stage whose data cannot tell right from wrong is blind."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeref.inputs import Inputs
from moeref.reference import Trace

SPREAD = 0.01
"""Relative spread under which weights or scales count as equal: mixing them up would move outputs by less than a
re-quantisation does."""

STAGES = ("topk", "weights", "permute", "activation_scale", "gemm1_scale", "swiglu", "gemm2_scale")
"""Stages that a problem's data may leave untested, in the order of the data."""

CURVED = (0.1, 8.0)
"""|gate| between which silu differs from x/2 + x**2/4 by more than 1e-4 of it, and from relu by more than bf16's half
spacing: there another activation shows."""

CURVED_SHARE = 0.01
"""Least share of local gates that must lie there."""


@dataclass(frozen=True)
class Vacuity:
    """Figures of one problem, and the stages that it could not have shown to be wrong."""

    active_tokens: int
    local_rows: int
    experts_hit: int
    longest_run: int  # rows of the busiest local expert
    weight_spread: float  # standard deviation over mean of the local routing weights
    activation_scale_spread: float  # the same of |scale| over blocks of active tokens
    gemm1_scale_spread: float  # over blocks of experts that are hit
    gemm2_scale_spread: float
    curved_gates: float  # share of local gates within CURVED
    gate_range: tuple[float, float]
    smallest_margin: float  # at the expert cut
    distinct_choices: int  # different sets of experts among the tokens
    blind: tuple[str, ...]  # stages that this problem says nothing about


def vacuity(inputs: Inputs, trace: Trace) -> Vacuity:
    """Look at the data of an exact trace. Cheap beside the trace: no matrix product."""
    rows = trace.permutation.permuted_idx_to_token_idx
    runs = trace.permutation.expert_offsets.diff()
    hit = (runs > 0).nonzero().squeeze(1)
    active = torch.unique(rows)
    weights = trace.routing.topk_weights[rows, trace.permutation.permuted_idx_to_slot]
    gate = trace.gemm1_out.chunk(2, dim=-1)[1]
    size = gate.abs()
    curved = float(((size > CURVED[0]) & (size < CURVED[1])).float().mean()) if gate.numel() else 0.0
    sets = torch.unique(trace.routing.topk_ids.sort(1).values, dim=0) if inputs.seq_len else rows[:0]
    spreads = {
        "weights": _spread(weights),
        "activation_scale": _spread(inputs.hidden_states_scale[:, active]),
        "gemm1_scale": _spread(inputs.gemm1_weights_scale[hit]),
        "gemm2_scale": _spread(inputs.gemm2_weights_scale[hit]),
    }
    blind = [stage for stage, spread in spreads.items() if spread < SPREAD]
    blind += ["swiglu"] if curved < CURVED_SHARE else []
    blind += ["topk"] if len(sets) < 2 else []
    blind += ["permute"] if not len(runs) or int(runs.max()) < 2 else []
    margins = trace.routing.expert_margin
    return Vacuity(
        active_tokens=len(active),
        local_rows=len(rows),
        experts_hit=len(hit),
        longest_run=int(runs.max()) if len(runs) else 0,
        weight_spread=spreads["weights"],
        activation_scale_spread=spreads["activation_scale"],
        gemm1_scale_spread=spreads["gemm1_scale"],
        gemm2_scale_spread=spreads["gemm2_scale"],
        curved_gates=curved,
        gate_range=(float(gate.min()), float(gate.max())) if gate.numel() else (0.0, 0.0),
        smallest_margin=float(margins.min()) if len(margins) else 0.0,
        distinct_choices=len(sets),
        blind=tuple(blind),
    )


def _spread(values: torch.Tensor) -> float:
    """Standard deviation of |values| over their mean; 0 for none, one or all zero."""
    size = values.abs().double()
    if size.numel() < 2 or not float(size.mean()):
        return 0.0
    return float(size.std() / size.mean())
