"""One CUDA C++ launch for at most 8 tokens, made for few: reading the hit experts' weights is the cost."""

from __future__ import annotations

import torch

from moe_fast.backends import Backend, hopper_cuda
from moe_fast.current import run_on
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
    from moe_fast.pipelines.hopper_few_tokens import run as pipeline  # the driver is loaded only where it is used

    return run_on(
        hidden_states.device,
        pipeline,
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
    """What hopper_cuda needs, and sizes that fit the kernel's registers and shared memory."""
    reason = hopper_cuda.unsupported(geometry, device)
    if reason is not None:
        return reason
    from moe_fast.kernels.cuda_few_tokens import unfit

    g = geometry
    sizes = (g.num_experts, g.num_local_experts, g.hidden_size, g.intermediate_size, g.top_k)
    reason = unfit(*sizes, target_of(device).sm_count)
    return f"its kernel is not made for {g.name}: {reason}" if reason else None


def workspace(geometry: Geometry, tokens: int) -> int:
    """Bytes that a call keeps: SwiGLU's rows of 8 tokens, whatever the tokens are."""
    from moe_fast.kernels.cuda_few_tokens import COUNTERS
    from moe_fast.pipelines.hopper_few_tokens import Workspace

    counters = torch.zeros(COUNTERS, dtype=torch.int32, device="meta")
    return Workspace(geometry.num_local_experts, geometry.top_k, geometry.intermediate_size, counters).nbytes


BACKEND = Backend(
    name="hopper_few_tokens",
    run=run,
    recipe="requant",
    deterministic=True,
    unsupported=unsupported,
    workspace=workspace,
    aligned=("hidden_states", "gemm1_weights", "gemm2_weights", "out"),  # bulk copies; logits are read one by one
    priority=30,
    summary="CUDA C++, Hopper: the whole layer in one launch for every 8 tokens",
)
