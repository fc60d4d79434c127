"""Every CUDA source compiles by NVRTC 13.0, which is what torch's CUDA wheels bring along: nvcc takes more."""

from __future__ import annotations

import pytest

from moe_fast.kernels import (
    cuda_combine,
    cuda_few_tokens,
    cuda_grouped_gemm,
    cuda_later_windows,
    cuda_route,
    cuda_route_permute,
)
from moe_fast.kernels.cuda_build import ARCH, SOURCES, compile_nvrtc, source_text

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

VARIANTS = [
    ("grouped_gemm.cu", cuda_grouped_gemm.defines(1)),
    ("grouped_gemm.cu", cuda_grouped_gemm.defines(2)),
    ("later_windows.cu", cuda_later_windows.defines(2, 8)),
    ("combine.cu", cuda_combine.defines(8)),
    ("combine.cu", cuda_combine.defines(1)),
    ("route.cu", cuda_route.route_defines(256, 8, 4, 8, 32)),
    ("place.cu", cuda_route.place_defines(8, 32)),
    ("route_permute.cu", cuda_route_permute.defines(256, 8, 4, 8, 32)),
    ("few_tokens.cu", cuda_few_tokens.defines(256, 8, 4, 8, 32, 7168, 2048, 132)),
]


@pytest.mark.parametrize(("name", "defines"), VARIANTS)
def test_a_source_compiles(name: str, defines: tuple[tuple[str, int], ...]) -> None:
    binary = compile_nvrtc(source_text(name), [f"{key}={value}" for key, value in defines], ARCH)
    assert binary.startswith(b"\x7fELF") and name.removesuffix(".cu").encode() + b"_kernel" in binary


def test_every_source_is_among_them() -> None:
    assert {name for name, _ in VARIANTS} == {path.name for path in SOURCES.glob("*.cu")}


@pytest.mark.skipif(nvrtc.nvrtcVersion()[1:] != (13, 0), reason="later ones take generic lambdas")
def test_what_nvcc_alone_takes_is_refused_with_the_compilers_words() -> None:
    text = 'extern "C" __global__ void f() { auto same = [](auto x) { return x; }; same(1); }'
    with pytest.raises(RuntimeError, match="without execution space annotations"):
        compile_nvrtc(text, [], ARCH)
