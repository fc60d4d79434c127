"""What a candidate is asked, in a fixed order: sequences of steps, and the answers to compare.

A step is one problem called twice, or one problem and then another out of the very same buffers. Every hypothesis gets
the same calls in the same order as the candidate, so that what one call leaves behind for the next is compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from moeref.diagnose.kernel import Kernel
from moeref.inputs import Inputs
from moeref.judge.checks import POISONS, comparable
from moeref.judge.verdict import Known, Observed
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.spec import Geometry, Problem


@dataclass(frozen=True)
class Step:
    """Two calls: both on `problem`, or the second one on `then`, written over the first one's buffers."""

    problem: str  # a problem's name
    then: str = ""  # of the same geometry and seq_len; '' for none

    @property
    def judged(self) -> str:
        """Name of the last call's problem."""
        return self.then or self.problem


Steps = tuple[Step, ...]

PANEL: Steps = (
    Step("small-t16-o8-iid-heterogeneous-s1-f3.0"),  # a factor other than the usual one comes first
    Step("small-t24-o16-iid-model_like-s2"),  # nothing special
    Step("e16l8h384i256k4g4t2-t21-o4-skewed-heterogeneous-s3"),  # H != I, three blocks of H, runs of all lengths
    Step("e16l8h256i384k2g2t1-t40-o8-iid-model_like-s4"),  # three blocks of I
    Step("small-t18-o8-iid-published-s5"),  # half of the scales are negative, gates are large
    Step("small-t23-o0-all_negative-model_like-s6"),  # a mask of 0 outranks negative scores
    Step("small-t25-o16-ties-model_like-s7"),  # equal scores at the cut
    Step("small-t26-o8-near_ties-model_like-s8"),  # scores that bfloat16 can't tell apart
    Step("small-t27-o8-underflow-model_like-s9"),  # the sum of the chosen scores is 0
    Step("small-t28-o16-large_bias-model_like-s10"),  # score + bias - bias cancels
    Step("small_kimi-t19-o6-iid-heterogeneous-s11"),  # one group
    Step("small-t1-o24-deepseek_like-model_like-s0"),  # one token
    Step("small-t15-o28-deepseek_like-heterogeneous-s12"),  # past the last expert
    Step("small-t34-o-3-iid-heterogeneous-s13"),  # before the first expert
    Step("small-t20-o24-iid-zero_block-s14"),  # blocks of zeros
    Step("small-t12-o8-iid-tiny-s15"),  # outputs near 1e-7
    Step("small-t13-o16-iid-huge-s16"),  # outputs beyond float16
    Step("small-t17-o8-one_expert-heterogeneous-s17"),  # a run of 16 + 1 rows
    Step("small-t80-o8-one_expert-model_like-s18"),  # a run of five full tiles
    Step("small-t66-o8-balanced-heterogeneous-s19"),  # more than 64 tokens, every expert hit
    Step("small-t24-o16-iid-model_like-s2", "small-t24-o16-iid-model_like-s20"),  # buffers filled with other contents
)
"""Small problems on which every fault of the catalogue shows, in an order that shows what one call leaves behind."""


@dataclass(frozen=True)
class Answer:
    """What one step gave."""

    rows: Tensor | None  # [calls * T, H], the calls one after the other; None where there is no comparable output
    changed: frozenset[str]  # inputs that the calls changed
    observed: Observed

    def last(self) -> View:
        """What is to be judged of a step of two problems: the second call alone."""
        seen = self.observed
        return View(
            list(seen.outputs[1:]),
            list(seen.changed_inputs),
            seen.status,
            seen.message,
            seen.poisoned,
            list(seen.aliased_inputs),
            seen.overwritten_result,
            seen.deterministic,
        )

    def bare(self) -> Answer:
        """Without the calls' own outputs: `rows` holds them."""
        return replace(self, observed=View([], sorted(self.changed)))


class Subject(Protocol):
    """A candidate whose memory begins anew at restart()."""

    def restart(self) -> None:
        """Forget every call so far."""

    def observe(self, inputs: Inputs, then: Inputs | None = None) -> Observed:
        """Two calls, on `inputs` both or on `inputs` and then `then` in the same buffers; buffers hold POISONS."""


def answer(observed: Observed, inputs: Inputs) -> Answer:
    """Stack what can be compared."""
    rows = None
    whole = len(observed.outputs) == len(POISONS)
    if observed.status == "ok" and whole and comparable(observed.outputs, inputs.seq_len, inputs.geometry.hidden_size):
        rows = torch.cat([output.to(inputs.device).bfloat16() for output in observed.outputs])
    return Answer(rows, frozenset(observed.changed_inputs), observed)


@dataclass
class View:
    """Calls in the shape of moeref.judge.verdict.Observed."""

    outputs: list[Any]
    changed_inputs: list[str] = field(default_factory=list)
    status: str = "ok"
    message: str = ""
    poisoned: bool = True
    aliased_inputs: list[str] = field(default_factory=list)
    overwritten_result: bool = False
    deterministic: bool = True


class LocalSubject:
    """A hooked kernel in this process. build: makes a fresh one. takes_out: it is given a poisoned buffer."""

    def __init__(self, build: Callable[[], Kernel], takes_out: bool = True) -> None:
        self.build = build
        self.takes_out = takes_out
        self.kernel = build()

    def restart(self) -> None:
        """A fresh kernel."""
        self.kernel = self.build()

    def observe(self, inputs: Inputs, then: Inputs | None = None) -> View:
        """As Subject. Inputs that the kernel changes are put back."""
        g, outputs, changed = inputs.geometry, [], set()
        contents, buffers = inputs, inputs.map(torch.clone) if then is not None else inputs
        for count, poison in enumerate(POISONS):
            if count and then is not None:
                contents = then
                _copy(then, buffers)
            kept = {
                name: t.clone() if contents is buffers else t for name, t in contents.tensors().items() if _kept(name)
            }
            versions = {name: tensor._version for name, tensor in buffers.tensors().items()}
            shape = (inputs.seq_len, g.hidden_size)
            out = torch.full(shape, poison, dtype=torch.bfloat16, device=inputs.device) if self.takes_out else None
            scalars = (contents.local_expert_offset, contents.routed_scaling_factor)
            arguments: tuple[Any, ...] = (*buffers.tensors().values(), *scalars, out)
            result = self.kernel(*arguments, n_group=g.n_group, topk_group=g.topk_group, top_k=g.top_k)
            outputs.append(result.clone())
            written = [name for name, tensor in buffers.tensors().items() if tensor._version != versions[name]]
            changed.update(written)
            for name in written:  # no kernel of ours writes to weights: a copy of them would cost more than its call
                buffers.tensors()[name].view(torch.uint8).copy_(kept[name].view(torch.uint8))
        return View(outputs, sorted(changed), poisoned=self.takes_out)


def _kept(name: str) -> bool:
    return name not in ("gemm1_weights", "gemm2_weights")


def _copy(source: Inputs, target: Inputs) -> None:
    """The tensors' bytes; targets keep their memory."""
    for name, tensor in target.tensors().items():
        tensor.view(torch.uint8).copy_(source.tensors()[name].view(torch.uint8))


class Prepared:
    """The inputs of a sequence of steps and what judging them needs, each made when first asked for."""

    def __init__(self, steps: Steps, device: str | torch.device = "cpu") -> None:
        self.steps = steps
        self.device = device
        self._inputs: dict[str, Inputs] = {}
        self._known: dict[str, Known] = {}

    def inputs(self, index: int) -> tuple[Inputs, Inputs | None]:
        """Of the step's first problem, and of the one that is written over it."""
        step = self.steps[index]
        return self._made(step.problem), self._made(step.then) if step.then else None

    def judged(self, index: int) -> Inputs:
        """Of the problem of the step's last call."""
        return self._made(self.steps[index].judged)

    def known(self, index: int) -> Known:
        """Reference, noise and emulations of the step's last call."""
        name = self.steps[index].judged
        if name not in self._known:
            inputs = self._made(name)
            self._known[name] = Known(moe(inputs), inputs)
        return self._known[name]

    def _made(self, name: str) -> Inputs:
        if name not in self._inputs:
            self._inputs[name] = make_inputs(Problem.parse(name)).to(self.device)
        return self._inputs[name]

    @property
    def length(self) -> int:
        """Number of steps."""
        return len(self.steps)


def ask(subject: Subject, prepared: Prepared, index: int) -> Answer:
    """One step's answer. The caller keeps the order."""
    first, then = prepared.inputs(index)
    return answer(subject.observe(first, then), first)


def panel_at(geometry: Geometry) -> Steps:
    """A short panel at another geometry, for a candidate that runs at no small one: few tokens, few experts hit."""
    name, low = geometry.name, 0
    last = max(geometry.num_experts - geometry.num_local_experts, 0)
    middle = last // 2 // geometry.num_local_experts * geometry.num_local_experts
    return (
        Step(f"{name}-t17-o{low}-one_expert-heterogeneous-s2-f3.0"),  # every entry runs this one: one expert's weights
        Step(f"{name}-t2-o{middle}-iid-heterogeneous-s1"),
        Step(f"{name}-t4-o{last}-iid-model_like-s3"),
        Step(f"{name}-t3-o{middle}-all_negative-model_like-s4"),
    )


def regrouped(name: str, like: Geometry | None) -> str:
    """The problem of that name with the routing groups and top_k of another model; itself where `like` is None.

    For candidates that answer for their own model's groups alone. There are as many experts as before or more, and a
    shard that reached past the last one still does.
    """
    problem = Problem.parse(name)
    if like is None:
        return name
    g = problem.geometry
    members = max(4, 2 * -(-like.top_k // like.topk_group), -(-g.num_experts // like.n_group))
    experts = like.n_group * members
    changed = replace(g, num_experts=experts, top_k=like.top_k, n_group=like.n_group, topk_group=like.topk_group)
    past = problem.offset + g.num_local_experts > g.num_experts
    offset = problem.offset + experts - g.num_experts if past else problem.offset
    return replace(problem, geometry=changed, offset=offset).name


def regrouped_steps(steps: Steps, like: Geometry | None) -> Steps:
    """Every problem of the steps regrouped; steps that became alike are kept once."""
    made = [Step(regrouped(one.problem, like), regrouped(one.then, like) if one.then else "") for one in steps]
    return tuple(dict.fromkeys(made))
