"""What the reference costs on this machine: `python -m moeref.reference_cost` prints seconds and peak memory.

One problem at the full geometry, seq_len 16, 13 experts hit, inputs included in the memory. The published reference
expands all 32 experts to float32 at once: 40 s and 18.2 GB for a seq_len of 16 on 2 cores.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from moeref.make import make_inputs
from moeref.reference import moe
from moeref.spec import Problem

PROBLEM = "dsv3-t16-o32-iid-published-s0"


def peak_gigabytes() -> float:
    """Largest resident size of this process so far, in 10**9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    """Print the figures."""
    start = time.perf_counter()
    inputs = make_inputs(Problem.parse(PROBLEM))
    made = time.perf_counter()
    trace = moe(inputs)
    done = time.perf_counter()
    hit = int((trace.permutation.expert_offsets.diff() > 0).sum())
    print(f"{PROBLEM}: {hit} experts hit, {torch.get_num_threads()} threads")
    print(f"inputs    {made - start:6.2f} s")
    print(f"reference {done - made:6.2f} s")
    print(f"peak      {peak_gigabytes():6.2f} GB for the whole process")
    start = time.perf_counter()
    del inputs, trace
    make_inputs(Problem.parse(PROBLEM), experts="all")
    print(f"inputs    {time.perf_counter() - start:6.2f} s with all 32 experts' weights")


if __name__ == "__main__":
    main()
