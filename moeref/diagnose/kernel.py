"""The layer as one black box with a hook for every step: what faults and legal variants are small changes of.

An instance is a candidate: ten inputs, an optional `out`, and the three routing sizes that the shapes do not hold. A
subclass that overrides one hook is a kernel with one thing changed; `Kernel.<hook>(self, ...)` is the right behaviour.
Steps in order, names of axes as in moeref.reference:

    arguments -> scores add_bias group_scores choose_groups mask choose_experts weigh apply_factor
              -> to_local permute -> gather activation_scale gemm1_scale gemm1 (dot1) -> swiglu
              -> block_scale cast read_scale -> gemm2_scale gemm2 (dot2) -> row_weights combine -> finish store
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import silu

from moeref.inputs import FP8, Inputs
from moeref.quant import FP8_MAX, dequantize_1x128, power_of_two_ceil, quantize_1x128
from moeref.reference import NORMALISER_EPSILON, Permutation, expert_spans
from moeref.spec import BLOCK, Geometry, Recipe

USUAL = Recipe(requantize=1)
"""What most real kernels do: SwiGLU's output is stored in e4m3, everything else is float32."""


class Kernel:
    """One candidate. `memory` is what a stateful fault keeps between calls; the right kernel keeps nothing."""

    MOEREF: ClassVar[dict[str, Any]] = {"deterministic": True}  # the same bytes from every call, by promise

    def __init__(self, recipe: Recipe = USUAL) -> None:
        self.recipe = recipe
        self.memory: dict[str, Any] = {}

    def __call__(
        self,
        routing_logits: Tensor,
        routing_bias: Tensor,
        hidden_states: Tensor,
        hidden_states_scale: Tensor,
        gemm1_weights: Tensor,
        gemm1_weights_scale: Tensor,
        gemm2_weights: Tensor,
        gemm2_weights_scale: Tensor,
        local_expert_offset: int,
        routed_scaling_factor: float,
        out: Tensor | None = None,
        *,
        n_group: int = 8,
        topk_group: int = 4,
        top_k: int = 8,
    ) -> Tensor:
        """The layer's output [T, H] bfloat16, in `out` where one is given."""
        geometry = Geometry(
            num_experts=routing_logits.shape[1],
            num_local_experts=gemm1_weights.shape[0],
            hidden_size=hidden_states.shape[1],
            intermediate_size=gemm2_weights.shape[2],
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
        )
        inputs = Inputs(
            routing_logits,
            routing_bias,
            hidden_states,
            hidden_states_scale,
            gemm1_weights,
            gemm1_weights_scale,
            gemm2_weights,
            gemm2_weights_scale,
            local_expert_offset,
            routed_scaling_factor,
            geometry,
        )
        return self.launch(inputs, out)

    # The whole call

    def launch(self, inputs: Inputs, out: Tensor | None) -> Tensor:
        """All stages."""
        inputs = self.arguments(inputs)
        ids, weights = self.route(inputs)
        permutation = self.permute(inputs, self.to_local(inputs, ids))
        gemm2_out = self.experts(inputs, permutation)
        result = self.combine(inputs, gemm2_out, self.row_weights(inputs, weights, permutation), permutation)
        return self.store(inputs, self.finish(inputs, result), out)

    def arguments(self, inputs: Inputs) -> Inputs:
        """What the kernel reads of its arguments."""
        return inputs

    # Routing

    def route(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(topk_ids, topk_weights), [T, K] each."""
        scores = self.scores(inputs)
        biased = self.add_bias(inputs, scores)
        groups = self.choose_groups(inputs, self.group_scores(inputs, scores, biased))
        ids = self.choose_experts(inputs, scores, self.mask(inputs, biased, groups))
        return ids, self.apply_factor(inputs, self.weigh(inputs, scores, biased, ids))

    def scores(self, inputs: Inputs) -> Tensor:
        """Sigmoid of the logits, [T, E]."""
        return 1.0 / (1.0 + torch.exp(-inputs.routing_logits))

    def add_bias(self, inputs: Inputs, scores: Tensor) -> Tensor:
        """What the choice is made on, [T, E]."""
        return scores + inputs.routing_bias.float()

    def group_scores(self, inputs: Inputs, scores: Tensor, biased: Tensor) -> Tensor:
        """Sum of the two best of each group, [T, n_group]."""
        return by_group(inputs, biased).topk(min(2, inputs.geometry.group_size), dim=-1).values.sum(-1)

    def choose_groups(self, inputs: Inputs, group_scores: Tensor) -> Tensor:
        """Ids of the groups that stay, [T, topk_group]; equal scores: the lower id."""
        return best(group_scores, inputs.geometry.topk_group)

    def mask(self, inputs: Inputs, biased: Tensor, groups: Tensor) -> Tensor:
        """biased with the experts of other groups at the lowest finite number, [T, E]."""
        return masked(inputs, biased, groups, torch.finfo(torch.float32).min)

    def choose_experts(self, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
        """topk_ids [T, K], best first; equal scores: the lower id."""
        return best(masked, inputs.geometry.top_k)

    def weigh(self, inputs: Inputs, scores: Tensor, biased: Tensor, ids: Tensor) -> Tensor:
        """Normalised weights of the chosen, [T, K]."""
        chosen = scores.gather(1, ids)
        return chosen / (chosen.sum(-1, keepdim=True) + NORMALISER_EPSILON)

    def apply_factor(self, inputs: Inputs, weights: Tensor) -> Tensor:
        """Times routed_scaling_factor, [T, K]."""
        weights = weights * inputs.routed_scaling_factor
        return weights.bfloat16().float() if self.recipe.topk_weights == "bf16" else weights

    # From choices to rows

    def to_local(self, inputs: Inputs, ids: Tensor) -> Tensor:
        """Local expert of each choice, [T, K]; anything outside 0 .. L-1 is not local."""
        return ids - inputs.local_expert_offset

    def permute(self, inputs: Inputs, local: Tensor) -> Permutation:
        """Local pairs sorted by expert, then by token."""
        count = inputs.geometry.num_local_experts
        tokens, slots = torch.nonzero((local >= 0) & (local < count), as_tuple=True)
        return sort_pairs(tokens, slots, local[tokens, slots], count)

    # Experts

    def experts(self, inputs: Inputs, permutation: Permutation) -> Tensor:
        """Both matrix products and what lies between, [P, H]."""
        hidden = dequantize_1x128(self.gather(inputs, permutation), self.activation_scale(inputs, permutation))
        gemm1_out = self.gemm1(inputs, hidden, self.gemm1_scale(inputs), permutation)
        requantized = self.requantize(inputs, self.swiglu(inputs, self.store_gemm1(gemm1_out)), permutation)
        return self.gemm2(inputs, requantized, self.gemm2_scale(inputs), permutation)

    def gather(self, inputs: Inputs, permutation: Permutation) -> Tensor:
        """hidden_states of each row, unscaled, [P, H]."""
        return widen(inputs.hidden_states.view(torch.uint8)[permutation.permuted_idx_to_token_idx].view(FP8))

    def activation_scale(self, inputs: Inputs, permutation: Permutation) -> Tensor:
        """hidden_states_scale of each row, [P, H/128]."""
        return inputs.hidden_states_scale.T[permutation.permuted_idx_to_token_idx]

    def gemm1_scale(self, inputs: Inputs) -> Tensor:
        """gemm1_weights_scale as read, [L, 2I/128, H/128]."""
        return inputs.gemm1_weights_scale

    def gemm1(self, inputs: Inputs, hidden: Tensor, scale: Tensor, permutation: Permutation) -> Tensor:
        """Each row times its expert's weights, [P, 2I], [up | gate]."""
        out = hidden.new_empty(len(hidden), 2 * inputs.geometry.intermediate_size)
        for expert, span in expert_spans(permutation.expert_offsets):
            out[span] = self.dot1(inputs, expert, hidden[span], dequantize(inputs.gemm1_weights[expert], scale[expert]))
        return out

    def dot1(self, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        """One expert's rows x [rows, H] times weight [2I, H], transposed."""
        return x @ weight.T

    def store_gemm1(self, gemm1_out: Tensor) -> Tensor:
        """gemm1_out as the recipe stores it."""
        if self.recipe.gemm1_out == "bf16":
            gemm1_out = gemm1_out.bfloat16().float()
        if self.recipe.requantize == 2:
            gemm1_out = dequantize_1x128(*quantize_1x128(gemm1_out, self.recipe.scale))
        return gemm1_out

    def swiglu(self, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
        """silu(gate) * up, [P, I]."""
        up, gate = gemm1_out.chunk(2, dim=-1)
        return silu(gate) * up

    def requantize(self, inputs: Inputs, swiglu_out: Tensor, permutation: Permutation) -> Tensor:
        """What gemm2 reads, [P, I]: payload times scale."""
        if self.recipe.requantize == 0:
            return swiglu_out
        scale = self.block_scale(inputs, swiglu_out)
        payload = self.cast(inputs, to_blocks(swiglu_out) / scale.unsqueeze(-1)).reshape(swiglu_out.shape)
        return dequantize_1x128(payload, self.read_scale(inputs, scale, permutation))

    def block_scale(self, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
        """Scale of each 1x128 block, [P, I/128]: amax / 448, 1 where that is 0."""
        return self.scale_of(to_blocks(swiglu_out).abs().amax(-1))

    def scale_of(self, amax: Tensor) -> Tensor:
        """The recipe's scale for these largest magnitudes."""
        scale = amax / FP8_MAX
        if self.recipe.scale == "ue8m0":
            scale = power_of_two_ceil(scale)
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def cast(self, inputs: Inputs, scaled: Tensor) -> Tensor:
        """The e4m3 numbers nearest to `scaled` [P, I/128, 128], saturating, as float32."""
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()

    def read_scale(self, inputs: Inputs, scale: Tensor, permutation: Permutation) -> Tensor:
        """The re-quantisation's scales [P, I/128] as gemm2 reads them."""
        return scale

    def gemm2_scale(self, inputs: Inputs) -> Tensor:
        """gemm2_weights_scale as read, [L, H/128, I/128]."""
        return inputs.gemm2_weights_scale

    def gemm2(self, inputs: Inputs, requantized: Tensor, scale: Tensor, permutation: Permutation) -> Tensor:
        """Each row times its expert's weights, [P, H]."""
        out = requantized.new_empty(len(requantized), inputs.geometry.hidden_size)
        for expert, span in expert_spans(permutation.expert_offsets):
            weight = dequantize(inputs.gemm2_weights[expert], scale[expert])
            out[span] = self.dot2(inputs, expert, requantized[span], weight)
        return out

    def dot2(self, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        """One expert's rows x [rows, I] times weight [H, I], transposed."""
        return x @ weight.T

    # The result

    def row_weights(self, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
        """topk_weights of each row, [P]."""
        return weights[permutation.permuted_idx_to_token_idx, permutation.permuted_idx_to_slot]

    def combine(self, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        """Weighted sum of each token's rows in float32, experts ascending, [T, H]."""
        result = gemm2_out.new_zeros(inputs.seq_len, gemm2_out.shape[1])
        weighted = weights[:, None] * gemm2_out
        for _, span in expert_spans(permutation.expert_offsets):
            result.index_add_(0, permutation.permuted_idx_to_token_idx[span], weighted[span])
        return result

    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        """The final cast to bfloat16."""
        return result.bfloat16()

    def store(self, inputs: Inputs, output: Tensor, out: Tensor | None) -> Tensor:
        """Into the caller's buffer, where there is one."""
        return output if out is None else out.copy_(output)


HOOKS = tuple(name for name in vars(Kernel) if not name.startswith("_") and callable(getattr(Kernel, name)))
"""Names of the steps that a fault or variant may override."""


# What hooks are made of


def by_group(inputs: Inputs, scores: Tensor) -> Tensor:
    """[T, E] -> [T, n_group, E/n_group]."""
    return scores.view(len(scores), inputs.geometry.n_group, inputs.geometry.group_size)


def best(scores: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest of each row, best first; equal ones: the lower id."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]


def masked(inputs: Inputs, biased: Tensor, groups: Tensor, value: float) -> Tensor:
    """biased [T, E] with `value` for every expert outside of groups [T, n]."""
    kept = torch.zeros(len(biased), inputs.geometry.n_group, dtype=torch.bool, device=biased.device)
    kept.scatter_(1, groups, True)
    return by_group(inputs, biased).masked_fill(~kept.unsqueeze(-1), value).view_as(biased)


def sort_pairs(tokens: Tensor, slots: Tensor, experts: Tensor, count: int) -> Permutation:
    """The permutation of pairs (token, slot) with their local expert, all [P]."""
    order = torch.argsort(experts, stable=True)
    offsets = torch.bincount(experts, minlength=count).cumsum(0)
    return Permutation(torch.cat([offsets.new_zeros(1), offsets]), tokens[order], slots[order])


def to_blocks(x: Tensor) -> Tensor:
    """[P, N] -> [P, N/128, 128]."""
    return x.view(len(x), x.shape[1] // BLOCK, BLOCK)


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """One expert's weight [N, M] e4m3 times scale [N/128, M/128], float32."""
    rows, columns = scale.shape
    return widen(weight).view(rows, BLOCK, columns, BLOCK).mul_(scale[:, None, :, None]).view(weight.shape)


def widen(payload: Tensor) -> Tensor:
    """e4m3 -> a fresh float32 tensor, the same values; on a CPU seven times as fast as torch's cast.

    The seven bits of exponent and mantissa, put where float32 has its own, make a number 2**120 times too small.
    """
    if payload.device.type != "cpu" or not payload.numel():
        return payload.float()
    octets = payload.view(torch.int8).to(torch.int32)
    values = octets.bitwise_left_shift_(20).bitwise_and_(SIGN_AND_E4M3).view(torch.float32).mul_(2.0**120)
    low, high = torch.aminmax(values)
    return payload.float() if max(-float(low), float(high)) > FP8_MAX else values  # 480 is e4m3's NaN


SIGN_AND_E4M3 = 0x87F00000 - (1 << 32)
