"""Faults of combine and of the output: sums, weights, casts, gains, memory that is not written."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moeref.diagnose.faults.registry import fault
from moeref.diagnose.faults.rows import TILE
from moeref.diagnose.kernel import Kernel
from moeref.inputs import FP8, Inputs
from moeref.quant import FP8_MAX
from moeref.reference import Permutation, expert_spans


def fresh_memory(self: Kernel, output: Tensor, out: Tensor | None) -> Tensor:
    """`out`, or new memory as a caching allocator gives it: what the last call left there, at first zeros."""
    if out is not None:
        return out
    left = self.memory.get("left")
    return left.clone() if left is not None and left.shape == output.shape else torch.zeros_like(output)


def rank_among_local(permutation: Permutation) -> Tensor:
    """How many rows of the same token stand before each row, [P]."""
    tokens = permutation.permuted_idx_to_token_idx
    order = torch.argsort(tokens, stable=True)
    first = torch.searchsorted(tokens[order], tokens[order])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first
    return rank


def active_tokens(inputs: Inputs, permutation: Permutation) -> Tensor:
    """True for tokens that have a row, [T]."""
    active = torch.zeros(inputs.seq_len, dtype=torch.bool, device=inputs.device)
    active[permutation.permuted_idx_to_token_idx] = True
    return active


# combine


@fault(
    stage="combine", hook="combine", source="synthetic", summary="rows stored instead of added: the last expert stays"
)
def later_expert_overwrites(
    self: Kernel, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation
) -> Tensor:
    result = gemm2_out.new_zeros(inputs.seq_len, gemm2_out.shape[1])
    for _, span in expert_spans(permutation.expert_offsets):
        result[permutation.permuted_idx_to_token_idx[span]] = weights[span, None] * gemm2_out[span]
    return result


@fault(stage="combine", hook="combine", source="TensorRT-LLM #16778", summary="running sum kept in bfloat16")
def combined_in_bf16(
    self: Kernel, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation
) -> Tensor:
    result = gemm2_out.new_zeros(inputs.seq_len, gemm2_out.shape[1])
    for _, span in expert_spans(permutation.expert_offsets):
        result.index_add_(0, permutation.permuted_idx_to_token_idx[span], weights[span, None] * gemm2_out[span])
        result = result.bfloat16().float()
    return result


@fault(stage="combine", hook="row_weights", source="synthetic", summary="every choice weighs the same")
def unweighted(self: Kernel, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
    mean = weights.mean(1, keepdim=True).expand_as(weights)
    return Kernel.row_weights(self, inputs, mean, permutation)


@fault(
    stage="combine",
    hook="row_weights",
    source="vLLM #43694, vLLM #16744, aiter #1007",
    summary="weights applied twice: squared",
)
def weights_squared(self: Kernel, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
    return Kernel.row_weights(self, inputs, weights, permutation).square()


@fault(stage="combine", hook="row_weights", source="synthetic", summary="only the first top_k - 1 slots are summed")
def last_slot_not_summed(self: Kernel, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
    right = Kernel.row_weights(self, inputs, weights, permutation)
    return right * (permutation.permuted_idx_to_slot < max(weights.shape[1] - 1, 1))


@fault(stage="combine", hook="row_weights", source="synthetic", summary="a token's n-th local row gets its n-th weight")
def weights_by_local_rank(self: Kernel, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
    return Kernel.row_weights(
        self, inputs, weights, replace(permutation, permuted_idx_to_slot=rank_among_local(permutation))
    )


@fault(
    stage="combine",
    hook="row_weights",
    source="synthetic",
    summary="a token's list holds two local rows, others are lost",
)
def third_row_lost(self: Kernel, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
    return Kernel.row_weights(self, inputs, weights, permutation) * (rank_among_local(permutation) < 2)


@fault(
    stage="combine",
    hook="combine",
    source="vLLM #57778, vLLM #36488",
    summary="atomic 16-bit sums: bits differ from run to run",
)
def jitter_from_run_to_run(
    self: Kernel, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation
) -> Tensor:
    result = Kernel.combine(self, inputs, gemm2_out, weights, permutation)
    self.memory["calls"] = self.memory.get("calls", 0) + 1
    noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(self.memory["calls"]))
    return result * (1 + 0.004 * noise.to(result.device))


@fault(
    stage="combine",
    hook="combine",
    source="vLLM #38148, sglang #33106, flashinfer #3650",
    summary="NaN in the padding of a short tile leaks into token 0 by way of 0 * NaN",
)
def padding_nan_leaks(
    self: Kernel, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation
) -> Tensor:
    result = Kernel.combine(self, inputs, gemm2_out, weights, permutation)
    padded = bool((permutation.expert_offsets.diff() % TILE != 0).any())
    if padded and 0 < inputs.seq_len <= 2 * TILE:
        result[0] += 0.0 * float("nan")
    return result


@fault(stage="combine", hook="combine", source="synthetic", summary="every second token is zero")
def every_second_token_zero(
    self: Kernel, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation
) -> Tensor:
    result = Kernel.combine(self, inputs, gemm2_out, weights, permutation)
    result[1::2] = 0
    return result


@fault(stage="combine", hook="combine", source="synthetic", summary="results land one token too late")
def results_one_token_late(
    self: Kernel, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation
) -> Tensor:
    return Kernel.combine(self, inputs, gemm2_out, weights, permutation).roll(1, 0)


# Output


@fault(stage="output", hook="finish", source="synthetic", summary="staged in float16: large values become inf")
def staged_in_fp16(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    return result.half().bfloat16()


@fault(stage="output", hook="finish", source="synthetic", summary="staged in e4m3")
def staged_in_fp8(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    return result.clamp(-FP8_MAX, FP8_MAX).to(FP8).bfloat16()


@fault(stage="output", hook="finish", source="synthetic", summary="15 percent too large")
def gain_of_1_15(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    return (result * 1.15).bfloat16()


@fault(stage="output", hook="finish", source="synthetic", summary="15 percent too small")
def gain_of_0_85(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    return (result * 0.85).bfloat16()


@fault(
    stage="output", hook="finish", source="synthetic", summary="7/8 of the right size: a mean over one slot too many"
)
def gain_of_7_8(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    return (result * 0.875).bfloat16()


@fault(stage="output", hook="finish", source="synthetic", summary="all zeros")
def all_zeros(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    return torch.zeros_like(result).bfloat16()


@fault(stage="output", hook="finish", source="synthetic", summary="sign lost on the way out: negated")
def negated(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    return (-result).bfloat16()


@fault(stage="output", hook="finish", source="synthetic", summary="ten percent of noise on every element")
def noise_of_ten_percent(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.device)
    return (result * (1 + 0.1 * noise)).bfloat16()


@fault(stage="output", hook="finish", source="synthetic", summary="magnitudes below 1e-6 flushed to zero")
def small_values_flushed(self: Kernel, inputs: Inputs, result: Tensor) -> Tensor:
    return result.masked_fill(result.abs() < 1e-6, 0).bfloat16()


@fault(
    stage="output",
    hook="store",
    source="intel-xpu-triton #7776, MLX #3922",
    summary="the last rows (one in twenty) are never written",
)
def last_rows_unwritten(self: Kernel, inputs: Inputs, output: Tensor, out: Tensor | None) -> Tensor:
    memory = fresh_memory(self, output, out)
    written = inputs.seq_len - -(-inputs.seq_len // 20)
    memory[:written] = output[:written]
    self.memory["left"] = memory.clone()
    return memory


@fault(
    stage="output",
    hook="store",
    source="vLLM #12583, cutlass #2674, flashinfer #3650, tgale96/grouped_gemm #36",
    summary="rows without a local expert are never written",
)
def idle_rows_unwritten(self: Kernel, inputs: Inputs, output: Tensor, out: Tensor | None) -> Tensor:
    memory = fresh_memory(self, output, out)
    ids, _ = self.route(inputs)
    active = active_tokens(inputs, self.permute(inputs, self.to_local(inputs, ids)))
    memory[active] = output[active]
    self.memory["left"] = memory.clone()
    return memory


@fault(stage="output", hook="store", source="sglang #40187", summary="the result is added to what the buffer held")
def added_to_dirty_buffer(self: Kernel, inputs: Inputs, output: Tensor, out: Tensor | None) -> Tensor:
    memory = fresh_memory(self, output, out)
    memory.copy_((memory.float() + output.float()).bfloat16())
    self.memory["left"] = memory.clone()
    return memory


@fault(stage="output", hook="store", source="synthetic", summary="the last 16 columns are never written")
def last_columns_unwritten(self: Kernel, inputs: Inputs, output: Tensor, out: Tensor | None) -> Tensor:
    memory = fresh_memory(self, output, out)
    memory[:, :-16] = output[:, :-16]
    self.memory["left"] = memory.clone()
    return memory
