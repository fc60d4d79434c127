"""Fixed lists of problems: the published workloads, and the small suite that runs in seconds. Standard library only."""

from __future__ import annotations

from moeref.spec import PRESETS, Geometry, Problem
from moeref.workloads import WORKLOADS, Workload

CPU_SEQ_LEN = 80
"""Published workloads up to this seq_len run on a CPU by default; the three longer ones take minutes each."""

_SMALL, _KIMI = PRESETS["small"], PRESETS["small_kimi"]
_WIDE = Geometry(16, 16, 128, 384, 2, 2, 1)  # one rank holds all experts; I > H

# routing kind, value kind, seq_len, offset; offsets 28 and 20 reach past the last expert
_DEEPSEEK = (
    ("iid", "published", 16, 8),
    ("iid", "model_like", 33, 0),
    ("iid", "heterogeneous", 17, 16),
    ("iid", "zero_block", 20, 24),
    ("iid", "tiny", 12, 8),
    ("iid", "huge", 12, 16),
    ("iid", "outlier", 12, 0),
    ("deepseek_like", "published", 1, 24),
    ("deepseek_like", "model_like", 64, 24),
    ("balanced", "model_like", 32, 0),
    ("balanced", "heterogeneous", 129, 8),
    ("skewed", "model_like", 80, 16),
    ("one_expert", "heterogeneous", 17, 8),
    ("one_expert", "model_like", 80, 8),
    ("no_local_work", "model_like", 7, 8),
    ("ties", "model_like", 24, 16),
    ("near_ties", "model_like", 24, 8),
    ("all_negative", "model_like", 24, 0),
    ("underflow", "model_like", 24, 8),
    ("large_bias", "model_like", 24, 16),
    ("deepseek_like", "heterogeneous", 15, 28),
    ("iid", "model_like", 5, -3),
    ("iid", "model_like", 0, 8),
)
_ONE_GROUP = (
    ("deepseek_like", "model_like", 16, 6),
    ("iid", "published", 16, 0),
    ("iid", "heterogeneous", 33, 12),
    ("ties", "heterogeneous", 16, 18),
    ("all_negative", "model_like", 16, 6),
    ("skewed", "zero_block", 40, 20),
)


DIAGNOSIS = ("e16l4h384i384k4g4t2-t24-o4-iid-model_like-s0",)
"""Problems whose geometry and shard laws and read-outs are run on. A short accumulator that runs over several blocks of
K shows from three blocks on."""


def small_suite(seed: int = 0) -> list[Problem]:
    """Every routing and value kind at small geometries, DeepSeek's structure and Kimi-K2's."""
    problems = [Problem(_SMALL, t, o, routing, values, seed) for routing, values, t, o in _DEEPSEEK]
    problems += [Problem(_KIMI, t, o, routing, values, seed) for routing, values, t, o in _ONE_GROUP]
    problems.append(Problem(_WIDE, 40, 0, "iid", "model_like", seed))
    problems.append(Problem(_SMALL, 16, 8, "iid", "heterogeneous", seed, factor=1.0))
    return problems


def published(on_cpu: bool, everything: bool) -> tuple[list[Workload], list[Workload]]:
    """(workloads to run, workloads left out) of the 19."""
    if everything or not on_cpu:
        return list(WORKLOADS), []
    short = [w for w in WORKLOADS if w.seq_len <= CPU_SEQ_LEN]
    return short, [w for w in WORKLOADS if w.seq_len > CPU_SEQ_LEN]
