"""Every Triton kernel compiles for sm_90 and sm_100 without a GPU: the expected matrix instruction, no spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from moe_fast.kernels import combine, experts, gemm1, gemm2, permute, routing  # noqa: E402

I32, F32, FP8 = "*i32", "*fp32", "*fp8e4nv"
SIZES = {"H": 7168, "I": 2048, "L": 32}
PLAN = {"permuted_idx_to_token_idx": I32, "expert_offsets": I32, "tile_offsets": I32}
STAGE = {"swiglu_out": F32, "requantized": FP8, "requantized_scale": F32, "row_capacity": "i32"}
HIDDEN = {"hidden_states": FP8, "hidden_states_scale": F32, "scale_stride": "i32"}
WEIGHTS1 = {"gemm1_weights": FP8, "gemm1_weights_scale": F32}
WEIGHTS2 = {"gemm2_weights": FP8, "gemm2_weights_scale": F32}
EXPERTS = {
    **HIDDEN, **WEIGHTS1, **WEIGHTS2, **PLAN, **STAGE, "gemm2_out": F32, "counters": I32, "max_tiles": "i32",
}  # fmt: skip
ROUTE = {
    "routing_logits": F32, "routing_bias": "*bf16", "topk_ids": I32, "topk_weights": F32, "local_slot": I32,
    "token_rows": I32, "expert_offsets": I32, "tile_offsets": I32, "permuted_idx_to_token_idx": I32, "ticket": I32,
    "counters": I32, "num_counters": "i32", "num_tokens": "i32", "local_expert_offset": "i32",
    "routed_scaling_factor": "fp32",
}  # fmt: skip
PLACE = {"local_slot": I32, "token_rows": I32, "expert_offsets": I32, "tile_offsets": I32}


def route_constants(block: int, chunk: int, fused: bool, experts_: int = 256, local: int = 32, groups: int = 8) -> dict:
    """Constants of route_kernel for one geometry."""
    return {
        "E": experts_, "L": local, "K": 8, "N_GROUP": groups, "TOPK_GROUP": max(1, groups // 2), "BLOCK_T": block,
        "CHUNK_T": chunk, "TILE_ROWS": 16, "PERMUTE": fused, "FAST_EXP": False, "PDL": True,
    }  # fmt: skip


def experts_constants(bn: int, nb: int, mb: int, stages: int, unroll: int) -> dict:
    """Constants of experts_kernel."""
    return {
        "U1": unroll, "U2": unroll,
        **SIZES, "BN": bn, "NB": nb, "MB": mb, "STAGES1": stages, "STAGES2": stages, "PDL": True,
    }  # fmt: skip


CASES: dict[str, tuple[Any, Mapping[str, str], dict[str, Any], int, bool]] = {
    "route_one": (routing.route_kernel, ROUTE, route_constants(1, 1, True), 1, False),
    "route_fused": (routing.route_kernel, ROUTE, route_constants(1, 16, True), 1, False),
    "route_kimi": (routing.route_kernel, ROUTE, route_constants(1, 1, False, 384, 48, 1), 1, False),
    "count": (
        permute.count_kernel,
        {"local_slot": I32, "chunk_counts": I32, "num_tokens": "i32"},
        {"L": 32, "LP": 32, "CHUNK_T": 128},
        4,
        False,
    ),
    "permute": (
        permute.permute_kernel,
        {**PLACE, "permuted_idx_to_token_idx": I32, "chunk_counts": I32, "num_tokens": "i32"},
        {"L": 32, "LP": 32, "K": 8, "CHUNK_T": 128, "TILE_ROWS": 16, "ALONE": False},
        4,
        False,
    ),
    "permute_alone": (
        permute.permute_kernel,
        {**PLACE, "permuted_idx_to_token_idx": I32, "chunk_counts": I32, "num_tokens": "i32"},
        {"L": 32, "LP": 32, "K": 8, "CHUNK_T": 128, "TILE_ROWS": 16, "ALONE": True},
        4,
        False,
    ),
    "gemm1": (
        gemm1.gemm1_kernel,
        {**HIDDEN, **WEIGHTS1, **PLAN, **STAGE, "arrivals": I32},
        {**SIZES, "BN": 16, "NB": 128, "STAGES": 4, "U": 1},
        8,
        True,
    ),
    "gemm2": (
        gemm2.gemm2_kernel,
        {"requantized": FP8, "requantized_scale": F32, "row_capacity": "i32", **WEIGHTS2}
        | {"expert_offsets": I32, "tile_offsets": I32, "gemm2_out": F32},
        {**SIZES, "BN": 16, "MB": 128, "STAGES": 4, "U": 1},
        4,
        True,
    ),
    "experts_16": (experts.experts_kernel, EXPERTS, experts_constants(16, 32, 64, 3, 2), 4, True),
    "experts_32": (experts.experts_kernel, EXPERTS, experts_constants(32, 64, 128, 5, 1), 4, True),
    "experts_32_hopper": (experts.experts_kernel, EXPERTS, experts_constants(32, 64, 128, 2, 2), 4, True),
    "combine": (
        combine.combine_kernel,
        {"gemm2_out": F32, "topk_weights": F32, "token_rows": I32, "output": "*bf16"},
        {"H": 7168, "K": 8, "BLOCK_H": 1024, "PDL": True},
        4,
        False,
    ),
}
UNALIGNED = {"num_tokens", "local_expert_offset", "num_counters", "scale_stride", "row_capacity", "max_tiles"}


def build(name: str, capability: int) -> Any:
    """The case compiled for a compute capability such as 90; base pointers are 16-byte aligned as torch gives them."""
    kernel, signature, constants, warps, _ = CASES[name]
    names = kernel.arg_names
    full = {arg: signature.get(arg, "constexpr") for arg in names}
    attrs = {(index,): [["tt.divisibility", 16]] for index, arg in enumerate(names) if full[arg].startswith("*")}
    source = ASTSource(kernel, full, {(names.index(arg),): value for arg, value in constants.items()}, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def spilled(compiled: Any) -> tuple[int, int, int]:
    """(registers a thread, bytes spilled, bytes of shared memory) as cuobjdump reads them off the cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[union-attr]
    return registers, stack + local, compiled.metadata.shared


@pytest.mark.parametrize(
    ("name", "capability"),
    # the tiling for 513 to 1024 tokens fills Hopper's registers and would spill on Blackwell, which needs its own
    [
        (name, capability)
        for name in CASES
        for capability in (90, 100)
        if (name, capability) != ("experts_32_hopper", 100)
    ],
)
def test_compiles(name: str, capability: int) -> None:
    """Builds, uses the Hopper or Blackwell matrix unit where it should, keeps everything in registers."""
    compiled = build(name, capability)
    registers, spills, shared = spilled(compiled)
    assert spills == 0, f"{name}: {spills} bytes spilled at {registers} registers"
    assert shared <= 227 * 1024
    if CASES[name][-1]:
        instruction = {90: r"wgmma\.mma_async.*e4m3\.e4m3", 100: r"tcgen05\.mma"}[capability]
        assert re.search(instruction, compiled.asm["ptx"]), f"{name}: no {instruction}"


def test_combine_may_read_what_came_before_the_experts() -> None:
    """`experts` waits for routing before it lets combine start, and combine waits before it reads gemm2_out."""
    wait, start = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
    experts_ptx, combine_ptx = (build(name, 90).asm["ptx"] for name in ("experts_16", "combine"))
    assert experts_ptx.count(wait) == experts_ptx.count(start) == combine_ptx.count(wait) == 1
    assert experts_ptx.index(wait) < experts_ptx.index(start) < experts_ptx.index("ld.global")
    before, after = combine_ptx.split(wait)
    assert before.count("ld.global.cg") == before.count("ld.global") == 2  # a token's rows and weights
    assert "ld.global" in after and "st.global" not in before
