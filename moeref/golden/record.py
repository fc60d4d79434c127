"""What a manifest says beside the tensors: digests of the inputs, norms and samples, and the torch that wrote it."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch

import moeref.reference as reference
from moeref.golden.stages import StageResult
from moeref.inputs import FP8, TENSOR_FIELDS, Inputs

WEIGHTS = ("gemm1_weights", "gemm2_weights")

_IN_RANGE = (0.0, -0.0, 2.0**-10, 3 * 2.0**-10, 2.0**-9, 2.0**-6, 17.0, 19.0, -17.0, 431.0, 432.0, 447.0, 448.0, -448.0)
_BEYOND = (463.0, 464.0, 465.0, 1e30, float("inf"), float("-inf"), float("nan"))


def fp8_cast() -> dict[str, str]:
    """What this torch makes of float32 -> e4m3, as hex bytes.

    in_range: zeros, ties to even, subnormal numbers, the largest: every machine must give the same bytes.
    beyond: 448 and more, infinities, NaN: libraries differ (saturate, or NaN); every cast here clamps first.
    """

    def octets(values: tuple[float, ...]) -> str:
        return bytes(torch.tensor(values).to(FP8).view(torch.uint8).tolist()).hex()

    return {"in_range": octets(_IN_RANGE), "beyond": octets(_BEYOND)}


def environment() -> dict[str, Any]:
    """Of the machine that records a case."""
    return {"torch": torch.__version__, "machine": platform.machine(), "fp8_cast": fp8_cast()}


def check_cast(manifest: dict[str, Any]) -> StageResult:
    """Whether this torch casts to e4m3 as the recording one did, inside the range that is ever cast."""
    now, recorded = fp8_cast()["in_range"], manifest["written"]["fp8_cast"]["in_range"]
    detail = "" if now == recorded else f"casts of {len(_IN_RANGE)} values inside +-448 give {now}, recorded {recorded}"
    return StageResult("fp8_cast", not detail, detail)


def input_digests(inputs: Inputs, hit: list[int]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and digest of the eight tensors. Of the weights, only the local experts `hit` are looked at."""
    found = {}
    for name in TENSOR_FIELDS:
        tensor = getattr(inputs, name)
        parts = [tensor[slot] for slot in hit] if name in WEIGHTS else [tensor]
        hasher = hashlib.sha256()
        for part in parts:
            hasher.update(part.contiguous().reshape(-1).view(torch.uint8).numpy())
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[name] = {"shape": list(tensor.shape), "dtype": dtype, "sha256": hasher.hexdigest()[:16]}
    return found


def check_inputs(manifest: dict[str, Any], inputs: Inputs, hit: list[int]) -> dict[str, StageResult]:
    """A result for each input tensor: its bytes are the recorded ones."""
    now, results = input_digests(inputs, hit), {}
    for name, recorded in manifest["inputs"].items():
        detail = "" if now[name] == recorded else f"now {now[name]}, recorded {recorded}"
        results[name] = StageResult(name, not detail, detail)
    return results


def hit_experts(expert_offsets: torch.Tensor) -> list[int]:
    """Local experts that have rows."""
    return [expert for expert, _ in reference.expert_spans(expert_offsets)]


def summary(stage: torch.Tensor) -> dict[str, Any]:
    """Norms and a few values of a float stage, for readers: root mean square, largest magnitude, four elements."""
    values = stage.double()
    if not values.numel():
        return {"rms": 0.0, "largest": 0.0, "samples": []}
    flat = values.flatten()
    picks = [len(flat) * part // 4 for part in range(4)]
    samples = [[*divmod(pick, stage.shape[-1]), float(f"{float(flat[pick]):.9g}")] for pick in dict.fromkeys(picks)]
    return {
        "rms": float(f"{float(values.square().mean().sqrt()):.9g}"),
        "largest": float(f"{float(flat.abs().max()):.9g}"),
        "samples": samples,  # [row, column, value]
    }
