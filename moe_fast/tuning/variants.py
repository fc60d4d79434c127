"""What is tried: a bounded list, chosen by hand from what was near the best on an H100 (docs/h100.md)."""

from __future__ import annotations

import torch

from moe_fast.backends import hopper, hopper_few_tokens
from moe_fast.kernels.experts import Tiling
from moe_fast.pipelines.hopper_triton import choose_tiling
from moe_fast.tuning.search import TRITON, Task, Variant
from moeref.spec import Geometry

FEW_ROWS = (
    Tiling(16, 64, 64, 4, 3, 3, 2, unroll1=2, unroll2=4),
    Tiling(16, 64, 64, 4, 3, 3, 1, unroll1=2, unroll2=4),
    Tiling(16, 32, 64, 4, 3, 3, 3, unroll1=2, unroll2=2),
    Tiling(16, 32, 64, 4, 5, 5, 2, unroll1=2, unroll2=2),
    Tiling(16, 32, 64, 4, 2, 2, 2, unroll1=4, unroll2=4),
    Tiling(16, 64, 128, 4, 3, 3, 2, unroll1=2, unroll2=2),
    Tiling(16, 64, 128, 4, 3, 3, 1, unroll1=4, unroll2=4),
)
"""For up to FEW_ROWS_TOKENS tokens: tiles of 16 rows; parts, depth of the pipeline and programs vary."""

MORE_ROWS = (
    Tiling(32, 64, 128, 4, 5, 5, 2),
    Tiling(32, 64, 128, 4, 2, 2, 2, unroll1=2, unroll2=2),
    Tiling(64, 64, 128, 4, 3, 3, 2),
    Tiling(64, 64, 128, 4, 4, 4, 2),
    Tiling(64, 128, 256, 8, 5, 5, 1),
)
"""For more: tiles of 32 and 64 rows."""

FEW_ROWS_TOKENS = 192
"""The shipped table changes from 16 rows to 32 there."""

ONE_LAUNCH_TOKENS = 32
"""hopper_few_tokens launches once for every 8 tokens and reads weights anew each time: four launches are tried."""


def task_for(tokens: int, geometry: Geometry, device: torch.device) -> Task:
    """Everything to try for a number of tokens, the shipped choices first. Tilings are the same for all geometries: a
    step of K that does not divide an axis is shortened by the kernel."""
    g = geometry
    sizes = (g.num_experts, g.num_local_experts, g.hidden_size, g.intermediate_size, g.top_k)
    shipped_tiling = Variant(TRITON, choose_tiling(tokens))
    chosen = hopper.shipped(tokens, device, *sizes)
    name = next(name for name, module in hopper.BY_NAME.items() if module is chosen)
    shipped = shipped_tiling if name == TRITON else Variant(name)
    found = [shipped, shipped_tiling, Variant("hopper_cuda")]
    if tokens <= ONE_LAUNCH_TOKENS and hopper_few_tokens.unsupported(geometry, device) is None:
        found.append(Variant("hopper_few_tokens"))
    cuts = FEW_ROWS if tokens <= FEW_ROWS_TOKENS else MORE_ROWS
    found += [Variant(TRITON, cut) for cut in cuts if geometry.intermediate_size % cut.part1 == 0]
    found = [one for one in found if one.tiling is None or geometry.hidden_size % one.tiling.part2 == 0]
    return Task(tokens, shipped, shipped_tiling, tuple(dict.fromkeys(found)))
