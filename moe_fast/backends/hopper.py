"""Hopper: one launch for at most 8 tokens, the Triton pipeline while memory is the limit, the CUDA C++ one for many."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from moe_fast.backends import Backend, hopper_cuda, hopper_few_tokens, hopper_triton
from moe_fast.tuning.table import saved
from moeref.spec import Geometry

FEW_TOKENS = 8
"""Up to so many tokens one launch does everything, where its kernel fits the geometry."""

TRITON_TOKENS = 160
"""Up to so many tokens the Triton pipeline, with routing in CUDA C++, is the faster one (docs/h100.md)."""


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
    tokens, device = hidden_states.shape[0], hidden_states.device
    sizes = (routing_bias.shape[0], *gemm2_weights.shape, top_k)
    tuned = saved(tokens, device, *sizes, n_group, topk_group)
    chosen = BY_NAME[tuned.pipeline] if tuned is not None else shipped(tokens, device, *sizes)
    more = {"cuda_routing": True} if chosen is hopper_triton else {}  # CUDA C++ is at hand here
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
        **more,
    )


BY_NAME = {"hopper_few_tokens": hopper_few_tokens, "hopper_triton": hopper_triton, "hopper_cuda": hopper_cuda}


def shipped(
    tokens: int, device: torch.device, experts: int, local: int, hidden: int, inter: int, top_k: int
) -> ModuleType:
    """The pipeline of a call of so many tokens where no table of moe_fast.tune() says otherwise."""
    if tokens <= FEW_TOKENS and few_fit(experts, local, hidden, inter, top_k, device):
        return hopper_few_tokens
    return hopper_triton if tokens <= TRITON_TOKENS else hopper_cuda


@functools.cache
def few_fit(experts: int, local: int, hidden: int, inter: int, top_k: int, device: torch.device) -> bool:
    """Whether the one-launch kernel is made for these sizes."""
    return hopper_few_tokens.unsupported(Geometry(experts, local, hidden, inter, top_k, 1, 1), device) is None


def unsupported(geometry: Geometry, device: torch.device) -> str | None:
    """What both pipelines need."""
    return hopper_triton.unsupported(geometry, device) or hopper_cuda.unsupported(geometry, device)


def workspace(geometry: Geometry, tokens: int) -> int | None:
    """That of the pipeline which a call of so many tokens takes."""
    if tokens <= FEW_TOKENS:
        return hopper_few_tokens.workspace(geometry, tokens)
    return (hopper_triton if tokens <= TRITON_TOKENS else hopper_cuda).workspace(geometry, tokens)


BACKEND = Backend(
    name="hopper",
    run=run,
    recipe="requant",
    deterministic=True,
    unsupported=unsupported,
    workspace=workspace,
    aligned=hopper_cuda.ALIGNED,
    priority=60,
    summary=f"Hopper: one launch up to {FEW_TOKENS} tokens, hopper_triton up to {TRITON_TOKENS}, hopper_cuda beyond",
)
