"""Golden files: recorded cases that hold the reference, and any candidate, to what was once right.

    for case in cases():
        result = check_case(case)                        # the reference
        result = check_case(case, "my_kernel.py:run")    # a candidate, or an open Runner

`cases()` lists the small ones and the short published ones, `cases(everything=True)` all. See golden/README.md.
"""

from moeref.golden.case import DEFAULT_FOLDER, Case, GoldenError, cases, find
from moeref.golden.check import CaseResult, check_case
from moeref.golden.stages import StageResult
from moeref.golden.write import write_case

__all__ = [
    "DEFAULT_FOLDER",
    "Case",
    "CaseResult",
    "GoldenError",
    "StageResult",
    "cases",
    "check_case",
    "find",
    "write_case",
]
