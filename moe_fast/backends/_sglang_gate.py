"""SGLang's fused gate, wherever the installed release has it: one call for the three places that it has lived in."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from moe_fast.backends._adapter import Layer
from moeref.interop.candidates import Unsupported

PLACES = ("sglang.kernels.ops.moe.moe_fused_gate", "sglang.jit_kernel.moe_fused_gate")
"""Modules of sglang 0.5.17 and newer, and of 0.5.16, that define moe_fused_gate in Triton; before, sgl_kernel did."""

GATE_NAMES = ("sgl_kernel.moe_fused_gate", *(f"{place}.moe_fused_gate" for place in PLACES))

Gate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def load_gate() -> tuple[Gate, bool]:
    """(moe_fused_gate, whether it is sgl_kernel's, whose arguments are others). Raises ImportError."""
    import sgl_kernel

    if hasattr(sgl_kernel, "moe_fused_gate"):
        return sgl_kernel.moe_fused_gate, True
    failures = []
    for place in PLACES:
        try:
            return importlib.import_module(place).moe_fused_gate, False
        except ImportError as error:
            failures.append(f"{place}: {error}")
    raise ImportError(
        "this sgl_kernel has no moe_fused_gate; install the sglang that belongs to it, or sglang-kernel 0.4.4 or older "
        f"({'; '.join(failures)})"
    )


def route(library: Any, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights [T, K] float32, topk_ids [T, K] int32, global), by library.moe_fused_gate.

    Raises Unsupported where an old gate does not know the geometry.
    """
    bias = layer.routing_bias.float()  # the gate wants the logits' dtype
    if library.gate_is_old:
        if layer.experts & (layer.experts - 1) or layer.experts // layer.n_group > 32:
            raise Unsupported(
                f"this sglang-kernel's gate knows powers of two of experts, in groups of at most 32; got "
                f"{layer.experts} in {layer.n_group} groups: install sglang-kernel 0.4.5 or newer with its sglang"
            )
        return library.moe_fused_gate(  # type: ignore[no-any-return]
            layer.routing_logits,
            bias,
            layer.n_group,
            layer.topk_group,
            layer.top_k,
            num_fused_shared_experts=0,
            routed_scaling_factor=layer.routed_scaling_factor,
            apply_routed_scaling_factor_on_output=True,
        )
    return library.moe_fused_gate(  # type: ignore[no-any-return]
        layer.routing_logits,
        bias,
        layer.top_k,
        scoring_func="sigmoid",
        num_fused_shared_experts=0,
        renormalize=True,
        routed_scaling_factor=layer.routed_scaling_factor,
        apply_routed_scaling_factor_on_output=True,
        num_expert_group=layer.n_group,
        topk_group=layer.topk_group,
    )
