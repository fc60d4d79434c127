"""FlashInfer's fused MoE, the one that this machine's card runs: flashinfer_trtllm or flashinfer_cutlass."""

from __future__ import annotations

from moe_fast.backends import flashinfer_cutlass, flashinfer_trtllm
from moe_fast.backends._adapter import chooser

BACKEND = chooser(
    "flashinfer",
    (flashinfer_trtllm.BACKENDS[0], flashinfer_cutlass.BACKENDS[0]),
    "FlashInfer's fused MoE: flashinfer_trtllm on Blackwell, flashinfer_cutlass on Hopper",
)
