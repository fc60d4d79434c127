"""Other routing rules than the definition's, to say what a wrong one looks like; and which choices a tie allows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeref.inputs import Inputs
from moeref.judge.ties import MARGIN_ULPS
from moeref.spec import Geometry

Rule = Callable[[torch.Tensor, torch.Tensor, Geometry], torch.Tensor]
"""(logits [E], bias [E], geometry) -> chosen ids [K], sorted."""


def _pick(
    logits: torch.Tensor,
    bias: torch.Tensor,
    g: Geometry,
    mask: float = torch.finfo(torch.float32).min,
    best: int = 2,
    groups: int = 0,
    by_score: bool = False,
) -> torch.Tensor:
    """Ids [K] that the definition would choose, with one thing changed."""
    scores = torch.sigmoid(logits)
    biased = scores + bias
    grouped = biased.view(g.n_group, g.group_size)
    rank = grouped.topk(min(best, g.group_size), dim=-1).values.sum(-1)
    kept = torch.sort(rank, descending=True, stable=True).indices[: groups or g.topk_group]
    inside = torch.zeros(g.n_group, dtype=torch.bool, device=logits.device)
    inside[kept] = True
    candidates = (scores if by_score else biased).view_as(grouped).masked_fill(~inside[:, None], mask).flatten()
    return torch.sort(candidates, descending=True, stable=True).indices[: g.top_k].sort().values


CHOICES: dict[str, tuple[tuple[str, ...], Rule]] = {
    "the bias were not added": (("bias",), lambda x, b, g: _pick(x, b * 0, g)),
    "the bias were subtracted": (("bias",), lambda x, b, g: _pick(x, -b, g)),
    "masked groups scored 0 instead of the lowest number": (("groups",), lambda x, b, g: _pick(x, b, g, mask=0.0)),
    "a group's score were its largest member": (("groups",), lambda x, b, g: _pick(x, b, g, best=1)),
    "a group's score were the sum of all members": (("groups",), lambda x, b, g: _pick(x, b, g, best=g.group_size)),
    "groups did not matter": (("groups",), lambda x, b, g: _pick(x, b, g, groups=g.n_group)),
    "one group more were kept": (("groups",), lambda x, b, g: _pick(x, b, g, groups=min(g.topk_group + 1, g.n_group))),
    "one group fewer were kept": (("groups",), lambda x, b, g: _pick(x, b, g, groups=max(g.topk_group - 1, 1))),
    "experts were chosen by scores without bias": (("topk", "bias"), lambda x, b, g: _pick(x, b, g, by_score=True)),
    "logits were rounded to bfloat16": (("routing",), lambda x, b, g: _pick(x.bfloat16().float(), b, g)),
    "ids were one too high": (("offset", "permute"), lambda x, b, g: _moved_by(1, _pick(x, b, g), g)),
    "ids were one too low": (("offset", "permute"), lambda x, b, g: _moved_by(-1, _pick(x, b, g), g)),
    "the last choice were lost": (("topk",), lambda x, b, g: _best_but_last(x, b, g)),
}


def _moved_by(step: int, ids: torch.Tensor, g: Geometry) -> torch.Tensor:
    moved = ids + step
    return moved[(moved >= 0) & (moved < g.num_experts)]


def _best_but_last(logits: torch.Tensor, bias: torch.Tensor, g: Geometry) -> torch.Tensor:
    ids = _pick(logits, bias, g)
    biased = torch.sigmoid(logits[ids]) + bias[ids]
    return ids[torch.sort(biased, descending=True, stable=True).indices[:-1]].sort().values


MOST = 24  # wrong tokens that a rule is tried on


def like_choice(wrong: list[tuple[Inputs, int, torch.Tensor]]) -> tuple[tuple[str, ...], str]:
    """(suspects, '; as if ...') of the first rule that explains every wrong token (inputs, token, chosen ids)."""
    for name, (stages, rule) in CHOICES.items():
        if all(
            torch.equal(
                rule(one.routing_logits[token], one.routing_bias.float(), one.geometry).sort().values, ids.sort().values
            )
            for one, token, ids in wrong[:MOST]
        ):
            return stages, f"; as if {name}"
    return (), ""


Weigh = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(scores [K], biases [K], logits [K], factor) -> weights [K]."""

WEIGHTS: dict[str, Weigh] = {
    "taken from scores with bias": lambda s, b, x, f: (s + b) / (s + b).sum() * f,
    "recovered as (score + bias) - bias": lambda s, b, x, f: ((s + b) - b) / (((s + b) - b).sum() + 1e-20) * f,
    "not normalised": lambda s, b, x, f: s * f,
    "not multiplied by routed_scaling_factor": lambda s, b, x, f: s / s.sum(),
    "multiplied by routed_scaling_factor twice": lambda s, b, x, f: s / s.sum() * f * f,
    "squared": lambda s, b, x, f: (s / s.sum() * f).square(),
    "all one": lambda s, b, x, f: torch.ones_like(s),
    "a softmax of the logits": lambda s, b, x, f: torch.softmax(x, 0) * f,
    "rounded to e4m3": lambda s, b, x, f: (s / s.sum() * f).to(torch.float8_e4m3fn).float(),
    "normalised without the 1e-20": lambda s, b, x, f: s / s.sum() * f,
    "given to the chosen in reverse order": lambda s, b, x, f: _moved(s / s.sum() * f, s + b, lambda w: w.flip(0)),
    "given to the next choice": lambda s, b, x, f: _moved(s / s.sum() * f, s + b, lambda w: w.roll(1)),
    "given to the choice before": lambda s, b, x, f: _moved(s / s.sum() * f, s + b, lambda w: w.roll(-1)),
}


def _moved(weights: torch.Tensor, biased: torch.Tensor, move: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Weights [K] moved along the order of choice, the best biased score first."""
    order = torch.sort(biased, descending=True, stable=True).indices
    result = torch.empty_like(weights)
    result[order] = move(weights[order])
    return result


def like_weights(wrong: list[tuple[Inputs, int, torch.Tensor]], factor: float, tolerance: float) -> str:
    """'; as if ...' of the first rule that gives the weights read, (inputs, token, row [E]), of every wrong token."""
    for name, rule in WEIGHTS.items():
        for one, token, row in wrong[:MOST]:
            bias = one.routing_bias.float()
            ids = _pick(one.routing_logits[token], bias, one.geometry)
            logits = one.routing_logits[token, ids]
            due = rule(torch.sigmoid(logits), bias[ids], logits, factor)
            got = row[ids]
            close = ((got - due).abs() <= tolerance * due.abs()) | (got.isnan() & due.isnan())
            if not bool(close.all()):
                break
        else:
            return f"; as if weights were {name}"
    return ""


def admissible(inputs: Inputs, token: int, ids: torch.Tensor) -> bool:
    """Whether a tie (within float32 rounding) allows token to choose exactly `ids`.

    There must be topk_group groups, every one as good as the cut, all clearly better ones among them, such that `ids`
    are top_k experts of them and no expert of them that is left out is clearly better than one taken.
    """
    g = inputs.geometry
    bias = inputs.routing_bias.float()
    biased = torch.sigmoid(inputs.routing_logits[token]) + bias
    slack = float(MARGIN_ULPS * torch.finfo(torch.float32).eps * (1.0 + bias.abs().max()))
    if len(ids) != g.top_k:
        return False
    grouped = biased.view(g.n_group, g.group_size)
    rank = grouped.topk(min(2, g.group_size), dim=-1).values.sum(-1)
    cut = rank.sort(descending=True).values[g.topk_group - 1]
    used = set((ids // g.group_size).tolist())
    must = set((rank > cut + 2 * slack).nonzero().squeeze(1).tolist())
    may = set((rank >= cut - 2 * slack).nonzero().squeeze(1).tolist())
    if not used <= may or len(used | must) > g.topk_group:
        return False
    weakest = biased[ids].min()
    left = biased.clone()
    left[ids] = -torch.inf
    best_left = left.view_as(grouped).amax(1)  # best expert of each group that was not taken
    quiet = {group for group in may if float(best_left[group]) <= float(weakest) + slack}
    return used | must <= quiet and len(quiet) >= g.topk_group
