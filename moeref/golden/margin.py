"""How clear the choice of experts is: gaps in float64, and the tokens whose choice float32 rounding could turn."""

from __future__ import annotations

import torch

from moeref.inputs import Inputs
from moeref.judge.ties import MARGIN_ULPS

SAFETY = 2
"""A gap counts as clear from so many times the margin below which float32 may decide either way (moeref.judge.ties)."""


def safe_gap(inputs: Inputs) -> float:
    """The least gap between two biased scores that every float32 routing sees the same way."""
    size = 1.0 + float(inputs.routing_bias.float().abs().max())
    return SAFETY * MARGIN_ULPS * torch.finfo(torch.float32).eps * size


def routing_gaps(inputs: Inputs) -> torch.Tensor:
    """The smallest gap that decides a token's routing, [T] float64; inf where nothing but the rule for ties does.

    Looked at are the cut between the groups, and the order of the chosen experts down to the best one left out: ids
    are recorded best first. Two experts with the same logit and the same bias have the same score on every machine,
    so the rule decides between them (the lower id first), not rounding.
    """
    g = inputs.geometry
    logits, bias = inputs.routing_logits.double(), inputs.routing_bias.double()
    biased = 1.0 / (1.0 + torch.exp(-logits)) + bias  # [T, E]
    grouped = biased.view(len(biased), g.n_group, g.group_size)
    best_two = grouped.topk(min(2, g.group_size), dim=-1).values  # [T, n_group, 2]
    score, group = torch.sort(best_two.sum(-1), dim=-1, descending=True, stable=True)
    smallest = torch.full_like(biased[:, 0], torch.inf)
    if g.topk_group < g.n_group:
        last, first_out = group[:, g.topk_group - 1], group[:, g.topk_group]
        token = torch.arange(len(biased), device=biased.device)
        same = (best_two[token, last] == best_two[token, first_out]).all(-1)
        smallest = torch.where(same, smallest, score[:, g.topk_group - 1] - score[:, g.topk_group])
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, group[:, : g.topk_group], True)
    masked = grouped.masked_fill(~kept.unsqueeze(-1), torch.finfo(torch.float64).min).flatten(1)
    ordered, ids = torch.sort(masked, dim=-1, descending=True, stable=True)
    count = min(g.top_k + 1, g.num_experts)
    gaps = ordered[:, : count - 1] - ordered[:, 1:count]  # [T, K] or one less
    same_logit = logits.gather(1, ids)[:, :count].diff(dim=1) == 0
    same_bias = bias[ids[:, :count]].diff(dim=1) == 0
    gaps = gaps.masked_fill(same_logit & same_bias, torch.inf)
    return torch.minimum(smallest, gaps.amin(1)) if count > 1 else smallest


def open_tokens(inputs: Inputs) -> torch.Tensor:
    """Tokens, int64 ascending, whose choice float32 rounding could turn: another machine may choose otherwise."""
    return (routing_gaps(inputs) < safe_gap(inputs)).nonzero().squeeze(1)
