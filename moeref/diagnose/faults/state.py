"""Faults of what one call leaves behind for the next: stale inputs, caches by address, counters, workspace."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from moeref.diagnose.faults.registry import fault
from moeref.diagnose.faults.rows import experts_of
from moeref.diagnose.kernel import Kernel, sort_pairs
from moeref.inputs import Inputs
from moeref.reference import Permutation


def _first(self: Kernel, key: Hashable, value: Tensor) -> Tensor:
    """The value that came first under this key, kept as a copy."""
    name = str(key)
    if name not in self.memory:
        self.memory[name] = value.clone()
    kept: Tensor = self.memory[name]
    return kept


def _first_input(self: Kernel, inputs: Inputs, name: str) -> Inputs:
    """inputs with the first call's tensor of that name and shape."""
    tensor: Tensor = getattr(inputs, name)
    return replace(inputs, **{name: _first(self, (name, tensor.shape), tensor)})  # type: ignore[arg-type]


def _address(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


# An input of the first call is kept


@fault(stage="state", hook="arguments", source="synthetic", summary="gemm1_weights of the first call are kept")
def stale_gemm1_weights(self: Kernel, inputs: Inputs) -> Inputs:
    return _first_input(self, inputs, "gemm1_weights")


@fault(stage="state", hook="arguments", source="synthetic", summary="gemm2_weights of the first call are kept")
def stale_gemm2_weights(self: Kernel, inputs: Inputs) -> Inputs:
    return _first_input(self, inputs, "gemm2_weights")


@fault(stage="state", hook="arguments", source="synthetic", summary="gemm1_weights_scale of the first call is kept")
def stale_gemm1_scale(self: Kernel, inputs: Inputs) -> Inputs:
    return _first_input(self, inputs, "gemm1_weights_scale")


@fault(stage="state", hook="arguments", source="synthetic", summary="gemm2_weights_scale of the first call is kept")
def stale_gemm2_scale(self: Kernel, inputs: Inputs) -> Inputs:
    return _first_input(self, inputs, "gemm2_weights_scale")


@fault(stage="state", hook="arguments", source="sglang #38290", summary="routing_bias of an earlier call is read")
def stale_bias(self: Kernel, inputs: Inputs) -> Inputs:
    return _first_input(self, inputs, "routing_bias")


@fault(stage="state", hook="arguments", source="synthetic", summary="hidden_states_scale of the first call is kept")
def stale_activation_scale(self: Kernel, inputs: Inputs) -> Inputs:
    return _first_input(self, inputs, "hidden_states_scale")


@fault(stage="state", hook="arguments", source="synthetic", summary="local_expert_offset of the first call is kept")
def stale_offset(self: Kernel, inputs: Inputs) -> Inputs:
    return replace(inputs, local_expert_offset=self.memory.setdefault("offset", inputs.local_expert_offset))


@fault(stage="state", hook="arguments", source="synthetic", summary="routed_scaling_factor of the first call is kept")
def stale_factor(self: Kernel, inputs: Inputs) -> Inputs:
    return replace(inputs, routed_scaling_factor=self.memory.setdefault("factor", inputs.routed_scaling_factor))


# Results kept by address or shape


@fault(stage="state", hook="scores", source="synthetic", summary="scores kept by the address of routing_logits")
def scores_cached_by_address(self: Kernel, inputs: Inputs) -> Tensor:
    return _first(self, _address(inputs.routing_logits), Kernel.scores(self, inputs))


@fault(
    stage="state",
    hook="gather",
    source="synthetic",
    summary="unpacked activations kept by the address of hidden_states",
)
def activations_cached_by_address(self: Kernel, inputs: Inputs, permutation: Permutation) -> Tensor:
    key = _address(inputs.hidden_states)
    octets = _first(self, key, inputs.hidden_states.view(torch.uint8)).view(inputs.hidden_states.dtype)
    return Kernel.gather(self, replace(inputs, hidden_states=octets), permutation)


@fault(stage="state", hook="arguments", source="synthetic", summary="weights re-laid out once an address, then kept")
def weights_cached_by_address(self: Kernel, inputs: Inputs) -> Inputs:
    weights = _first(self, _address(inputs.gemm1_weights), inputs.gemm1_weights)
    return replace(inputs, gemm1_weights=weights)


@fault(
    stage="state",
    hook="launch",
    source="synthetic",
    summary="the result of the call before is returned, shape allowing",
)
def previous_result_returned(self: Kernel, inputs: Inputs, out: Tensor | None) -> Tensor:
    result = Kernel.launch(self, inputs, None)
    previous = self.memory.get("result", result)
    self.memory["result"] = result
    return self.store(inputs, previous.clone() if previous.shape == result.shape else result, out)


@fault(
    stage="state",
    hook="permute",
    source="flashinfer #4735, flashinfer #4827",
    summary="a replayed graph keeps the first call's run boundaries",
)
def run_boundaries_kept(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    offsets = _first(self, ("offsets", inputs.seq_len, inputs.geometry), right.expert_offsets)
    rows = len(right.permuted_idx_to_token_idx)
    kept = offsets.clamp(max=rows)
    kept[-1] = rows
    return replace(right, expert_offsets=kept)


@fault(
    stage="state",
    hook="permute",
    source="flashinfer #4027, DeepGEMM #451, vLLM #42177",
    summary="tiles of a larger call before are not cleared: their rows are added again",
)
def stale_tiles_run_again(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    tokens, slots, experts = right.permuted_idx_to_token_idx, right.permuted_idx_to_slot, experts_of(right)
    earlier = self.memory.get("tiles")
    if earlier is None or len(earlier[0]) <= len(tokens):
        self.memory["tiles"] = (tokens, slots, experts)
        return right
    old = [part[len(tokens) :] for part in earlier]
    valid = (old[0] < inputs.seq_len) & (old[1] < local.shape[1]) & (old[2] < inputs.geometry.num_local_experts)
    parts = [torch.cat([new, part[valid]]) for new, part in zip((tokens, slots, experts), old, strict=True)]
    return sort_pairs(parts[0], parts[1], parts[2], inputs.geometry.num_local_experts)


@fault(
    stage="state", hook="permute", source="flashinfer #4027", summary="expert counters not reset: runs start too late"
)
def counters_not_reset(self: Kernel, inputs: Inputs, local: Tensor) -> Permutation:
    right = Kernel.permute(self, inputs, local)
    counts = right.expert_offsets.diff()
    counted: Tensor = counts + self.memory.get(f"counts {len(counts)}", torch.zeros_like(counts))
    self.memory[f"counts {len(counts)}"] = counted
    offsets = torch.cat([counted.new_zeros(1), counted.cumsum(0)]).clamp(max=int(right.expert_offsets[-1]))
    offsets[-1] = right.expert_offsets[-1]
    return replace(right, expert_offsets=offsets)


@fault(stage="state", hook="combine", source="synthetic", summary="the sum's workspace is not cleared between calls")
def workspace_not_cleared(
    self: Kernel, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation
) -> Tensor:
    result = Kernel.combine(self, inputs, gemm2_out, weights, permutation)
    workspace = self.memory.get("workspace")
    if workspace is not None and workspace.shape == result.shape:
        result = result + workspace
    self.memory["workspace"] = result
    return result


@fault(
    stage="state",
    hook="combine",
    source="vLLM #13693",
    summary="workspace sized by the first call: later tokens are lost",
)
def workspace_of_first_size(
    self: Kernel, inputs: Inputs, gemm2_out: Tensor, weights: Tensor, permutation: Permutation
) -> Tensor:
    result = Kernel.combine(self, inputs, gemm2_out, weights, permutation)
    result[self.memory.setdefault("tokens", inputs.seq_len) :] = 0
    return result


@fault(
    stage="state",
    hook="gemm1",
    source="flashinfer #3227, flashinfer #4563",
    summary="another tactic from the third call on, and that one leaves out the last 32 of K",
)
def third_call_takes_another_tactic(
    self: Kernel, inputs: Inputs, hidden: Tensor, scale: Tensor, permutation: Permutation
) -> Tensor:
    self.memory["calls"] = self.memory.get("calls", 0) + 1
    if self.memory["calls"] > 2:
        hidden = torch.cat([hidden[:, :-32], torch.zeros_like(hidden[:, -32:])], 1)
    return Kernel.gemm1(self, inputs, hidden, scale, permutation)


@fault(
    stage="state", hook="arguments", source="synthetic", summary="gemm2_weights_scale multiplied in place at every call"
)
def scale_folded_in_place(self: Kernel, inputs: Inputs) -> Inputs:
    before = inputs.gemm2_weights_scale.clone()
    inputs.gemm2_weights_scale.mul_(2.0)
    return replace(inputs, gemm2_weights_scale=before)
