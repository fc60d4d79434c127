"""Which check kills which fault: every planted fault and every legal variant through all checks, in-process.

Beside the checks of `moeref verify --small` stand the three published thresholds of the matched ratio and DeepGEMM's
calc_diff, each as an author would use it alone: a fault is killed if any problem of the suite fails it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch

from moeref.diagnose.faults import FAULTS
from moeref.diagnose.kernel import Kernel
from moeref.diagnose.laws import run_laws
from moeref.diagnose.readout import run_readouts
from moeref.diagnose.result import LocalCall
from moeref.diagnose.variants import VARIANTS
from moeref.inputs import Inputs
from moeref.judge.checks import POISONS
from moeref.judge.compare import CRITERIA
from moeref.judge.verdict import FAIL, Known, judge
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.spec import Problem
from moeref.suites import DIAGNOSIS, small_suite

CALC_DIFF = 1e-3
"""DeepGEMM's threshold for 1 - 2<x, y> / (<x, x> + <y, y>) over the whole output."""

RIVALS = (*(f"matched {name}" for name in CRITERIA), "calc_diff")
"""What the field uses alone, for comparison; none of them counts as a check here."""


@dataclass(frozen=True)
class Row:
    """One fault or legal variant and what fired on it."""

    name: str
    stage: str  # a fault's; 'legal' for a variant
    source: str
    checks: frozenset[str]  # of the judge, laws ('law NAME') and read-outs ('readout NAME')
    rivals: frozenset[str]  # of RIVALS
    details: tuple[str, ...]  # one sentence for each check that fired


@dataclass
class LocalRun:
    """Two calls into poisoned buffers, in the shape of moeref.judge.verdict.Observed."""

    outputs: list[Any]
    changed_inputs: list[str]
    status: str = "ok"
    message: str = ""
    poisoned: bool = True
    aliased_inputs: list[str] = field(default_factory=list)
    overwritten_result: bool = False
    deterministic: bool = True


def observe(kernel: Kernel, inputs: Inputs) -> LocalRun:
    """Call twice, into a buffer filled with another value each time; inputs that change are put back."""
    before = {name: tensor.view(torch.uint8).clone() for name, tensor in inputs.tensors().items()}
    g, outputs = inputs.geometry, []
    for poison in POISONS:
        out = torch.full((inputs.seq_len, g.hidden_size), poison, dtype=torch.bfloat16, device=inputs.device)
        arguments: tuple[Any, ...] = (*inputs.args(), out)
        kernel(*arguments, n_group=g.n_group, topk_group=g.topk_group, top_k=g.top_k)
        outputs.append(out)
    changed = []
    for name, tensor in inputs.tensors().items():
        if not torch.equal(tensor.view(torch.uint8), before[name]):
            changed.append(name)
            tensor.view(torch.uint8).copy_(before[name])
    return LocalRun(outputs, changed)


@cache
def _prepared() -> list[tuple[Problem, Inputs, Known]]:
    made = [(problem, make_inputs(problem)) for problem in small_suite()]
    return [(problem, inputs, Known(moe(inputs), inputs)) for problem, inputs in made]


def examine(name: str, stage: str, source: str, kernel: Kernel, declared: str = "auto") -> Row:
    """Everything that fires on one kernel. declared: the recipe it declares, 'auto' for none."""
    checks: dict[str, str] = {}
    rivals: set[str] = set()
    for problem, inputs, known in _prepared():
        run = observe(kernel, inputs)
        verdict = judge(problem.name, inputs, known.trace, run, declared, known=known)
        if verdict.status == FAIL:
            for check in verdict.checks:
                if not check.passed:
                    checks.setdefault(check.name, f"{problem.name}: {check.detail}")
        for criterion in CRITERIA.values():
            if verdict.figures.matched.get(criterion.name, 0.0) < criterion.required:
                rivals.add(f"matched {criterion.name}")
        if any(calc_diff(output, known.trace.output) > CALC_DIFF for output in run.outputs):
            rivals.add("calc_diff")
    call = LocalCall(kernel)
    for kind, findings in (("law", run_laws), ("readout", run_readouts)):
        for text in DIAGNOSIS:
            for finding in findings(call, Problem.parse(text)):
                if finding.passed is False:
                    checks.setdefault(f"{kind} {finding.name}", finding.detail)
    details = tuple(f"{check}: {detail}" for check, detail in checks.items())
    return Row(name, stage, source, frozenset(checks), frozenset(rivals), details)


def calc_diff(output: torch.Tensor, reference: torch.Tensor) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>) in float64; 0 for two zero outputs, 1 where the output is not finite."""
    x, y = output.double(), reference.double()
    if not bool(torch.isfinite(x).all()):
        return 1.0
    size = float((x * x + y * y).sum())
    return 1 - 2 * float((x * y).sum()) / size if size else 0.0


def _examine_by_name(name: str) -> Row:
    torch.set_num_threads(1)
    if name in FAULTS:
        fault = FAULTS[name]
        return examine(name, fault.stage, fault.source, fault.build())
    return examine(name, "legal", "", VARIANTS[name].build())


def kill_matrix(names: Sequence[str] | None = None, processes: int = 2) -> Iterator[Row]:
    """Rows of these faults and variants (default: all), in order, as they come."""
    wanted = list(names) if names is not None else [*FAULTS, *VARIANTS]
    if processes < 2:
        yield from map(_examine_by_name, wanted)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_examine_by_name, wanted)


@dataclass(frozen=True)
class Totals:
    """Sums over a matrix."""

    faults: int
    killed: int
    survivors: tuple[str, ...]
    variants: int
    false_alarms: tuple[str, ...]  # variants on which a check fired
    kills: Counter[str]  # check -> faults that it kills
    alone: Counter[str]  # check -> faults that no other check kills
    rivals: Counter[str]  # rival -> faults that it kills


def totals(rows: Sequence[Row]) -> Totals:
    """Count."""
    faults = [row for row in rows if row.stage != "legal"]
    variants = [row for row in rows if row.stage == "legal"]
    kills = Counter(check for row in faults for check in row.checks)
    alone = Counter(check for row in faults if len(row.checks) == 1 for check in row.checks)
    return Totals(
        faults=len(faults),
        killed=sum(bool(row.checks) for row in faults),
        survivors=tuple(row.name for row in faults if not row.checks),
        variants=len(variants),
        false_alarms=tuple(row.name for row in variants if row.checks),
        kills=kills,
        alone=alone,
        rivals=Counter(rival for row in faults for rival in row.rivals),
    )


def lines(rows: Sequence[Row], write: Callable[[str], None]) -> None:
    """The matrix as text: one line a kernel, then the totals."""
    write(f"{'fault':<40} {'stage':<17} {'published':>9} {'calc_diff':>9}  killed by")
    for row in rows:
        published = "kills" if "matched published" in row.rivals else "-"
        diff = "kills" if "calc_diff" in row.rivals else "-"
        by = ", ".join(sorted(row.checks)) or ("-" if row.stage == "legal" else "NOTHING")
        write(f"{row.name:<40} {row.stage:<17} {published:>9} {diff:>9}  {by}")
    found = totals(rows)
    write("")
    write(f"{'check':<40} {'kills':>5} {'alone':>5}")
    for check, count in found.kills.most_common():
        mark = "" if found.alone[check] else "   kills nothing that others do not"
        write(f"{check:<40} {count:>5} {found.alone[check]:>5}{mark}")
    write("")
    for rival in RIVALS:
        write(f"{rival + ' alone':<40} {found.rivals[rival]:>5} of {found.faults}")
    write(f"{'all checks of moeref':<40} {found.killed:>5} of {found.faults}")
    write(f"false alarms on legal variants: {len(found.false_alarms)} of {found.variants}")
    if found.survivors:
        write(f"not killed: {', '.join(found.survivors)}")


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """{rows: [{name, stage, source, checks, rivals, details}], totals: {...}}."""
    plain = [{**vars(row), "checks": sorted(row.checks), "rivals": sorted(row.rivals)} for row in rows]
    return {"rows": plain, "totals": vars(totals(rows))}
