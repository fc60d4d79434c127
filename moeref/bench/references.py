"""What a speed-up is measured against: moeref's own reference, or one that works as the published one does."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import silu

from moeref.inputs import Inputs
from moeref.reference import Trace, moe, route
from moeref.spec import BLOCK

OURS, PUBLISHED, NONE = "moeref", "published", "none"
REFERENCES = (OURS, PUBLISHED, NONE)


def timed_moe(inputs: Inputs) -> tuple[Trace, float]:
    """(every stage, seconds) of moeref.reference.moe on the inputs' device."""
    _synchronise(inputs.device)
    start = time.perf_counter()
    trace = moe(inputs)
    _synchronise(inputs.device)
    return trace, time.perf_counter() - start


def published_moe(inputs: Inputs) -> torch.Tensor:
    """The layer the way the published definition computes it: every local expert's weights are expanded to float32 at
    once (5.6 GB at DeepSeek-V3's shard, twice that while they are scaled), then each expert that has tokens is run.

    Returns output [T, H] bfloat16. Slower than moeref.reference.moe wherever not every expert is hit.
    """
    g, offset = inputs.geometry, inputs.local_expert_offset
    scale = inputs.hidden_states_scale.T.repeat_interleave(BLOCK, 1)  # [T, H]
    hidden = inputs.hidden_states.float() * scale
    gemm1 = _expanded(inputs.gemm1_weights, inputs.gemm1_weights_scale)  # [L, 2I, H]
    gemm2 = _expanded(inputs.gemm2_weights, inputs.gemm2_weights_scale)  # [L, H, I]
    routing = route(inputs.routing_logits, inputs.routing_bias, g, inputs.routed_scaling_factor)
    output = torch.zeros(inputs.seq_len, g.hidden_size, device=inputs.device)
    for slot in range(g.num_local_experts):
        tokens, choice = torch.nonzero(routing.topk_ids == offset + slot, as_tuple=True)
        if len(tokens):
            up, gate = (hidden[tokens] @ gemm1[slot].T).chunk(2, dim=1)
            result = (silu(gate) * up) @ gemm2[slot].T
            output.index_add_(0, tokens, result * routing.topk_weights[tokens, choice, None])
    return output.to(torch.bfloat16)


def _expanded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight [L, N, K] e4m3, scale [L, N/128, K/128] -> [L, N, K] float32."""
    return weight.float() * scale.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Wall times of `repeats` calls after one untimed, until the device is done."""
    times = []
    for _ in range(repeats + 1):
        _synchronise(device)
        start = time.perf_counter()
        call()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
