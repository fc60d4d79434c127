"""`python -m moe_fast.tools.two_gpus FOLDER`: the published workloads on the GPUs of one host, and how long they take.

1. torchrun, --ep: all eight shards of every workload and their sum, four shards a GPU with two of them;
2. torchrun without --ep: the workloads dealt to the GPUs;
3. one GPU alone, the same workloads one after the other.

Each way is a command of its own with a time limit: what was done is kept in FOLDER, also where a machine is lent for
minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

LIMITS = {"ep": 285, "dealt": 150, "one": 150}
"""Seconds for each way, by default; together less than ten minutes."""


def command(way: str, candidate: str, gpus: int, words: list[str], target: Path) -> list[str]:
    """The command line of one way."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m"]
    start = [sys.executable, "-m"] if way == "one" else launcher
    device = ["--device", "cuda:0"] if way == "one" else []
    ep = ["--ep"] if way == "ep" else []
    return [*start, "moeref", "verify", candidate, *words, *ep, *device, "--json", str(target)]


def run(way: str, line: list[str], limit: float) -> tuple[int, float]:
    """(exit code, seconds); the code of `timeout`, 124, where it took too long."""
    print("$ " + " ".join(line), flush=True)
    begun = time.monotonic()
    process = subprocess.Popen(line)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun's ranks print what they have
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
        code = 124
    return code, time.monotonic() - begun


def told(target: Path) -> dict[str, Any]:
    """What a way found: statuses, seconds of each problem, wrong shards."""
    if not target.exists():
        return {"statuses": {}, "seconds": {}}
    outcomes = json.loads(target.read_text())["outcomes"]
    shards = Counter(shard["status"] for one in outcomes for shard in one["shards"])
    return {
        "statuses": dict(Counter(one["status"] for one in outcomes)),
        "shards": dict(shards),
        "seconds": {one["label"]: round(one["seconds"], 2) for one in outcomes},
        "noise_z": {one["label"]: one["figures"]["noise_z"] for one in outcomes},
    }


def main() -> None:
    """Run the ways asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--candidate", default="moe_fast")
    parser.add_argument("--ways", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--problems", default="--all", help="how verify is told which problems, e.g. =--small")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for way in options.ways:
        target = options.folder / f"{way}.json"
        line = command(way, options.candidate, options.gpus, options.problems.split(), target)
        code, seconds = run(way, line, LIMITS[way])
        found[way] = {"exit": code, "wall_seconds": round(seconds, 1), **told(target)}
        print(f"--- {way}: exit {code}, {seconds:.1f} s, {found[way]['statuses']}", flush=True)
        (options.folder / "two_gpus.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
