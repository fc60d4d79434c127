"""Every layout that another library wants, as a pair to_x / from_x: from_x(to_x(tensors)) gives the same bytes back.

Only re-orderings: no rounding, no change of dtype. Payloads are moved as bytes, since not every device indexes e4m3.
Axes: T tokens, L local experts, N and K a weight's rows and columns, H hidden, I intermediate.
"""

from __future__ import annotations

import torch

from moeref.spec import BLOCK

Pair = tuple[torch.Tensor, torch.Tensor]

SHUFFLES = {
    16: (0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15),
    32: tuple(lane * 4 + part for part in range(4) for lane in range(8)),
}
"""Rows that the matrix unit's fragments want side by side: new row r of each block of 16 (or 32) is old row [r]."""


def to_token_major(hidden_states_scale: torch.Tensor) -> torch.Tensor:
    """[H/128, T] -> [T, H/128], contiguous: a token's scales side by side, as SGLang and DeepGEMM keep them."""
    return hidden_states_scale.t().clone(memory_format=torch.contiguous_format)


def from_token_major(scale: torch.Tensor) -> torch.Tensor:
    """[T, H/128] -> [H/128, T], the definition's."""
    return scale.t().clone(memory_format=torch.contiguous_format)


def to_gate_up(weight: torch.Tensor, scale: torch.Tensor) -> Pair:
    """gemm1's rows [up ; gate] -> [gate ; up], the order of SGLang's and vLLM's silu_and_mul.

    weight [L, 2I, H] e4m3, scale [L, 2I/128, H/128]; copies of both.
    """
    return _halves_exchanged(weight), _halves_exchanged(scale)


def from_gate_up(weight: torch.Tensor, scale: torch.Tensor) -> Pair:
    """gemm1's rows [gate ; up] -> [up ; gate], the definition's."""
    return _halves_exchanged(weight), _halves_exchanged(scale)


def _halves_exchanged(tensor: torch.Tensor) -> torch.Tensor:
    octets = tensor.contiguous().view(torch.uint8)
    return octets.roll(tensor.shape[1] // 2, dims=1).view(tensor.dtype)


def to_k_major_columns(weight: torch.Tensor, scale: torch.Tensor) -> Pair:
    """[L, N, K] -> a view [L, K, N] whose columns are contiguous, and the scales alike: CUTLASS's column-major B."""
    return weight.transpose(1, 2), scale.transpose(1, 2)


def from_k_major_columns(weight: torch.Tensor, scale: torch.Tensor) -> Pair:
    """A view [L, K, N] -> [L, N, K], the definition's."""
    return weight.transpose(1, 2), scale.transpose(1, 2)


def to_block_major_k(weight: torch.Tensor) -> torch.Tensor:
    """[L, N, K] e4m3 -> [L, K/128, N, 128]: what one step over K reads is one piece (FlashInfer's BlockMajorK)."""
    experts, rows, width = weight.shape
    octets = weight.view(torch.uint8).view(experts, rows, width // BLOCK, BLOCK)
    return octets.transpose(1, 2).contiguous().view(weight.dtype)


def from_block_major_k(weight: torch.Tensor) -> torch.Tensor:
    """[L, K/128, N, 128] e4m3 -> [L, N, K]."""
    experts, blocks, rows, block = weight.shape
    octets = weight.view(torch.uint8).transpose(1, 2).contiguous()
    return octets.view(experts, rows, blocks * block).view(weight.dtype)


def to_shuffled_rows(weight: torch.Tensor, block: int = 16) -> torch.Tensor:
    """[L, N, K] with each block of 16 (or 32) rows in the order of SHUFFLES; FlashInfer's shuffle_matrix_a.

    16 belongs to an epilogue tile of 64 rows, which its FP8 block-scale kernels have; 32 to one of 128. A scale block
    is 128 rows, so scales stay as they are.
    """
    return _rows_reordered(weight, torch.tensor(SHUFFLES[block]))


def from_shuffled_rows(weight: torch.Tensor, block: int = 16) -> torch.Tensor:
    """The inverse of to_shuffled_rows."""
    return _rows_reordered(weight, torch.argsort(torch.tensor(SHUFFLES[block])))


def _rows_reordered(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    experts, rows, width = weight.shape
    blocks = weight.view(torch.uint8).view(experts, rows // len(order), len(order), width)
    return blocks[:, :, order.to(weight.device)].view(experts, rows, width).view(weight.dtype)
