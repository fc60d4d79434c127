"""`moeref explain` without its command line: a candidate by name, in a process of its own, to an Explanation."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from moeref.diagnose.explain.case import Case, Library
from moeref.diagnose.explain.engine import explain
from moeref.diagnose.explain.result import Explanation
from moeref.inputs import Inputs
from moeref.interop.bundle import write_bundle
from moeref.interop.candidates import load
from moeref.interop.isolated_call import IsolatedCall
from moeref.interop.observe import CandidateRun
from moeref.interop.runner import Runner
from moeref.make import make_inputs
from moeref.reference import Trace, moe
from moeref.spec import Problem
from moeref.verify import Options

SMALL_EXPERT = 1 << 20
"""Weights of an expert, 3 H I, up to which one thread is enough."""


@contextlib.contextmanager
def one_thread_if_small(problem: Problem | None) -> Iterator[None]:
    """One thread for this process and for those that it starts, unless the problem's tensors are large.

    The candidate's process and this one take turns, and threads that wait for their turn do so busily: on two cores a
    small problem took 22 s with two threads each and 12 s with one.
    """
    if problem is not None and 3 * problem.geometry.hidden_size * problem.geometry.intermediate_size > SMALL_EXPERT:
        yield
        return
    threads, given = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if given is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = given


class RunnerSubject:
    """moeref.diagnose.explain.panel.Subject over a Runner: restart() ends the candidate's process."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.asked = False
        self.traces = False  # it returns every stage

    def restart(self) -> None:
        """A fresh process, where the old one was asked anything."""
        if self.asked:
            self.runner.close()
            self.asked = False

    def observe(self, inputs: Inputs, then: Inputs | None = None) -> CandidateRun:
        """Two calls."""
        self.asked = True
        run = self.runner.run(inputs, then=then)
        self.traces = any("returned a Trace" in note for note in run.notes)
        return run


def explain_candidate(
    candidate: str,
    problem: Problem | None,
    options: Options,
    *,
    shrink_seconds: float = 6.0,
    say: Callable[[str], None] = lambda text: None,
    library: Library | None = None,
) -> Explanation:
    """What is wrong with the candidate. problem: None for a small one. say: is told what is being done.

    Raises SpecError for a problem of an unknown kind, and moeref.interop.candidates.CandidateError where the candidate
    can't be found at all.
    """

    def replay(problems: Sequence[str]) -> str:
        words = ["moeref", "verify", candidate]
        for name in problems:
            words += ["--problem", name]
        if options.device != "cpu":
            words += ["--device", options.device]
        return shlex.join(words)

    with one_thread_if_small(problem), options.runner(candidate) as runner:
        subject = RunnerSubject(runner)

        def traced(inputs: Inputs) -> Trace | None:
            """The stages, by a call in this process: a candidate that shows them has run well in its own by now."""
            if not subject.traces:
                return None
            g = inputs.geometry
            loaded = load(candidate)
            sizes = {"n_group": g.n_group, "topk_group": g.topk_group, "top_k": g.top_k}
            answer = loaded.run(*inputs.args(), **{name: sizes[name] for name in loaded.geometry_keywords})
            return answer if isinstance(answer, Trace) else None

        case = Case(
            candidate,
            problem,
            recipe=options.recipe,
            device=options.device,
            shrink_seconds=shrink_seconds,
            replay=replay,
            traced=traced,
            say=say,
        )
        return explain(subject, IsolatedCall(runner), case, library)


def bundle(candidate: str, problem: Problem, options: Options, folder: Path) -> list[Path]:
    """Write a replay bundle of one problem (moeref.interop.bundle); the files written."""
    inputs = make_inputs(problem)
    with options.runner(candidate) as runner:
        run = runner.run(inputs)
    reference = moe(inputs.to(options.device)).output.cpu()
    return write_bundle(folder, problem.name, candidate, inputs, run.outputs, reference)
