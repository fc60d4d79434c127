"""Legal variants: right kernels that differ from the definition as real ones do. No check may fire on any of them.

Every recipe that moeref.judge.recipes knows is one. The others differ in ways that no recipe names: the order of sums,
where a factor is applied, storage in fewer bits where that costs less than the re-quantisation does, ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeref.diagnose.kernel import USUAL, Kernel, best, masked, to_blocks
from moeref.inputs import Inputs
from moeref.judge.recipes import LEGAL
from moeref.reference import Permutation, expert_spans
from moeref.spec import BLOCK, Recipe


@dataclass(frozen=True)
class Variant:
    """A right kernel."""

    name: str
    summary: str
    kernel: type[Kernel]
    recipe: Recipe  # the nearest one that has a name

    def build(self) -> Kernel:
        """A fresh candidate."""
        return self.kernel(self.recipe)


VARIANTS: dict[str, Variant] = {r.name: Variant(r.name, f"recipe {r.name}", Kernel, r) for r in LEGAL}
"""Every variant by name, the recipes first."""


def variant(name: str, summary: str, recipe: Recipe = USUAL) -> Callable[[type[Kernel]], type[Kernel]]:
    """Register the decorated class under this name."""

    def register(kernel: type[Kernel]) -> type[Kernel]:
        if name in VARIANTS:
            raise ValueError(f"variant {name} exists already")
        VARIANTS[name] = Variant(name, summary, kernel, recipe)
        return kernel

    return register


# Another order of the same arithmetic


@variant("weight_before_requantize", "routing weights applied before the re-quantisation, combine only adds")
class WeightBeforeRequantize(Kernel):
    """Weights go where gemm2 reads its rows."""

    def route(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Kept for the re-quantisation of the same call."""
        ids, weights = Kernel.route(self, inputs)
        self.memory["weights"] = weights
        return ids, weights

    def requantize(self, inputs: Inputs, swiglu_out: Tensor, permutation: Permutation) -> Tensor:
        """Of the weighted rows."""
        weights = Kernel.row_weights(self, inputs, self.memory["weights"], permutation)
        return Kernel.requantize(self, inputs, swiglu_out * weights[:, None], permutation)

    def row_weights(self, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
        """Already applied."""
        return torch.ones_like(Kernel.row_weights(self, inputs, weights, permutation))


@variant("factor_after_combine", "routed_scaling_factor applied to the sum")
class FactorAfterCombine(Kernel):
    """As kernels do that take topk_weights from elsewhere."""

    def apply_factor(self, inputs: Inputs, weights: Tensor) -> Tensor:
        """Not yet."""
        return weights

    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        """Now."""
        return Kernel.finish(self, inputs, result * inputs.routed_scaling_factor)


@variant("experts_descending", "experts summed in descending order")
class ExpertsDescending(Kernel):
    """combine the other way round."""

    def combine(self, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        """Last expert first."""
        result = gemm2_out.new_zeros(inputs.seq_len, gemm2_out.shape[1])
        for _, span in reversed(expert_spans(permutation.expert_offsets)):
            tokens = permutation.permuted_idx_to_token_idx[span]
            result.index_add_(0, tokens, weights[span, None] * gemm2_out[span])
        return result


@variant("blocks_descending", "blocks of K summed from the last to the first, in both products")
class BlocksDescending(Kernel):
    """Partial sums of 128 in float32."""

    def dot1(self, inputs: Inputs, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        """Last block first."""
        total = x.new_zeros(len(x), len(weight))
        for start in reversed(range(0, x.shape[1], BLOCK)):
            total += x[:, start : start + BLOCK] @ weight[:, start : start + BLOCK].T
        return total

    dot2 = dot1


@variant("stable_sigmoid", "sigmoid by the library, which takes another branch for negative logits")
class StableSigmoid(Kernel):
    """The same to a unit in the last place."""

    def scores(self, inputs: Inputs) -> Tensor:
        """By torch."""
        return torch.sigmoid(inputs.routing_logits)


@variant("masked_with_infinity", "experts of other groups masked with minus infinity")
class MaskedWithInfinity(Kernel):
    """In place of the lowest finite number."""

    def mask(self, inputs: Inputs, biased: Tensor, groups: Tensor) -> Tensor:
        """Never chosen either way."""
        return masked(inputs, biased, groups, -torch.inf)


# Ties, which the definition leaves open


def best_high(scores: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest of each row, best first; equal ones: the higher id."""
    return scores.shape[1] - 1 - best(scores.flip(1), count)


@variant("ties_to_the_higher_id", "the higher id wins among equal scores, of groups and of experts")
class TiesToTheHigherId(Kernel):
    """The other of the two natural orders."""

    def choose_groups(self, inputs: Inputs, group_scores: Tensor) -> Tensor:
        """Equal scores: the higher id."""
        return best_high(group_scores, inputs.geometry.topk_group)

    def choose_experts(self, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
        """Equal scores: the higher id."""
        return best_high(masked, inputs.geometry.top_k)


# Storage in fewer bits, below the noise of the re-quantisation


@variant("fp16_gemm1", "gemm1's result stored in float16")
class Fp16Gemm1(Kernel):
    """Three bits finer than bfloat16."""

    def store_gemm1(self, gemm1_out: Tensor) -> Tensor:
        """Finite for every value kind: the largest is near 35000."""
        return gemm1_out.half().float()


@variant("bf16_swiglu", "gemm1's result and SwiGLU's stored in bfloat16", Recipe(gemm1_out="bf16", requantize=1))
class Bf16Swiglu(Kernel):
    """As where activation and quantisation are two launches."""

    def swiglu(self, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
        """Rounded before the re-quantisation."""
        return Kernel.swiglu(self, inputs, gemm1_out).bfloat16().float()


@variant("bf16_gemm2", "gemm2's rows stored in bfloat16, combined in float32")
class Bf16Gemm2(Kernel):
    """As where combine is a launch of its own."""

    def gemm2(self, inputs: Inputs, requantized: Tensor, scale: Tensor, permutation: Permutation) -> Tensor:
        """Rounded before combine."""
        return Kernel.gemm2(self, inputs, requantized, scale, permutation).bfloat16().float()


@variant("bf16_throughout", "gemm1's, SwiGLU's and gemm2's results in bfloat16", Recipe(gemm1_out="bf16", requantize=1))
class Bf16Throughout(Bf16Swiglu, Bf16Gemm2):
    """A pipeline of separate launches."""


@variant("bf16_activation_scale", "hidden_states_scale rounded to bfloat16")
class Bf16ActivationScale(Kernel):
    """Half a percent at most."""

    def activation_scale(self, inputs: Inputs, permutation: Permutation) -> Tensor:
        """Eight bits of mantissa."""
        return Kernel.activation_scale(self, inputs, permutation).bfloat16().float()


@variant("scaled_to_240", "re-quantised by amax / 240: the upper range of e4m3 stays unused")
class ScaledTo240(Kernel):
    """The largest number of e4m3fnuz."""

    def block_scale(self, inputs: Inputs, swiglu_out: Tensor) -> Tensor:
        """A floating-point format loses nothing by it but small numbers."""
        scale = to_blocks(swiglu_out).abs().amax(-1) / 240
        return torch.where(scale > 0, scale, torch.ones_like(scale))


@variant("truncated_output", "the final cast cuts off instead of rounding")
class TruncatedOutput(Kernel):
    """Half a unit in the last place, on average, towards zero."""

    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        """The upper half of each float32."""
        return (result.view(torch.int32) & -65536).view(torch.float32).bfloat16()
