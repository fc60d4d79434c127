"""Element and row comparisons: FlashInfer-Bench's matched ratio, and relative row errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeref.spec import BLOCK

CHUNK = 1024  # tokens compared at a time, so that temporaries stay small at seq_len 14107


@dataclass(frozen=True)
class Criterion:
    """An element fails when abs > atol and abs / (|ref| + 1e-8) > rtol; the share that does not fail must reach
    `required` (FlashInfer-Bench's low-bit evaluator)."""

    name: str
    rtol: float
    atol: float
    required: float


CRITERIA = {
    "published": Criterion("published", rtol=0.2, atol=0.1, required=0.85),
    "contest": Criterion("contest", rtol=0.3, atol=1.0, required=0.9),
    "default": Criterion("default", rtol=0.01, atol=0.01, required=0.95),
}


def chunks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of at most CHUNK rows each; none for an empty tensor."""
    return [tensor[start : start + CHUNK] for start in range(0, len(tensor), CHUNK)]


def matched_per_token(output: torch.Tensor, reference: torch.Tensor, criterion: Criterion) -> torch.Tensor:
    """Share of matching elements of each row, [T] float64. output, reference: [T, H]; a NaN in output never matches.

    Raises ValueError for a reference that is not finite: no candidate can be held to it.
    """
    shares = []
    for out, ref in zip(chunks(output), chunks(reference), strict=True):
        out, ref = out.float(), ref.float()
        if not bool(torch.isfinite(ref).all()):
            raise ValueError("the reference holds NaN or inf: nothing can be compared with it")
        error = (out - ref).abs()
        close = (error <= criterion.atol) | (error / (ref.abs() + 1e-8) <= criterion.rtol)
        shares.append((close & torch.isfinite(out)).double().mean(1))
    return torch.cat(shares) if shares else torch.empty(0, dtype=torch.float64)


def largest_errors(output: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(largest abs, largest abs / (|ref| + 1e-8)) over all elements, as FlashInfer-Bench reports them; NaN where the
    output holds one."""
    largest = torch.zeros(2, device=reference.device)
    for out, ref in zip(chunks(output), chunks(reference), strict=True):
        error = (out.float() - ref.float()).abs()
        pair = torch.stack([error.max(), (error / (ref.float().abs() + 1e-8)).max()])
        largest = torch.maximum(largest, pair)
    return float(largest[0]), float(largest[1])


def row_errors(output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """||out - ref|| / ||ref|| of each row, [T] float64: 0 where both are zero, inf where only ref is."""
    errors = []
    for out, ref in zip(chunks(output), chunks(reference), strict=True):
        norm = ref.double().norm(dim=1)
        difference = (out.double() - ref.double()).norm(dim=1)
        errors.append(torch.where(difference == 0, difference, difference / norm))
    return torch.cat(errors) if errors else torch.empty(0, dtype=torch.float64)


def block_errors(output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Root mean square, over a row's blocks of 128 columns, of ||out - ref|| / ||ref|| of the block, [T] float64.

    A block of small values counts as much as one of large values, which `row_errors` does not see beside the rounding
    of the large ones. 0 where both are zero, inf where only ref is.
    """
    errors = []
    for out, ref in zip(chunks(output), chunks(reference), strict=True):
        blocks = (len(ref), -1, BLOCK)
        norm = ref.double().reshape(blocks).norm(dim=2)
        difference = (out.double() - ref.double()).reshape(blocks).norm(dim=2)
        errors.append(torch.where(difference == 0, difference, difference / norm).square().mean(1).sqrt())
    return torch.cat(errors) if errors else torch.empty(0, dtype=torch.float64)
