"""A published case at full size: integer stages as digests, float stages as norms by expert and as sampled tokens.

Tokens whose routing float32 may turn (moeref.golden.margin) are listed as open and stand in no digest, norm or sample.
A sample holds some tokens with all of their local rows, every 29th column; what is compared carries the float noise of
all stages before it, so these cases are of the recipe that rounds nowhere.
"""

from __future__ import annotations

from typing import Any

import torch

from moeref import reference
from moeref.golden import tolerance
from moeref.golden.record import check_cast, check_inputs
from moeref.golden.stages import Locate, StageResult, close, equal, rounded
from moeref.golden.whole import FLOATS, INTEGERS
from moeref.inputs import Inputs
from moeref.make import digest
from moeref.reference import Permutation, Routing, Trace

TOKENS = 8
"""Tokens of a sample, spread evenly over those with local work."""

STRIDE = 29
"""Every 29th column: prime, so that every position within a block of 128 comes up; 248 columns of 7168."""

ROW_STAGES = FLOATS[1:5]
"""Float stages with a row for each local token-expert pair."""


def clear_mask(seq_len: int, open_tokens: list[int]) -> torch.Tensor:
    """Tokens whose routing is the same on every machine, bool [T]."""
    mask = torch.ones(seq_len, dtype=torch.bool)
    mask[open_tokens] = False
    return mask


def choose(permutation: Permutation, clear: torch.Tensor) -> torch.Tensor:
    """At most TOKENS clear tokens with local work, int64 ascending."""
    tokens = torch.unique(permutation.permuted_idx_to_token_idx)
    tokens = tokens[clear[tokens]]
    picks = torch.linspace(0, len(tokens) - 1, min(TOKENS, len(tokens))).round().long()
    chosen: torch.Tensor = tokens[picks]
    return chosen


def part_of(trace: Trace, tokens: torch.Tensor) -> Trace:
    """The trace of these tokens (int64 ascending) with all of their rows, tokens numbered anew."""
    routing, permutation = trace.routing, trace.permutation
    rows = torch.isin(permutation.permuted_idx_to_token_idx, tokens).nonzero().squeeze(1)
    return Trace(
        routing=Routing(*(field[tokens] for field in vars(routing).values())),
        permutation=Permutation(
            torch.searchsorted(rows, permutation.expert_offsets),
            torch.searchsorted(tokens, permutation.permuted_idx_to_token_idx[rows]),
            permutation.permuted_idx_to_slot[rows],
        ),
        **{name: getattr(trace, name)[rows] for name in ROW_STAGES},
        unrounded=trace.unrounded[tokens],
        output=trace.output[tokens],
    )


def integers(routing: Routing, permutation: Permutation, clear: torch.Tensor) -> dict[str, torch.Tensor]:
    """The integer stages of the clear tokens alone."""
    keep = clear[permutation.permuted_idx_to_token_idx]
    kept = keep.nonzero().squeeze(1)
    return {
        "topk_ids": routing.topk_ids[clear],
        "expert_offsets": torch.searchsorted(kept, permutation.expert_offsets),
        "permuted_idx_to_token_idx": permutation.permuted_idx_to_token_idx[keep],
        "permuted_idx_to_slot": permutation.permuted_idx_to_slot[keep],
    }


def integer_digests(found: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Shape and digest of each."""
    return {name: {"shape": list(tensor.shape), "sha256": digest(tensor)} for name, tensor in found.items()}


def norms(trace: Trace, clear: torch.Tensor) -> dict[str, list[float]]:
    """Root mean square of each float stage over the rows of each local expert, clear tokens alone; 0 without a row."""
    keep = clear[trace.permutation.permuted_idx_to_token_idx]
    found: dict[str, list[float]] = {}
    for name in ROW_STAGES:
        stage, values = getattr(trace, name), [0.0] * (len(trace.permutation.expert_offsets) - 1)
        for expert, span in reference.expert_spans(trace.permutation.expert_offsets):
            rows = stage[span] if bool(keep[span].all()) else stage[span][keep[span]]
            if len(rows):
                values[expert] = float(f"{float(rows.double().square().mean().sqrt()):.9g}")
        found[name] = values
    return found


def samples(part: Trace) -> dict[str, torch.Tensor]:
    """What is kept of the sampled tokens' trace."""
    kept = {"topk_ids": part.routing.topk_ids, "topk_weights": part.routing.topk_weights}
    return kept | {name: _columns(name, getattr(part, name)) for name in FLOATS[1:]}


def _columns(name: str, stage: torch.Tensor) -> torch.Tensor:
    """Every 29th column; of gemm1_out the same ones of up and of gate."""
    halves = stage.chunk(2, dim=1) if name == "gemm1_out" else (stage,)
    return torch.cat([half[:, ::STRIDE] for half in halves], 1).contiguous()


def check_sampled(
    manifest: dict[str, Any], golden: dict[str, torch.Tensor], inputs: Inputs, trace: Trace
) -> list[StageResult]:
    """Every input and stage of one published case, given this machine's inputs and whole trace."""
    clear = clear_mask(inputs.seq_len, manifest["routing"]["open_tokens"])
    rows_by_expert = manifest["rows_by_expert"]
    given = check_inputs(manifest, inputs, [expert for expert, rows in enumerate(rows_by_expert) if rows])
    whole = _integers(manifest, trace, clear)
    tokens = torch.tensor(manifest["sampled_tokens"], dtype=torch.int64)
    part = {result.stage: result for result in check_samples(golden, inputs, part_of(trace, tokens), tokens)}
    by_norm = _norms(manifest, norms(trace, clear), inputs.geometry.hidden_size)
    order = [check_cast(manifest), *(result for name, result in given.items() if not name.endswith("_weights"))]
    order += [_first_wrong(whole["topk_ids"], part["topk_ids"]), part["topk_weights"]]
    order += [whole[name] for name in INTEGERS[1:]]
    for name in ROW_STAGES:
        if name in ("gemm1_out", "gemm2_out"):
            order.append(given[name.replace("_out", "_weights")])
        order.append(_first_wrong(part[name], by_norm[name]))
    return [*order, part["unrounded"], part["output"]]


def check_samples(
    golden: dict[str, torch.Tensor], inputs: Inputs, part: Trace, tokens: torch.Tensor
) -> list[StageResult]:
    """The sampled tokens' stages, given this machine's trace of them alone or cut out of the whole."""
    g, found = inputs.geometry, samples(part)
    limits = tolerance.through(part, g.hidden_size, g.intermediate_size)
    results = [equal("topk_ids", found["topk_ids"], golden["topk_ids"], _at(tokens, 1))]
    limit = tolerance.weights_tolerance(golden["topk_weights"])
    results.append(close("topk_weights", found["topk_weights"], golden["topk_weights"], limit, _at(tokens, 1)))
    of_row = tokens[part.permutation.permuted_idx_to_token_idx]
    for name in ROW_STAGES:
        limit = _columns(name, limits[name])
        if found[name].shape != golden[name].shape:
            limit = found[name]  # not looked at: the shapes are named
        results.append(close(name, found[name], golden[name], limit, _at(of_row, STRIDE)))
    limit = _columns("unrounded", limits["unrounded"])
    results.append(close("unrounded", found["unrounded"], golden["unrounded"], limit, _at(tokens, STRIDE)))
    output = rounded("output", found["output"], golden["output"], golden["unrounded"], limit, _at(tokens, STRIDE))
    return [*results, output]


def _integers(manifest: dict[str, Any], trace: Trace, clear: torch.Tensor) -> dict[str, StageResult]:
    found = integers(trace.routing, trace.permutation, clear)
    now, results = integer_digests(found), {}
    for name, recorded in manifest["integers"].items():
        detail = "" if now[name] == recorded else f"now {now[name]}, recorded {recorded}"
        if detail and name == "expert_offsets":
            counts = list(enumerate(zip(found[name].diff().tolist(), manifest["rows_by_expert"], strict=True)))
            detail += "; rows: " + ", ".join(f"expert {e} now {a}, recorded {b}" for e, (a, b) in counts if a != b)
        results[name] = StageResult(name, not detail, detail)
    return results


def _norms(manifest: dict[str, Any], found: dict[str, list[float]], hidden_size: int) -> dict[str, StageResult]:
    limit, results = tolerance.norm_tolerance(hidden_size), {}
    for name, recorded in manifest["norms"].items():
        pairs = list(zip(found[name], recorded, strict=True))
        excess = [abs(a - b) / max(abs(b), 1e-300) / limit if a != b else 0.0 for a, b in pairs]
        worst = max(range(len(pairs)), key=lambda e: excess[e])
        detail = ""
        if not excess[worst] <= 1:
            now, then = pairs[worst]
            detail = (
                f"norm of local expert {worst}'s rows: now {now:.9g}, recorded {then:.9g}, tolerance {limit:.2g} of it"
            )
        results[name] = StageResult(name, not detail, detail, excess[worst])
    return results


def _first_wrong(first: StageResult, second: StageResult) -> StageResult:
    """The first that failed; the first where both passed."""
    return second if first.passed and not second.passed else first


def _at(names: torch.Tensor, stride: int) -> Locate:
    """Says a sampled row by its token, and a column by its place in the stage."""
    axis = "slot" if stride == 1 else "column"

    def locate(index: tuple[int, ...]) -> str:
        row, column = index
        token = int(names[row]) if row < len(names) else -1
        return f"token {token}, {axis} {column * stride}"

    return locate
