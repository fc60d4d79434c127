"""FlashInfer's fused MoE for Blackwell: one call does everything, routing included. Four variants.

It takes the definition's ten inputs as they are. gemm1's result and SwiGLU's are stored in e4m3 with 1x128 scales, the
routing weights in bfloat16, so its recipe is 'requant2+bf16_weights'.
Source: flashinfer 0.7, flashinfer.fused_moe.trtllm_fp8_block_scale_moe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from moe_fast.backends import Backend
from moe_fast.backends._adapter import Compute, Layer, Needs, Prepared, backend
from moe_fast.layouts import to_block_major_k, to_shuffled_rows
from moeref.interop.candidates import Unsupported
from moeref.spec import Geometry

DEEPSEEK_V3 = 2  # RoutingMethodType: sigmoid, bias, best groups, normalised
MAJOR_K, BLOCK_MAJOR_K = 0, 2  # WeightLayout

FUNCTIONS = {
    "trtllm_fp8_block_scale_moe": ("flashinfer.fused_moe.trtllm_fp8_block_scale_moe",),
    "autotune": ("flashinfer.autotune",),
}
"""What of the library is called; a test holds the calls to the real signatures."""


@dataclass(frozen=True)
class Variant:
    """What the library lets its caller choose."""

    shuffled: bool = False  # weights with shuffled rows in blocks along K, converted once, instead of as given
    tuned: bool = False  # the library times its tactics at the first call of each size
    pdl: bool | None = None  # programmatic dependent launch; None: the library decides


def load() -> SimpleNamespace:
    """The library's functions. Raises ImportError."""
    from flashinfer import autotune
    from flashinfer.fused_moe import trtllm_fp8_block_scale_moe

    return SimpleNamespace(trtllm_fp8_block_scale_moe=trtllm_fp8_block_scale_moe, autotune=autotune)


def shuffled(gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both weights [L, N, K] -> [L, K/128, N, 128] with rows shuffled for an epilogue tile of 64 rows."""
    return to_block_major_k(to_shuffled_rows(gemm1_weights)), to_block_major_k(to_shuffled_rows(gemm2_weights))


def compute_with(variant: Variant) -> Compute:
    """compute(library, layer, out) of one variant."""
    prepared = Prepared(shuffled)
    tuned_sizes: set[tuple[int, ...]] = set()

    def compute(library: SimpleNamespace, layer: Layer, out: torch.Tensor) -> None:
        if not 0 <= layer.local_expert_offset <= layer.experts - layer.local:
            raise Unsupported(
                f"trtllm_fp8_block_scale_moe has no experts outside of 0..{layer.experts - 1}: expected an offset of "
                f"0..{layer.experts - layer.local} for L={layer.local}, got {layer.local_expert_offset}"
            )
        gemm1_weights, gemm2_weights = layer.gemm1_weights, layer.gemm2_weights
        if variant.shuffled:
            gemm1_weights, gemm2_weights = prepared(gemm1_weights, gemm2_weights)
        with tuning(library.autotune, layer) if variant.tuned else contextlib.nullcontext():
            result = library.trtllm_fp8_block_scale_moe(
                layer.routing_logits,
                layer.routing_bias,
                layer.hidden_states,
                layer.hidden_states_scale,
                gemm1_weights,
                layer.gemm1_weights_scale,
                gemm2_weights,
                layer.gemm2_weights_scale,
                layer.experts,
                layer.top_k,
                layer.n_group,
                layer.topk_group,
                layer.intermediate,
                layer.local_expert_offset,
                layer.local,
                layer.routed_scaling_factor,
                routing_method_type=DEEPSEEK_V3,
                use_shuffled_weight=variant.shuffled,
                weight_layout=BLOCK_MAJOR_K if variant.shuffled else MAJOR_K,
                enable_pdl=variant.pdl,
                tune_max_num_tokens=max(8192, layer.tokens),
                output=out,
            )
        result = result[0] if isinstance(result, list) else result
        if result.data_ptr() != out.data_ptr():
            out.copy_(result)

    def tuning(
        autotune: Callable[[bool], contextlib.AbstractContextManager[object]], layer: Layer
    ) -> contextlib.AbstractContextManager[object]:
        size = (layer.tokens, layer.experts, *layer.gemm2_weights.shape)
        first = size not in tuned_sizes
        tuned_sizes.add(size)
        return autotune(first)

    return compute


def geometry_limits(geometry: Geometry) -> str | None:
    """Why its routing can't do this geometry, or None."""
    g = geometry
    most = 8 if g.num_experts <= 384 else 22
    if g.top_k > most:
        return f"trtllm_fp8_block_scale_moe chooses at most {most} of {g.num_experts} experts a token, not {g.top_k}"
    if g.topk_group > 4:
        return f"trtllm_fp8_block_scale_moe keeps at most 4 groups, not {g.topk_group}"
    if g.top_k >= g.topk_group * g.group_size:
        return (
            f"trtllm_fp8_block_scale_moe must have a choice: top_k={g.top_k} is not less than the "
            f"{g.topk_group * g.group_size} experts of {g.topk_group} groups"
        )
    return None


NEEDS = Needs(("flashinfer",), "pip install 'moeref[flashinfer]'", (10,), geometry_limits)
RECIPE = "requant2+bf16_weights"

VARIANTS: dict[str, tuple[Variant, str]] = {
    "flashinfer_trtllm": (Variant(), "FlashInfer, Blackwell: one fused call, weights as given"),
    "flashinfer_trtllm_shuffled": (
        Variant(shuffled=True),
        "flashinfer_trtllm with weights shuffled and blocked along K at the first call",
    ),
    "flashinfer_trtllm_tuned": (Variant(tuned=True), "flashinfer_trtllm with tactics timed at the first call"),
    "flashinfer_trtllm_no_pdl": (Variant(pdl=False), "flashinfer_trtllm without programmatic dependent launch"),
}

BACKENDS: tuple[Backend, ...] = tuple(
    backend(name, load, compute_with(variant), RECIPE, NEEDS, summary) for name, (variant, summary) in VARIANTS.items()
)
