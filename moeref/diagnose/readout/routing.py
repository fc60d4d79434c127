"""Read-out of the routing: crafted experts make the output *be* the matrix of topk_weights [T, E].

x = e0; every local expert has up row 0 = e0 and gate row 0 = 64 e0, so C = (64, 0, ...), and gemm2 sends it to the
expert's own column. out[t, column] = 64 w[t, e]. A shard is read at a time, over all offsets; with more local experts
than columns, a part of them at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moeref.diagnose.readout.craft import GATE, Stand, put
from moeref.diagnose.readout.rules import admissible, like_choice, like_weights
from moeref.diagnose.result import Finding
from moeref.inputs import Inputs
from moeref.judge.ties import ambiguous_tokens
from moeref.reference import NORMALISER_EPSILON, Routing, route
from moeref.routings import draw_routing
from moeref.spec import Problem

BELOW, ABOVE = 3 * 2.0**-8 + 2.0**-10, 2.0**-7 + 2.0**-10
"""Relative error of a weight read, towards zero and away: bfloat16 weights 2**-8, the output 2**-8, or 2**-7 towards
zero where it is cut off; sums and an approximate exponential far less than 2**-10."""

NOTHING = 1e-6
"""Weights below this share of the factor count as not there: sigmoids that underflow make such."""

MAX_SHARDS = 16
TOKENS = 16  # of each kind

# kinds whose logits are read under one bias (that of the first kind)
BATCHES = (
    ("near_ties", "skewed", "ties"),
    ("ties", "iid"),
    ("deepseek_like",),
    ("all_negative",),
    ("underflow",),
    ("large_bias",),
)


@dataclass(frozen=True)
class Batch:
    """Tokens of some kinds, what should come, and what came."""

    kinds: tuple[str, ...]  # one a token
    inputs: Inputs
    want: Routing
    weights: torch.Tensor  # [T, E] wanted, zeros elsewhere
    got: torch.Tensor  # [T, E]
    read: torch.Tensor  # [E] bool, columns that were read


def read_routing(stand: Stand) -> list[Finding]:
    """Which experts are chosen, with which weights, and how ties go."""
    offsets, complete = _offsets(stand)
    batches, stray = read_matrix(stand)
    note = "" if complete else f"; only {len(offsets)} shards were read"
    return [*_judge(stand, batches, complete, note), _clean(stray)]


def read_matrix(stand: Stand) -> tuple[list[Batch], int]:
    """The weights of every token of every batch, and how many elements of no expert's column were not zero."""
    offsets, _ = _offsets(stand)
    read = [_read(stand, kinds, offsets) for kinds in BATCHES]
    return [batch for batch, _ in read], sum(stray for _, stray in read)


def _offsets(stand: Stand) -> tuple[list[int], bool]:
    """Offsets of shards that cover all experts, on the problem's own grid; at most MAX_SHARDS, its own among them."""
    g, own = stand.geometry, stand.problem.offset
    grid = list(range(own % g.num_local_experts - g.num_local_experts, g.num_experts, g.num_local_experts))
    grid = [offset for offset in grid if offset > -g.num_local_experts]
    if len(grid) <= MAX_SHARDS:
        return grid, True
    return sorted({own, *grid[:: len(grid) // (MAX_SHARDS - 1)]})[:MAX_SHARDS], False


def _read(stand: Stand, kinds: tuple[str, ...], offsets: list[int]) -> tuple[Batch, int]:
    """One batch over all offsets, and how many elements of no expert's column were not zero."""
    g, problem = stand.geometry, stand.problem
    drawn = [draw_routing(Problem(g, TOKENS, problem.offset, kind, "model_like", problem.seed)) for kind in kinds]
    inputs = stand.blank(TOKENS * len(kinds))
    inputs.routing_logits.copy_(torch.cat([torch.from_numpy(logits) for logits, _ in drawn]))
    bias = torch.from_numpy(drawn[0][1])
    inputs.routing_bias.copy_(bias)
    put(inputs.hidden_states, (slice(None), 0), 1.0)
    put(inputs.gemm1_weights, (slice(None), 0, 0), 1.0)
    put(inputs.gemm1_weights, (slice(None), g.intermediate_size, 0), GATE)
    want = route(inputs.routing_logits, inputs.routing_bias, g, stand.factor)
    weights = torch.zeros_like(inputs.routing_logits).scatter_(1, want.topk_ids, want.topk_weights)
    got, read, stray = torch.zeros_like(weights), torch.zeros(g.num_experts, dtype=torch.bool, device=stand.device), 0
    for start in range(0, g.num_local_experts, g.hidden_size):
        slots = torch.arange(start, min(start + g.hidden_size, g.num_local_experts), device=stand.device)
        inputs.gemm2_weights.view(torch.uint8).zero_()
        put(inputs.gemm2_weights, (slots, slots - start, 0), 1.0)
        for offset in offsets:
            answer = stand.call(replace(inputs, local_expert_offset=offset)).float() / GATE
            real = (slots + offset >= 0) & (slots + offset < g.num_experts)
            got[:, slots[real] + offset] = answer[:, (slots - start)[real]]
            read[slots[real] + offset] = True
            answer[:, (slots - start)[real]] = 0
            stray += int((answer[~answer.isnan().any(1)] != 0).sum())  # a NaN weight fills its whole row
    names = tuple(kind for kind in kinds for _ in range(TOKENS))
    return Batch(names, inputs, want, weights, got, read), stray


def _judge(stand: Stand, batches: list[Batch], complete: bool, note: str) -> list[Finding]:
    floor = NOTHING * abs(stand.factor)
    wrong_choice: list[tuple[Batch, int]] = []
    wrong_weight: list[tuple[Batch, int]] = []
    other_ties, tied, total = 0, 0, 0
    gain = _gain(batches, floor)
    for batch in batches:
        want = batch.weights * batch.read
        good = _close(batch.got, want * gain, floor * abs(gain)).all(1)
        ambiguous = set(ambiguous_tokens(batch.inputs, batch.want).tolist())
        total, tied = total + len(good), tied + len(ambiguous)
        chosen = ~(batch.got.abs() <= floor * abs(gain))  # a NaN is something
        for token in (~good).nonzero().squeeze(1).tolist():
            ids = chosen[token].nonzero().squeeze(1)
            same = torch.equal(chosen[token], want[token].abs() > floor)
            if bool(batch.got[token].isnan().any()):
                same = True  # a NaN hides which experts it came from
            elif not same and token in ambiguous:
                if not complete:
                    continue  # experts that were not read may be the other choice
                if admissible(batch.inputs, token, ids):
                    other_ties += 1
                    same = _weights_fit(batch, token, ids, stand.factor * gain)
                    if same:
                        continue
            (wrong_weight if same else wrong_choice).append((batch, token))
    choice = _choice_finding(wrong_choice, floor * abs(gain), total, note)
    weight = _weight_finding(stand, wrong_weight, gain, total, note)
    lower = "ties go to the lower id" if not other_ties else f"{other_ties} tokens take another id than the lower"
    ties = Finding("routing_ties", True if tied else None, f"{tied} tokens are tied or nearly so; {lower}{note}")
    return [choice, weight, ties]


def _close(got: torch.Tensor, due: torch.Tensor, floor: float) -> torch.Tensor:
    """Whether each weight read can be what was due; never for NaN."""
    excess = (got - due) * due.sign()
    return (excess <= ABOVE * due.abs() + floor) & (excess >= -BELOW * due.abs() - floor)


def _gain(batches: list[Batch], floor: float) -> float:
    """A factor that all weights have in common: 1 unless the middle half of the ratios agrees on another."""
    ratios = torch.cat([(b.got / b.weights)[(b.weights.abs() > floor) & (b.got.abs() > floor)] for b in batches])
    ratios = ratios[torch.isfinite(ratios)]
    if len(ratios) < 8:
        return 1.0
    low, middle, high = torch.quantile(ratios.float(), torch.tensor([0.25, 0.5, 0.75], device=ratios.device)).tolist()
    agree = high - low <= 2 * ABOVE * abs(middle)
    return float(middle) if agree and not -BELOW <= middle - 1 <= ABOVE and middle else 1.0


def _weights_fit(batch: Batch, token: int, ids: torch.Tensor, factor: float) -> bool:
    """Whether the weights read for `ids` are those of that choice."""
    scores = torch.sigmoid(batch.inputs.routing_logits[token, ids])
    due = scores / (scores.sum() + NORMALISER_EPSILON) * factor
    return bool(_close(batch.got[token, ids], due, 0.0).all())


def _choice_finding(wrong: list[tuple[Batch, int]], floor: float, total: int, note: str) -> Finding:
    if not wrong:
        return Finding("routing_choice", True, f"{total} tokens choose the experts that they should{note}")
    batch, token = wrong[0]
    got = (~(batch.got[token].abs() <= floor)).nonzero().squeeze(1).tolist()
    want = sorted((batch.weights[token].abs() > floor).nonzero().squeeze(1).tolist())
    missing, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    kinds = sorted({b.kinds[t] for b, t in wrong})
    seen = [(b, t) for b, t in wrong if b.kinds[t] != "underflow"] or wrong  # there, chosen ones may weigh nothing
    stages, looks = like_choice([(b.inputs, t, (~(b.got[t].abs() <= floor)).nonzero().squeeze(1)) for b, t in seen])
    if 2 * len(wrong) > total and all(not bool(b.got[t].any()) for b, t in wrong):
        detail = f"nothing could be read: {len(wrong)} of {total} tokens gave all zero{note}"
        return Finding("routing_choice", False, detail, ("permute", "offset", "swiglu", "gemm1", "gemm2"))
    size = batch.inputs.geometry.group_size
    if not stages:
        steps = {e - w for e, w in zip(sorted(got), want, strict=False)} if len(got) == len(want) else set()
        groups = {e // size for e in extra} - {e // size for e in want}
        stages = ("offset", "permute") if len(steps) == 1 else ("groups", "topk") if groups else ("topk", "bias")
        if not extra:
            stages = ("topk", "permute", "combine")
    detail = f"{len(wrong)} of {total} tokens choose wrong experts ({', '.join(kinds)} logits); first: token {token}"
    detail += f" misses {missing or 'none'}, has {extra or 'none'} beyond{looks}{note}"
    return Finding("routing_choice", False, detail, stages)


def _weight_finding(stand: Stand, wrong: list[tuple[Batch, int]], gain: float, total: int, note: str) -> Finding:
    if not wrong and gain == 1.0:
        return Finding("routing_weights", True, f"weights of {total} tokens are right within {BELOW:.2g}{note}")
    if not wrong:
        guess = next((f" ({name})" for name, value in _common(stand).items() if abs(gain / value - 1) < BELOW), "")
        detail = f"all weights are {gain:.4g} times what they should be{guess}{note}"
        return Finding("routing_weights", False, detail, ("weights", "swiglu", "requantize", "output"))
    batch, token = wrong[0]
    ids = (batch.weights[token] != 0).nonzero().squeeze(1)
    ratio = batch.got[token, ids] / batch.weights[token, ids]
    expert = int((ratio - 1).abs().nan_to_num(nan=torch.inf).argmax())
    kinds = sorted({b.kinds[t] for b, t in wrong})
    looks = like_weights([(b.inputs, t, b.got[t]) for b, t in wrong], stand.factor, BELOW)
    detail = f"{len(wrong)} of {total} tokens have wrong weights ({', '.join(kinds)} logits); first: token {token}, "
    detail += f"expert {int(ids[expert])}: {float(ratio[expert]):.4g} times what it should be{looks}{note}"
    return Finding("routing_weights", False, detail, ("weights", "routing", "combine"))


def _common(stand: Stand) -> dict[str, float]:
    factor = stand.factor
    return {
        "routed_scaling_factor not applied": 1 / factor,
        "routed_scaling_factor applied twice": factor,
        "448 cast to 416: a truncating cast": 416 / 448,
    }


def _clean(stray: int) -> Finding:
    if not stray:
        return Finding("routing_columns", True, "columns of no expert are zero")
    detail = f"{stray} elements in columns that no expert writes are not zero"
    return Finding("routing_columns", False, detail, ("gemm2", "output", "combine"))
