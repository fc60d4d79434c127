"""The ten-input function in CUDA C++: route, place, the GEMMs and combine; once more for each later window of rows.

Recipe 'requant': SwiGLU's output becomes e4m3 with a float32 scale per 1x128 block. gemm2 writes a token's only row to
the output, and keeps the rows of other tokens in bfloat16 until combine sums them in float32. Nothing synchronises
with the host, and the launches hold for any routing: a captured graph may be replayed with other inputs. Made for many
rows an expert, where arithmetic is the cost; right for any size.

The first call with a new geometry compiles or loads its kernels, so it must not be inside a graph capture.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from moe_fast.current import current_stream
from moe_fast.kernels.cuda_combine import combine
from moe_fast.kernels.cuda_grouped_gemm import Direct, grouped_gemms, num_tiles, scale_stride
from moe_fast.kernels.cuda_later_windows import kernel_for, later_windows
from moe_fast.kernels.cuda_route import MAX_WINDOWS, Windows, mask_words, place, route, scale_columns

RECIPE = "requant"
ROW_BUFFER_BYTES = 376 * 10**6
"""What the buffers that grow with the rows may take; more rows than fit are done window by window. So much that 14107
tokens of DeepSeek-V3 (112,856 rows at most) take five windows: each one that turns out empty costs two launches."""
TOKEN_BUFFER_BYTES = 16 * 10**6
"""What the buffers that grow with the tokens may take; more tokens are done slice by slice."""
CLUSTER = 2
USUAL_SHARE = 1.5
"""Windows up to this multiple of the local experts' even share of rows have launches of their own. Those after them
share one, whose GEMMs are slower (docs/h100-gemm.md), but which costs 2 us where none of them has rows, not 3 each."""


@dataclass(frozen=True)
class Shape:
    """What sizes a workspace."""

    tokens: int  # T of the largest slice
    local: int  # L
    top_k: int
    hidden: int
    intermediate: int

    @property
    def rows_per_token(self) -> int:
        """Most local rows that a token can have."""
        return min(self.top_k, self.local)

    @property
    def row_limit(self) -> int:
        """Rows that ROW_BUFFER_BYTES hold: requantized, its scales and gemm2_out; at least four groups of tokens."""
        row_bytes = self.intermediate + self.intermediate // 128 * 4 + 2 * self.hidden
        return max(ROW_BUFFER_BYTES // row_bytes, 4 * 32 * self.rows_per_token)

    @property
    def windows(self) -> Windows:
        """Windows for any routing of the tokens."""
        return Windows.for_tokens(self.tokens, self.rows_per_token, self.row_limit)

    def usual_windows(self, experts: int) -> int:
        """Windows that have rows unless the local experts get more than their share of the tokens by half."""
        if self.windows.count == 1:
            return 1
        rows = USUAL_SHARE * self.tokens * self.top_k * self.local / experts
        return min(self.windows.count, max(1, math.ceil(rows / (self.windows.capacity - 32 * self.rows_per_token))))

    @property
    def tokens_at_once(self) -> int:
        """Most tokens that MAX_WINDOWS and TOKEN_BUFFER_BYTES hold: more are done in slices."""
        token_bytes = 4 * (2 * self.top_k + mask_words(self.local) + scale_columns(self.hidden) + 2)
        rows = MAX_WINDOWS * (self.row_limit - 32 * self.rows_per_token)
        return min(rows // self.rows_per_token, TOKEN_BUFFER_BYTES // token_bytes)


@functools.lru_cache(maxsize=1024)
def slices(whole: Shape, experts: int) -> tuple[tuple[slice, Shape, int], ...]:
    """What a call is cut into: tokens, their shape, and its usual windows."""
    cut = []
    for start in range(0, whole.tokens, whole.tokens_at_once):
        part = slice(start, min(start + whole.tokens_at_once, whole.tokens))
        shape = replace(whole, tokens=part.stop - part.start)
        cut.append((part, shape, shape.usual_windows(experts)))
    return tuple(cut)


class Window(NamedTuple):
    """A window's part of a workspace, or that of several."""

    permuted_idx_to_token_idx: torch.Tensor
    expert_offsets: torch.Tensor
    tiles_done: torch.Tensor
    row_targets: torch.Tensor
    combine_offsets: torch.Tensor


class Workspace:
    """Every intermediate of one call, on one device. `counters` is zero between calls."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        def ints(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        tokens, windows = shape.tokens, shape.windows
        capacity = windows.capacity
        self.token_rows = ints(tokens, shape.top_k)
        self.token_weights = torch.empty(tokens, shape.top_k, device=device)
        self.token_scales = torch.empty(tokens, scale_columns(shape.hidden), device=device)
        self.local_mask = ints(mask_words(shape.local), tokens)
        self.permuted_idx_to_token_idx = ints(windows.count, capacity)
        self.row_targets = ints(windows.count, capacity, 2)
        self.expert_offsets = ints(windows.count, shape.local + 1)
        self.combine_tokens = ints(tokens)
        self.combine_offsets = ints(windows.count + 1)
        self.idle_tokens = ints(tokens)
        self.idle_count = ints(1)
        self.requantized = torch.empty(capacity, shape.intermediate, dtype=torch.float8_e4m3fn, device=device)
        self.requantized_scale = torch.empty(shape.intermediate // 128, scale_stride(capacity), device=device)
        self.gemm2_out = torch.empty(capacity, shape.hidden, dtype=torch.bfloat16, device=device)
        self.tiles_done = ints(windows.count, num_tiles(capacity, shape.local))
        self.counters = torch.zeros(4, dtype=torch.int32, device=device)
        # Views are kept, for each takes microseconds.
        self.scales = self.token_scales[:, : shape.hidden // 128].T
        self._windows: dict[tuple[int, bool], Window] = {}

    def window(self, number: int, and_later: bool = False) -> Window:
        """One window's part, or that of all from this one on."""
        kept = self._windows.get((number, and_later))
        if kept is None:
            at = slice(number, None) if and_later else number
            bounds = slice(number, None if and_later else number + 2)
            kept = self._windows[number, and_later] = Window(
                self.permuted_idx_to_token_idx[at],
                self.expert_offsets[at],
                self.tiles_done[at],
                self.row_targets[at],
                self.combine_offsets[bounds],
            )
        return kept

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = (t for name, t in vars(self).items() if name != "scales" and isinstance(t, torch.Tensor))
        return sum(t.nbytes for t in own)


_workspaces: dict[tuple[object, ...], Workspace] = {}


def workspace_for(shape: Shape, device: torch.device) -> Workspace:
    """A workspace for a call on the current stream, never returned to callers: that of the last number of tokens is
    kept for each device, stream and geometry.

    Within a graph capture it comes fresh from the graph's own pool, so that no later call writes under the graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return Workspace(shape, device)
    stream = current_stream(device.index or 0) if device.type == "cuda" else 0
    key = (device, stream, shape.local, shape.top_k, shape.hidden, shape.intermediate)
    kept = _workspaces.get(key)
    if kept is None or kept.token_rows.shape[0] != shape.tokens:
        _workspaces.pop(key, None)  # the old one's memory can serve the new one
        _workspaces[key] = Workspace(shape, device)
    return _workspaces[key]


def release_workspaces() -> None:
    """Forget every kept workspace, and how calls are cut; graphs keep theirs."""
    _workspaces.clear()
    slices.cache_clear()


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
    cluster: int = CLUSTER,
) -> torch.Tensor:
    """Output [T, H] bfloat16, written into `out` when given. The inputs are taken as checked."""
    tokens, hidden = hidden_states.shape
    device = hidden_states.device
    if out is None:
        out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
    if device.type == "cuda":
        kernel_for(top_k, device, cluster)  # also where one window suffices: a longer call may come within a capture
    whole = Shape(tokens, gemm2_weights.shape[0], top_k, hidden, gemm2_weights.shape[2])
    for part, shape, usual in slices(whole, routing_logits.shape[1]):
        space = workspace_for(shape, device)
        logits, states, scales, output = routing_logits, hidden_states, hidden_states_scale, out
        if shape.tokens < tokens:
            logits, states, scales, output = logits[part], states[part], scales[:, part], output[part]
        route(
            logits, routing_bias, space.token_rows, space.token_weights, space.local_mask, shape.local,
            local_expert_offset, routed_scaling_factor, n_group, topk_group, (scales, space.token_scales),
        )  # fmt: skip
        place(
            space.local_mask, space.token_rows, space.token_weights, space.permuted_idx_to_token_idx, space.row_targets,
            space.expert_offsets, space.combine_tokens, space.combine_offsets, space.idle_tokens, space.idle_count,
            space.tiles_done, pdl=True,
        )  # fmt: skip
        matrices = (
            states, space.scales, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale,
        )  # fmt: skip
        for number in range(usual):
            window = space.window(number)
            idle = (None, None) if number else (space.idle_tokens, space.idle_count)
            grouped_gemms(
                *matrices, window.permuted_idx_to_token_idx, window.expert_offsets, space.requantized,
                space.requantized_scale, space.gemm2_out, window.tiles_done, space.counters,
                Direct(output, window.row_targets, *idle), cluster, pdl=True,
            )  # fmt: skip
            combine(
                space.gemm2_out, space.token_weights, space.token_rows, space.combine_tokens, window.combine_offsets,
                output, pdl=True,
            )  # fmt: skip
        if usual < space.expert_offsets.shape[0]:
            later = space.window(usual, and_later=True)
            later_windows(
                *matrices, later.permuted_idx_to_token_idx, later.expert_offsets, space.requantized,
                space.requantized_scale, space.gemm2_out, later.tiles_done, space.counters, later.row_targets,
                space.token_weights, space.token_rows, space.combine_tokens, later.combine_offsets, output, cluster,
            )  # fmt: skip
    return out
