"""The exact-order variant: a GPU's output and a CPU's are the same bytes.

For golden bytes from a GPU, and for debugging a kernel stage by stage; not for speed.
"""

from __future__ import annotations

import contextlib

import torch

from moe_fast.backends import Backend
from moe_fast.backends._adapter import PRIORITY
from moe_fast.target import target_of
from moeref.spec import Geometry


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
    from moe_fast.pipelines.exact_order import run as pipeline

    # kernels go to the current device, wherever the tensors are
    with torch.cuda.device(hidden_states.device) if hidden_states.is_cuda else contextlib.nullcontext():
        return pipeline(
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
    """A CPU needs nothing; a GPU triton, and compute capability 8.0 on."""
    if device.type != "cuda":
        return None
    target = target_of(device)
    if target.capability is None or target.capability < (8, 0):
        return f"needs compute capability 8.0 or later: {target.name} is {target.capability}"
    if target.triton is None:
        return "needs triton: pip install 'moeref[triton]'"
    return None


def workspace(geometry: Geometry, tokens: int) -> int:
    """Bytes of a slice's intermediates on a GPU, beside those of its routing."""
    from moe_fast.pipelines.exact_order import TOKENS_AT_ONCE, Workspace

    g, count = geometry, min(tokens, TOKENS_AT_ONCE["cuda"])
    meta = torch.device("meta")
    return Workspace(count, g.num_local_experts, g.top_k, g.hidden_size, g.intermediate_size, meta).nbytes


BACKEND = Backend(
    name="exact_order",
    run=run,
    recipe="requant",
    deterministic=True,
    unsupported=unsupported,
    workspace=workspace,
    priority=PRIORITY,
    summary="any device, the same bytes on all: Triton kernels and their twins in torch, in one fixed order; slow",
)
