"""`moeref show` and `moeref backends` as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from moeref.inputs import expected_layout
from moeref.reference import permute, route
from moeref.routings import draw_routing
from moeref.spec import PRESETS, Problem, SpecError
from moeref.workloads import find

if TYPE_CHECKING:
    from moeref.interop.candidates import Candidate

H100_BYTES_PER_SECOND = 3.084e12  # measured device read bandwidth of an H100 SXM
H100_FLOPS = 1.158e15  # measured block-scaled FP8 matrix rate of the same card


def describe(text: str, candidates: Mapping[str, Candidate] | None = None) -> list[str]:
    """Shapes, bytes, active experts and FLOPs of a problem, given by name or by a published uuid's start.

    candidates: those whose workspace is told, where they state one.
    """
    try:
        problem = Problem.parse(text)
    except SpecError as error:
        try:
            problem = find([text])[0].problem()
        except SpecError:
            raise error from None
    g = problem.geometry
    lines = [
        f"problem {problem.name}",
        f"geometry {g.code}: E={g.num_experts} L={g.num_local_experts} H={g.hidden_size} I={g.intermediate_size} "
        f"top_k={g.top_k} n_group={g.n_group} topk_group={g.topk_group}",
        "",
        f"{'input':<22} {'shape':<20} {'dtype':<14} {'bytes':>15}",
    ]
    total = 0
    for name, (shape, dtype) in expected_layout(g, problem.seq_len).items():
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        total += size
        lines.append(f"{name:<22} {list(shape)!s:<20} {str(dtype).removeprefix('torch.'):<14} {size:>15,}")
    lines.append(f"{'local_expert_offset':<22} {problem.offset}")
    lines.append(f"{'routed_scaling_factor':<22} {problem.factor}")
    logits, bias = (torch.from_numpy(part) for part in draw_routing(problem))
    routing = route(logits, bias, g, problem.factor)
    permutation = permute(routing.topk_ids, g, problem.offset)
    rows = permutation.expert_offsets.diff()
    hit = [(problem.offset + int(e), int(rows[e])) for e in rows.nonzero().squeeze(1)]
    count, active = int(rows.sum()), len(set(permutation.permuted_idx_to_token_idx.tolist()))
    flops = count * 6 * g.hidden_size * g.intermediate_size  # gemm1 4HI and gemm2 2HI per row
    weights = len(hit) * 3 * g.hidden_size * g.intermediate_size
    output = problem.seq_len * g.hidden_size * 2
    lines += [
        f"{'all inputs':<22} {'':<20} {'':<14} {total:>15,}",
        f"{'output':<22} {[problem.seq_len, g.hidden_size]!s:<20} {'bfloat16':<14} {output:>15,}",
        "",
        f"tokens with local work {active} of {problem.seq_len}; local rows {count}; experts hit {len(hit)}",
    ]
    if hit:
        lines.append("rows by expert (global id:rows) " + " ".join(f"{e}:{n}" for e, n in hit))
    lines.append(
        f"smallest margin at the cut: experts {_margin(routing.expert_margin)}, groups {_margin(routing.group_margin)}"
    )
    memory, arithmetic = weights / H100_BYTES_PER_SECOND * 1e6, flops / H100_FLOPS * 1e6
    lines.append(
        f"FLOPs {flops:.4g}; weight bytes of hit experts {weights:,}; "
        f"floor on an H100 {max(memory, arithmetic):.1f} us (memory {memory:.1f}, arithmetic {arithmetic:.1f})"
    )
    stated = {
        name: candidate.workspace(g, problem.seq_len)
        for name, candidate in sorted((candidates or {}).items())
        if candidate.workspace is not None
    }
    known = [f"{name} {size:,}" for name, size in stated.items() if size is not None]
    if known:
        lines.append("bytes of workspace that a call keeps, whatever the routing: " + "; ".join(known))
    return lines


def _margin(margins: torch.Tensor) -> str:
    return f"{float(margins.min()):.2e}" if len(margins) else "-"


def backend_lines(candidates: Mapping[str, Candidate]) -> list[str]:
    """One line a candidate: name, recipe, and 'ready' or the reason it can't run on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"candidates known by name, for {device} at DeepSeek-V3's geometry:"]
    wide = max(map(len, candidates), default=0)
    for name, candidate in sorted(candidates.items()):
        reason = candidate.unsupported(PRESETS["dsv3"], device)
        state = f"cannot run here: {reason}" if reason else "ready"
        lines.append(f"  {name:<{wide}}  recipe {candidate.recipe:<33}  {state}")
        if candidate.summary:
            lines.append(f"  {'':<{wide}}  {candidate.summary}")
    return lines
