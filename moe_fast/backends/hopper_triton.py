"""The Triton pipeline: three to five launches, made for few rows an expert, where reading the weights is the cost."""

from __future__ import annotations

import torch

from moe_fast.backends import Backend
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
    cuda_routing: bool = False,
) -> torch.Tensor:
    """The ten inputs -> output [T, H] bfloat16, written into `out` when given. The inputs are taken as checked.
    cuda_routing: see the pipeline; where it is True, hopper_cuda must support the geometry and the card, too."""
    from moe_fast.pipelines.hopper_triton import run as pipeline  # triton is imported only where it is used

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
        cuda_routing=cuda_routing,
    )


def unsupported(geometry: Geometry, device: torch.device) -> str | None:
    """A Hopper card (compute capability 9.x) and triton are needed."""
    if device.type != "cuda":
        return "needs a Hopper GPU (compute capability 9.x), e.g. an H100: this is a CPU"
    target = target_of(device)
    if not target.is_hopper:
        return f"needs a Hopper GPU (compute capability 9.x), e.g. an H100: {target.name} is {target.capability}"
    if target.triton is None:
        return "needs triton: pip install 'moeref[triton]'"
    return None


def workspace(geometry: Geometry, tokens: int) -> int | None:
    """Bytes that a call keeps for its largest slice, which is rounded up to a power of two. None without triton."""
    try:
        from moe_fast.pipelines.hopper_triton import TOKENS_AT_ONCE, Shape, Workspace, choose_tiling, size_class
    except ImportError:
        return None
    g, slice_tokens = geometry, min(tokens, TOKENS_AT_ONCE)
    shape = size_class(Shape(slice_tokens, g.num_local_experts, g.top_k, g.hidden_size, g.intermediate_size))
    meta = torch.device("meta")
    ticket = torch.zeros(1, dtype=torch.int32, device=meta)
    return Workspace(shape, choose_tiling(slice_tokens).tile_rows, meta, ticket).nbytes


BACKEND = Backend(
    name="hopper_triton",
    run=run,
    recipe="requant",
    deterministic=True,
    unsupported=unsupported,
    workspace=workspace,
    priority=50,
    summary="Triton, Hopper: route, experts (gemm1 and gemm2 in one persistent launch), combine",
)
