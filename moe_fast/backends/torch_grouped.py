"""Vectorised torch on any device: expert by expert, block-scaled partial products, nothing re-quantised.

Written apart from moeref.reference, and computed another way: weights are never dequantised. Each 128-wide slice of K
gives a partial product of raw payloads, which is multiplied by (activation scale x weight scale) and added up in
float32, as a block-scaled tensor-core kernel does. Memory beside the output does not grow with T.
"""

from __future__ import annotations

import torch

from moe_fast.backends import Backend
from moeref.spec import BLOCK, Geometry

ROWS_AT_ONCE = 1024
"""Rows of one expert computed together: bounds the intermediates, 32 KB a row at the real geometry."""

COLUMNS_AT_ONCE = 512
"""Weight rows decoded together, 15 MB in float32 at the real geometry."""

ROWS_OF_PARTIALS = 128
"""Rows whose partial products are held together, 15 MB at the real geometry."""

TOKENS_AT_ONCE = 4096
"""Tokens computed together: bounds the float32 sum, 29 KB a token at the real geometry."""


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
    """The ten inputs -> output [T, H] bfloat16, written into `out` when given. The inputs are taken as checked."""
    if out is None:
        out = torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)
    payload = hidden_states.view(torch.uint8)  # not every device gathers e4m3
    for start in range(0, len(payload), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        ids, weights = choose(routing_logits[part], routing_bias, routed_scaling_factor, n_group, topk_group, top_k)
        x_scale = hidden_states_scale[:, part].T.contiguous()  # [tokens, H/128]
        total = torch.zeros(payload[part].shape, device=payload.device)
        local_ids = ids - local_expert_offset
        is_local = (local_ids >= 0) & (local_ids < len(gemm1_weights))
        for expert in torch.unique(local_ids[is_local]).tolist():  # ascending
            tokens, slots = torch.nonzero(local_ids == expert, as_tuple=True)
            for rows in torch.split(torch.arange(len(tokens), device=tokens.device), ROWS_AT_ONCE):
                mine = tokens[rows]
                x = decode(payload[part][mine])
                both = scaled_product(x, x_scale[mine], gemm1_weights[expert], gemm1_weights_scale[expert])
                up, gate = both.tensor_split(2, dim=1)
                act = gate * torch.sigmoid(gate) * up  # [rows, I]
                y = scaled_product(act, None, gemm2_weights[expert], gemm2_weights_scale[expert])
                total.index_add_(0, mine, y * weights[mine, slots[rows]].unsqueeze(1))
        out[part] = total
    return out


def choose(
    logits: torch.Tensor, bias: torch.Tensor, factor: float, n_group: int, topk_group: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> (expert ids [T, K] int64, weights [T, K]). Every maximum is the first of its equals."""
    tokens, num_experts = logits.shape
    score = torch.exp(-logits).add_(1.0).reciprocal_()
    left = (score + bias.float()).view(tokens, n_group, num_experts // n_group)
    best, at = left.max(dim=2, keepdim=True)
    group_score = best.squeeze(2)
    if left.shape[2] > 1:
        group_score = group_score + left.scatter(2, at, -torch.inf).amax(dim=2)
    open_group = torch.zeros_like(group_score, dtype=torch.bool)
    for _ in range(topk_group):
        first = group_score.argmax(dim=1, keepdim=True)
        open_group.scatter_(1, first, True)
        group_score = group_score.scatter(1, first, -torch.inf)
    left = left.masked_fill(~open_group.unsqueeze(2), torch.finfo(torch.float32).min).view(tokens, num_experts)
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    for k in range(top_k):
        ids[:, k] = left.argmax(dim=1)
        left = left.scatter(1, ids[:, k : k + 1], -torch.inf)
    chosen = score.gather(1, ids)
    return ids, chosen / (chosen.sum(dim=1, keepdim=True) + 1e-20) * factor


def scaled_product(
    x: torch.Tensor, x_scale: torch.Tensor | None, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """x [rows, K] float32 payloads, x_scale [rows, K/128] or None (ones); weight [N, K] e4m3, weight_scale
    [N/128, K/128] -> [rows, N] float32."""
    rows, width = x.shape
    blocks = width // BLOCK
    out = torch.empty(rows, len(weight), device=x.device)
    x_blocks = x.view(rows, blocks, BLOCK).transpose(0, 1)  # [K/128, rows, 128]
    payload = weight.view(torch.uint8)
    for start in range(0, len(weight), COLUMNS_AT_ONCE):
        numbers = decode(payload[start : start + COLUMNS_AT_ONCE])  # [n, K]
        count = len(numbers)
        w_blocks = numbers.view(count, blocks, BLOCK).permute(1, 2, 0)  # [K/128, 128, n]
        w_scale = weight_scale[start // BLOCK : (start + count) // BLOCK].T  # [K/128, n/128]
        for top in range(0, rows, ROWS_OF_PARTIALS):
            part = slice(top, min(top + ROWS_OF_PARTIALS, rows))
            partial = torch.bmm(x_blocks[:, part], w_blocks).view(blocks, -1, count // BLOCK, BLOCK)
            scale = w_scale.unsqueeze(1)  # [K/128, 1, n/128]
            if x_scale is not None:
                scale = x_scale[part].T.unsqueeze(2) * scale  # [K/128, rows, n/128]
            out[part, start : start + count] = partial.mul_(scale.unsqueeze(3)).sum(dim=0).view(-1, count)
    return out


EXPONENT_SHIFT = 2.0**120  # float32's exponent bias 127, e4m3's 7


def decode(octets: torch.Tensor) -> torch.Tensor:
    """e4m3 bytes (uint8) -> the same numbers in float32, exactly, NaN included.

    On a CPU by moving bits, which runs ten times as fast as torch's cast: sign to bit 31, exponent and mantissa to
    bits 26..20, then a multiplication by 2**120 sets the exponent right, of subnormals too.
    """
    if octets.device.type != "cpu":
        return octets.view(torch.float8_e4m3fn).float()
    wide = octets.view(torch.int8).to(torch.int32)  # sign-extended: bit 31 is the sign
    wide <<= 20
    wide &= -(1 << 31) | (0x7F << 20)
    numbers = wide.view(torch.float32).mul_(EXPONENT_SHIFT)
    magnitude = octets & 0x7F
    if magnitude.numel() and int(magnitude.amax()) == 0x7F:  # NaN, which would be 480
        numbers.masked_fill_(magnitude == 0x7F, torch.nan)
    return numbers


def unsupported(geometry: Geometry, device: torch.device) -> str | None:
    """Runs everywhere."""
    return None


BACKEND = Backend(
    name="torch_grouped",
    run=run,
    recipe="exact",
    deterministic=True,
    unsupported=unsupported,
    priority=0,
    summary="vectorised torch, any device: block-scaled partial products in float32",
)
