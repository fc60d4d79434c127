"""SGLang's block-wise FP8 pipeline, the one of the published table, from sglang-kernel's own functions. Six variants.

moe_fused_gate, prepare_moe_input, shuffle_rows, fp8_blockwise_scaled_grouped_mm, silu_and_mul, a 1x128 quantisation,
the second grouped GEMM, apply_shuffle_mul_sum. `sglang_blockwise` is as published: SwiGLU's halves are swapped by
torch.cat in every call, the quantisation is PyTorch's, the workspace has 1 GB, everything is allocated in every call.
The other variants each add one improvement to those before, the last has all five; timed in turn they show what each
one brings. The fifth, SwiGLU and quantisation in one launch, is this project's own kernel: the library's quantisation
takes fuse_silu_and_mul, but obeys it only where scales are powers of two in columns, and otherwise quantises the first
half without a word (seen on an H100 with sglang-kernel 0.4.3 and 0.4.5).

The library knows local ids only. What is not local gets id -1, which no expert claims, weight 0, and a row of zeros.
gemm1's result and the routing weights are bfloat16, SwiGLU's output is quantised: 'bf16_gemm1+requant+bf16_weights'.
Sources: sgl_kernel 0.4 and sglang 0.5, layers/moe/cutlass_moe.py; FlashInfer-Bench, sglang_fp8_blockwise_moe.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch

from moe_fast.backends import Backend
from moe_fast.backends._adapter import Compute, KeptBuffers, Layer, Needs, Prepared, backend, step
from moe_fast.backends._sglang_gate import GATE_NAMES, load_gate, route
from moe_fast.layouts import to_gate_up, to_k_major_columns, to_token_major
from moeref.spec import BLOCK

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
SMALLEST_AMAX = 1e-10  # the library's default: a block of zeros is divided by this, not by zero
PUBLISHED_WORKSPACE, SMALL_WORKSPACE = 1 << 30, 90_000  # bytes; the second is what SGLang itself gives

NAMES = (
    "prepare_moe_input",
    "shuffle_rows",
    "fp8_blockwise_scaled_grouped_mm",
    "silu_and_mul",
    "sgl_per_token_group_quant_8bit",
    "apply_shuffle_mul_sum",
)
FUNCTIONS = {**{name: (f"sgl_kernel.{name}",) for name in NAMES}, "moe_fused_gate": GATE_NAMES}
"""What of the library is called, where releases have it; a test holds the calls to the real signatures."""


@dataclass(frozen=True)
class Steps:
    """The five improvements, in the order in which the variants add them."""

    load_swap: bool = False  # [gate ; up] is made from the weights at the first call
    library_quant: bool = False  # the library's 1x128 quantisation, one launch
    small_workspace: bool = False  # 90 KB instead of 1 GB
    kept_buffers: bool = False  # allocated at the first call of a size
    fused_act: bool = False  # SwiGLU and quantisation in one launch, of moe_fast's


def load() -> SimpleNamespace:
    """The library's functions. Raises ImportError, or AttributeError for a release without one of them."""
    import sgl_kernel

    gate, is_old = load_gate()
    functions = {name: getattr(sgl_kernel, name) for name in NAMES}
    return SimpleNamespace(**functions, moe_fused_gate=gate, gate_is_old=is_old)


@dataclass(frozen=True)
class Buffers:
    """Everything that one call needs beside its inputs. R = T * K rows: room for every pair, local or not."""

    workspace: torch.Tensor
    pointers: tuple[torch.Tensor, ...]  # five times [L] int64
    strides: tuple[torch.Tensor, ...]  # gemm1's of A and B, of C; gemm2's: [L] int64 each
    scale_layouts: tuple[torch.Tensor, torch.Tensor]  # [L, 5] int32, A's and B's
    expert_offsets: torch.Tensor  # [L+1] int32
    problem_sizes: tuple[torch.Tensor, torch.Tensor]  # [L, 3] int32: (rows, N, K)
    local_ids: torch.Tensor  # [T, K] int32
    local_weights: torch.Tensor  # [T, K] bfloat16
    row_token: torch.Tensor  # [R] int32: which token's row
    pair_row: torch.Tensor  # [R] int32: where a pair's row went
    gemm1_out: torch.Tensor  # [R, 2I] bfloat16
    swiglu_out: torch.Tensor  # [R, I] bfloat16
    requantized: torch.Tensor  # [R, I] e4m3
    requantized_scale: torch.Tensor  # [R, I/128]
    gemm2_out: torch.Tensor  # [R+1, H] bfloat16; the last row is zero, and stands for what is not local


def make_buffers(
    device: torch.device, tokens: int, top_k: int, local: int, hidden: int, intermediate: int, workspace: int
) -> Buffers:
    """Buffers for one size of call. row_token is zero where nothing writes it, so that every row reads some token."""
    rows = tokens * top_k

    def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def ints(*shape: int) -> torch.Tensor:
        return make(*shape, dtype=torch.int32)

    def filled(value: int) -> torch.Tensor:
        return torch.full((local,), value, dtype=torch.int64, device=device)

    gemm2_out = make(rows + 1, hidden, dtype=torch.bfloat16)
    gemm2_out[rows].zero_()
    return Buffers(
        workspace=make(workspace, dtype=torch.uint8),
        pointers=tuple(make(local, dtype=torch.int64) for _ in range(5)),
        strides=(filled(hidden), filled(2 * intermediate), filled(intermediate), filled(hidden)),
        scale_layouts=(ints(local, 5), ints(local, 5)),
        expert_offsets=ints(local + 1),
        problem_sizes=(ints(local, 3), ints(local, 3)),
        local_ids=ints(tokens, top_k),
        local_weights=make(tokens, top_k, dtype=torch.bfloat16),
        row_token=ints(rows).zero_(),
        pair_row=ints(rows),
        gemm1_out=make(rows, 2 * intermediate, dtype=torch.bfloat16),
        swiglu_out=make(rows, intermediate, dtype=torch.bfloat16),
        requantized=make(rows, intermediate, dtype=FP8),
        requantized_scale=make(rows, intermediate // BLOCK, dtype=torch.float32),
        gemm2_out=gemm2_out,
    )


def compute_with(steps: Steps) -> Compute:
    """compute(library, layer, out) of one variant."""
    gate_up, kept = Prepared(to_gate_up), KeptBuffers(make_buffers)
    workspace = SMALL_WORKSPACE if steps.small_workspace else PUBLISHED_WORKSPACE

    def compute(library: SimpleNamespace, layer: Layer, out: torch.Tensor) -> None:
        size = (layer.tokens, layer.top_k, layer.local, layer.hidden, layer.intermediate, workspace)
        space = kept(layer.device, *size) if steps.kept_buffers else make_buffers(layer.device, *size)
        topk_weights, topk_ids = route(library, layer)
        step("localize", layer.device)(
            topk_ids, topk_weights, space.local_ids, space.local_weights, layer.local_expert_offset, layer.local
        )
        rows = layer.tokens * layer.top_k
        space.pair_row.fill_(rows)
        library.prepare_moe_input(
            space.local_ids,
            space.expert_offsets,
            *space.problem_sizes,
            space.row_token,
            space.pair_row,
            layer.local,
            layer.intermediate,
            layer.hidden,
        )
        x_scale = to_token_major(layer.hidden_states_scale)
        x = library.shuffle_rows(layer.hidden_states, space.row_token, (rows, layer.hidden))
        x_scale = library.shuffle_rows(x_scale, space.row_token, (rows, layer.hidden // BLOCK))
        weight, scale = layer.gemm1_weights, layer.gemm1_weights_scale
        if steps.load_swap:
            weight, scale = gate_up(weight, scale)
        gemm(library, space, 0, x, x_scale, weight, scale, space.gemm1_out)
        activate(library, space, steps)
        read = (space.requantized, space.requantized_scale)
        gemm(library, space, 1, *read, layer.gemm2_weights, layer.gemm2_weights_scale, space.gemm2_out[:rows])
        library.apply_shuffle_mul_sum(space.gemm2_out, out, space.pair_row, space.local_weights)

    return compute


def gemm(
    library: SimpleNamespace,
    space: Buffers,
    which: int,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """gemm1 (which 0) or gemm2 (1): x [R, K] e4m3 with x_scale [R, K/128], weight [L, N, K] -> out [R, N] bfloat16."""
    ab_stride, c_stride = space.strides[2 * which], space.strides[2 * which + 1]
    columns, columns_scale = to_k_major_columns(weight, weight_scale)
    library.fp8_blockwise_scaled_grouped_mm(
        out,
        *space.pointers,
        x,
        columns,
        x_scale,
        columns_scale,
        ab_stride,
        ab_stride,
        c_stride,
        *space.scale_layouts,
        space.problem_sizes[which],
        space.expert_offsets[:-1],
        space.workspace,
    )


def activate(library: SimpleNamespace, space: Buffers, steps: Steps) -> None:
    """gemm1_out -> requantized and its scale, by as many launches as the variant has."""
    gemm1_out, half = space.gemm1_out, space.swiglu_out.shape[1]
    quantized, scale = space.requantized, space.requantized_scale
    if steps.fused_act:
        step("swiglu_quantize", gemm1_out.device)(gemm1_out, None, quantized, scale, gate_first=steps.load_swap)
        return
    if not steps.load_swap:
        gemm1_out = torch.cat([gemm1_out[:, half:], gemm1_out[:, :half]], dim=1)
    library.silu_and_mul(gemm1_out, space.swiglu_out)
    if steps.library_quant:
        limits = (SMALLEST_AMAX, -FP8_MAX, FP8_MAX)
        library.sgl_per_token_group_quant_8bit(space.swiglu_out, quantized, scale, BLOCK, *limits)
        return
    blocks = space.swiglu_out.float().unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=2).clamp(min=SMALLEST_AMAX) / FP8_MAX  # [R, I/128]
    quantized.copy_((blocks / largest.unsqueeze(2)).clamp(-FP8_MAX, FP8_MAX).flatten(1))
    scale.copy_(largest)


RECIPE = "bf16_gemm1+requant+bf16_weights"
NEEDS = Needs(("sgl_kernel",), "pip install 'moeref[sglang]'", (9, 10))

_ADDED = (
    ("sglang_blockwise", "SGLang's block-wise FP8 pipeline, Hopper and Blackwell, as in the published table"),
    ("sglang_blockwise_swap", "sglang_blockwise with SwiGLU's halves swapped in the weights, at the first call"),
    ("sglang_blockwise_quant", "sglang_blockwise_swap with the library's 1x128 quantisation"),
    ("sglang_blockwise_workspace", "sglang_blockwise_quant with a workspace of 90 KB instead of 1 GB"),
    ("sglang_blockwise_buffers", "sglang_blockwise_workspace with buffers kept from call to call"),
    (
        "sglang_blockwise_improved",
        "sglang_blockwise_buffers with SwiGLU and quantisation in one launch of moe_fast's: all five",
    ),
)

VARIANTS: dict[str, tuple[Steps, str]] = {
    name: (steps, summary)
    for (name, summary), steps in zip(
        _ADDED,
        itertools.accumulate(fields(Steps), lambda steps, field: replace(steps, **{field.name: True}), initial=Steps()),
        strict=True,
    )
}

BACKENDS: tuple[Backend, ...] = tuple(
    backend(name, load, compute_with(steps), RECIPE, NEEDS, summary) for name, (steps, summary) in VARIANTS.items()
)
