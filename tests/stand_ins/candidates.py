"""Every adapter, in every variant, over its stand-in: `moeref verify tests/stand_ins/candidates.py:NAME --small`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # stand_ins is a package beside the tests

from moe_fast.backends import deep_gemm as deep_gemm_adapter
from moe_fast.backends import flashinfer_cutlass, flashinfer_trtllm, sglang_blockwise, sglang_triton
from moe_fast.backends._adapter import entry
from stand_ins import deep_gemm as deep_gemm_stand_in
from stand_ins import flashinfer as flashinfer_stand_in
from stand_ins import sgl_kernel as sglang_stand_in

LIBRARIES: dict[ModuleType, Callable[[], SimpleNamespace]] = {
    flashinfer_trtllm: flashinfer_stand_in.library,
    flashinfer_cutlass: flashinfer_stand_in.library,
    sglang_blockwise: sglang_stand_in.library,
    sglang_triton: sglang_stand_in.library,
    deep_gemm_adapter: deep_gemm_stand_in.library,
}

VARIANTS: dict[str, tuple[ModuleType, Any]] = {
    name: (module, variant) for module in LIBRARIES for name, (variant, _) in module.VARIANTS.items()
}


def over(name: str, library: SimpleNamespace | None = None) -> Callable[..., Any]:
    """The adapter of that name over its stand-in, or over `library`; it declares its backend's recipe."""
    module, variant = VARIANTS[name]
    run = entry(LIBRARIES[module] if library is None else lambda: library, module.compute_with(variant))
    run.MOEREF = {"recipe": module.RECIPE}  # type: ignore[attr-defined]
    run.__module__ = __name__
    return run


globals().update({name: over(name) for name in VARIANTS})
