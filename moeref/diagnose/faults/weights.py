"""Faults of routing weights and of the step from global ids to local experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moeref.diagnose.faults.registry import fault
from moeref.diagnose.kernel import Kernel
from moeref.inputs import FP8, Inputs
from moeref.reference import NORMALISER_EPSILON


def _normalise(chosen: Tensor, total: Tensor, epsilon: float = NORMALISER_EPSILON) -> Tensor:
    return chosen / (total + epsilon)


# Weights


@fault(
    stage="weights",
    hook="weigh",
    source="transformers #41647, vLLM #12002, PaddleFormers #3452",
    summary="combine weights gathered from biased scores",
)
def biased_weights(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return Kernel.weigh(self, inputs, biased, biased, ids)


@fault(
    stage="weights",
    hook="weigh",
    source="vLLM-metax #269",
    summary="combine weights gathered from biased scores where there is one group only",
)
def biased_weights_for_one_group(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return Kernel.weigh(self, inputs, biased if inputs.geometry.n_group == 1 else scores, biased, ids)


@fault(
    stage="weights",
    hook="weigh",
    source="flashinfer #3875",
    summary="score recovered as (score + bias) - bias, which cancels",
)
def weights_by_subtraction(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return Kernel.weigh(self, inputs, biased - inputs.routing_bias.float(), biased, ids)


@fault(
    stage="weights",
    hook="weigh",
    source="flashinfer #3803, flashinfer #3946",
    summary="nothing added to the sum of the chosen scores: 0 / 0",
)
def no_normaliser_epsilon(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    chosen = scores.gather(1, ids)
    return _normalise(chosen, chosen.sum(-1, keepdim=True), 0.0)


@fault(stage="weights", hook="weigh", source="synthetic", summary="1e-6 added to the sum of the chosen scores")
def large_normaliser_epsilon(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    chosen = scores.gather(1, ids)
    return _normalise(chosen, chosen.sum(-1, keepdim=True), 1e-6)


@fault(stage="weights", hook="weigh", source="TensorRT-LLM #17088", summary="weights not normalised")
def not_normalised(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return scores.gather(1, ids)


@fault(
    stage="weights", hook="weigh", source="megablocks #87", summary="weights normalised over the batch, slot by slot"
)
def normalised_over_the_batch(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    chosen = scores.gather(1, ids)
    return _normalise(chosen, chosen.sum(0, keepdim=True))


@fault(stage="weights", hook="weigh", source="synthetic", summary="weights normalised over all experts, chosen or not")
def normalised_over_all_experts(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return _normalise(scores.gather(1, ids), scores.sum(-1, keepdim=True))


@fault(stage="weights", hook="weigh", source="synthetic", summary="weights normalised over the chosen local experts")
def normalised_over_local_experts(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    local = ids - inputs.local_expert_offset
    chosen = scores.gather(1, ids)
    is_local = (local >= 0) & (local < inputs.geometry.num_local_experts)
    return _normalise(chosen, (chosen * is_local).sum(-1, keepdim=True))


@fault(stage="weights", hook="weigh", source="synthetic", summary="the last choice is left out of the sum")
def normaliser_misses_the_last(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    chosen = scores.gather(1, ids)
    return _normalise(chosen, chosen[:, : max(ids.shape[1] - 1, 1)].sum(-1, keepdim=True))


@fault(stage="weights", hook="weigh", source="synthetic", summary="softmax over the chosen scores")
def softmax_of_the_chosen(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return torch.softmax(scores.gather(1, ids), dim=-1)


@fault(
    stage="weights",
    hook="weigh",
    source="vllm-xpu-kernels #66",
    summary="weights in the reverse order of their experts",
)
def weights_reversed(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return Kernel.weigh(self, inputs, scores, biased, ids).flip(1)


@fault(
    stage="weights", hook="weigh", source="vllm-xpu-kernels #66", summary="each expert gets the weight of the next slot"
)
def weights_rotated(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return Kernel.weigh(self, inputs, scores, biased, ids).roll(-1, 1)


@fault(stage="weights", hook="weigh", source="synthetic", summary="each token gets the weights of the token before")
def weights_of_previous_token(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return Kernel.weigh(self, inputs, scores, biased, ids).roll(1, 0)


@fault(stage="weights", hook="weigh", source="synthetic", summary="weights rounded to e4m3")
def weights_in_fp8(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
    return Kernel.weigh(self, inputs, scores, biased, ids).to(FP8).float()


@fault(
    stage="weights",
    hook="apply_factor",
    source="vLLM #43769, flashinfer #3499, sglang #31449",
    summary="routed_scaling_factor not applied",
)
def factor_not_applied(self: Kernel, inputs: Inputs, weights: Tensor) -> Tensor:
    return weights


@fault(
    stage="weights",
    hook="apply_factor",
    source="vLLM #24119, vLLM #45037, sglang #8511, sglang #35152, kvcache-ai/sglang #86",
    summary="routed_scaling_factor applied twice",
)
def factor_applied_twice(self: Kernel, inputs: Inputs, weights: Tensor) -> Tensor:
    return Kernel.apply_factor(self, inputs, weights) * inputs.routed_scaling_factor


@fault(stage="weights", hook="apply_factor", source="synthetic", summary="routed_scaling_factor fixed at 2.5")
def factor_fixed(self: Kernel, inputs: Inputs, weights: Tensor) -> Tensor:
    return weights * 2.5


@fault(stage="weights", hook="apply_factor", source="synthetic", summary="routed_scaling_factor cut to an integer")
def factor_cut_to_an_integer(self: Kernel, inputs: Inputs, weights: Tensor) -> Tensor:
    return weights * int(inputs.routed_scaling_factor)


# Local experts


@fault(
    stage="offset",
    hook="to_local",
    source="flashinfer #3066, vllm-xpu-kernels #405",
    summary="local_expert_offset ignored",
)
def offset_ignored(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    return ids


@fault(stage="offset", hook="to_local", source="flashinfer #3547", summary="local_expert_offset subtracted twice")
def offset_subtracted_twice(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    return ids - 2 * inputs.local_expert_offset


@fault(stage="offset", hook="to_local", source="synthetic", summary="local_expert_offset one too large")
def offset_one_too_large(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    return ids - inputs.local_expert_offset - 1


@fault(stage="offset", hook="to_local", source="synthetic", summary="local_expert_offset one too small")
def offset_one_too_small(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    return ids - inputs.local_expert_offset + 1


@fault(stage="offset", hook="to_local", source="synthetic", summary="offset rounded down to a multiple of L")
def offset_rounded_down(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    count = inputs.geometry.num_local_experts
    return ids - inputs.local_expert_offset // count * count


@fault(stage="offset", hook="to_local", source="synthetic", summary="a negative offset cut to 0")
def offset_cut_at_zero(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    return ids - max(inputs.local_expert_offset, 0)


@fault(stage="offset", hook="to_local", source="vLLM #51632", summary="the last local expert treated as not local")
def last_local_expert_dropped(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    local = Kernel.to_local(self, inputs, ids)
    return local.masked_fill(local == inputs.geometry.num_local_experts - 1, -1)


@fault(stage="offset", hook="to_local", source="synthetic", summary="the first local expert treated as not local")
def first_local_expert_dropped(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    local = Kernel.to_local(self, inputs, ids)
    return local.masked_fill(local == 0, -1)


@fault(stage="offset", hook="to_local", source="synthetic", summary="ids of other ranks taken modulo L as local")
def ids_taken_modulo(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    return Kernel.to_local(self, inputs, ids) % inputs.geometry.num_local_experts


@fault(stage="offset", hook="to_local", source="synthetic", summary="ids just below the shard count from its end")
def negative_local_ids_wrap(self: Kernel, inputs: Inputs, ids: Tensor) -> Tensor:
    local = Kernel.to_local(self, inputs, ids)
    return torch.where(local < 0, local + inputs.geometry.num_local_experts, local)
