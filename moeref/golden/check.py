"""Holding the reference, or a candidate, to a recorded case."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from moeref import reference
from moeref.golden.case import DEFAULT_FOLDER, Case, GoldenError
from moeref.golden.record import check_inputs
from moeref.golden.sampled import check_sampled, check_samples
from moeref.golden.stages import StageResult
from moeref.golden.whole import check_whole, unflatten
from moeref.inputs import Inputs
from moeref.interop.runner import CandidateRun, Runner
from moeref.interop.shared_inputs import SharedInputs
from moeref.judge import checks
from moeref.judge.compare import CRITERIA
from moeref.judge.verdict import AUTO, ERROR, FAIL, INCONCLUSIVE, PASS, Verdict, judge
from moeref.make import make_inputs
from moeref.verify import Options


@dataclass(frozen=True)
class CaseResult:
    """What one case showed."""

    case: str
    status: str  # PASS, FAIL, ERROR, and for a candidate INCONCLUSIVE or UNSUPPORTED
    stages: tuple[StageResult, ...]  # in the order in which they come about; empty where nothing could be compared
    message: str  # one paragraph; empty for a PASS
    seconds: float
    repeat: str  # the command that checks this case again
    verdict: Verdict | None = None  # of a candidate

    @property
    def diverged(self) -> tuple[StageResult, ...]:
        """Stages that are not as recorded, the first one first."""
        return tuple(stage for stage in self.stages if not stage.passed)

    @property
    def worst(self) -> float:
        """The largest difference of any stage over its tolerance."""
        return max((stage.worst for stage in self.stages if stage.worst is not None), default=0.0)


def check_case(case: Case, candidate: str | Runner | None = None, options: Options | None = None) -> CaseResult:
    """Hold the reference to a case or, where one is given, a candidate.

    candidate   a text that moeref.interop.candidates.load understands, or an open Runner, which then stays open.
    options     of a candidate's judgement; default Options().
    A golden file that can't be trusted is an ERROR that names the file and, where one was changed, the stage. Raises
    moeref.interop.candidates.CandidateError where the candidate can't be found at all.
    """
    start = time.perf_counter()
    options = options or Options()
    name = candidate.candidate if isinstance(candidate, Runner) else candidate
    try:
        manifest = case.manifest()
        tensors = case.tensors(manifest)
        if candidate is None:
            status, stages, message, verdict = *_reference(case, manifest, tensors), None
        elif isinstance(candidate, Runner):
            status, stages, message, verdict = _candidate(case, manifest, tensors, candidate, options)
        else:
            with options.runner(candidate) as runner:
                status, stages, message, verdict = _candidate(case, manifest, tensors, runner, options)
    except GoldenError as error:
        stages = [StageResult(error.stage, False, str(error))] if error.stage else []
        status, message, verdict = ERROR, str(error), None
    seconds = time.perf_counter() - start
    return CaseResult(case.name, status, tuple(stages), message, seconds, _repeat(case, name, options), verdict)


def _reference(
    case: Case, manifest: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[str, list[StageResult], str]:
    inputs = make_inputs(case.spec.problem)
    if case.sampled:
        results = check_sampled(manifest, tensors, inputs, reference.moe(inputs))
    else:
        results = check_whole(manifest, tensors, inputs, case.spec.recipe)
    return _concluded(results)


def _concluded(results: list[StageResult]) -> tuple[str, list[StageResult], str]:
    wrong = [result for result in results if not result.passed]
    if not wrong:
        return PASS, results, ""
    message = f"first divergent stage {wrong[0].stage}: {wrong[0].detail}"
    if len(wrong) > 1:
        message += f"; then {', '.join(result.stage for result in wrong[1:])}"
    return FAIL, results, message


def _candidate(
    case: Case, manifest: dict[str, Any], tensors: dict[str, torch.Tensor], runner: Runner, options: Options
) -> tuple[str, list[StageResult], str, Verdict | None]:
    """The candidate judged on the recorded trace; of a published case, on the sampled tokens."""
    if not case.judges_candidates:
        why = "holds the reference's own roundings: candidates are judged on the cases that round nowhere"
        return INCONCLUSIVE, [], why, None
    whole: list[checks.Check] | None = None  # of a published case: what its whole output shows
    with SharedInputs() as shared:
        inputs = make_inputs(case.spec.problem, allocate=shared.allocate)
        hit = [expert for expert, rows in enumerate(manifest["rows_by_expert"]) if rows]
        drawn = list(check_inputs(manifest, inputs, hit).values())
        run = runner.run(shared.describe(inputs), trials=options.trials)
        if case.sampled:
            tokens = torch.tensor(manifest["sampled_tokens"], dtype=torch.int64)
            part = inputs.take(tokens)
            trace = reference.moe(part)
            drawn += check_samples(tensors, part, trace, tokens)
            whole = _whole_output(run, inputs) if run.status == "ok" else None
            run, inputs = _rows(run, tokens), part
        else:
            trace = unflatten(tensors, inputs)
        status, drawn, message = _concluded(drawn)
        if status != PASS:
            return ERROR, drawn, f"nobody can be judged, the inputs or the reference changed: {message}", None
        recipe = run.recipe if options.recipe == AUTO else options.recipe
        criterion, alone = CRITERIA[options.preset], options.matched_ratio_alone
        verdict = judge(case.spec.problem.name, inputs, trace, run, recipe, criterion, alone)
    if whole is not None and verdict.status in (PASS, FAIL, INCONCLUSIVE):
        verdict = _with(verdict, whole)
    return verdict.status, drawn, verdict.message, verdict


def _whole_output(run: CandidateRun, inputs: Inputs) -> list[checks.Check]:
    """What can be said of all tokens without their reference: form, finite values, rows without local work zero."""
    form = checks.form(run.outputs, inputs.seq_len, inputs.geometry.hidden_size)
    if not checks.comparable(run.outputs, inputs.seq_len, inputs.geometry.hidden_size):
        return [form]
    routing = reference.route(inputs.routing_logits, inputs.routing_bias, inputs.geometry, inputs.routed_scaling_factor)
    permutation = reference.permute(routing.topk_ids, inputs.geometry, inputs.local_expert_offset)
    return [form, *checks.content(run.outputs, torch.unique(permutation.permuted_idx_to_token_idx))]


def _with(verdict: Verdict, whole: list[checks.Check]) -> Verdict:
    """A verdict on the sampled tokens, with what the whole output showed."""
    failed = [check for check in whole if not check.passed]
    if not failed:
        return verdict
    names = {check.name for check in whole}
    kept = tuple(check for check in verdict.checks if check.name not in names)
    failed += [check for check in kept if not check.passed]
    message = "; ".join(f"{check.name}: {check.detail}" for check in failed)
    return replace(verdict, status=FAIL, checks=(*whole, *kept), message=message)


def _rows(run: CandidateRun, tokens: torch.Tensor) -> CandidateRun:
    """The run with only these tokens of each output; outputs that are no [T, ...] tensor stay."""
    fits = [isinstance(out, torch.Tensor) and out.dim() > 0 and len(out) > int(tokens.max()) for out in run.outputs]
    outputs = [out[tokens] if fit else out for out, fit in zip(run.outputs, fits, strict=True)]
    return replace(run, outputs=outputs)


def _repeat(case: Case, candidate: str | None, options: Options) -> str:
    words = ["moeref", "golden", "check", case.name]
    if case.root != DEFAULT_FOLDER:
        words += ["--dir", str(case.root)]
    if candidate is not None:
        words += ["--candidate", candidate]
        if options.device != "cpu":
            words += ["--device", options.device]
        if options.recipe != AUTO:
            words += ["--recipe", options.recipe]
        if options.timeout != Options.timeout:
            words += ["--timeout", f"{options.timeout:g}"]
        if not options.isolate:
            words += ["--no-isolate"]
    return shlex.join(words)
