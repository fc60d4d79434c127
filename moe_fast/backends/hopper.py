"""Hopper: the Triton pipeline for few tokens, where memory is the limit, the CUDA C++ one for many."""

from __future__ import annotations

import torch

from moe_fast.backends import Backend, hopper_cuda, hopper_triton
from moeref.spec import Geometry

TRITON_TOKENS = 160
"""Up to so many tokens the Triton pipeline is the faster one (docs/h100.md)."""


def run(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    out: torch.Tensor | None = None,
    *,
    n_group: int = 8,
    topk_group: int = 4,
    top_k: int = 8,
) -> torch.Tensor:
    """The ten inputs -> output [T, H] bfloat16, written into `out` when given. The inputs are taken as checked."""
    chosen = hopper_triton if hidden_states.shape[0] <= TRITON_TOKENS else hopper_cuda
    return chosen.run(
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
        out,
        n_group=n_group,
        topk_group=topk_group,
        top_k=top_k,
    )


def unsupported(geometry: Geometry, device: torch.device) -> str | None:
    """What both pipelines need."""
    return hopper_triton.unsupported(geometry, device) or hopper_cuda.unsupported(geometry, device)


def workspace(geometry: Geometry, tokens: int) -> int | None:
    """That of the pipeline which a call of so many tokens takes."""
    return (hopper_triton if tokens <= TRITON_TOKENS else hopper_cuda).workspace(geometry, tokens)


BACKEND = Backend(
    name="hopper",
    run=run,
    recipe="requant",
    deterministic=True,
    unsupported=unsupported,
    workspace=workspace,
    priority=60,
    summary=f"Hopper: hopper_triton up to {TRITON_TOKENS} tokens, hopper_cuda beyond",
)
