"""How much of each local expert an output holds: the routing weights in effect, read from ordinary answers.

Every token's right result under every local expert is computed; the weights a[t, e] that make up the token's output
row are found by least squares over its H columns. A small residual says that the experts' results are right and only
their choice or weights are wrong; a large one says that something inside of the experts is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeref.inputs import Inputs
from moeref.quant import dequantize_1x128, weight_slices
from moeref.reference import Routing, swiglu

MOST_PRODUCTS = 2**31
"""Multiplications (tokens x local experts x 3 H I) up to which all experts are computed."""


@dataclass(frozen=True)
class Mixture:
    """An output as a sum of right experts' results."""

    weights: Tensor  # [T, L] float64, in effect
    wanted: Tensor  # [T, L] float64, of the reference; 0 where the expert was not chosen
    residual: Tensor  # [T] float64: share of the row's square that no weights explain; 1 for a row that is not finite


def dense_results(inputs: Inputs) -> Tensor | None:
    """gemm2's result of every token under every local expert, [T, L, H] float32; None where that is too much."""
    g = inputs.geometry
    count = inputs.seq_len * g.num_local_experts * 3 * g.hidden_size * g.intermediate_size
    if count > MOST_PRODUCTS or not inputs.seq_len:
        return None
    hidden = dequantize_1x128(inputs.hidden_states, inputs.hidden_states_scale.T.float())
    out = hidden.new_empty(inputs.seq_len, g.num_local_experts, g.hidden_size)
    for expert in range(g.num_local_experts):
        first = [
            hidden @ weight.T
            for _, weight in weight_slices(
                inputs.gemm1_weights[expert], inputs.gemm1_weights_scale[expert], torch.float32
            )
        ]
        between = swiglu(torch.cat(first, 1))
        second = [
            between @ weight.T
            for _, weight in weight_slices(
                inputs.gemm2_weights[expert], inputs.gemm2_weights_scale[expert], torch.float32
            )
        ]
        out[:, expert] = torch.cat(second, 1)
    return out


def mixture(output: Tensor, inputs: Inputs, routing: Routing, dense: Tensor) -> Mixture:
    """Weights in effect in output [T, H], given dense_results(inputs)."""
    count = inputs.geometry.num_local_experts
    local = routing.topk_ids - inputs.local_expert_offset  # [T, K]
    kept = (local >= 0) & (local < count)
    wanted = torch.zeros(len(local), count, dtype=torch.float64, device=output.device)
    wanted.scatter_add_(1, local.clamp(0, count - 1), routing.topk_weights.double() * kept)
    rows = output.double()
    finite = torch.isfinite(rows).all(1)
    rows = rows.masked_fill(~finite[:, None], 0)
    basis = dense.double().transpose(1, 2)  # [T, H, L]
    size = basis.norm(dim=1, keepdim=True)
    scaled = basis / torch.where(size > 0, size, torch.ones_like(size))
    found = torch.linalg.lstsq(scaled, rows.unsqueeze(-1), driver="gelsd" if rows.device.type == "cpu" else None)
    weights = found.solution  # [T, L, 1]
    left = (rows.unsqueeze(-1) - scaled @ weights).squeeze(-1).square().sum(1)
    total = rows.square().sum(1)
    residual = torch.where(total > 0, left / torch.where(total > 0, total, torch.ones_like(total)), total)
    residual = residual.masked_fill(~finite, 1.0)
    in_effect = (weights / torch.where(size > 0, size, torch.ones_like(size)).transpose(1, 2)).squeeze(-1)
    return Mixture(in_effect, wanted, residual)
