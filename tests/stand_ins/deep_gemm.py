"""DeepGEMM's functions that moe_fast's adapter calls."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from moeref.quant import dequantize_1x128, dequantize_128x128

Scaled = tuple[torch.Tensor, torch.Tensor]
ALIGNMENT = 128


def m_grouped_fp8_gemm_nt_contiguous(a: Scaled, b: Scaled, d: torch.Tensor, grouped_layout: torch.Tensor) -> None:
    """d's rows of expert e = a's rows times b[e]^T; grouped_layout names each row's expert, -1 where it is padding."""
    assert grouped_layout.dtype == torch.int32 and len(d) % ALIGNMENT == 0
    d.fill_(torch.nan)
    for tile in grouped_layout.split(ALIGNMENT):
        assert len(set(tile[tile >= 0].tolist())) <= 1, "a tile has rows of one expert"
        assert not bool((tile >= 0).any()) or int(tile[0]) >= 0, "a tile's first row names its expert"
    for expert in grouped_layout[grouped_layout >= 0].unique().tolist():
        rows = grouped_layout == expert
        d[rows] = _product(a[0][rows], a[1][rows], b, expert).to(d.dtype)


def m_grouped_fp8_gemm_nt_masked(
    a: Scaled, b: Scaled, d: torch.Tensor, masked_m: torch.Tensor, expected_m: int
) -> None:
    """d[e] = a[e] times b[e]^T, for the first masked_m[e] rows of each expert."""
    assert d.dim() == 3 and masked_m.dtype == torch.int32 and expected_m >= 1
    d.fill_(torch.nan)
    for expert, rows in enumerate(masked_m.tolist()):
        d[expert, :rows] = _product(a[0][expert, :rows], a[1][expert, :rows], b, expert).to(d.dtype)


def get_mk_alignment_for_contiguous_layout() -> int:
    """Rows of a tile."""
    return ALIGNMENT


def _product(x: torch.Tensor, x_scale: torch.Tensor, b: Scaled, expert: int) -> torch.Tensor:
    return dequantize_1x128(x, x_scale) @ dequantize_128x128(b[0][expert], b[1][expert]).t()


def library() -> SimpleNamespace:
    """What the adapter's load() gives where the library is installed."""
    return SimpleNamespace(
        contiguous=m_grouped_fp8_gemm_nt_contiguous,
        masked=m_grouped_fp8_gemm_nt_masked,
        alignment=get_mk_alignment_for_contiguous_layout,
    )
