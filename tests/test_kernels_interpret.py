"""Each Triton kernel beside its twin, under Triton's interpreter on the CPU: evidence of indexing, not of numerics.

The interpreter rounds e4m3 casts wrongly, so values that went through one get E4M3_SLACK: two e4m3 steps.
Runs in a process of its own, because TRITON_INTERPRET must be set before a kernel is defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("interpreted_kernels.py")


@pytest.mark.parametrize("group", ["routing", "permute", "gemms", "pipeline"])
def test_interpreted(group: str) -> None:
    """One group of cases, in a child process with the interpreter on."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(CASES.parent.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(CASES), group], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
