"""Faults: wrong kernels by name, each a small change of one step of moeref.diagnose.kernel.Kernel.

To add one, write a function under @fault in the file of its stage; nothing else needs to change. Each is a candidate
too: `moeref verify moeref.diagnose.faults:biased_weights`.
"""

from moeref.diagnose.faults import activation, gemms, results, routing, rows, scales, state, weights
from moeref.diagnose.faults.registry import FAULTS, STAGES, SYNTHETIC, Fault, fault
from moeref.diagnose.kernel import Kernel

__all__ = ["FAULTS", "STAGES", "SYNTHETIC", "Fault", "fault"]

_FILES = (routing, weights, rows, scales, gemms, activation, results, state)  # importing them fills FAULTS


def __getattr__(name: str) -> Kernel:
    """A fault's name as attribute: a fresh kernel."""
    if name in FAULTS:
        return FAULTS[name].build()
    raise AttributeError(f"no fault '{name}'")
