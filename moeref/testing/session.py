"""What the items of moeref.testing.suite ask: one candidate, judged piece by piece, each answer a Result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import moeref.interop
from moeref.interop.candidates import CandidateError
from moeref.interop.observe import CandidateRun
from moeref.interop.runner import Runner
from moeref.judge.vacuity import STAGES
from moeref.judge.verdict import ERROR, FAIL, INCONCLUSIVE, PASS, UNSUPPORTED, Verdict
from moeref.make import make_inputs
from moeref.spec import PRESETS, Geometry, Problem
from moeref.suites import DIAGNOSIS
from moeref.verify import Diagnosis, Options, diagnose_one, judge_one

if TYPE_CHECKING:
    from moeref.golden import Case

Property = str | int | float


@dataclass(frozen=True)
class Result:
    """What one item showed."""

    status: str  # PASS, FAIL, ERROR, UNSUPPORTED or INCONCLUSIVE
    text: str  # a sentence with numbers; '' for a PASS that needs no word
    repeat: str = ""  # the command of moeref that repeats it, with more detail
    properties: dict[str, Property] = field(default_factory=dict)  # for JUnit and the report's section
    details: str = ""  # the candidate's own traceback and what it printed last


class Session:
    """One candidate in one pytest process: its runner, opened at the first question. A context manager.

    geometry   of laws, read-outs and fuzz; None: small ones
    """

    def __init__(self, candidate: str, options: Options, geometry: Geometry | None = None, seed: int = 0) -> None:
        self.candidate = candidate
        self.options = options
        self.geometry = geometry
        self.seed = seed
        self._runner: Runner | None = None
        self._takes_groups: bool | None = None
        self._first: CandidateRun | None = None
        self._readouts: dict[str, list[Diagnosis]] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if self._runner is not None:
            self._runner.close()

    def problem(self, label: str, problem: Problem) -> Result:
        """The verdict on one problem."""
        unfit = self._unfit(problem.geometry)
        if unfit is not None:
            return replace(unfit, properties={"problem": problem.name})
        outcome = judge_one(self._open(), self.candidate, label, problem, self.options)
        properties = _figures(outcome.verdict) | {"seconds": _short(outcome.seconds)}
        details = _candidate_frames(outcome.traceback)
        return Result(outcome.verdict.status, outcome.verdict.message, outcome.repeat, properties, details)

    def law(self, name: str) -> Result:
        """The finding of one law."""
        return self._diagnosis(laws=(name,))

    def readout(self, name: str, finding: str) -> Result:
        """One finding of one read-out; the others of the same crafted inputs are kept until they are asked for."""
        return self._diagnosis(readout=name, finding=finding)

    def golden(self, case: Case) -> Result:
        """The candidate held to one recorded case."""
        from moeref.golden import check_case

        unfit = self._unfit(case.spec.problem.geometry)
        if unfit is not None:
            return replace(unfit, properties={"problem": case.spec.problem.name})
        found = check_case(case, self._open(), self.options)
        properties: dict[str, Property] = {"problem": case.spec.problem.name}
        if found.verdict is not None:
            properties |= _figures(found.verdict)
        return Result(found.status, found.message, found.repeat, properties | {"seconds": _short(found.seconds)})

    def fuzz(self, seed: int, examples: int) -> Result:
        """Drawn problems; the first that fails, shrunk. Their counts stand in properties `drawn_PASS` and the like."""
        try:
            from moeref.testing.fuzz import fuzz
        except ModuleNotFoundError as error:
            return Result(UNSUPPORTED, f"fuzz needs {error.name}: pip install 'moeref[test]'")
        unfit = self._unfit(self.geometry or PRESETS["small"])
        if unfit is not None:
            return unfit
        found = fuzz(self.candidate, self.options, examples=examples, seed=seed, geometry=self.geometry)
        properties: dict[str, Property] = {f"drawn_{status}": count for status, count in found.statuses.items()}
        properties["seconds"] = _short(found.seconds)
        if found.failure is not None:
            verdict = found.failure.verdict
            text = (
                f"{verdict.message} (the smallest problem that fails, after {found.shrink_steps} steps: "
                f"{verdict.problem}; seed {seed}, problem {found.drawn} of {examples})"
            )
            details = _candidate_frames(found.failure.traceback)
            return Result(verdict.status, text, found.failure.repeat, properties | _figures(verdict), details)
        if found.statuses[PASS]:
            return Result(PASS, "", "", properties)
        status = UNSUPPORTED if found.statuses[UNSUPPORTED] else INCONCLUSIVE
        text = f"none of {found.drawn} drawn problems could be judged: {_counts(found.statuses)}"
        return Result(status, text, properties=properties)

    # ---- shared

    def _open(self) -> Runner:
        if self._runner is None:
            self._runner = self.options.runner(self.candidate).__enter__()
        return self._runner

    def _unfit(self, geometry: Geometry) -> Result | None:
        """Why the candidate can't be asked at this geometry: it would have to guess the routing groups.

        A function without n_group, topk_group and top_k knows those of its own model, which are taken to be
        DeepSeek-V3's: its answers to others would be wrong for no fault of its own.
        """
        own = PRESETS["dsv3"]
        if (geometry.n_group, geometry.topk_group, geometry.top_k) == (own.n_group, own.topk_group, own.top_k):
            return None
        if self._takes_groups is None:
            try:
                none = make_inputs(replace(Problem.parse(DIAGNOSIS[0]), seq_len=0))  # a call as cheap as can be
                self._takes_groups = self._open().run(none, poisons=(0.0,)).takes_groups
            except CandidateError as error:
                return Result(ERROR, str(error))
        if self._takes_groups:
            return None
        groups = f"n_group={geometry.n_group}, topk_group={geometry.topk_group}, top_k={geometry.top_k}"
        return Result(
            UNSUPPORTED,
            f"{self.candidate} takes no n_group, topk_group and top_k, so it can't know this problem's {groups}: add "
            "them as keyword arguments; or --moe-geometry dsv3 runs laws, read-outs and fuzz with DeepSeek-V3's",
        )

    @property
    def _probed(self) -> Problem:
        """Where laws and read-outs are asked."""
        problem = replace(Problem.parse(DIAGNOSIS[0]), seed=self.seed)
        if self.geometry is None:
            return problem
        shard = self.geometry.num_local_experts
        offset = min(shard, self.geometry.num_experts - shard)  # the second shard: an offset of 0 hides faults
        return replace(problem, geometry=self.geometry, offset=offset)

    def _diagnosis(self, laws: Sequence[str] = (), readout: str = "", finding: str = "") -> Result:
        problem = self._probed
        unfit = self._unfit(problem.geometry)
        if unfit is not None:
            return replace(unfit, properties={"problem": problem.name})
        if self._first is None or self._first.status != "ok":
            self._first = self._open().run(make_inputs(problem))
        first = self._first
        properties: dict[str, Property] = {"problem": problem.name}
        if first.status != "ok":
            status = UNSUPPORTED if first.status == "unsupported" else ERROR
            repeat = self.options.repeat(self.candidate, problem)
            return Result(status, first.message, repeat, properties, _candidate_frames(first.traceback))
        if readout not in self._readouts:
            asked = diagnose_one(
                self._open(), self.candidate, problem, self.options, first, laws, [readout] if readout else []
            )
            found = list(asked)
            if readout:
                self._readouts[readout] = found
        else:
            found = self._readouts[readout]
        named = [one for one in found if not finding or one.finding.name == finding]
        if not named:
            return Result(INCONCLUSIVE, f"the read-out {readout} gave no finding {finding}", "", properties)
        one = named[0]
        if one.finding.z is not None:
            properties["noise_z"] = _short(one.finding.z)
        suspects = one.finding.suspects if one.status == FAIL else ()
        if suspects:
            properties["suspects"] = ", ".join(suspects)
        where = f" [suspect: {', '.join(suspects)}]" if suspects else ""
        text = "" if one.status == PASS else f"{one.finding.detail}{where}"
        return Result(one.status, text, one.repeat, properties)


def _figures(verdict: Verdict) -> dict[str, Property]:
    """What was measured on one problem."""
    figures = verdict.figures
    found: dict[str, Property] = {"problem": verdict.problem}
    if verdict.failed:
        found["failed"] = ", ".join(verdict.failed)
    if verdict.recipe:
        found["recipe"] = verdict.recipe
        found["recipe_found"] = "found" if verdict.recipe_found else "declared"
    if verdict.status not in (PASS, FAIL):
        return found  # figures of a problem that could not have failed would only look good
    if "published" in figures.matched:
        found["matched_ratio"] = _short(figures.matched["published"])
    if "published" in figures.matched_active:
        found["matched_ratio_active"] = _short(figures.matched_active["published"])
    if figures.noise_z is not None:
        found["noise_z"] = _short(figures.noise_z)
    found |= {"active_tokens": figures.active_tokens, "local_rows": figures.local_rows}
    found |= {"expert_runs": figures.experts_hit}
    found["tells"] = ", ".join(stage for stage in STAGES if stage not in figures.blind)
    return found


def _short(number: float) -> float:
    return float(f"{number:.5g}")


def _counts(statuses: Counter[str]) -> str:
    return ", ".join(f"{number} {status}" for status, number in statuses.most_common())


def _candidate_frames(text: str) -> str:
    """A traceback without the frames of moeref's own runner."""
    own = f'  File "{Path(moeref.interop.__path__[0])}'
    kept, skipping = [], False
    for line in text.splitlines():
        if line.startswith("  File "):
            skipping = line.startswith(own)
        elif not line.startswith("    "):
            skipping = False
        if not skipping:
            kept.append(line)
    return "\n".join(kept)
