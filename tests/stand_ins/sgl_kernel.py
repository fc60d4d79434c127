"""sglang-kernel's functions, and SGLang's gate and Triton MoE, that moe_fast's adapters call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import silu

from moeref.quant import dequantize_1x128, dequantize_128x128, quantize_1x128
from moeref.reference import route
from moeref.spec import Geometry


def moe_fused_gate(
    scores: torch.Tensor,
    bias: torch.Tensor,
    topk: int,
    scoring_func: str = "sigmoid",
    num_fused_shared_experts: int = 0,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
    moe_softcapping: float = 0.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, global ids): sglang 0.5.16 and newer."""
    assert scoring_func == "sigmoid" and renormalize and bias.dtype == torch.float32
    factor = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
    geometry = Geometry(scores.shape[1], 1, 128, 128, topk, num_expert_group, topk_group)
    chosen = route(scores, bias, geometry, factor)
    return chosen.topk_weights, chosen.topk_ids.to(torch.int32)


def moe_fused_gate_old(
    input_tensor: torch.Tensor,
    bias: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 0,
    apply_routed_scaling_factor_on_output: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in sglang-kernel 0.4.4 and older."""
    return moe_fused_gate(
        input_tensor,
        bias,
        topk,
        routed_scaling_factor=routed_scaling_factor,
        apply_routed_scaling_factor_on_output=apply_routed_scaling_factor_on_output,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
    )


def prepare_moe_input(
    topk_ids: torch.Tensor,
    expert_offsets: torch.Tensor,
    problem_sizes1: torch.Tensor,
    problem_sizes2: torch.Tensor,
    input_permutation: torch.Tensor,
    output_permutation: torch.Tensor,
    num_experts: int,
    n: int,
    k: int,
    blockscale_offsets: torch.Tensor | None = None,
) -> None:
    """Counts, offsets and permutations; an expert's rows come in any order (here backwards), others are skipped."""
    assert topk_ids.dtype == torch.int32
    ids, top_k = topk_ids.flatten(), topk_ids.shape[1]
    row = 0
    expert_offsets[0] = 0
    for expert in range(num_experts):
        pairs = torch.nonzero(ids == expert).flatten().flip(0)
        problem_sizes1[expert] = torch.tensor([len(pairs), 2 * n, k])
        problem_sizes2[expert] = torch.tensor([len(pairs), k, n])
        rows = torch.arange(row, row + len(pairs))
        input_permutation[rows] = (pairs // top_k).to(torch.int32)
        output_permutation[pairs] = rows.to(torch.int32)
        row += len(pairs)
        expert_offsets[expert + 1] = row


def shuffle_rows(
    input_tensor: torch.Tensor, dst2src_map: torch.Tensor, output_tensor_shape: tuple[int, int]
) -> torch.Tensor:
    """Rows by index; an index outside is an error here, an illegal read there."""
    assert output_tensor_shape == (len(dst2src_map), input_tensor.shape[1])
    octets = input_tensor.contiguous().view(torch.uint8)
    return octets[dst2src_map.long()].view(input_tensor.dtype)


def fp8_blockwise_scaled_grouped_mm(
    output: torch.Tensor,
    a_ptrs: torch.Tensor,
    b_ptrs: torch.Tensor,
    out_ptrs: torch.Tensor,
    a_scales_ptrs: torch.Tensor,
    b_scales_ptrs: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scales_a: torch.Tensor,
    scales_b: torch.Tensor,
    stride_a: torch.Tensor,
    stride_b: torch.Tensor,
    stride_c: torch.Tensor,
    layout_sfa: torch.Tensor,
    layout_sfb: torch.Tensor,
    problem_sizes: torch.Tensor,
    expert_offsets: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """output rows of expert e = a's rows times b[e] [K, N]; a row of no expert stays what it was, here NaN."""
    for pointers in (a_ptrs, b_ptrs, out_ptrs, a_scales_ptrs, b_scales_ptrs, stride_a, stride_b, stride_c):
        assert pointers.dtype == torch.int64 and pointers.shape == (len(b),)
    assert layout_sfa.shape == layout_sfb.shape == (len(b), 5) and workspace.dtype == torch.uint8
    assert problem_sizes.shape == (len(b), 3) and expert_offsets.shape == (len(b),)
    assert int(stride_a[0]) == int(stride_b[0]) == a.shape[1] and int(stride_c[0]) == output.shape[1]
    assert b.stride(1) == 1 and b.stride(2) == b.shape[1]  # column-major
    output.fill_(torch.nan)
    for expert, (rows, n, k) in enumerate(problem_sizes.tolist()):
        assert (n, k) == (b.shape[2], b.shape[1])
        part = slice(int(expert_offsets[expert]), int(expert_offsets[expert]) + rows)
        weight = dequantize_128x128(b[expert].t(), scales_b[expert].t())
        output[part] = (dequantize_1x128(a[part], scales_a[part]) @ weight.t()).to(output.dtype)


def silu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(first half) * second half."""
    gate, up = input.float().chunk(2, dim=-1)
    result = (silu(gate) * up).to(input.dtype)
    return result if out is None else out.copy_(result)


def sgl_per_token_group_quant_8bit(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool = False,
    fuse_silu_and_mul: bool = False,
    masked_m: torch.Tensor | None = None,
    enable_v2: bool | None = None,
) -> None:
    """1x128 quantisation. Fused it is refused: with float32 scales the library ignores the flag without a word."""
    assert not fuse_silu_and_mul
    blocks = input.float().unflatten(-1, (-1, group_size))
    scale = blocks.abs().amax(dim=-1).clamp(min=eps) / fp8_max
    output_q.copy_((blocks / scale.unsqueeze(-1)).clamp(fp8_min, fp8_max).flatten(-2))
    output_s.copy_(scale)


def apply_shuffle_mul_sum(
    input: torch.Tensor, output: torch.Tensor, permutation: torch.Tensor, factors: torch.Tensor
) -> None:
    """output[t] = sum over k of input[permutation[t, k]] * factors[t, k]."""
    assert factors.dtype == output.dtype
    tokens = len(output)
    taken = input[permutation.long()].view(tokens, -1, input.shape[1]).float()
    output.copy_((taken * factors.view(tokens, -1, 1).float()).sum(1))


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    cumsum_buffer: torch.Tensor,
    pad_sorted_token_ids: bool = False,
    ignore_invalid_expert: bool = False,
) -> None:
    """Pairs by expert, ids -1 first, each expert's padded to whole blocks by a pair that does not exist."""
    assert cumsum_buffer.shape == (num_experts + 1,) and pad_sorted_token_ids
    pairs = topk_ids.flatten()
    sorted_token_ids.fill_(pairs.numel())
    row = 0
    for expert in range(-1, num_experts - 1):
        mine = torch.nonzero(pairs == expert).flatten()
        blocks = -(-len(mine) // block_size)
        sorted_token_ids[row : row + len(mine)] = mine.to(torch.int32)
        experts_ids[row // block_size : row // block_size + blocks] = expert
        row += blocks * block_size
    num_tokens_post_pad.fill_(row)


def invoke_fused_moe_kernel(
    A: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None,
    C: torch.Tensor,
    A_scale: torch.Tensor | None,
    B_scale: torch.Tensor,
    B_zp: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor,
    mul_routed_weight: bool,
    top_k: int,
    config: dict[str, Any],
    compute_type: Any,
    use_fp8_w8a8: bool,
    use_int8_w8a8: bool,
    use_int8_w8a16: bool,
    use_int4_w4a16: bool,
    per_channel_quant: bool,
    block_shape: list[int] | None = None,
) -> None:
    """C's row of each pair = A's row of its token (pair // top_k), quantised 1x128, times its expert's B."""
    assert use_fp8_w8a8 and not (use_int8_w8a8 or use_int8_w8a16 or use_int4_w4a16) and block_shape == [128, 128]
    assert A.dtype == C.dtype == torch.bfloat16 and A_scale is None
    read = dequantize_1x128(*quantize_1x128(A.float().nan_to_num()))
    out, weights = C.view(-1, C.shape[-1]), topk_weights.flatten()
    out.fill_(torch.nan)
    tile = config["BLOCK_SIZE_M"]
    for index in range(int(num_tokens_post_padded) // tile):
        pairs = sorted_token_ids[index * tile : (index + 1) * tile].long()
        pairs, expert = pairs[pairs < topk_ids.numel()], int(expert_ids[index])
        if expert < 0:
            out[pairs] = 0
            continue
        result = read[pairs // top_k] @ dequantize_128x128(B[expert], B_scale[expert]).t()
        out[pairs] = (result * weights[pairs, None] if mul_routed_weight else result).to(C.dtype)


def moe_sum_reduce(input_tensor: torch.Tensor, output_tensor: torch.Tensor, routed_scaling_factor: float = 0) -> None:
    """output = sum over k of input [T, K, H], times the factor."""
    output_tensor.copy_(input_tensor.float().sum(1) * routed_scaling_factor)


def library(old_gate: bool = False) -> SimpleNamespace:
    """What the adapters' load() functions give where the libraries are installed."""
    table = {1: 16, 64: 32, 1024: 64}
    return SimpleNamespace(
        **{name: function for name, function in globals().items() if getattr(function, "__module__", "") == __name__},
        gate_is_old=old_gate,
        bfloat16=torch.bfloat16,
        table=lambda: {tokens: {"BLOCK_SIZE_M": rows} for tokens, rows in table.items()},
    )
