"""Tokens whose choice of experts is a toss-up, and the other choices that are as good."""

from __future__ import annotations

import torch

from moeref.inputs import Inputs
from moeref.judge.compare import block_errors
from moeref.reference import NORMALISER_EPSILON, Routing, Trace, experts
from moeref.spec import Geometry

MARGIN_ULPS = 8
"""A biased score carries the rounding of exp, of the reciprocal, and of the sum with the bias, each about one unit in
the last place of the largest operand; the sum of two doubles that. Two such numbers compare safely 8 units apart."""


def ambiguous_tokens(inputs: Inputs, routing: Routing) -> torch.Tensor:
    """Tokens [n] int64 whose margin at the expert or the group cut is within float32 rounding, exact ties included."""
    size = 1.0 + inputs.routing_bias.float().abs().max()
    slack = MARGIN_ULPS * torch.finfo(torch.float32).eps * size
    close = (routing.expert_margin <= slack) | (routing.group_margin <= slack)
    return close.nonzero().squeeze(1)


def adopt(inputs: Inputs, trace: Trace, output: torch.Tensor) -> tuple[Trace, int, int]:
    """The trace under the admissible choices that come nearest to output [T, H], token by token.

    Returns (trace, ambiguous tokens, tokens that took another choice than the lower id). The trace is the given one
    where no token did. Output rows that are not finite take the first choice.
    """
    tokens = ambiguous_tokens(inputs, trace.routing)
    if not len(tokens):
        return trace, 0, 0
    part, rows = inputs.take(tokens), output[tokens]
    first = trace.routing
    choices = [Routing(*(field[tokens] for field in vars(first).values())), *other_choices(part, inputs.geometry)]
    errors = [block_errors(rows, trace.output[tokens])]
    errors += [block_errors(rows, experts(part, choice).output) for choice in choices[1:]]
    best = torch.stack(errors).nan_to_num(nan=torch.inf, posinf=torch.finfo(torch.float64).max).argmin(0)  # [n]
    changed = best > 0
    if not bool(changed.any()):
        return trace, len(tokens), 0
    index = torch.arange(len(tokens), device=tokens.device)
    ids, weights = first.topk_ids.clone(), first.topk_weights.clone()
    ids[tokens] = torch.stack([choice.topk_ids for choice in choices])[best, index]
    weights[tokens] = torch.stack([choice.topk_weights for choice in choices])[best, index]
    routing = Routing(ids, weights, first.expert_margin, first.group_margin)
    return experts(inputs, routing), len(tokens), int(changed.sum())


def other_choices(inputs: Inputs, geometry: Geometry) -> list[Routing]:
    """Other admissible routings of these (ambiguous) tokens.

    Ties to the higher id, among experts, among groups, or both; the other side of the expert cut, of the group cut, or
    of both. A routing may repeat the first choice where that cut is clear.
    """
    scores = torch.sigmoid(inputs.routing_logits)
    biased = scores + inputs.routing_bias.float()
    grouped = biased.view(len(biased), geometry.n_group, geometry.group_size)
    group_score = grouped.topk(min(2, geometry.group_size), dim=-1).values.sum(-1)

    def orders(values: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Ids by falling value: the lower first among equals; the higher first; the two at the cut exchanged."""
        lower = torch.sort(values, dim=-1, descending=True, stable=True).indices
        turned = torch.sort(values.flip(1), dim=-1, descending=True, stable=True).indices
        return [order[:, :count] for order in (lower, values.shape[1] - 1 - turned, _swap_at(lower, count))]

    found = []
    for groups in orders(group_score, geometry.topk_group):
        kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, groups, True)
        masked = grouped.masked_fill(~kept.unsqueeze(-1), torch.finfo(torch.float32).min).flatten(1)
        found += [_weigh(ids, scores, inputs) for ids in orders(masked, geometry.top_k)]
    return found[1:]  # the first one is the reference's own


def _swap_at(order: torch.Tensor, count: int) -> torch.Tensor:
    """Exchange the last taken and the first left-out column, where anything is left out."""
    if count >= order.shape[1]:
        return order
    swapped = order.clone()
    swapped[:, [count - 1, count]] = order[:, [count, count - 1]]
    return swapped


def _weigh(topk_ids: torch.Tensor, scores: torch.Tensor, inputs: Inputs) -> Routing:
    chosen = scores.gather(1, topk_ids)
    weights = chosen / (chosen.sum(-1, keepdim=True) + NORMALISER_EPSILON) * inputs.routed_scaling_factor
    clear = torch.full_like(weights[:, 0], torch.inf)
    return Routing(topk_ids, weights, clear, clear)
