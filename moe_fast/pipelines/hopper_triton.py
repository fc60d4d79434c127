"""The ten-input function in Triton: route (and permute), experts (gemm1, gemm2), combine.

Three launches up to 16 tokens, four up to 128, five beyond; with routing in CUDA C++ three up to 160.

Recipe 'requant': SwiGLU's output becomes e4m3 with a float32 scale per 1x128 block; everything else is float32 until
the final cast. Nothing synchronises with the host; grids hold for any routing, so a captured graph may be replayed
with other inputs. Made for few rows an expert, where reading the weights is the cost; correct for any size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from moe_fast.current import current_stream
from moe_fast.kernels.combine import combine
from moe_fast.kernels.cuda_route_permute import MAX_TOKENS, route_permute
from moe_fast.kernels.experts import Tiling, experts, num_counters
from moe_fast.kernels.permute import CHUNK, permute
from moe_fast.kernels.routing import route
from moe_fast.kernels.triton_launch import cdiv, next_power_of_2
from moe_fast.target import target_of
from moe_fast.tuning.table import saved

RECIPE = "requant"
TOKENS_AT_ONCE = 1024
"""More tokens than this are done in slices: the workspace must hold top_k rows a token, whatever the routing is."""


TILINGS: tuple[tuple[int, Tiling], ...] = (
    (4, Tiling(16, 64, 64, 4, 3, 3, 2, unroll1=2, unroll2=4)),
    (192, Tiling(16, 32, 64, 4, 3, 3, 3, unroll1=2, unroll2=2)),
    (512, Tiling(32, 64, 128, 4, 5, 5, 2)),
    (1024, Tiling(32, 64, 128, 4, 2, 2, 2, unroll1=2, unroll2=2)),
)
"""(up to so many tokens, tiling), for about one local row a token, as expert parallel 8 has."""


def choose_tiling(tokens: int) -> Tiling:
    """The shipped tiling for a slice of `tokens` tokens: where no table of moe_fast.tune() says otherwise."""
    return next((tiling for limit, tiling in TILINGS if tokens <= limit), TILINGS[-1][1])


@dataclass(frozen=True)
class Shape:
    """What sizes a workspace."""

    tokens: int  # T of the largest slice
    local: int  # L
    top_k: int
    hidden: int
    intermediate: int

    @property
    def rows(self) -> int:
        """Most permuted rows that any routing can give."""
        return self.tokens * min(self.top_k, self.local)

    def max_tiles(self, tile_rows: int) -> int:
        """Most tiles that any routing can give: each hit expert wastes less than one tile."""
        return min(self.local, self.rows) + self.rows // tile_rows


class Workspace:
    """Every intermediate of one call, on one device. `ticket` is zero between calls."""

    def __init__(self, shape: Shape, tile_rows: int, device: torch.device, ticket: torch.Tensor) -> None:
        def ints(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        tokens, rows = shape.tokens, shape.rows
        self.topk_ids = ints(tokens, shape.top_k)
        self.topk_weights = torch.empty(tokens, shape.top_k, device=device)
        self.local_slot = ints(tokens, shape.local)
        self.token_rows = ints(tokens, shape.top_k)
        self.expert_offsets = ints(shape.local + 1)
        self.tile_offsets = ints(shape.local + 1)
        self.chunk_counts = ints(cdiv(tokens, CHUNK), shape.local)
        self.permuted_idx_to_token_idx = ints(rows)
        self.swiglu_out = torch.empty(rows, shape.intermediate, device=device)
        self.requantized = torch.empty(rows, shape.intermediate, dtype=torch.float8_e4m3fn, device=device)
        self.requantized_scale = torch.empty(shape.intermediate // 128, rows, device=device)
        self.gemm2_out = torch.empty(rows, shape.hidden, device=device)
        self.counters = ints(num_counters(shape.max_tiles(tile_rows), shape.intermediate))
        self.ticket = ticket
        self._first: dict[int, tuple[torch.Tensor, ...]] = {}

    def first(self, tokens: int) -> tuple[torch.Tensor, ...]:
        """topk_ids, topk_weights, local_slot and token_rows of so many tokens; kept, for views take microseconds."""
        if tokens not in self._first:
            whole = self.topk_ids, self.topk_weights, self.local_slot, self.token_rows
            self._first[tokens] = tuple(t[:tokens] for t in whole)
        return self._first[tokens]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, torch.Tensor))


_workspaces: dict[tuple[object, ...], Workspace] = {}
_tickets: dict[torch.device, list[torch.Tensor]] = {}


@functools.lru_cache(maxsize=4096)
def size_class(shape: Shape) -> Shape:
    """The shape with its tokens rounded up to a power of two, 16 at least: few classes share the kept workspaces."""
    return replace(shape, tokens=max(16, next_power_of_2(shape.tokens)))


def workspace_for(shape: Shape, tile_rows: int, device: torch.device) -> Workspace:
    """A workspace for a call on the current stream: kept by device, stream and size class, never returned to callers.

    Within a graph capture it comes fresh from the graph's own pool, so that no later call writes under the graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        spare = _tickets.get(device, [])
        ticket = spare.pop() if spare else torch.zeros(1, dtype=torch.int32, device=device)
        return Workspace(shape, tile_rows, device, ticket)
    stream = current_stream(device.index or 0) if device.type == "cuda" else 0
    shape = size_class(shape)
    key = (device, stream, shape, tile_rows)
    if key not in _workspaces:
        if device not in _tickets:
            _tickets[device] = list(torch.zeros(4096, dtype=torch.int32, device=device).split(1))
        _workspaces[key] = Workspace(shape, tile_rows, device, torch.zeros(1, dtype=torch.int32, device=device))
    return _workspaces[key]


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
    tiling: Tiling | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    cuda_routing: bool = False,
) -> torch.Tensor:
    """Output [T, H] bfloat16, written into `out` when given. The inputs are taken as checked. cuda_routing: route and
    permute by kernels.cuda_route_permute where that takes so many tokens, which needs a compiler for CUDA C++."""
    tokens, hidden = hidden_states.shape
    if out is None:
        out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=hidden_states.device)
    local, intermediate = gemm2_weights.shape[0], gemm2_weights.shape[2]
    sizes = (routing_bias.shape[0], local, hidden, intermediate, top_k, n_group, topk_group)
    for start in range(0, tokens, tokens_at_once):
        part = slice(start, min(start + tokens_at_once, tokens))
        count = part.stop - part.start
        logits, states, scales, output = routing_logits, hidden_states, hidden_states_scale, out
        if count < tokens:
            logits, states, scales, output = logits[part], states[part], scales[:, part], output[part]
        tuned = saved(count, hidden_states.device, *sizes) if tiling is None else None
        cut = tiling or (tuned and tuned.tiling) or choose_tiling(count)
        shape = Shape(count, local, top_k, hidden, intermediate)
        _run_slice(
            logits,
            routing_bias,
            states,
            scales,
            gemm1_weights,
            gemm1_weights_scale,
            gemm2_weights,
            gemm2_weights_scale,
            local_expert_offset,
            routed_scaling_factor,
            output,
            n_group,
            topk_group,
            cut,
            workspace_for(shape, cut.tile_rows, hidden_states.device),
            cuda_routing,
        )
    return out


def _run_slice(
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
    out: torch.Tensor,
    n_group: int,
    topk_group: int,
    cut: Tiling,
    space: Workspace,
    cuda_routing: bool,
) -> None:
    tokens = hidden_states.shape[0]
    on_gpu = hidden_states.is_cuda  # the interpreter runs on CPU tensors
    topk_ids, topk_weights, local_slot, token_rows = space.first(tokens)
    placed = (space.expert_offsets, space.tile_offsets, space.permuted_idx_to_token_idx)
    rest = (local_expert_offset, routed_scaling_factor, n_group, topk_group, cut.tile_rows)
    if cuda_routing and tokens <= MAX_TOKENS:
        route_permute(
            routing_logits, routing_bias, topk_ids, topk_weights, token_rows, *placed, space.counters, *rest,
        )  # fmt: skip
    else:
        permuted = route(
            routing_logits, routing_bias, topk_ids, topk_weights, local_slot, token_rows, *placed, space.ticket,
            space.counters, *rest, fast_exp=not on_gpu, pdl=on_gpu and cut.pdl,
        )  # fmt: skip
        if not permuted:
            permute(local_slot, token_rows, *placed, space.chunk_counts, cut.tile_rows)
    experts(
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        space.permuted_idx_to_token_idx,
        space.expert_offsets,
        space.tile_offsets,
        space.swiglu_out,
        space.requantized,
        space.requantized_scale,
        space.gemm2_out,
        space.counters,
        (space.counters.numel() - 1) // (1 + gemm2_weights.shape[2] // 128),
        target_of(hidden_states.device).sm_count * cut.programs_per_sm,
        cut,
        on_gpu,
    )
    combine(space.gemm2_out, topk_weights, token_rows, out, pdl=on_gpu and cut.pdl)
