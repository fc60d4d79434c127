"""What a wrong shard does, read off its output: which experts it leaves out or counts twice, whose tokens it serves.

The output is written as a sum of known pieces by least squares: what each of the shard's experts contributes, and what
the shard would give if it took its experts for those of another shard, or for their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moeref.inputs import Inputs
from moeref.reference import Trace, expert_spans, moe

ROWS = 32
"""Tokens that are looked at: those with the largest error."""

UNEXPLAINED = 0.02
"""Largest share of the output's square that the pieces may leave over. Two re-quantisations leave (0.043)**2 = 0.002
(docs/numerics.md), a piece that is missing from the sum about 1/K."""

WHOLE = 0.1
"""How near to a whole number a piece's coefficient must lie."""


@dataclass(frozen=True)
class Sign:
    """What a shard does wrong."""

    kind: str  # 'missing', 'doubled', 'shifted', 'extra', 'scaled', 'other'; '' for nothing
    detail: str  # one phrase


def find_sign(inputs: Inputs, trace: Trace, output: torch.Tensor, count: int) -> Sign:
    """Why a shard's output [T, H] is not trace.unrounded. count: shards of the layer. 'other' where nothing fits."""
    error = (output.float() - trace.unrounded).nan_to_num(nan=torch.inf).double().norm(dim=1)
    tokens = error.argsort(descending=True, stable=True)[:ROWS]
    tokens = tokens[error[tokens] > 0].sort().values
    got = output[tokens].double()
    if not len(tokens) or not bool(torch.isfinite(got).all()):
        return Sign("other", "NaN or inf" if len(tokens) else "no value differs")
    size = float(got.square().sum())
    if not size:
        return Sign("missing", "it contributes nothing")
    some = inputs.take(tokens)
    own = moe(some)
    # a shift by d: the ids offset+d .. are taken for this shard's experts
    shifts = _shifts(inputs, count)
    pieces = _by_expert(own, inputs.local_expert_offset)
    shifted = {d: moe(replace(some, local_expert_offset=inputs.local_expert_offset + d)).unrounded for d in shifts}
    shifted = {d: piece for d, piece in shifted.items() if bool(piece.any())}
    beside = _beside(some)
    every = (*pieces.values(), *shifted.values(), *beside.values())
    columns = torch.stack([piece.double().flatten() for piece in every], 1)
    weights = torch.linalg.lstsq(columns.cpu(), got.flatten().cpu()[:, None], driver="gelsd").solution[:, 0]
    left = float((columns.cpu() @ weights - got.flatten().cpu()).square().sum()) / size
    if left > UNEXPLAINED:
        return _token_by_token(got, own.unrounded.double(), inputs.routed_scaling_factor, own)
    mine = dict(zip(pieces, weights[: len(pieces)].tolist(), strict=True))
    names: list[int | str] = [*shifted, *beside]
    theirs = dict(zip(names, weights[len(pieces) :].tolist(), strict=True))
    return _read(mine, theirs, inputs)


def _shifts(inputs: Inputs, count: int) -> list[int]:
    """Shifts of the offset worth trying: whole shards, one expert, the offset ignored or subtracted twice."""
    size, offset, experts = inputs.geometry.num_local_experts, inputs.local_expert_offset, inputs.geometry.num_experts
    whole = [sign * number * size for number in range(1, count) for sign in (1, -1)]
    wanted = dict.fromkeys([*whole, 1, -1, offset, -offset, -(offset % size), offset % size])
    return [d for d in wanted if d and -size < offset + d < experts]


def _by_expert(trace: Trace, first: int) -> dict[int, torch.Tensor]:
    """Global id -> what that expert contributes, [n, H], for experts that have a row."""
    rows = trace.permutation.permuted_idx_to_token_idx
    weights = trace.routing.topk_weights[rows, trace.permutation.permuted_idx_to_slot]
    found = {}
    for expert, span in expert_spans(trace.permutation.expert_offsets):
        piece = torch.zeros_like(trace.unrounded)
        piece[rows[span]] = weights[span, None] * trace.gemm2_out[span]
        if bool(piece.any()):
            found[first + expert] = piece
    return found


def _beside(inputs: Inputs) -> dict[str, torch.Tensor]:
    """What the first expert would give for the id before it, and the last one for the id after it, [n, H] each."""
    first, size = inputs.local_expert_offset, inputs.geometry.num_local_experts
    found = {}
    for slot, wanted in ((0, first - 1), (size - 1, first + size)):
        if not 0 <= wanted < inputs.geometry.num_experts or size == 1:
            continue  # of one expert that is what a shifted shard gives
        names = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
        alone: dict[str, Any] = {name: getattr(inputs, name)[slot : slot + 1] for name in names}
        geometry = replace(inputs.geometry, num_local_experts=1)
        piece = moe(replace(inputs, **alone, local_expert_offset=wanted, geometry=geometry)).unrounded
        if bool(piece.any()):
            found[f"expert {wanted} (of the neighbouring shard, with the weights of {first + slot})"] = piece
    return found


def _read(mine: dict[int, float], theirs: dict[int | str, float], inputs: Inputs) -> Sign:
    """A sign from the coefficients of own experts, of shifted shards (by their shift) and of single ids (by words)."""
    gone = [e for e, weight in mine.items() if abs(weight) < WHOLE]
    twice = [e for e, weight in mine.items() if abs(weight - 2) < 2 * WHOLE]
    right = [e for e, weight in mine.items() if abs(weight - 1) < WHOLE]
    extra = [d for d, weight in theirs.items() if abs(weight - 1) < WHOLE]
    if extra and len(gone) == len(mine):
        return Sign("shifted", f"it serves the tokens of {_others(extra, inputs)} in place of its own")
    if extra and len(right) == len(mine):
        return Sign("extra", f"it serves the tokens of {_others(extra, inputs)} beside its own")
    if gone and len(gone) + len(right) == len(mine):
        return Sign("missing", f"it leaves out {_experts(gone, mine)}")
    if twice and len(twice) + len(right) == len(mine):
        return Sign("doubled", f"it counts {_experts(twice, mine)} twice")
    if mine and not extra:
        return Sign("scaled", f"its experts count {min(mine.values()):.3g} to {max(mine.values()):.3g} times")
    return Sign("other", "its output is a mixture of its own and other tokens' work")


def _experts(some: list[int], every: dict[int, float]) -> str:
    if len(some) == len(every):
        return "all of its experts"
    return ("expert " if len(some) == 1 else "experts ") + ", ".join(str(e) for e in some)


def _others(served: list[int | str], inputs: Inputs) -> str:
    """The experts whose tokens are served, in words."""
    size, offset, last = (
        inputs.geometry.num_local_experts,
        inputs.local_expert_offset,
        inputs.geometry.num_experts - 1,
    )
    words = [one for one in served if isinstance(one, str)]
    for d in sorted(one for one in served if isinstance(one, int)):
        number, rest = divmod(abs(d), size)
        unit, amount = ("expert", abs(d)) if rest else ("shard", number)
        span = f"{max(offset + d, 0)}..{min(offset + d + size - 1, last)}"
        words.append(f"experts {span} ({d / abs(d) * amount:+.0f} {unit}{'s' * (amount > 1)})")
    return ", ".join(words)


def _token_by_token(got: torch.Tensor, own: torch.Tensor, factor: float, trace: Trace) -> Sign:
    """Whether every token is its own multiple of what is right; and whether the multiples undo the normalisation."""
    norm = own.square().sum(1)
    multiple = torch.where(norm > 0, (got * own).sum(1) / norm, torch.ones_like(norm))
    left = float((got - multiple[:, None] * own).square().sum() / got.square().sum())
    if left > UNEXPLAINED:
        return Sign("other", "its output is no sum of known pieces")
    rows = trace.permutation.permuted_idx_to_token_idx
    local = torch.zeros_like(norm)
    weights = trace.routing.topk_weights[rows, trace.permutation.permuted_idx_to_slot].double()
    local.index_add_(0, rows, weights)  # routing weights of this shard's experts, factor included
    alone = torch.where(local > 0, factor / local, torch.ones_like(local))
    if bool(((multiple - alone).abs() <= WHOLE * alone.abs()).all()):
        return Sign("scaled", "weights are normalised over this shard's experts alone")
    return Sign("scaled", f"tokens count {float(multiple.min()):.3g} to {float(multiple.max()):.3g} times")
