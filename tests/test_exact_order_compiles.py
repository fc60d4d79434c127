"""The exact-order kernels as compiled for sm_90 and sm_100: nothing spilled, nothing fused, no constant shortened."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from test_kernels_compile import spilled  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from moe_fast.kernels import exact_order as kernels  # noqa: E402
from moe_fast.kernels import exact_twins as twins  # noqa: E402

I32, F32, U8 = "*i32", "*fp32", "*u8"
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "grouped_gemm": (
        kernels.grouped_gemm_kernel,
        {"rows": U8, "rows_scale": F32, "scale_stride": "i32", "row_source": I32, "weights": U8}
        | {"weights_scale": F32, "expert_offsets": I32, "output": F32},
        {"N": 4096, "W": 7168, "GATHER": True, "BM": 4, "BN": 32, "BK": 32},
    ),
    "swiglu_quantize": (
        kernels.swiglu_quantize_kernel,
        {"gemm1_out": F32, "expert_offsets": I32, "quantized": U8, "scale": F32, "row_capacity": "i32"},
        {"I": 2048, "L": 32, "BM": 4},
    ),
    "combine": (
        kernels.combine_kernel,
        {"gemm2_out": F32, "topk_weights": F32, "token_rows": I32, "output": "*i16"},
        {"H": 7168, "K": 8, "BLOCK_H": 1024},
    ),
}


def build(name: str, capability: int, **options: Any) -> Any:
    """A kernel compiled as it is launched; options come on top of the kernels' own."""
    kernel, signature, constants = KERNELS[name]
    names = kernel.arg_names
    full = {arg: signature.get(arg, "constexpr") for arg in names}
    attrs = {(index,): [["tt.divisibility", 16]] for index, arg in enumerate(names) if full[arg].startswith("*")}
    source = ASTSource(kernel, full, {(names.index(arg),): value for arg, value in constants.items()}, attrs)
    chosen = {"num_warps": 4, **kernels.OPTIONS, **options}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)


def instructions(compiled: Any) -> Counter[str]:
    """How often each machine instruction stands in the cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([tool, "-sass", cubin.name], capture_output=True, text=True, check=True).stdout
    found = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9]*)", text, re.M))
    assert found["EXIT"], "no machine code could be read"
    return found


def arithmetic(ptx: str) -> Counter[str]:
    """How often each float32 or float64 operation stands in the PTX."""
    return Counter(re.findall(r"^\s*(?:@%\w+ )?((?:fma|mad|add|sub|mul|div)\.[\w.]*f(?:32|64)(?:x2)?)\b", ptx, re.M))


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_spilled_or_fused(name: str, capability: int) -> None:
    compiled = build(name, capability)
    registers, spills, _ = spilled(compiled)
    assert spills == 0, f"{name}: {spills} bytes spilled at {registers} registers"
    ptx = arithmetic(compiled.asm["ptx"])
    assert ptx and not [one for one in ptx if "fma" in one or "mad" in one or "ftz" in one or ".rn" not in one], ptx
    assert not [one for one in ptx if one.startswith("div") and one != "div.rn.f64"], ptx
    code = instructions(compiled)
    divisions = ptx["div.rn.f64"]  # a division's own steps are fused ones, at most one of float32 each
    assert code["FFMA2"] == 0 and code["FFMA"] <= divisions and (divisions or code["DFMA"] == 0), code
    assert code["DMUL"] >= ptx["mul.rn.f64"] and code["DADD"] >= ptx["add.rn.f64"] + ptx["sub.rn.f64"], (code, ptx)
    products = ptx["mul.rn.f32"] + 2 * ptx["mul.rn.f32x2"]
    assert code["FMUL"] + 2 * code["FMUL2"] >= products > 0, (code, ptx)


@pytest.mark.parametrize("name", KERNELS)
def test_without_its_option_a_kernel_would_be_fused(name: str) -> None:
    assert "fma.rn" in build(name, 90, enable_fp_fusion=True).asm["ptx"]


def test_every_constant_of_exp_arrives_with_all_its_bits() -> None:
    ptx = build("swiglu_quantize", 90).asm["ptx"].lower()
    for value in (twins.LOG2E, twins.LN2_HIGH, twins.LN2_LOW, twins.ROUND, *twins.TAYLOR[2:]):
        bits = struct.unpack(">Q", struct.pack(">d", value))[0]
        negative = bits ^ 1 << 63  # a subtraction may have become the addition of the negative
        assert f"0d{bits:016x}" in ptx or f"0d{negative:016x}" in ptx, value
