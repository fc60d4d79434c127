"""FlashInfer's CUTLASS fused MoE for Hopper, FP8 block scales: routing in one call, everything else in another.

The library takes bfloat16 activations and quantises them 1x128 itself. The definition's come quantised, so this adapter
dequantises them first, in one fused kernel of its own. Their second quantisation costs about what re-quantising gemm1's
result costs, SwiGLU's output is quantised before gemm2, and so the recipe that covers both is 'requant2'.
Source: flashinfer 0.7, flashinfer.fused_moe.fused_topk_deepseek and cutlass_fused_moe.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from moe_fast.backends import Backend
from moe_fast.backends._adapter import Compute, Layer, Needs, backend, step
from moeref.interop.candidates import Unsupported
from moeref.spec import Geometry

FUNCTIONS = {
    "fused_topk_deepseek": ("flashinfer.fused_moe.fused_topk_deepseek",),
    "cutlass_fused_moe": ("flashinfer.fused_moe.cutlass_fused_moe",),
}
"""What of the library is called; a test holds the calls to the real signatures."""

RECIPE = "requant2"
OWN_STEP = "dequantising the activations to bfloat16 is this adapter's step"


@dataclass(frozen=True)
class Variant:
    """What the library lets its caller choose."""

    pdl: bool | None = None  # programmatic dependent launch; None: the library decides


def load() -> SimpleNamespace:
    """The library's functions. Raises ImportError."""
    from flashinfer.fused_moe import cutlass_fused_moe, fused_topk_deepseek

    return SimpleNamespace(cutlass_fused_moe=cutlass_fused_moe, fused_topk_deepseek=fused_topk_deepseek)


def compute_with(variant: Variant) -> Compute:
    """compute(library, layer, out) of one variant."""

    def compute(library: SimpleNamespace, layer: Layer, out: torch.Tensor) -> None:
        rank, rest = divmod(layer.local_expert_offset, layer.local)
        size, left = divmod(layer.experts, layer.local)
        if rest or left or not 0 <= rank < size:
            raise Unsupported(
                f"cutlass_fused_moe numbers its ranks: the offset must be a multiple of L={layer.local} below "
                f"E={layer.experts}, which L must divide; got offset {layer.local_expert_offset}"
            )
        topk_weights = layer.empty(layer.tokens, layer.top_k)
        topk_ids = layer.empty(layer.tokens, layer.top_k, dtype=torch.int32)
        library.fused_topk_deepseek(
            layer.routing_logits,
            layer.routing_bias,
            layer.n_group,
            layer.topk_group,
            layer.top_k,
            layer.routed_scaling_factor,
            topk_weights,
            topk_ids,
            launch_with_pdl=variant.pdl is not False,
        )
        activations = layer.empty(layer.tokens, layer.hidden, dtype=torch.bfloat16)
        step("dequantize", layer.device)(layer.hidden_states, layer.hidden_states_scale, activations)
        library.cutlass_fused_moe(
            activations,
            topk_ids,
            topk_weights,
            layer.gemm1_weights,
            layer.gemm2_weights,
            torch.bfloat16,
            [layer.gemm1_weights_scale, layer.gemm2_weights_scale],
            ep_size=size,
            ep_rank=rank,
            output=out,
            use_deepseek_fp8_block_scale=True,
            tune_max_num_tokens=max(8192, layer.tokens),
            enable_pdl=variant.pdl,
        )

    return compute


def geometry_limits(geometry: Geometry) -> str | None:
    """Why fused_topk_deepseek can't route this geometry, or None."""
    g = geometry
    if g.top_k > 8:
        return f"flashinfer's fused_topk_deepseek chooses at most 8 experts a token, not {g.top_k}"
    if g.n_group == 1 and g.num_experts > 384:
        return f"flashinfer's fused_topk_deepseek knows at most 384 experts in one group, not {g.num_experts}"
    if g.n_group > 1 and (g.group_size > 32 or g.group_size * g.topk_group > 128 or g.n_group > 32):
        return (
            "flashinfer's fused_topk_deepseek knows at most 32 groups of 32 experts, of which 128 are kept; got "
            f"{g.n_group} of {g.group_size}, {g.topk_group} kept"
        )
    if g.num_experts % g.num_local_experts:
        return f"cutlass_fused_moe has equal ranks: L={g.num_local_experts} must divide E={g.num_experts}"
    return None


NEEDS = Needs(("flashinfer",), "pip install 'moeref[flashinfer]'", (9,), geometry_limits)

VARIANTS: dict[str, tuple[Variant, str]] = {
    "flashinfer_cutlass": (Variant(), f"FlashInfer, Hopper: CUTLASS fused MoE; {OWN_STEP}"),
    "flashinfer_cutlass_no_pdl": (Variant(pdl=False), "flashinfer_cutlass without programmatic dependent launch"),
}

BACKENDS: tuple[Backend, ...] = tuple(
    backend(name, load, compute_with(variant), RECIPE, NEEDS, summary) for name, (variant, summary) in VARIANTS.items()
)
