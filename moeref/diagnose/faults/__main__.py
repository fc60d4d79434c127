"""`python -m moeref.diagnose.faults`: what the judge alone sees of every fault on the small suite.

One line a fault: how many problems fail, the published criterion's verdict (pass only where every problem passes it),
and the checks that fail. Laws and read-outs are not run: what is left over here is theirs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeref.diagnose.faults.registry import FAULTS
from moeref.diagnose.kernel import Kernel
from moeref.inputs import Inputs
from moeref.judge.checks import POISONS
from moeref.judge.compare import CRITERIA
from moeref.judge.verdict import FAIL, Verdict, judge
from moeref.make import make_inputs
from moeref.reference import Trace, moe
from moeref.spec import Problem
from moeref.suites import small_suite


@dataclass
class Run:
    """Two calls into poisoned buffers, as moeref.judge.verdict.Observed."""

    outputs: list[Any]
    changed_inputs: list[str]
    status: str = "ok"
    message: str = ""
    poisoned: bool = True
    aliased_inputs: list[str] = field(default_factory=list)
    overwritten_result: bool = False
    deterministic: bool = True


def call(kernel: Kernel, inputs: Inputs, out: Tensor | None = None) -> Tensor:
    """One call with the routing sizes of inputs' geometry."""
    g = inputs.geometry
    options: dict[str, Any] = {"out": out, "n_group": g.n_group, "topk_group": g.topk_group, "top_k": g.top_k}
    return kernel(*inputs.args(), **options)


def observe(kernel: Kernel, inputs: Inputs) -> Run:
    """Call twice, each time into a buffer filled with another value; the inputs are put back where they changed."""
    before = {name: tensor.view(torch.uint8).clone() for name, tensor in inputs.tensors().items()}
    outputs = []
    for poison in POISONS:
        out = torch.full((inputs.seq_len, inputs.geometry.hidden_size), poison, dtype=torch.bfloat16)
        outputs.append(call(kernel, inputs, out.to(inputs.device)))
    changed = []
    for name, tensor in inputs.tensors().items():
        if not torch.equal(tensor.view(torch.uint8), before[name]):
            changed.append(name)
            tensor.view(torch.uint8).copy_(before[name])
    return Run(outputs, changed)


def prepare(problems: Sequence[Problem]) -> list[tuple[Problem, Inputs, Trace]]:
    """Inputs and exact trace of each."""
    made = [(problem, make_inputs(problem)) for problem in problems]
    return [(problem, inputs, moe(inputs)) for problem, inputs in made]


def verdicts(kernel: Kernel, prepared: Sequence[tuple[Problem, Inputs, Trace]]) -> list[Verdict]:
    """One kernel through all problems in turn, as one worker process serves them."""
    return [judge(p.name, inputs, trace, observe(kernel, inputs)) for p, inputs, trace in prepared]


def main(names: Sequence[str]) -> None:
    """Print the table, for these faults or for all."""
    torch.set_num_threads(1)  # the tensors are small
    prepared = prepare(small_suite())
    seen, passed = 0, 0
    required = CRITERIA["published"].required
    for name in names or FAULTS:
        found = verdicts(FAULTS[name].build(), prepared)
        failed = [verdict for verdict in found if verdict.status == FAIL]
        checks = Counter(check for verdict in failed for check in verdict.failed)
        ratio = min(verdict.figures.matched.get("published", 1.0) for verdict in found)
        seen, passed = seen + bool(failed), passed + (ratio >= required)
        published = "pass" if ratio >= required else "fail"
        listed = ", ".join(f"{check} {count}" for check, count in checks.most_common())
        print(f"{name:36} {FAULTS[name].stage:16} {len(failed):3}/{len(found)} {ratio:6.3f} {published}  {listed}")
    total = len(names or FAULTS)
    print(f"{total} faults: the judge sees {seen}, the published criterion alone {total - passed}")


if __name__ == "__main__":
    main(sys.argv[1:])
