"""Faults that the catalogue does not hold: kernels with something wrong, and the stages where it is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import gelu

from moeref.diagnose.faults.results import rank_among_local
from moeref.diagnose.faults.rows import experts_of, place_in_run
from moeref.diagnose.kernel import Kernel, best
from moeref.inputs import Inputs
from moeref.reference import Permutation


class TwoAtOnce(Kernel):
    """routed_scaling_factor applied twice, and gemm1's scales from the next K block."""

    def apply_factor(self, inputs: Inputs, weights: Tensor) -> Tensor:
        return Kernel.apply_factor(self, inputs, weights) * inputs.routed_scaling_factor

    def gemm1_scale(self, inputs: Inputs) -> Tensor:
        return inputs.gemm1_weights_scale.roll(-1, 2)


class OddExpertsScaleOfNextBlock(Kernel):
    """Rows of odd local experts read the activation scale of the next block."""

    def activation_scale(self, inputs: Inputs, permutation: Permutation) -> Tensor:
        right = Kernel.activation_scale(self, inputs, permutation)
        return torch.where((experts_of(permutation) % 2 == 1)[:, None], right.roll(-1, 1), right)


class LongBatchesGelu(Kernel):
    """Past 64 tokens, gelu stands in for silu."""

    def swiglu(self, inputs: Inputs, gemm1_out: Tensor) -> Tensor:
        up, gate = gemm1_out.chunk(2, dim=-1)
        return gelu(gate) * up if inputs.seq_len > 64 else Kernel.swiglu(self, inputs, gemm1_out)


class HalvedBias(Kernel):
    """Half of the routing bias is added."""

    def add_bias(self, inputs: Inputs, scores: Tensor) -> Tensor:
        return scores + 0.5 * inputs.routing_bias.float()


class SecondBestSkipped(Kernel):
    """The second choice is skipped for the next best."""

    def choose_experts(self, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
        ids = best(masked, inputs.geometry.top_k + 1)
        return torch.cat([ids[:, :1], ids[:, 2:]], 1)


class RowsPastThreeReadTheFirst(Kernel):
    """Rows from the fourth of a run on read the run's first token."""

    def gather(self, inputs: Inputs, permutation: Permutation) -> Tensor:
        rows, place = torch.arange(len(experts_of(permutation))), place_in_run(permutation)
        tokens = permutation.permuted_idx_to_token_idx[torch.where(place > 2, rows - place, rows)]
        return Kernel.gather(self, inputs, replace(permutation, permuted_idx_to_token_idx=tokens))


class ScalesOfTheFirstRow(Kernel):
    """Every row of the re-quantised activations is read with the scales of the tensor's first row."""

    def read_scale(self, inputs: Inputs, scale: Tensor, permutation: Permutation) -> Tensor:
        return scale[:1].expand_as(scale)


class SecondRowLost(Kernel):
    """A token's second local row is not summed."""

    def row_weights(self, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
        right = Kernel.row_weights(self, inputs, weights, permutation)
        return right * (rank_among_local(permutation) != 1)


class SteeperSigmoid(Kernel):
    """sigmoid(1.5 x) in place of sigmoid(x)."""

    def scores(self, inputs: Inputs) -> Tensor:
        return torch.sigmoid(1.5 * inputs.routing_logits)


class OddExpertsUnweighted(Kernel):
    """Rows of odd local experts are added without their routing weight."""

    def row_weights(self, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
        right = Kernel.row_weights(self, inputs, weights, permutation)
        return torch.where(experts_of(permutation) % 2 == 1, torch.ones_like(right), right)


UNCATALOGUED: dict[type[Kernel], tuple[str, ...]] = {
    TwoAtOnce: ("weights", "gemm1_scale"),
    OddExpertsScaleOfNextBlock: ("activation_scale",),
    LongBatchesGelu: ("swiglu",),
    HalvedBias: ("bias",),
    SecondBestSkipped: ("topk",),
    RowsPastThreeReadTheFirst: ("permute",),
    ScalesOfTheFirstRow: ("requantize",),
    SecondRowLost: ("combine",),
    SteeperSigmoid: ("routing",),
    OddExpertsUnweighted: ("combine", "weights"),
}
"""Kernel -> stages that are right answers; an unweighted row lies between two."""
