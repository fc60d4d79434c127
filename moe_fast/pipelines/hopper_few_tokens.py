"""The ten-input function in one launch for every 8 tokens, made for at most 8.

Recipe 'requant': SwiGLU's output becomes e4m3 with a float32 scale per 1x128 block; everything else is float32 until
the final cast. Nothing synchronises with the host, and the launch holds for any routing: a captured graph may be
replayed with other inputs. The first call with a new geometry compiles or loads its kernel, so it must not be inside a
graph capture.
"""

from __future__ import annotations

import torch

from moe_fast.current import current_stream
from moe_fast.kernels.cuda_few_tokens import COUNTERS, TOKENS, few_tokens, prepare, rows_kept

RECIPE = "requant"


class Workspace:
    """What one launch needs beside its inputs, on one device. `counters` is zero between calls."""

    def __init__(self, local: int, top_k: int, intermediate: int, counters: torch.Tensor) -> None:
        size = rows_kept(top_k, local) * TOKENS * intermediate
        self.swiglu_out = torch.empty(size, device=counters.device)
        self.counters = counters

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


_workspaces: dict[tuple[int, ...], Workspace] = {}
_zeros: dict[int, list[torch.Tensor]] = {}
"""Counters for graphs, by device: made ahead, for a captured zeroing would be one more node in every replay."""


def workspace_for(local: int, top_k: int, intermediate: int, device: int, stream: int) -> Workspace:
    """A workspace for a call on a stream: kept by device, stream and geometry, never returned to callers.

    Within a graph capture it comes fresh from the graph's own pool, so that no later call writes under the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        spare = _zeros.get(device)
        counters = spare.pop() if spare else _counters(device, 1)[0]
        return Workspace(local, top_k, intermediate, counters)
    key = (device, stream, local, top_k, intermediate)
    kept = _workspaces.get(key)
    if kept is None:
        if device not in _zeros:
            _zeros[device] = _counters(device, 4096)
        kept = _workspaces[key] = Workspace(local, top_k, intermediate, _counters(device, 1)[0])
    return kept


def _counters(device: int, sets: int) -> list[torch.Tensor]:
    made = torch.zeros(sets * COUNTERS, dtype=torch.int32, device=torch.device("cuda", device))
    return list(made.split(COUNTERS))


def release_workspaces() -> None:
    """Forget every kept workspace; graphs keep theirs."""
    _workspaces.clear()


def run(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    out: torch.Tensor | None = None,
    *,
    n_group: int = 8,
    topk_group: int = 4,
    top_k: int = 8,
) -> torch.Tensor:
    """Output [T, H] bfloat16, written into `out` when given. The inputs are taken as checked."""
    tokens, hidden = hidden_states.shape
    local, _, intermediate = gemm2_weights.shape
    index = hidden_states.get_device()
    if out is None:
        out = torch.empty_like(hidden_states, dtype=torch.bfloat16)
    launch = prepare(routing_bias.shape[0], n_group, topk_group, top_k, local, hidden, intermediate, index)
    stream = current_stream(index)
    space = workspace_for(local, top_k, intermediate, index, stream)
    rest = (
        gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, local_expert_offset,
        routed_scaling_factor,
    )  # fmt: skip
    last = (space.swiglu_out, space.counters, launch, stream)
    if tokens <= TOKENS:
        if tokens:
            few_tokens(routing_logits, routing_bias, hidden_states, hidden_states_scale, *rest, out, *last)
        return out
    for start in range(0, tokens, TOKENS):
        part = slice(start, start + TOKENS)
        few_tokens(
            routing_logits[part], routing_bias, hidden_states[part], hidden_states_scale[:, part], *rest, out[part],
            *last,
        )  # fmt: skip
    return out
