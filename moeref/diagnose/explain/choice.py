"""Which step of the routing is wrong, from the matrix of routing weights that the read-out gives.

A wrong choice of experts is tried against families of rules: another share of the bias, another score, another
rule for groups. Where one rule gives every token's choice, its step is to blame, be it in the catalogue or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from moeref.diagnose.explain.geometry import Fact
from moeref.diagnose.readout.craft import Stand
from moeref.diagnose.readout.routing import ABOVE, NOTHING, read_matrix
from moeref.diagnose.result import Broken, Call, Guarded
from moeref.judge.ties import ambiguous_tokens
from moeref.spec import Geometry, Problem

AGREE = 0.97
"""Share of the tokens whose choice a rule must give: a tie may go either way in a few."""

MOST_SUBSETS = 256
"""Subsets of groups that are tried one by one."""

LEFT_OUT = ("underflow",)  # kinds whose chosen experts may weigh nothing


@dataclass(frozen=True)
class Read:
    """Tokens without ties, of all batches."""

    logits: Tensor  # [N, E]
    bias: Tensor  # [N, E]
    got: Tensor  # [N, E] weights read
    chosen: Tensor  # [N, E] bool, by what was read
    seen: Tensor  # [N, E] bool, columns that were read
    geometry: Geometry
    factor: float
    offset: int


def read_routing_weights(call: Call, problem: Problem, device: str) -> Read | None:
    """The routing weights of crafted tokens; None where nothing could be read."""
    stand = Stand(Guarded(call), problem, torch.device(device))
    try:
        batches, _ = read_matrix(stand)
    except Broken:
        return None
    parts = []
    for batch in batches:
        keep = torch.tensor([kind not in LEFT_OUT for kind in batch.kinds], device=stand.device)
        keep[ambiguous_tokens(batch.inputs, batch.want)] = False
        keep &= torch.isfinite(batch.got).all(1)
        bias = batch.inputs.routing_bias.float().expand_as(batch.got)
        read = batch.read.expand_as(batch.got)
        parts.append([x[keep] for x in (batch.inputs.routing_logits, bias, batch.got, read)])
    logits, bias, got, seen = (torch.cat(part) for part in zip(*parts, strict=True))
    if not len(got) or not bool(got.any()):
        return None
    chosen = got.abs() > NOTHING * abs(stand.factor)
    return Read(logits, bias, got, chosen, seen, stand.geometry, stand.factor, problem.offset)


Scores = Callable[[Tensor], Tensor]
Groups = Callable[[Tensor], Tensor]


def choose(read: Read, scores: Tensor, biased: Tensor, group_score: Groups | None = None, kept: int = 0) -> Tensor:
    """[N, E] bool: the definition's choice on other scores, biased scores, group scores or number of groups."""
    g = read.geometry
    grouped = biased.view(len(biased), g.n_group, g.group_size)
    rank = group_score(grouped) if group_score else grouped.topk(min(2, g.group_size), -1).values.sum(-1)
    ids = rank.sort(dim=-1, descending=True, stable=True).indices[:, : kept or g.topk_group]
    inside = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, ids, True)
    return _best(read, biased, inside)


def _best(read: Read, biased: Tensor, inside: Tensor) -> Tensor:
    """[N, E] bool: top_k of biased [N, E] among the experts of groups inside [N, n_group]."""
    g = read.geometry
    allowed = inside.repeat_interleave(g.group_size, 1)
    order = biased.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, : g.top_k]
    return torch.zeros_like(allowed).scatter_(1, order, True)


def _rules(read: Read) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(stage, as if ..., choice [N, E] bool, scores [N, E])."""
    x, b, g = read.logits, read.bias, read.geometry
    s = torch.sigmoid(x)
    for share in (0.0, -1.0, 0.5, 2.0, 0.25, 0.75, 1.5, 3.0, 4.0, 0.1, 10.0):
        yield "bias", f"{share:g} times the bias were added", choose(read, s, s + share * b), s
    yield "bias", "the bias were added to the logits", choose(read, s, torch.sigmoid(x + b)), s
    yield "bias", "negative biases were cut to 0", choose(read, s, s + b.clamp(min=0)), s
    for roll in (-1, 1):
        yield "bias", "each expert had its neighbour's bias", choose(read, s, s + b.roll(roll, 1)), s
    for slope in (0.5, 2.0, 1.5, 0.25, 0.75, 1.25, 1.702, 3.0, -1.0):
        other = torch.sigmoid(slope * x)
        yield "routing", f"the score were sigmoid({slope:g} logit)", choose(read, other, other + b), other
    for name, other in (
        ("softmax(logits)", torch.softmax(x, -1)),
        ("the logit", x),
        ("a bfloat16 sigmoid", s.bfloat16().float()),
        ("tanh(logit)", torch.tanh(x)),
        ("exp(logit)", torch.exp(x)),
        ("the sigmoid of a bfloat16 logit", torch.sigmoid(x.bfloat16().float())),
    ):
        yield "routing", f"the score were {name}", choose(read, other, other + b), other
    if g.n_group > 1:
        ranks: dict[str, Groups] = {
            "its largest member": lambda part: part.amax(-1),
            "its second largest member": lambda part: part.topk(min(2, part.shape[-1]), -1).values[..., -1],
            "its three largest members": lambda part: part.topk(min(3, part.shape[-1]), -1).values.sum(-1),
            "all of its members": lambda part: part.sum(-1),
            "its smallest member": lambda part: part.amin(-1),
        }
        for name, rank in ranks.items():
            yield "groups", f"a group's score came from {name}", choose(read, s, s + b, rank), s
        for kept in range(1, g.n_group + 1):
            if kept != g.topk_group and kept * g.group_size >= g.top_k:
                yield "groups", f"{kept} groups were kept", choose(read, s, s + b, kept=kept), s
    order = (s + b).sort(dim=-1, descending=True, stable=True).indices
    for skipped in range(min(3, g.num_experts - g.top_k)):
        without = (s + b).scatter(1, order[:, skipped : skipped + 1], -torch.inf)
        name = ("best", "second best", "third best")[skipped]
        yield "topk", f"the {name} expert were skipped", choose(read, s, without), s


def _some_groups(read: Read) -> Tensor:
    """[N] bool: the choice is the top_k of some set of groups."""
    g = read.geometry
    biased = torch.sigmoid(read.logits) + read.bias
    found = torch.zeros(len(biased), dtype=torch.bool, device=biased.device)
    subsets = [c for n in range(1, g.n_group + 1) for c in combinations(range(g.n_group), n)]
    for subset in subsets[:MOST_SUBSETS]:
        inside = torch.zeros(len(biased), g.n_group, dtype=torch.bool, device=biased.device)
        inside[:, list(subset)] = True
        found |= _same(read, _best(read, biased, inside))
    return found


def _same(read: Read, choice: Tensor) -> Tensor:
    """[N] bool: the choice that was read, in the columns that were."""
    return ((choice == read.chosen) | ~read.seen).all(1)


def _weights_of(read: Read, scores: Tensor) -> Tensor:
    """[N] bool: what was read are these scores, normalised over the chosen."""
    due = scores * read.chosen
    due = due / due.sum(1, keepdim=True).clamp(min=1e-30) * read.factor
    off = (read.got - due).abs() > 2 * ABOVE * due.abs() + NOTHING * abs(read.factor)
    return ~(off & read.seen & read.chosen).any(1) & bool(read.seen.all())


def judge_routing(read: Read) -> Fact | None:
    """Which step of the routing is wrong; None where all of it is right."""
    s = torch.sigmoid(read.logits)
    right = _same(read, choose(read, s, s + read.bias))
    weighed = _weights_of(read, s)
    count, wrong = len(right), int((~right).sum())
    lead = f"the routing read out chooses wrong experts for {wrong} of {count} tokens without ties"
    if wrong <= (1 - AGREE) * count:
        return _weights_alone(read, weighed, count)
    due = choose(read, s, s + read.bias)
    if not bool((read.chosen & ~due & read.seen).any()):
        return _lost(read, due & ~read.chosen & read.seen, due, lead)
    agreeing = [
        (float(_weights_of(read, scores).double().mean()), stage, name)
        for stage, name, choice, scores in _rules(read)
        if float(_same(read, choice).double().mean()) >= AGREE
    ]
    if agreeing:
        own, stage, name = max(agreeing, key=lambda one: one[0] >= AGREE)
        note = ", and its weights are of those scores" if own >= AGREE else ""
        return Fact(f"{lead}; all choose as if {name}{note}", (stage,) * 2)
    if read.geometry.n_group > 1 and float(_some_groups(read).double().mean()) >= AGREE:
        return Fact(f"{lead}; each takes the best experts of some groups, but of wrong groups", ("groups", "topk"))
    if bool(read.seen.all()) and float(weighed.double().mean()) < 0.5 and not bool(_scaled(read, s).any()):
        return Fact(f"{lead}, and weights are of other scores", ("routing", "weights"))
    return Fact(f"{lead}; no other rule for bias, scores or groups gives that choice", ("topk", "bias", "groups"))


def _lost(read: Read, lost: Tensor, due: Tensor, lead: str) -> Fact:
    """Choices that are due and missing, none beyond: of which local experts, or of which of a token's rows?"""
    count = read.geometry.num_local_experts
    shard = (torch.arange(due.shape[1], device=due.device) - read.offset) // count
    local = (torch.arange(due.shape[1], device=due.device) - read.offset) % count
    rank = torch.zeros_like(due, dtype=torch.long)
    for one in sorted(set(shard.tolist())):
        columns = shard == one
        rank[:, columns] = due[:, columns].long().cumsum(1) - 1
    for figure, text, stages in (
        (local.expand_as(rank), "always of the same local experts", ("offset", "offset", "permute")),
        (rank, "always the same ones of a token's local rows", ("combine", "combine", "permute")),
    ):
        share = [float(lost[due & (figure == value)].double().mean()) for value in sorted(set(figure[due].tolist()))]
        if all(one < 1 - AGREE or one > AGREE for one in share) and min(share) < 0.5 < max(share):
            return Fact(f"{lead}: some are missing, {text}", stages)
    return Fact(f"{lead}: some are missing, none is there beyond those due", ("permute", "topk", "combine"))


def _scaled(read: Read, scores: Tensor) -> Tensor:
    """[N] bool: what was read is a multiple of the chosen scores, whatever their sum."""
    ratio = torch.where(read.chosen, read.got / scores, torch.nan)
    low = ratio.nan_to_num(nan=torch.inf).amin(1)
    high = ratio.nan_to_num(nan=-torch.inf).amax(1)
    return (high - low).abs() <= 4 * ABOVE * high.abs()


def _weights_alone(read: Read, weighed: Tensor, count: int) -> Fact | None:
    off = int((~weighed).sum())
    if off <= (1 - AGREE) * count or not bool(read.seen.all()):
        return None
    text = f"the routing read out chooses the right experts, but {off} of {count} tokens weigh them wrongly"
    scaled = float(_scaled(read, torch.sigmoid(read.logits)).double().mean())
    if scaled >= AGREE:
        sums = read.got.sum(1) / read.factor
        if float((sums - sums.median()).abs().max()) <= 4 * ABOVE * float(sums.median().abs()):
            return None  # one gain for all tokens: any step behind the routing may have made it
        return Fact(f"{text}: right ratios, wrong sums", ("weights", "weights", "combine"))
    experts = torch.arange(read.got.shape[1], device=read.got.device) % read.geometry.num_local_experts
    due = torch.sigmoid(read.logits) * read.chosen
    due = due / due.sum(1, keepdim=True) * read.factor
    bad = ((read.got - due).abs() > 2 * ABOVE * due) & read.chosen
    guilty = bad.sum(0).double() / read.chosen.sum(0).clamp(min=1)
    lost = bool(((read.got == 0) == bad)[read.chosen].all())
    parity = [float(guilty[experts % 2 == rest].mean()) for rest in (0, 1)]
    if lost:
        return Fact(f"{text}: some are missing", ("combine", "permute"))
    if min(parity) < 0.05 < max(parity):
        which = "odd" if parity[1] > parity[0] else "even"
        return Fact(f"{text}: those of {which} local experts", ("combine", "weights"))
    return Fact(f"{text}: wrong ratios", ("weights", "weights", "combine"))
