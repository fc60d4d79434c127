"""The text of a definition's reference: standalone.py with the constants of a geometry."""

from __future__ import annotations

from pathlib import Path

from moeref.spec import Geometry


def reference_source(geometry: Geometry) -> str:
    """Python source with a function `run` of the ten inputs, which needs torch alone."""
    text = Path(__file__).with_name("standalone.py").read_text(encoding="utf-8")
    shipped = {"TOP_K = 8": geometry.top_k, "N_GROUP = 8": geometry.n_group, "TOPK_GROUP = 4": geometry.topk_group}
    for line, size in shipped.items():
        assert text.count(f"\n{line}\n") == 1, line
        text = text.replace(f"\n{line}\n", f"\n{line.split(' = ')[0]} = {size}\n")
    return text
