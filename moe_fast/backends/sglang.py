"""SGLang: its block-wise FP8 pipeline of the published table, else its Triton MoE."""

from __future__ import annotations

from moe_fast.backends import sglang_blockwise, sglang_triton
from moe_fast.backends._adapter import chooser

BACKEND = chooser(
    "sglang",
    (sglang_blockwise.BACKENDS[0], sglang_triton.BACKENDS[0]),
    "SGLang: the published block-wise pipeline (sglang_blockwise), else its Triton MoE (sglang_triton)",
)
