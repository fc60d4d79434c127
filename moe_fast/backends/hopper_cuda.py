"""The CUDA C++ pipeline, made for many rows an expert, where arithmetic is the cost."""

from __future__ import annotations

from dataclasses import replace

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
) -> torch.Tensor:
    """The ten inputs -> output [T, H] bfloat16, written into `out` when given. The inputs are taken as checked."""
    from moe_fast.pipelines.hopper_cuda import run as pipeline  # the driver is loaded only where it is used

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
    """A Hopper card (compute capability 9.x) and a compiler, NVRTC or nvcc, are needed."""
    if device.type != "cuda":
        return "needs a Hopper GPU (compute capability 9.x), e.g. an H100: this is a CPU"
    target = target_of(device)
    if not target.is_hopper:
        return f"needs a Hopper GPU (compute capability 9.x), e.g. an H100: {target.name} is {target.capability}"
    if geometry.top_k > 32 or geometry.num_experts > 1024 or geometry.num_local_experts > 512:
        return f"needs top_k <= 32, E <= 1024 and L <= 512: this is {geometry.name}"
    from moe_fast.kernels.cuda_build import CompilerNotFoundError, compiler

    try:
        compiler()
    except CompilerNotFoundError as error:
        return f"{error}: pip install cuda-bindings, or put nvcc on the PATH"
    return None


def workspace(geometry: Geometry, tokens: int) -> int:
    """Bytes that a call keeps: what the most rows of any routing need, at most ROW_BUFFER_BYTES for those that grow."""
    from moe_fast.pipelines.hopper_cuda import Shape, Workspace

    g = geometry
    shape = Shape(tokens, g.num_local_experts, g.top_k, g.hidden_size, g.intermediate_size)
    return Workspace(replace(shape, tokens=min(tokens, shape.tokens_at_once)), torch.device("meta")).nbytes


ALIGNED = ("routing_logits", "routing_bias", "hidden_states", "gemm1_weights", "gemm2_weights", "out")
"""What the CUDA C++ kernels read or write up to 16 bytes at a time; the Triton pipeline takes any address."""

BACKEND = Backend(
    name="hopper_cuda",
    run=run,
    recipe="requant",
    deterministic=True,
    unsupported=unsupported,
    workspace=workspace,
    aligned=ALIGNED,
    priority=40,
    summary="CUDA C++, Hopper: route, place, gemm1, gemm2, combine; gemm2's rows in bfloat16",
)
