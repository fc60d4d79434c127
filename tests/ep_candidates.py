"""Candidates for expert-parallel runs: `ep_candidates.py:NAME`, NAME a fault of the catalogue or of this file.

Those of this file are wrong in a way that shows only where several ranks run: some on one rank alone, some in the sum
alone. `honest` is right, and re-quantises SwiGLU's output once.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from moeref.diagnose.faults import FAULTS
from moeref.diagnose.kernel import Kernel
from moeref.inputs import Inputs
from moeref.quant import dequantize_1x128
from moeref.reference import Permutation


class TiesLocalFirst(Kernel):
    """Among equal scores this rank's experts come first: each rank is right, together they count nine or seven."""

    def choose_experts(self, inputs: Inputs, scores: Tensor, masked: Tensor) -> Tensor:
        first = inputs.local_expert_offset
        order = torch.roll(torch.arange(masked.shape[1]), -first)  # [E] this rank's own ids lead
        places = torch.sort(masked[:, order], dim=-1, descending=True, stable=True).indices
        return order[places][:, : inputs.geometry.top_k]


class TermOnEveryRank(Kernel):
    """A term that belongs in the layer once is added by every rank (TensorRT-LLM #15922: the shared expert's)."""

    size = 0.3

    def combine(self, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        result = super().combine(inputs, gemm2_out, weights, permutation)
        term = dequantize_1x128(inputs.hidden_states, inputs.hidden_states_scale.T)
        norm = result.norm(dim=1, keepdim=True) / term.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return result + self.size * norm * term


class SmallTermOnEveryRank(TermOnEveryRank):
    """The same, too small to be seen beside one rank's own roundings."""

    size = 0.015


class BoundaryExpertTwice(Kernel):
    """The first expert of the next shard is taken for this shard's last: `<=` for `<`."""

    def to_local(self, inputs: Inputs, ids: Tensor) -> Tensor:
        local, count = super().to_local(inputs, ids), inputs.geometry.num_local_experts
        return torch.where(local == count, count - 1, local)


class ReducedTwice(Kernel):
    """The result is added up over ranks twice, with two ranks: every number doubles."""

    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        return super().finish(inputs, 2 * result)


class LastShardSilent(Kernel):
    """The last shard gives nothing."""

    def finish(self, inputs: Inputs, result: Tensor) -> Tensor:
        last = inputs.local_expert_offset + inputs.geometry.num_local_experts == inputs.geometry.num_experts
        return super().finish(inputs, result * (0 if last else 1))


class NextShardsTokens(Kernel):
    """Shard 1 takes the next shard's ids for its own."""

    def to_local(self, inputs: Inputs, ids: Tensor) -> Tensor:
        local, count = super().to_local(inputs, ids), inputs.geometry.num_local_experts
        return local - count if inputs.local_expert_offset == count else local


class WrongOnRankOne(Kernel):
    """Right everywhere but in the process whose RANK is 1: it drops its first expert."""

    def to_local(self, inputs: Inputs, ids: Tensor) -> Tensor:
        local = super().to_local(inputs, ids)
        return local.masked_fill(local == 0, -1) if os.environ.get("RANK") == "1" else local


OWN: dict[str, type[Kernel]] = {
    "honest": Kernel,
    "ties_local_first": TiesLocalFirst,
    "term_on_every_rank": TermOnEveryRank,
    "small_term_on_every_rank": SmallTermOnEveryRank,
    "boundary_expert_twice": BoundaryExpertTwice,
    "reduced_twice": ReducedTwice,
    "last_shard_silent": LastShardSilent,
    "next_shards_tokens": NextShardsTokens,
    "wrong_on_rank_one": WrongOnRankOne,
}


def __getattr__(name: str) -> Any:
    if name in OWN:
        return OWN[name]()
    if name in FAULTS:
        return FAULTS[name].build()
    raise AttributeError(name)
