"""SGLang's Triton fused MoE, called kernel by kernel, without the server's state. Two variants.

moe_fused_gate, moe_align_block_size, invoke_fused_moe_kernel, silu_and_mul, invoke_fused_moe_kernel, moe_sum_reduce.
The library takes bfloat16 activations and quantises them 1x128 itself, twice; the definition's come quantised, so this
adapter dequantises them first, in one fused kernel of its own. Recipe 'requant2', for flashinfer_cutlass's reason.
Source: sglang 0.5, kernels/ops/moe/fused_moe_triton_kernels.py; sgl_kernel 0.4.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moe_fast.backends import Backend
from moe_fast.backends._adapter import Compute, Layer, Needs, Prepared, backend, step
from moe_fast.backends._sglang_gate import GATE_NAMES, load_gate, route
from moe_fast.backends.flashinfer_cutlass import OWN_STEP
from moe_fast.layouts import to_gate_up
from moeref.spec import BLOCK

FUNCTIONS = {
    "invoke_fused_moe_kernel": ("sglang.kernels.ops.moe.fused_moe_triton_kernels.invoke_fused_moe_kernel",),
    "moe_align_block_size": ("sgl_kernel.moe_align_block_size",),
    "silu_and_mul": ("sgl_kernel.silu_and_mul",),
    "moe_sum_reduce": ("sgl_kernel.moe_sum_reduce",),
    "moe_fused_gate": GATE_NAMES,
}
"""What of the library is called, where releases have it; a test holds the calls to the real signatures."""

DEFAULT_CONFIG = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": BLOCK,
    "BLOCK_SIZE_K": BLOCK,
    "GROUP_SIZE_M": 32,
    "num_warps": 4,
    "num_stages": 3,
}
"""What sglang takes for 128x128 blocks where it ships no table for the card and geometry."""

TABLE = "E=256,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
"""The table for DeepSeek-V3 on Hopper that sglang ships (tensor parallel 8); none is shipped for 32 local experts."""


@dataclass(frozen=True)
class Variant:
    """What the library lets its caller choose."""

    tuned: bool = False  # tilings of TABLE instead of the default


def load() -> SimpleNamespace:
    """The library's functions and its table. Raises ImportError; AttributeError for a release without one of them."""
    import sgl_kernel
    import sglang
    import triton.language as tl
    from sglang.kernels.ops.moe.fused_moe_triton_kernels import invoke_fused_moe_kernel

    gate, is_old = load_gate()
    return SimpleNamespace(
        invoke_fused_moe_kernel=invoke_fused_moe_kernel,
        moe_align_block_size=sgl_kernel.moe_align_block_size,
        silu_and_mul=sgl_kernel.silu_and_mul,
        moe_sum_reduce=sgl_kernel.moe_sum_reduce,
        moe_fused_gate=gate,
        gate_is_old=is_old,
        bfloat16=tl.bfloat16,
        table=functools.cache(lambda: shipped_table(Path(sglang.__path__[0]))),
    )


def shipped_table(package: Path) -> dict[int, dict[str, int]]:
    """Tokens -> tiling, of the newest Triton that sglang ships TABLE for. Raises FileNotFoundError."""
    found = sorted(package.glob(f"srt/layers/moe/**/configs/triton_*/{TABLE.replace('[', '[[]')}"))
    if not found:
        raise FileNotFoundError(f"this sglang ships no table {TABLE}: use sglang_triton instead of sglang_triton_tuned")
    table = json.loads(found[-1].read_text(encoding="utf-8"))
    return {int(tokens): config for tokens, config in table.items()}


def compute_with(variant: Variant) -> Compute:
    """compute(library, layer, out) of one variant."""
    gate_up = Prepared(to_gate_up)

    def config_for(library: SimpleNamespace, tokens: int) -> dict[str, int]:
        if not variant.tuned:
            return DEFAULT_CONFIG
        table: dict[int, dict[str, int]] = library.table()
        return table[min(table, key=lambda size: abs(size - tokens))]

    def compute(library: SimpleNamespace, layer: Layer, out: torch.Tensor) -> None:
        config = config_for(library, layer.tokens)
        topk_weights, topk_ids = route(library, layer)
        local_ids, local_weights = torch.empty_like(topk_ids), torch.empty_like(topk_weights)
        step("localize", layer.device)(
            topk_ids, topk_weights, local_ids, local_weights, layer.local_expert_offset, layer.local
        )
        plan = align(library, layer, local_ids, config["BLOCK_SIZE_M"])
        rows = layer.tokens * layer.top_k
        activations = layer.empty(layer.tokens, layer.hidden, dtype=torch.bfloat16)
        step("dequantize", layer.device)(layer.hidden_states, layer.hidden_states_scale, activations)
        gemm1_out = layer.empty(rows, 2 * layer.intermediate, dtype=torch.bfloat16)
        swiglu_out = layer.empty(rows, layer.intermediate, dtype=torch.bfloat16)
        gemm2_out = layer.empty(layer.tokens, layer.top_k, layer.hidden, dtype=torch.bfloat16)
        call = functools.partial(gemm, library, local_ids, local_weights, plan, config)
        weight, scale = gate_up(layer.gemm1_weights, layer.gemm1_weights_scale)
        call(activations, weight, scale, gemm1_out, weighted=False, rows_a_token=layer.top_k)
        library.silu_and_mul(gemm1_out, swiglu_out)
        weight, scale = layer.gemm2_weights, layer.gemm2_weights_scale
        call(swiglu_out, weight, scale, gemm2_out, weighted=True, rows_a_token=1)
        library.moe_sum_reduce(gemm2_out, out, 1.0)

    return compute


def align(
    library: SimpleNamespace, layer: Layer, local_ids: torch.Tensor, tile_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pairs sorted by expert, each expert's padded to whole tiles; each tile's expert; number of padded pairs)."""
    pairs, experts = local_ids.numel(), layer.local + 1  # those that are not local count as one more, id -1
    padded = pairs * tile_rows if pairs < experts else pairs + experts * (tile_rows - 1)
    sorted_pairs = layer.empty(padded, dtype=torch.int32)
    tile_expert = layer.empty(-(-padded // tile_rows), dtype=torch.int32)
    num_padded = layer.empty(1, dtype=torch.int32)
    scratch = layer.empty(experts + 1, dtype=torch.int32)
    library.moe_align_block_size(
        local_ids, experts, tile_rows, sorted_pairs, tile_expert, num_padded, scratch, pad_sorted_token_ids=True
    )
    return sorted_pairs, tile_expert, num_padded


def gemm(
    library: SimpleNamespace,
    local_ids: torch.Tensor,
    local_weights: torch.Tensor,
    plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    config: dict[str, Any],
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
    *,
    weighted: bool,
    rows_a_token: int,
) -> None:
    """x bfloat16, quantised by the library, times each pair's expert's weight [L, N, K]; pairs not local become 0."""
    library.invoke_fused_moe_kernel(
        x,
        weight,
        None,
        out,
        None,
        weight_scale,
        None,
        local_weights,
        local_ids,
        *plan,
        weighted,
        rows_a_token,
        config,
        compute_type=library.bfloat16,
        use_fp8_w8a8=True,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
        block_shape=[BLOCK, BLOCK],
    )


RECIPE = "requant2"
NEEDS = Needs(("sglang", "sgl_kernel"), "pip install 'moeref[sglang]'", (9, 10))

VARIANTS: dict[str, tuple[Variant, str]] = {
    "sglang_triton": (Variant(), f"SGLang's Triton fused MoE, Hopper and Blackwell, default tiling; {OWN_STEP}"),
    "sglang_triton_tuned": (Variant(tuned=True), "sglang_triton with the tilings that sglang ships for an H200"),
}

BACKENDS: tuple[Backend, ...] = tuple(
    backend(name, load, compute_with(variant), RECIPE, NEEDS, summary) for name, (variant, summary) in VARIANTS.items()
)
