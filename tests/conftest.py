"""Shared by all tests: few threads, a Hypothesis profile without deadlines."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

# Small matrices run faster on one thread, and pytest-xdist already uses the cores.
torch.set_num_threads(1)

# Times vary on shared machines, so no deadline; the same examples in every run, so that a red run is red again.
settings.register_profile(
    "moeref", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
settings.load_profile("moeref")
