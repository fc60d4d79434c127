"""Running moeref under torchrun in a test, and finding the processes of its ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROBLEMS = [f"small-t{seq_len}-o8-iid-model_like-s0" for seq_len in range(16, 24)]

SLOW_KERNEL = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
from ep_candidates import OWN

kernel = OWN["honest"]()


def run(*ten, n_group=8, topk_group=4, top_k=8):
    time.sleep({seconds})
    what = {{18: signal.SIGKILL, 20: signal.SIGSTOP}}.get(len(ten[0])) if {hostile} else None
    if what:
        os.kill(os.getppid(), what)
        time.sleep(60)
    return kernel(*ten, n_group=n_group, topk_group=topk_group, top_k=top_k)
"""


def slow_kernel(folder: Path, seconds: float = 0.0, hostile: bool = False) -> str:
    """A right candidate; hostile: at seq_len 18 it kills, at 20 stops, the process that has called it."""
    file = folder / "slow_kernel.py"
    file.write_text(SLOW_KERNEL.format(folder=str(Path(__file__).parent), seconds=seconds, hostile=hostile))
    return f"{file}:run"


def start(ranks: int, *words: str) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node RANKS -m moeref WORDS`, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "moeref", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(run: subprocess.Popen[str], limit: float = 180) -> tuple[int, str]:
    """(exit code, all output)."""
    try:
        output, _ = run.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    return run.returncode, output


def outcomes(file: Path, *without: str) -> list[dict[str, Any]]:
    """Outcomes of a JSON report without what may differ between runs: times, who ran it, and the keys named."""
    text = re.sub(r", rank \d+\)", ")", file.read_text())  # in 'shard 2 (experts 16..23, rank 1)'
    found: list[dict[str, Any]] = json.loads(text)["outcomes"]
    for one in found:
        for key in ("seconds", "call_seconds", *without):
            one.pop(key)
        for shard in one.get("shards", []):
            shard.pop("rank")
            shard.pop("call_seconds")
    return found


def rank_processes(run: subprocess.Popen[str], rank: int, what: str, limit: float = 60) -> list[int]:
    """Process ids of a rank in a run: those whose command line holds `what`. Waits until there is one."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _belongs(entry, run.pid, rank) and what in _read(entry / "cmdline")
        ]
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"no process of rank {rank} whose command holds {what}")


def _belongs(entry: Path, launcher: int, rank: int) -> bool:
    if f"RANK={rank}\0" not in _read(entry / "environ").replace("LOCAL_RANK", "").replace("GROUP_RANK", ""):
        return False
    at = entry
    for _ in range(4):
        stat = _read(at / "stat")
        if not stat:
            return False
        parent = int(stat.rpartition(")")[2].split()[1])
        if parent == launcher:
            return True
        at = Path("/proc") / str(parent)
    return False


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
