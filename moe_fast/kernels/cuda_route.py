"""Route and place in CUDA C++: which experts a token takes, and the row of every local token-expert pair.

Axes: T tokens, E experts, L local experts, K top_k, W windows, C capacity. A window is a run of whole groups of 32
tokens whose rows fit the workspace, C of them; its rows, sorted by expert and then by token, count from 0. The host
never knows how many rows there are, so it launches what the most rows need; in a usual call the first window has all.

Worked example, one window, T = 3, L = 2, K = 2: local_mask [[2, 1, 3]] says that token 0 chose local expert 1, token
1 expert 0, token 2 both. Then expert_offsets [[0, 2, 4]], permuted_idx_to_token_idx [[1, 2, 0, 2]],
token_rows [[2, -1], [0, -1], [1, 3]]; token 2 is the one that combine has to sum, no token is idle.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from moe_fast.current import current_stream
from moe_fast.kernels.cuda_build import load

MAX_WINDOWS = 32
GROUP_TOKENS = 32
SCALES_AT_ONCE = 16  # blocks of a token's scales that a lane transposes


@dataclass(frozen=True)
class Windows:
    """How many windows of which capacity hold any routing of so many tokens."""

    count: int  # W
    capacity: int  # C, rows

    @classmethod
    def for_tokens(cls, tokens: int, rows_per_token: int, limit: int) -> Windows:
        """Windows of at most `limit` rows for T tokens with at most rows_per_token = min(K, L) rows each.

        Raises ValueError where more than MAX_WINDOWS would be needed, or `limit` is under two groups' rows.
        """
        most = tokens * rows_per_token
        if most <= limit:
            return cls(1, max(most, 1))
        slack = limit - GROUP_TOKENS * rows_per_token
        if slack < GROUP_TOKENS * rows_per_token or most > MAX_WINDOWS * slack:
            raise ValueError(f"{tokens} tokens with {rows_per_token} rows each in windows of {limit} rows")
        return cls(-(-most // slack), limit)


class RouteParams(ctypes.Structure):
    """Params of route.cu."""

    _fields_ = (
        ("routing_logits", ctypes.c_void_p),
        ("routing_bias", ctypes.c_void_p),
        ("topk_ids", ctypes.c_void_p),
        ("topk_weights", ctypes.c_void_p),
        ("token_rows", ctypes.c_void_p),
        ("token_weights", ctypes.c_void_p),
        ("hidden_states_scale", ctypes.c_void_p),
        ("token_scales", ctypes.c_void_p),
        ("local_mask", ctypes.c_void_p),
        ("hidden_states_scale_stride", ctypes.c_int64),
        ("scale_blocks", ctypes.c_int),
        ("scale_columns", ctypes.c_int),
        ("scale_ctas", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("offset", ctypes.c_int),
        ("factor", ctypes.c_float),
    )


class PlaceParams(ctypes.Structure):
    """Params of place.cu."""

    _fields_ = (
        ("local_mask", ctypes.c_void_p),
        ("token_rows", ctypes.c_void_p),
        ("token_weights", ctypes.c_void_p),
        ("permuted_idx_to_token_idx", ctypes.c_void_p),
        ("row_targets", ctypes.c_void_p),
        ("expert_offsets", ctypes.c_void_p),
        ("combine_tokens", ctypes.c_void_p),
        ("combine_offsets", ctypes.c_void_p),
        ("idle_tokens", ctypes.c_void_p),
        ("idle_count", ctypes.c_void_p),
        ("tiles_done", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("windows", ctypes.c_int),
        ("capacity", ctypes.c_int),
        ("tiles", ctypes.c_int),
    )


def mask_words(local: int) -> int:
    """Words of 32 bits that hold a bit for each local expert."""
    return -(-local // 32)


def scale_columns(hidden: int) -> int:
    """Second size of token_scales: a token's scales are written four at a time."""
    return -(-hidden // 512) * 4


def choice_defines(experts: int, n_group: int, topk_group: int, top_k: int, local: int) -> tuple[tuple[str, int], ...]:
    """What every source is compiled with that chooses experts (choose.cuh)."""
    return (
        ("EXPERTS", experts),
        ("GROUPS", n_group),
        ("TOPK_GROUP", topk_group),
        ("TOP_K", top_k),
        ("LOCAL", local),
    )


def route_defines(experts: int, n_group: int, topk_group: int, top_k: int, local: int) -> tuple[tuple[str, int], ...]:
    """What a variant of route.cu is compiled with."""
    chosen = choice_defines(experts, n_group, topk_group, top_k, local)
    return (*chosen, ("SCALES_AT_ONCE", SCALES_AT_ONCE))


def place_slices(local: int) -> int:
    """CTAs an expert, or a list of tokens: all of them fit an H100 at once, whose 132 multiprocessors hold one each."""
    return max(1, min(4, 132 // (local + 2)))


def place_defines(top_k: int, local: int) -> tuple[tuple[str, int], ...]:
    """What a variant of place.cu is compiled with."""
    return (("TOP_K", top_k), ("LOCAL", local), ("SLICES", place_slices(local)))


def route(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    token_rows: torch.Tensor,
    token_weights: torch.Tensor,
    local_mask: torch.Tensor,
    local: int,
    local_expert_offset: int,
    routed_scaling_factor: float,
    n_group: int,
    topk_group: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    choices: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Fill token_weights [T, K] float32 with the weights of a token's local experts, ascending, and local_mask
    [ceil(L/32), T] int32; set token_rows [T, K] int32 to -1.

    routing_logits [T, E] float32, routing_bias [E] bfloat16, both at a multiple of 16 bytes. T > 0, E <= 1024, K <= 32.
    `scales`: hidden_states_scale [H/128, T] and token_scales [T, scale_columns(H)], which gets them, a token's beside
    one another, both float32. `choices`: topk_ids [T, K] int32 and topk_weights [T, K] float32, for the experts chosen,
    best first, local or not.
    """
    tokens, experts = routing_logits.shape
    device = routing_logits.device
    blocks = scales[0].shape[0] if scales else 0
    scale_ctas = -(-tokens // 128) * -(-blocks // SCALES_AT_ONCE)
    params = RouteParams(
        routing_logits.data_ptr(),
        routing_bias.data_ptr(),
        choices[0].data_ptr() if choices else None,
        choices[1].data_ptr() if choices else None,
        token_rows.data_ptr(),
        token_weights.data_ptr(),
        scales[0].data_ptr() if scales else None,
        scales[1].data_ptr() if scales else None,
        local_mask.data_ptr(),
        scales[0].stride(0) if scales else 0,
        blocks,
        scales[1].shape[1] if scales else 0,
        scale_ctas,
        tokens,
        clamp_offset(local_expert_offset),
        routed_scaling_factor,
    )
    variant = route_defines(experts, n_group, topk_group, token_rows.shape[1], local)
    kernel = load("route.cu", variant, "route_kernel", 128, 0, device.index or 0)
    kernel.launch(scale_ctas + -(-tokens // 4), (params,), current_stream(device.index or 0))


def place(
    local_mask: torch.Tensor,
    token_rows: torch.Tensor,
    token_weights: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    row_targets: torch.Tensor,
    expert_offsets: torch.Tensor,
    combine_tokens: torch.Tensor,
    combine_offsets: torch.Tensor,
    idle_tokens: torch.Tensor,
    idle_count: torch.Tensor,
    tiles_done: torch.Tensor,
    pdl: bool = False,
) -> None:
    """Fill token_rows [T, K], -1 so far, with each token's rows, ascending, beside token_weights;
    permuted_idx_to_token_idx [W, C] up to each window's rows; row_targets [W, C, 2]: the token whose only row a row is
    and the bits of its weight, or -1 and 0; expert_offsets [W, L+1]; combine_tokens [T], the tokens with two rows or
    more, and combine_offsets [W+1], how many lie before each window; idle_tokens [T], those without a row, idle_count
    [1] of them. Zero tiles_done. All int32 but token_weights."""
    tokens, top_k = token_rows.shape
    windows, local = expert_offsets.shape[0], expert_offsets.shape[1] - 1
    device = token_rows.device
    params = PlaceParams(
        local_mask.data_ptr(),
        token_rows.data_ptr(),
        token_weights.data_ptr(),
        permuted_idx_to_token_idx.data_ptr(),
        row_targets.data_ptr(),
        expert_offsets.data_ptr(),
        combine_tokens.data_ptr(),
        combine_offsets.data_ptr(),
        idle_tokens.data_ptr(),
        idle_count.data_ptr(),
        tiles_done.data_ptr(),
        tokens,
        windows,
        permuted_idx_to_token_idx.shape[1],
        tiles_done.numel(),
    )
    kernel = load("place.cu", place_defines(top_k, local), "place_kernel", 1024, 0, device.index or 0)
    kernel.launch(place_slices(local) * (local + 2), (params,), current_stream(device.index or 0), pdl)


def clamp_offset(offset: int) -> int:
    """An offset far outside of the experts stays outside when it is cut to 32 bits, and id - offset can't wrap."""
    return max(min(offset, 1 << 24), -(1 << 24))


def route_torch(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    token_rows: torch.Tensor,
    token_weights: torch.Tensor,
    local_mask: torch.Tensor,
    local: int,
    local_expert_offset: int,
    routed_scaling_factor: float,
    n_group: int,
    topk_group: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    choices: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Twin of `route`."""
    if scales is not None:
        blocks = len(scales[0])
        scales[1][:, :blocks] = scales[0].T
        scales[1][:, blocks:] = 0.0
    tokens, experts = routing_logits.shape
    top_k = token_rows.shape[1]
    scores = 1.0 / (1.0 + torch.exp(-routing_logits))
    grouped = (scores + routing_bias.float()).view(tokens, n_group, experts // n_group)
    group_scores = grouped.topk(min(2, experts // n_group), dim=-1).values.sum(-1)
    groups = torch.sort(group_scores, dim=-1, descending=True, stable=True).indices[:, :topk_group]
    kept = torch.zeros(tokens, n_group, dtype=torch.bool, device=scores.device).scatter_(1, groups, True)
    masked = grouped.masked_fill(~kept.unsqueeze(-1), torch.finfo(torch.float32).min).view(tokens, experts)
    ids = torch.sort(masked, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.gather(1, ids)
    weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * routed_scaling_factor
    if choices is not None:
        choices[0].copy_(ids)
        choices[1].copy_(weights)
    token_rows.fill_(-1)
    local_ids = ids - local_expert_offset
    here = (local_ids >= 0) & (local_ids < local)
    lower = (here.unsqueeze(1) & (local_ids.unsqueeze(1) < local_ids.unsqueeze(2))).sum(-1)  # local experts, of each
    token, slot = here.nonzero(as_tuple=True)
    token_weights[token, lower[token, slot]] = weights[token, slot]
    for word in range(mask_words(local)):
        here = (local_ids >= 32 * word) & (local_ids < min(32 * word + 32, local))
        bits = torch.where(here, torch.ones_like(local_ids) << (local_ids - 32 * word).clamp(0, 31), 0).sum(-1)
        local_mask[word] = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def place_torch(
    local_mask: torch.Tensor,
    token_rows: torch.Tensor,
    token_weights: torch.Tensor,
    permuted_idx_to_token_idx: torch.Tensor,
    row_targets: torch.Tensor,
    expert_offsets: torch.Tensor,
    combine_tokens: torch.Tensor,
    combine_offsets: torch.Tensor,
    idle_tokens: torch.Tensor,
    idle_count: torch.Tensor,
    tiles_done: torch.Tensor,
    pdl: bool = False,
) -> None:
    """Twin of `place`."""
    tokens, top_k = token_rows.shape
    windows, local = expert_offsets.shape[0], expert_offsets.shape[1] - 1
    bit = torch.arange(32, device=local_mask.device)
    here = (local_mask.T.unsqueeze(-1) >> bit & 1).flatten(1)[:, :local].bool()  # [T, L]
    per_token = here.sum(1)
    slack = permuted_idx_to_token_idx.shape[1] - GROUP_TOKENS * min(top_k, local)
    tiles_done.zero_()
    expert_offsets.zero_()
    shared = (per_token >= 2).nonzero().squeeze(1)
    combine_tokens[: len(shared)] = shared.to(torch.int32)
    combine_offsets.fill_(len(shared))
    idle = (per_token == 0).nonzero().squeeze(1)
    idle_tokens[: len(idle)] = idle.to(torch.int32)
    idle_count.fill_(len(idle))
    before = 0
    parts: dict[int, list[int]] = {}
    for start in range(0, tokens, GROUP_TOKENS):
        window = 0 if windows == 1 else before // slack
        parts.setdefault(window, [start, start])[1] = min(start + GROUP_TOKENS, tokens)
        before += int(per_token[start : start + GROUP_TOKENS].sum())
    for window, (begin, end) in parts.items():
        combine_offsets[window] = int((shared < begin).sum())
        expert, token = here[begin:end].T.nonzero(as_tuple=True)
        placed, rows = token + begin, len(token)
        lower = (here.cumsum(1) - 1)[placed, expert]  # the token's lower local experts
        permuted_idx_to_token_idx[window, :rows] = placed.to(torch.int32)
        token_rows[placed, lower] = torch.arange(rows, dtype=torch.int32, device=token_rows.device)
        alone = per_token[placed] == 1
        row_targets[window, :rows, 0] = torch.where(alone, placed, -1).to(torch.int32)
        row_targets[window, :rows, 1] = torch.where(alone, token_weights[placed, lower].view(torch.int32), 0)
        expert_offsets[window, 1:] = torch.bincount(expert, minlength=local).cumsum(0)
