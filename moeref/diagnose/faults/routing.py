"""Faults of the choice of experts: scores, bias, groups, top-k."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moeref.diagnose.faults.registry import fault
from moeref.diagnose.kernel import Kernel, best, by_group, masked
from moeref.inputs import FP8, Inputs


def _with_bias(self: Kernel, inputs: Inputs, scores: Tensor, bias: Tensor) -> Tensor:
    return Kernel.add_bias(self, replace(inputs, routing_bias=bias), scores)


def _with_logits(self: Kernel, inputs: Inputs, logits: Tensor) -> Tensor:
    return Kernel.scores(self, replace(inputs, routing_logits=logits))


# Scores


@fault(stage="routing", hook="scores", source="flashinfer #2534", summary="router logits rounded to bfloat16")
def logits_in_bf16(self: Kernel, inputs: Inputs) -> Tensor:
    return _with_logits(self, inputs, inputs.routing_logits.bfloat16().float())


@fault(
    stage="routing",
    hook="scores",
    source="TensorRT-Model-Connect #669, lmdeploy #3030",
    summary="softmax over the experts instead of a sigmoid",
)
def softmax_scores(self: Kernel, inputs: Inputs) -> Tensor:
    return torch.softmax(inputs.routing_logits, dim=-1)


@fault(stage="routing", hook="scores", source="synthetic", summary="sigmoid replaced by (1 + x / (1 + |x|)) / 2")
def rational_sigmoid(self: Kernel, inputs: Inputs) -> Tensor:
    x = inputs.routing_logits
    return 0.5 + 0.5 * x / (1 + x.abs())


@fault(
    stage="routing", hook="scores", source="synthetic", summary="sigmoid as (1 + tanh(x / 2)) / 2: cancels below -17"
)
def sigmoid_by_tanh(self: Kernel, inputs: Inputs) -> Tensor:
    return 0.5 + 0.5 * torch.tanh(inputs.routing_logits / 2)


@fault(stage="routing", hook="scores", source="synthetic", summary="scores rounded to bfloat16 after the sigmoid")
def scores_in_bf16(self: Kernel, inputs: Inputs) -> Tensor:
    return Kernel.scores(self, inputs).bfloat16().float()


@fault(stage="routing", hook="scores", source="synthetic", summary="scores stored in float16, small ones underflow")
def scores_in_fp16(self: Kernel, inputs: Inputs) -> Tensor:
    return Kernel.scores(self, inputs).half().float()


@fault(stage="routing", hook="scores", source="synthetic", summary="logits clipped to [-10, 10] before the sigmoid")
def logits_clipped(self: Kernel, inputs: Inputs) -> Tensor:
    return _with_logits(self, inputs, inputs.routing_logits.clamp(-10, 10))


@fault(stage="routing", hook="scores", source="synthetic", summary="expert e reads the logit of expert e + 1")
def logits_of_next_expert(self: Kernel, inputs: Inputs) -> Tensor:
    return _with_logits(self, inputs, inputs.routing_logits.roll(-1, 1))


@fault(
    stage="routing", hook="scores", source="synthetic", summary="tokens past 64 reuse the scores of 64 tokens before"
)
def scores_wrap_at_64(self: Kernel, inputs: Inputs) -> Tensor:
    tokens = torch.arange(inputs.seq_len, device=inputs.device) % 64
    return Kernel.scores(self, inputs)[tokens]


# Bias


@fault(stage="bias", hook="add_bias", source="synthetic", summary="routing bias not added at all")
def bias_ignored(self: Kernel, inputs: Inputs, scores: Tensor) -> Tensor:
    return scores


@fault(stage="bias", hook="add_bias", source="synthetic", summary="routing bias subtracted")
def bias_subtracted(self: Kernel, inputs: Inputs, scores: Tensor) -> Tensor:
    return _with_bias(self, inputs, scores, -inputs.routing_bias)


@fault(stage="bias", hook="add_bias", source="synthetic", summary="routing bias added twice")
def bias_added_twice(self: Kernel, inputs: Inputs, scores: Tensor) -> Tensor:
    return _with_bias(self, inputs, scores, inputs.routing_bias.float() * 2)


@fault(stage="bias", hook="add_bias", source="synthetic", summary="expert e reads the bias of expert e - 1")
def bias_of_previous_expert(self: Kernel, inputs: Inputs, scores: Tensor) -> Tensor:
    return _with_bias(self, inputs, scores, inputs.routing_bias.roll(1))


@fault(stage="bias", hook="add_bias", source="synthetic", summary="every group reads the bias of the first group")
def bias_of_first_group(self: Kernel, inputs: Inputs, scores: Tensor) -> Tensor:
    size = max(inputs.geometry.group_size // (2 if inputs.geometry.n_group == 1 else 1), 1)
    experts = torch.arange(inputs.geometry.num_experts, device=inputs.device) % size
    return _with_bias(self, inputs, scores, inputs.routing_bias[experts])


@fault(stage="bias", hook="add_bias", source="synthetic", summary="bias added to the logits, before the sigmoid")
def bias_before_sigmoid(self: Kernel, inputs: Inputs, scores: Tensor) -> Tensor:
    return torch.sigmoid(inputs.routing_logits + inputs.routing_bias.float())


@fault(stage="bias", hook="add_bias", source="synthetic", summary="negative biases cut to 0")
def bias_cut_at_zero(self: Kernel, inputs: Inputs, scores: Tensor) -> Tensor:
    return _with_bias(self, inputs, scores, inputs.routing_bias.clamp(min=0))


@fault(stage="bias", hook="add_bias", source="synthetic", summary="routing bias stored in e4m3")
def bias_in_fp8(self: Kernel, inputs: Inputs, scores: Tensor) -> Tensor:
    return _with_bias(self, inputs, scores, inputs.routing_bias.float().to(FP8).float())


# Groups


@fault(
    stage="groups",
    hook="group_scores",
    source="vLLM #13474",
    summary="a group's score is its largest member, not the sum of its two largest",
)
def group_score_is_the_maximum(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor) -> Tensor:
    return by_group(inputs, biased).amax(-1)


@fault(stage="groups", hook="group_scores", source="synthetic", summary="group scores made of scores without bias")
def group_score_without_bias(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor) -> Tensor:
    return Kernel.group_scores(self, inputs, scores, scores)


@fault(stage="groups", hook="group_scores", source="synthetic", summary="a group's score is the sum of all members")
def group_score_sums_all(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor) -> Tensor:
    return by_group(inputs, biased).sum(-1)


@fault(
    stage="groups", hook="group_scores", source="synthetic", summary="a group's score sums its three largest members"
)
def group_score_sums_three(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor) -> Tensor:
    return by_group(inputs, biased).topk(min(3, inputs.geometry.group_size), dim=-1).values.sum(-1)


@fault(stage="groups", hook="group_scores", source="synthetic", summary="a group's score sums its first two members")
def group_score_of_first_two(self: Kernel, inputs: Inputs, scores: Tensor, biased: Tensor) -> Tensor:
    return by_group(inputs, biased)[:, :, :2].sum(-1)


@fault(stage="groups", hook="choose_groups", source="flashinfer #1723", summary="no limit on groups: all of them stay")
def all_groups_kept(self: Kernel, inputs: Inputs, group_scores: Tensor) -> Tensor:
    return best(group_scores, inputs.geometry.n_group)


@fault(stage="groups", hook="choose_groups", source="flashinfer #1723", summary="one group more than topk_group stays")
def one_group_too_many(self: Kernel, inputs: Inputs, group_scores: Tensor) -> Tensor:
    return best(group_scores, inputs.geometry.topk_group + 1)


@fault(stage="groups", hook="choose_groups", source="synthetic", summary="one group fewer than topk_group stays")
def one_group_too_few(self: Kernel, inputs: Inputs, group_scores: Tensor) -> Tensor:
    g = inputs.geometry
    return best(group_scores, max(g.topk_group - 1, -(-g.top_k // g.group_size)))


@fault(
    stage="groups", hook="choose_groups", source="synthetic", summary="the mask keeps the groups after the best ones"
)
def groups_after_the_best(self: Kernel, inputs: Inputs, group_scores: Tensor) -> Tensor:
    return (Kernel.choose_groups(self, inputs, group_scores) + 1) % inputs.geometry.n_group


@fault(
    stage="groups",
    hook="mask",
    source="vLLM #13474, transformers #45440, transformers #45441, flashinfer #4639, flashinfer #2168",
    summary="experts of other groups masked with 0, which outranks negative scores",
)
def masked_with_zero(self: Kernel, inputs: Inputs, biased: Tensor, groups: Tensor) -> Tensor:
    return masked(inputs, biased, groups, 0.0)


# Top-k


@fault(stage="topk", hook="choose_experts", source="synthetic", summary="experts chosen by scores without bias")
def chosen_without_bias(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    lowest = torch.finfo(torch.float32).min
    return best(scores.masked_fill(masked == lowest, lowest), inputs.geometry.top_k)


@fault(stage="topk", hook="choose_experts", source="synthetic", summary="experts chosen by scores rounded to bfloat16")
def chosen_in_bf16(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    return Kernel.choose_experts(self, inputs, scores, masked.bfloat16().float())


@fault(
    stage="topk",
    hook="choose_experts",
    source="vLLM #39391",
    summary="the last choice repeats the one before: an id twice",
)
def one_expert_chosen_twice(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    ids = Kernel.choose_experts(self, inputs, scores, masked)
    return torch.cat([ids[:, :-1], ids[:, -2:-1] if ids.shape[1] > 1 else ids[:, :1]], 1)


@fault(stage="topk", hook="choose_experts", source="synthetic", summary="only top_k - 1 experts are chosen")
def one_choice_too_few(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    return Kernel.choose_experts(self, inputs, scores, masked)[:, : max(inputs.geometry.top_k - 1, 1)]


@fault(stage="topk", hook="choose_experts", source="synthetic", summary="the next best replaces the last of the top_k")
def last_choice_is_the_next_best(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    ids = best(masked, inputs.geometry.top_k + 1)
    return torch.cat([ids[:, : inputs.geometry.top_k - 1], ids[:, -1:]], 1)


@fault(stage="topk", hook="choose_experts", source="synthetic", summary="the best expert is skipped")
def best_choice_skipped(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    return best(masked, inputs.geometry.top_k + 1)[:, 1:]


@fault(
    stage="topk",
    hook="choose_experts",
    source="tokenspeed #605",
    summary="ids recovered by searching the value, so equal values give one id twice",
)
def index_found_by_value(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    values = masked.gather(1, Kernel.choose_experts(self, inputs, scores, masked))
    return (masked.unsqueeze(1) == values.unsqueeze(2)).to(torch.uint8).argmax(-1)


@fault(
    stage="topk",
    hook="choose_experts",
    source="flashinfer #3529, flashinfer #2605",
    summary="many equal scores overflow the candidate buffer: better ones behind are lost",
)
def tied_candidates_overflow(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    ids = Kernel.choose_experts(self, inputs, scores, masked)
    candidate = masked >= masked.gather(1, ids[:, -1:])  # at or above the last chosen; more than top_k only with ties
    first = torch.sort(candidate.to(torch.uint8), dim=-1, descending=True, stable=True).indices
    return first[:, : inputs.geometry.top_k]


@fault(
    stage="topk", hook="choose_experts", source="synthetic", summary="the loop ends early: expert E - 1 is never chosen"
)
def last_expert_never_chosen(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    return Kernel.choose_experts(self, inputs, scores, masked[:, :-1])


@fault(stage="topk", hook="choose_experts", source="synthetic", summary="odd experts are ranked a little too low")
def odd_experts_rank_low(self: Kernel, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
    lowered = masked.clone()
    lowered[:, 1::2] -= 0.05
    return Kernel.choose_experts(self, inputs, scores, lowered)
