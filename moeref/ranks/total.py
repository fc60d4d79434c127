"""The sum of all shards' outputs, judged against the layer with all experts.

The sum is taken in float64, in which eight bfloat16 numbers within 2**42 of each other add up exactly (8 + 3 + 42 = 53
bits): it does not depend on how many processes there are, nor on the order in which a library adds. docs/numerics.md
derives what the sum may be off by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from moeref.judge import checks
from moeref.judge.checks import Check
from moeref.judge.compare import CRITERIA, block_errors
from moeref.judge.noise import SIGMAS, Noise, fit
from moeref.judge.verdict import ERROR, FAIL, UNSUPPORTED, Figures, Verdict, conclude, measure
from moeref.ranks.part import Part, Share
from moeref.reference import Permutation, Routing, Trace
from moeref.spec import Problem
from moeref.verify import Options, ShardVerdict


class Together(Protocol):
    """What processes that hold the other shards are asked for. Every process must ask for the same, in turn."""

    rank: int

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over all processes."""

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over all processes."""

    def gather(self, what: Any) -> list[Any]:
        """One object from each process."""


class Alone:
    """Together with nobody: this process holds all shards."""

    rank = 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor."""
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor."""
        return tensor

    def gather(self, what: Any) -> list[Any]:
        """The object."""
        return [what]


@dataclass(frozen=True)
class Brief:
    """A part without its tensors: what every process learns of every shard."""

    own: ShardVerdict
    addable: bool
    adopted: tuple[int, ...]
    claimed: tuple[tuple[int, ...], ...]  # for each token at a tie, the experts that this shard counted
    traceback: str


def judge_total(
    layer: Problem, parts: Sequence[Part], together: Together, options: Options, device: torch.device
) -> tuple[Verdict, tuple[Brief, ...]]:
    """The verdict on the sum, and every shard's own. parts: this process's; may be none. Same result everywhere."""
    gathered = together.gather([_brief(part, together.rank) for part in parts])
    briefs = tuple(sorted((b for some in gathered for b in some), key=lambda b: b.own.shard))
    figures = Figures(layer.seq_len, 0, 0, 0, 0)
    unable = [b for b in briefs if not b.addable]
    if unable or not layer.seq_len:
        return _without_sum(layer, briefs, unable, figures), briefs
    total = together.sum(_add([part.output for part in parts], layer, device))  # [T, H] float64
    if not bool(torch.isfinite(total).all()):
        found = checks.content([total.bfloat16()], torch.arange(layer.seq_len, device=device))
        return _with_shards(
            conclude(layer.name, found, "", False, figures, options.matched_ratio_alone), briefs
        ), briefs
    shares, changed, tossed = _settle(parts, total, together, layer, device)
    expected = together.sum(_add([share.unrounded for share in shares], layer, device))
    rows = together.sum(_count(shares, layer, device))  # [T, E]
    if not bool((rows.sum(1) == layer.geometry.top_k).all()) or int(rows.max()) > 1:
        raise RuntimeError("the shards' references do not hold each of a token's experts once")
    noise = _noise(shares, together, layer, device)
    every = torch.arange(layer.seq_len, device=device)
    criterion = CRITERIA[options.preset]
    base = replace(
        figures,
        active_tokens=layer.seq_len,
        local_rows=layer.seq_len * layer.geometry.top_k,
        experts_hit=int((rows.sum(0) > 0).sum()),
        blind=tuple(sorted(set.intersection(*(set(b.own.verdict.figures.blind) for b in briefs)))),
        ambiguous_tokens=tossed,
        other_choice_tokens=changed,
    )
    measured = measure(base, [total.bfloat16()], expected.bfloat16(), every, criterion)
    names = sorted({b.own.verdict.recipe for b in briefs if b.own.verdict.recipe})
    fitted = fit(total.float(), _as_trace(expected.float()), noise, every, grouped=False)
    found = [Check("finite", True), checks.matched(measured.matched[criterion.name], criterion)]
    found += checks.noise(fitted, " / ".join(names) or "exact")
    measured = replace(measured, noise_z=fitted.overall.value)
    vacuous = "" if bool(expected.any()) else "the layer's output is all zero: only that was tested"
    was_found = any(b.own.verdict.recipe_found for b in briefs)
    verdict = conclude(layer.name, found, " / ".join(names), was_found, measured, options.matched_ratio_alone, vacuous)
    if verdict.status == FAIL:
        whose = _claims(briefs, parts, layer, together) or _whose(parts, shares, total - expected, noise, together)
        verdict = replace(verdict, message=f"the sum of {len(briefs)} shards: {verdict.message}; {whose}")
    return _with_shards(verdict, briefs), briefs


def _brief(part: Part, rank: int) -> Brief:
    shard = part.shard
    claimed = []
    for at, choice in enumerate(part.adopted):
        share, row = (part.share, int(part.tossed[at])) if choice == 0 else (part.others[choice - 1], at)
        claimed.append(tuple(share.local[row].nonzero().squeeze(1).tolist()))
    own = ShardVerdict(
        shard.index,
        (shard.first, shard.first + shard.size - 1),
        rank,
        part.verdict,
        part.sign.kind,
        part.sign.detail,
        part.call_seconds,
    )
    return Brief(own, part.output is not None, part.adopted, tuple(claimed), part.traceback)


def _add(tensors: Sequence[torch.Tensor | None], layer: Problem, device: torch.device) -> torch.Tensor:
    """Sum of this process's [T, H] tensors in float64."""
    total = torch.zeros(layer.seq_len, layer.geometry.hidden_size, dtype=torch.float64, device=device)
    for tensor in tensors:
        assert tensor is not None
        total += tensor.to(device)
    return total


def _count(shares: Sequence[Share], layer: Problem, device: torch.device) -> torch.Tensor:
    rows = torch.zeros(layer.seq_len, layer.geometry.num_experts, dtype=torch.int32, device=device)
    for share in shares:
        rows += share.local
    return rows


# ---- ties: one admissible choice of experts a token, the same for all shards


def _settle(
    parts: Sequence[Part], total: torch.Tensor, together: Together, layer: Problem, device: torch.device
) -> tuple[list[Share], int, int]:
    """(each part's share under the choices that the sum comes nearest to, tokens not of the first choice, tossed)."""
    counts = together.gather([len(part.tossed) for part in parts[:1]])
    tossed = max((count for some in counts for count in some), default=0)
    if not tossed:
        return [part.share for part in parts], 0, 0
    choices = max(count for some in together.gather([len(part.others) for part in parts[:1]]) for count in some)
    hidden = layer.geometry.hidden_size
    stacked = torch.zeros(choices + 1, tossed, hidden, dtype=torch.float64, device=device)
    tokens = torch.zeros(tossed, dtype=torch.int64, device=device)
    for part in parts:
        tokens = part.tossed
        stacked += torch.stack([part.share.unrounded[tokens], *(other.unrounded for other in part.others)])
    stacked, tokens = together.sum(stacked), together.max(tokens)
    errors = torch.stack([block_errors(total[tokens], choice) for choice in stacked])
    best = errors.nan_to_num(nan=torch.inf, posinf=torch.finfo(torch.float64).max).argmin(0)  # [n]
    return [_chosen(part, best) for part in parts], int((best > 0).sum()), tossed


def _chosen(part: Part, best: torch.Tensor) -> Share:
    """The part's share with each tossed token's row taken from its best choice."""
    share = part.share
    unrounded, local = share.unrounded.clone(), share.local.clone()
    fields = {name: getattr(share.noise, name).clone() for name in ("variance", "shared", "freedom", "largest")}
    for choice, other in enumerate(part.others, start=1):
        rows = (best == choice).nonzero().squeeze(1)
        tokens = part.tossed[rows]
        unrounded[tokens], local[tokens] = other.unrounded[rows], other.local[rows]
        for name, field in fields.items():
            field[tokens] = getattr(other.noise, name)[rows]
    return Share(unrounded, Noise(**fields, sources=share.noise.sources), local)


# ---- the noise of a sum


def _noise(shares: Sequence[Share], together: Together, layer: Problem, device: torch.device) -> Noise:
    """The noise of a sum of independent outputs: moeref.diagnose.laws_experts.added, over processes.

    A shard with share v of a row's variance adds f v to what columns share, f**2 v**2 / n to the sum of squares that
    the number n of independent errors stands for, and v times its largest.
    """
    variance = together.sum(_add([share.noise.variance for share in shares], layer, device))  # [T, H]
    sums = torch.zeros(2, layer.seq_len, dtype=torch.float64, device=device)  # what columns share; squares
    largest = torch.zeros(layer.seq_len, dtype=torch.float64, device=device)
    for share in shares:
        noise = share.noise
        part = (noise.variance / variance).nan_to_num(nan=0.0).mean(1)  # [T]
        shared = part * noise.shared
        sums += torch.stack([shared, shared.square() / noise.freedom])
        largest = torch.maximum(largest, part * noise.largest)
    sums, largest = together.sum(sums), together.max(largest)
    sources = max([share.noise.sources for share in shares], default=1)
    sources = int(together.max(torch.tensor([sources], device=device)))
    freedom = torch.where(sums[1] > 0, sums[0].square() / sums[1], torch.ones_like(sums[0])).clamp(min=1.0)
    return Noise(variance.float(), sums[0].float(), freedom.float(), largest.float(), sources)


def _as_trace(unrounded: torch.Tensor) -> Trace:
    """A trace that knows its result alone, which is all that `fit` reads where nothing is grouped."""
    none = unrounded[:0]
    index = none.new_zeros(0, dtype=torch.int64)
    routing, permutation = Routing(index, none, none, none), Permutation(index, index, index)
    return Trace(routing, permutation, none, none, none, none, unrounded.bfloat16(), unrounded)


# ---- verdicts


def _whose(
    parts: Sequence[Part], shares: Sequence[Share], error: torch.Tensor, noise: Noise, together: Together
) -> str:
    """Which shards a wrong sum comes from, and whether their errors are independent: a sentence.

    Independent errors add up to the sum of their squares, 1 in units of it; equal ones of n shards to n. A product of
    two shards' errors, summed over tokens with `freedom` independent errors each, has a variance of the product of
    their squares over F = sum of freedom; all products together one of at most 2/F.
    """
    size = float(error.square().sum())
    mine = []
    for part, share in zip(parts, shares, strict=True):
        assert part.output is not None
        own = part.output.double() - share.unrounded
        mine.append((part.shard.index, float((own * error).sum()) / size, float(own.square().sum())))
    every = sorted(one for some in together.gather(mine) for one in some)
    coherence = size / sum(square for _, _, square in every)
    heavy = [(index, part) for index, part, _ in every if part >= 0.5 / len(every)]
    shown = ", ".join(f"shard {index} {100 * part:.0f} %" for index, part in heavy)
    text = f"of the sum's squared error come from {shown}"
    if coherence > 1 + SIGMAS * (2 / float(noise.freedom.double().sum())) ** 0.5:
        text += (
            f"; the shards' errors point the same way (added up they have {coherence:.3g} times the square of "
            "independent ones): a term that every shard adds"
        )
    return text


def _claims(briefs: Sequence[Brief], parts: Sequence[Part], layer: Problem, together: Together) -> str:
    """A token at a tie of which the shards together counted more or fewer than top_k experts; '' where there is none.

    Every shard may be right by a choice of its own: only together they count an expert too many.
    """
    at: list[list[int]] = [
        tokens for tokens in together.gather([int(t) for p in parts[:1] for t in p.tossed]) if tokens
    ]
    for place, token in enumerate(at[0] if at else []):
        counted = {b.own.shard: b.claimed[place] for b in briefs if b.claimed[place]}
        number = sum(len(ids) for ids in counted.values())
        if number != layer.geometry.top_k:
            listed = ", ".join(f"shard {shard} experts {' '.join(map(str, ids))}" for shard, ids in counted.items())
            many = "too many (doubled)" if number > layer.geometry.top_k else "too few (missing)"
            return (
                f"shards break ties differently: of token {token} they count {number} experts, {many}, "
                f"top_k is {layer.geometry.top_k}: {listed}"
            )
    return ""


def _with_shards(verdict: Verdict, briefs: Sequence[Brief]) -> Verdict:
    """The sum's verdict with that of the shards: a wrong shard makes the layer wrong, whatever the sum says."""
    wrong = [b.own for b in briefs if b.own.verdict.status == FAIL]
    told: dict[str, list[ShardVerdict]] = {}
    for one in wrong:
        told.setdefault(f"{one.sign}: {one.detail}" if one.sign else one.verdict.message, []).append(one)
    sentences = [f"{', '.join(_name(one) for one in some)} {what}" for what, some in told.items()]
    check = Check("shards", not wrong, "; ".join(sentences))
    found = (*verdict.checks, check)
    if not wrong:
        return replace(verdict, checks=found)
    message = check.detail + (f"; {verdict.message}" if verdict.status == FAIL else "; the sum passes")
    return replace(verdict, checks=found, status=FAIL, message=message)


def _name(one: ShardVerdict) -> str:
    return f"shard {one.shard} (experts {one.experts[0]}..{one.experts[1]}, rank {one.rank})"


def _without_sum(layer: Problem, briefs: Sequence[Brief], unable: Sequence[Brief], figures: Figures) -> Verdict:
    """The verdict where some shard gave nothing to add, or there is no token."""
    if not unable:
        verdict = conclude(layer.name, (), "", False, figures, False, "no token: only the output's form was tested")
        return _with_shards(verdict, briefs)
    statuses = [b.own.verdict.status for b in unable]
    status = next((s for s in (ERROR, FAIL) if s in statuses), UNSUPPORTED)
    first = next(b.own for b in unable if b.own.verdict.status == status)
    more = f" (and {statuses.count(status) - 1} more shards)" if statuses.count(status) > 1 else ""
    return Verdict(layer.name, status, (), "", False, figures, f"{_name(first)}{more}: {first.verdict.message}")
