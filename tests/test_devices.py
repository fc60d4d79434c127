"""The judge on a GPU that is not the current one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def uses_of_torch_ldexp(path: Path) -> list[int]:
    """Lines that call torch.ldexp, or a tensor's method of that name."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    return [node.lineno for node in nodes if node.attr in ("ldexp", "ldexp_") and ast.unparse(node.value) != "np"]


def test_torch_ldexp_which_needs_the_current_device_is_called_in_one_place() -> None:
    found = [path for folder in ("moeref", "moe_fast") for path in (ROOT / folder).rglob("*.py")]
    uses = {path.relative_to(ROOT).as_posix(): uses_of_torch_ldexp(path) for path in found}
    assert [name for name, lines in uses.items() for _ in lines] == ["moeref/quant.py"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("words", [["--problem", "dsv3-t7-o192-deepseek_like-published-s0"], ["--small"]])
def test_the_reference_passes_on_a_device_that_is_not_the_current_one(words: list[str]) -> None:
    command = [sys.executable, "-m", "moeref", "verify", "reference", *words, "--device", "cuda:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
