"""Faults of the permutation: which rows an expert gets, and which token a row reads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moeref.diagnose.faults.registry import fault
from moeref.diagnose.kernel import Kernel, sort_pairs
from moeref.inputs import Inputs
from moeref.reference import Permutation

TILE = 16
"""Rows of the tile that the imitated kernels work on."""


def experts_of(permutation: Permutation) -> Tensor:
    """Local expert of each row, [P]."""
    counts = permutation.expert_offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def place_in_run(permutation: Permutation) -> Tensor:
    """Position of each row within its expert's run, [P]."""
    experts = experts_of(permutation)
    return torch.arange(len(experts), device=experts.device) - permutation.expert_offsets[experts]


def length_of_run(permutation: Permutation) -> Tensor:
    """Length of the run that each row is in, [P]."""
    return permutation.expert_offsets.diff()[experts_of(permutation)]


def without(permutation: Permutation, lost: Tensor) -> Permutation:
    """The permutation without the rows where lost [P] is true."""
    kept = ~lost
    tokens, slots = permutation.permuted_idx_to_token_idx[kept], permutation.permuted_idx_to_slot[kept]
    return sort_pairs(tokens, slots, experts_of(permutation)[kept], len(permutation.expert_offsets) - 1)


def _reading(self: Kernel, inputs: Inputs, permutation: Permutation, rows: Tensor) -> Tensor:
    """gather with each row p reading the token of row rows[p]."""
    tokens = permutation.permuted_idx_to_token_idx[rows]
    return Kernel.gather(self, inputs, replace(permutation, permuted_idx_to_token_idx=tokens))


def _own_rows(permutation: Permutation) -> Tensor:
    tokens = permutation.permuted_idx_to_token_idx
    return torch.arange(len(tokens), device=tokens.device)


# Rows that are lost


@fault(stage="permute", hook="permute", source="synthetic", summary="an expert that has one row only is skipped")
def single_rows_dropped(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    return without(right, length_of_run(right) == 1)


@fault(
    stage="permute",
    hook="permute",
    source="synthetic",
    summary="the last row of an expert's run is lost when it has 16 k + 1 > 16 rows",
)
def tile_tail_row_lost(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    place, length = place_in_run(right), length_of_run(right)
    return without(right, (place == length - 1) & (length % TILE == 1) & (length > TILE))


@fault(stage="permute", hook="permute", source="synthetic", summary="an expert takes 16 rows at most, the rest is lost")
def rows_past_capacity_dropped(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    return without(right, place_in_run(right) >= TILE)


@fault(stage="permute", hook="permute", source="synthetic", summary="the last token is lost when seq_len is odd")
def last_odd_token_dropped(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    last = right.permuted_idx_to_token_idx == inputs.seq_len - 1
    return without(right, last & (inputs.seq_len % 2 == 1))


# Rows at the wrong expert


@fault(
    stage="permute",
    hook="permute",
    source="DeepGEMM #15, FBGEMM #3949",
    summary="runs shifted by one: the first row of a run gets the expert before",
)
def runs_shifted_by_one(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    offsets = right.expert_offsets.clone()
    offsets[1:-1] = (offsets[1:-1] + 1).clamp(max=int(offsets[-1]))
    return replace(right, expert_offsets=offsets)


@fault(
    stage="permute",
    hook="permute",
    source="sglang #37663",
    summary="one prefix entry read before it was written: a run in the middle goes to the next expert",
)
def one_prefix_entry_stale(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    offsets = right.expert_offsets.clone()
    middle = len(offsets) // 2
    offsets[middle] = offsets[middle - 1]
    return replace(right, expert_offsets=offsets)


@fault(
    stage="permute",
    hook="permute",
    source="synthetic",
    summary="a run of exactly 16 k rows gives its last tile to the next expert",
)
def full_tiles_go_to_next_expert(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    counts = right.expert_offsets.diff()
    full = (counts > 0) & (counts % TILE == 0)
    offsets = right.expert_offsets.clone()
    offsets[1:-1] -= TILE * full[:-1].long()
    return replace(right, expert_offsets=offsets)


@fault(
    stage="permute",
    hook="permute",
    source="TileOPs #640",
    summary="the inverse permutation is used in place of the forward one",
)
def inverse_permutation(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    is_local = (local >= 0) & (local < inputs.geometry.num_local_experts)
    tokens, slots = torch.nonzero(is_local, as_tuple=True)
    inverse = torch.argsort(torch.argsort(local[tokens, slots], stable=True), stable=True)
    return replace(right, permuted_idx_to_token_idx=tokens[inverse], permuted_idx_to_slot=slots[inverse])


# Rows that read another token


@fault(
    stage="permute",
    hook="gather",
    source="DeepGEMM #15, FBGEMM #3949",
    summary="the last row of a run reads the first token of the next run",
)
def last_row_reads_next_run(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    rows = _own_rows(permutation)
    last = place_in_run(permutation) == length_of_run(permutation) - 1
    return _reading(self, inputs, permutation, torch.where(last, (rows + 1) % max(len(rows), 1), rows))


@fault(
    stage="permute",
    hook="gather",
    source="flashinfer #2642, flashinfer #3743, flashinfer #4263, sglang #4727, sglang #6348, sglang #35188, "
    "vLLM #34279, vLLM #48398, TE #2908, DeepGEMM #226, Liger #1296, DeepSpeed #8261",
    summary="row times stride wraps (here at 32 rows): late rows read early ones",
)
def row_offsets_wrap(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    return _reading(self, inputs, permutation, _own_rows(permutation) % 32)


@fault(stage="permute", hook="gather", source="synthetic", summary="rows of a run past 64 read its first token")
def rows_past_64_read_the_first(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    rows, place = _own_rows(permutation), place_in_run(permutation)
    return _reading(self, inputs, permutation, torch.where(place >= 64, rows - place, rows))


@fault(stage="permute", hook="gather", source="synthetic", summary="row 0 of a run's second tile reads the row before")
def second_tile_reads_one_back(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    rows, place = _own_rows(permutation), place_in_run(permutation)
    return _reading(self, inputs, permutation, torch.where(place == TILE, rows - 1, rows))


@fault(stage="permute", hook="gather", source="synthetic", summary="odd experts read their tokens in reverse order")
def odd_experts_read_backwards(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    rows, place, length = _own_rows(permutation), place_in_run(permutation), length_of_run(permutation)
    odd = experts_of(permutation) % 2 == 1
    return _reading(self, inputs, permutation, torch.where(odd, rows + length - 1 - 2 * place, rows))


@fault(stage="permute", hook="gather", source="synthetic", summary="past 64 tokens, neighbours swap their activations")
def long_batches_swap_neighbours(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    tokens = permutation.permuted_idx_to_token_idx
    swapped = (tokens ^ 1).clamp(max=inputs.seq_len - 1) if inputs.seq_len > 64 else tokens
    return Kernel.gather(self, inputs, replace(permutation, permuted_idx_to_token_idx=swapped))


@fault(
    stage="permute",
    hook="row_weights",
    source="TileOPs #640",
    summary="routing weights stay in token order while rows are sorted by expert",
)
def weights_not_permuted(self: Kernel, inputs: Inputs, weights: Tensor, permutation: Permutation) -> Tensor:
    tokens, slots = permutation.permuted_idx_to_token_idx, permutation.permuted_idx_to_slot
    order = torch.argsort(tokens * weights.shape[1] + slots)
    return weights[tokens[order], slots[order]]
