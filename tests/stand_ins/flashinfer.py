"""FlashInfer 0.7's functions that moe_fast's adapters call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch

from moe_fast.layouts import from_block_major_k, from_shuffled_rows
from moeref.inputs import Inputs
from moeref.quant import quantize_1x128
from moeref.reference import Routing, experts, moe, route
from moeref.spec import Geometry, Recipe


def trtllm_fp8_block_scale_moe(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: int = 0,
    use_shuffled_weight: bool = False,
    weight_layout: int = 0,
    enable_pdl: bool | None = None,
    tune_max_num_tokens: int = 8192,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """The whole layer, with gemm1's and SwiGLU's results in e4m3 and the routing weights in bfloat16."""
    assert routing_method_type == 2, "2 is DeepSeekV3"
    assert tune_max_num_tokens >= len(hidden_states)
    assert n_group is not None and topk_group is not None and routing_bias is not None
    if weight_layout == 2:
        gemm1_weights, gemm2_weights = from_block_major_k(gemm1_weights), from_block_major_k(gemm2_weights)
    if use_shuffled_weight:
        gemm1_weights, gemm2_weights = from_shuffled_rows(gemm1_weights), from_shuffled_rows(gemm2_weights)
    assert local_num_experts == len(gemm1_weights) and intermediate_size == gemm2_weights.shape[2]
    hidden = hidden_states.shape[1]
    geometry = Geometry(num_experts, local_num_experts, hidden, intermediate_size, top_k, n_group, topk_group)
    inputs = Inputs(
        routing_logits, routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale,
        gemm2_weights, gemm2_weights_scale, local_expert_offset, float(routed_scaling_factor or 1.0), geometry,
    )  # fmt: skip
    result = moe(inputs, Recipe.parse("requant2+bf16_weights")).output
    return result if output is None else output.copy_(result)


@contextlib.contextmanager
def autotune(tune_mode: bool = True) -> Iterator[None]:
    """Tunes nothing."""
    assert isinstance(tune_mode, bool)
    yield


def fused_topk_deepseek(
    scores: torch.Tensor,
    bias: torch.Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    routed_scaling_factor: float,
    topk_values: torch.Tensor,
    topk_indices: torch.Tensor,
    launch_with_pdl: bool = True,
) -> None:
    """DeepSeek-V3's routing, global ids."""
    geometry = Geometry(scores.shape[1], 1, 128, 128, topk, n_group, topk_group)
    chosen = route(scores, bias, geometry, routed_scaling_factor)
    topk_indices.copy_(chosen.topk_ids)
    topk_values.copy_(chosen.topk_weights)


def cutlass_fused_moe(
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor,
    fc1_expert_weights: torch.Tensor,
    fc2_expert_weights: torch.Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[torch.Tensor],
    ep_size: int = 1,
    ep_rank: int = 0,
    output: torch.Tensor | None = None,
    use_deepseek_fp8_block_scale: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Everything after routing; quantises the bfloat16 activations and SwiGLU's result 1x128."""
    assert use_deepseek_fp8_block_scale and output_dtype == input.dtype == torch.bfloat16
    assert token_selected_experts.dtype == torch.int32 and tune_max_num_tokens >= len(input)
    payload, scale = quantize_1x128(input.float())
    local, hidden, intermediate = fc2_expert_weights.shape
    geometry = Geometry(local * ep_size, local, hidden, intermediate, token_final_scales.shape[1], 1, 1)
    nowhere = input.new_zeros(0, dtype=torch.float32)
    inputs = Inputs(
        nowhere, nowhere, payload, scale.t().contiguous(), fc1_expert_weights, quant_scales[0],
        fc2_expert_weights, quant_scales[1], ep_rank * local, 1.0, geometry,
    )  # fmt: skip
    routing = Routing(token_selected_experts.long(), token_final_scales, nowhere, nowhere)
    result = experts(inputs, routing, Recipe.parse("bf16_gemm1+requant")).output
    return result if output is None else output.copy_(result)


def library() -> SimpleNamespace:
    """What the adapters' load() functions give where the library is installed."""
    return SimpleNamespace(
        trtllm_fp8_block_scale_moe=trtllm_fp8_block_scale_moe,
        autotune=autotune,
        fused_topk_deepseek=fused_topk_deepseek,
        cutlass_fused_moe=cutlass_fused_moe,
    )
