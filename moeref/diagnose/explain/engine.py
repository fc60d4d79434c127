"""From a candidate to an Explanation, cheapest first; it stops when the cause is clear.

the problem asked about -> the panel -> the catalogue's entries as hypotheses -> a sequence that separates those left
-> (where none fits) laws, read-outs, error geometry and partial matches vote on the stage -> the smallest problem
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from moeref.diagnose.explain.case import ASKED, Case, Library
from moeref.diagnose.explain.choice import judge_routing, read_routing_weights
from moeref.diagnose.explain.geometry import INSIDE, Fact, error_geometry
from moeref.diagnose.explain.hypotheses import Hypotheses
from moeref.diagnose.explain.inside import PROBLEM, look_inside
from moeref.diagnose.explain.panel import (
    Answer,
    Prepared,
    Step,
    Subject,
    ask,
    panel_at,
    regrouped,
)
from moeref.diagnose.explain.rank import FIT, Score, Search
from moeref.diagnose.explain.result import Explanation, Suspect
from moeref.diagnose.explain.separate import separate
from moeref.diagnose.explain.substitution import judge_trace
from moeref.diagnose.explain.votes import partial_matches, stage_votes
from moeref.diagnose.faults import FAULTS
from moeref.diagnose.kernel import USUAL
from moeref.diagnose.laws import run_laws
from moeref.diagnose.readout import run_readouts
from moeref.diagnose.result import Call, Finding
from moeref.diagnose.shrink import shrink
from moeref.judge.verdict import AUTO, FAIL, INCONCLUSIVE, PASS, Observed, Verdict, judge
from moeref.make import make_inputs
from moeref.spec import PRESETS, Problem, Recipe
from moeref.suites import DIAGNOSIS

MOST_SUSPECTS = 4
SMALL = 2**22
"""H * I up to which a geometry counts as small: a problem of it takes milliseconds."""

CHECK_STAGES = {
    "form": ("output",),
    "inputs_unchanged": ("state",),
    "no_alias": ("output", "state"),
    "own_result": ("state", "output"),
    "written": ("output",),
    "idle_rows": ("output", "offset"),
}
"""Stages that a failed check of the judge points to by itself."""


def explain(subject: Subject, call: Call, case: Case, library: Library | None = None) -> Explanation:
    """What is wrong with the candidate, or that nothing is. subject and call are the same candidate.

    Raises SpecError for a problem of an unknown kind.
    """
    return _Explainer(subject, call, case, library).run()


class _Explainer:
    def __init__(self, subject: Subject, call: Call, case: Case, library: Library | None) -> None:
        self.subject, self.call, self.case = subject, call, case
        self.library = library or Library(case.device)
        self.asked = case.problem or Problem.parse(ASKED)
        self.facts: list[str] = []
        self.ruled_out: list[str] = []

    def run(self) -> Explanation:
        case = self.case
        answers = self._ask_panel()
        self.asked = case.problem or Problem.parse(regrouped(ASKED, self.library.like))
        case.say(f"the problem {self.asked.name}")
        own = Prepared((Step(self.asked.name),), case.device)
        first = ask(self.subject, own, 0)
        if first.observed.status != "ok":
            return self._explanation(False, None, (), facts=(first.observed.message,))
        verdict = self._judge(own, first, 0)
        if verdict.status == FAIL and "form" in verdict.failed:
            detail = next(check.detail for check in verdict.checks if check.name == "form")
            return self._explanation(False, None, (self._suspect("output", detail, self.asked.name),))
        self.takes_out = first.observed.poisoned
        verdicts = [self._judge(self.library.panel, one, k) for k, one in enumerate(answers)]
        wrong = [k for k, one in enumerate(verdicts) if one.status not in (PASS, INCONCLUSIVE)]
        recipe = self._recipe([verdict, *verdicts])
        findings: list[Finding] = []
        if verdict.status in (PASS, INCONCLUSIVE) and not wrong:
            findings = self._findings(first)
            if not any(one.passed is False for one in findings):
                return self._explanation(True, recipe.name, ())
        self._tell(own, first, verdict, answers, verdicts, wrong, recipe)
        case.say("the catalogue's entries as hypotheses")
        search = Search(answers, self.library.hypotheses(self.takes_out))
        scores = search.run(wrong, recipe)
        fitting = self._told_apart([one for one in scores if one.fits])
        if verdict.status == FAIL and fitting and not self._is_state(fitting[0]):
            fitting = self._confirmed(fitting, own, first)
        if fitting:
            suspects = self._named(fitting, wrong, scores)
            recipe = fitting[0].recipe
        else:
            findings = findings or self._findings(first)
            suspects = self._voted(scores, search, wrong, recipe, verdicts, findings)
        large = self.asked.geometry.hidden_size * self.asked.geometry.intermediate_size > SMALL
        start = self._problem_of(wrong) if wrong and (large or verdict.status != FAIL) else self.asked.name
        smallest = None if fitting and self._is_state(fitting[0]) else self._shrunk(start)
        return self._explanation(False, recipe.name, suspects, shrunk=smallest)

    # Asking

    def _ask_panel(self) -> list[Answer]:
        """The panel's answers; the panel is another one for a candidate that answers for one model's groups alone, or
        that does not run at small geometries."""
        case = self.case
        case.say("a panel of small problems")
        self.subject.restart()
        self.at_home = False
        first = ask(self.subject, self.library.panel, 0)
        if first.observed.status == "ok" and not getattr(first.observed, "takes_groups", True):
            like = case.problem.geometry if case.problem else PRESETS["dsv3"]
            self.facts.append(
                f"it does not take n_group, topk_group and top_k: taken as made for {like.n_group} groups, of which "
                f"{like.topk_group} stay, and top_k = {like.top_k}"
            )
            self.library = Library(case.device, like=like)
            self.subject.restart()
            first = ask(self.subject, self.library.panel, 0)
        if first.observed.status != "ok" and case.problem is not None:
            geometry = case.problem.geometry
            message = first.observed.message
            self.facts.append(f"it does not run at small geometries ({message}): diagnosed at {geometry.name}")
            self.library = Library(case.device, panel_at(geometry), self.library.like)
            self.at_home = True
            first = ask(self.subject, self.library.panel, 0)
        if first.observed.status != "ok":
            return [first]
        return [first, *(ask(self.subject, self.library.panel, k) for k in range(1, self.library.panel.length))]

    def _judge(self, prepared: Prepared, answer: Answer, index: int) -> Verdict:
        step, known = prepared.steps[index], prepared.known(index)
        observed: Observed = answer.last() if step.then else answer.observed
        return judge(step.judged, known.inputs, known.trace, observed, self.case.recipe, known=known)

    def _recipe(self, verdicts: Sequence[Verdict]) -> Recipe:
        """The declared one, else the one that most problems where all is well were judged under."""
        if self.case.recipe != AUTO:
            return Recipe.parse(self.case.recipe)
        found = Counter(one.recipe for one in verdicts if one.status == PASS and one.recipe)
        return Recipe.parse(found.most_common(1)[0][0]) if found else USUAL

    def _findings(self, first: Answer) -> list[Finding]:
        """Laws and read-outs, at a small geometry where the candidate runs there."""
        if not self.case.laws:
            return []
        self.case.say("laws and read-outs")
        problem = self.asked if self.at_home else Problem.parse(regrouped(DIAGNOSIS[0], self.library.like))
        found = run_readouts(self.call, problem, device=self.case.device)
        if problem.geometry.hidden_size * problem.geometry.intermediate_size > SMALL:
            return found  # laws draw every local expert's weights: minutes at such a size
        return found + run_laws(
            self.call,
            problem,
            device=self.case.device,
            recipe=self.case.recipe,
            inexact=self.case.inexact,
            deterministic=first.observed.deterministic,
        )

    # Telling

    def _tell(
        self,
        own: Prepared,
        first: Answer,
        verdict: Verdict,
        answers: Sequence[Answer],
        verdicts: Sequence[Verdict],
        wrong: Sequence[int],
        recipe: Recipe,
    ) -> None:
        """Facts of the problem asked about, or of the panel's first wrong step."""
        self.geometry: list[Fact] = []
        if verdict.status == FAIL:
            self._tell_one(own, 0, first, verdict, recipe)
        if wrong:
            names = [self.library.panel.steps[k].judged for k in wrong]
            self.facts.append(f"{len(wrong)} of {len(answers)} steps of the panel fail, the first is {names[0]}")
            if verdict.status != FAIL:
                self._tell_one(self.library.panel, wrong[0], answers[wrong[0]], verdicts[wrong[0]], recipe)

    def _tell_one(self, prepared: Prepared, index: int, answer: Answer, verdict: Verdict, recipe: Recipe) -> None:
        if answer.rows is None:
            self.facts.append(f"{verdict.problem}: {answer.observed.message}")
            return
        known = prepared.known(index)
        output = answer.rows[-known.inputs.seq_len :] if known.inputs.seq_len else answer.rows
        self.geometry = error_geometry(output, known, recipe)
        self.facts += [f"{verdict.problem}: {one.text}" for one in self.geometry]
        for check in verdict.checks:
            if not check.passed and check.name in CHECK_STAGES:
                self.facts.append(f"{verdict.problem}: {check.detail}")
                self.geometry.append(Fact(check.detail, CHECK_STAGES[check.name]))

    # Naming

    def _told_apart(self, fitting: list[Score]) -> list[Score]:
        """Fitting entries without those that a further sequence rules out."""
        near = [one for one in fitting if one.units <= fitting[0].units + 1 and fitting[0].units > EXACTLY]
        near += [one for one in fitting if fitting[0].units <= EXACTLY and one.units <= EXACTLY]
        for other in fitting:
            if other not in near:
                self._rule_out(other, "lies further from the answers than the entry named")
        if len(near) < 2:
            return near
        self.case.say("a problem that separates " + ", ".join(one.name for one in near))
        found = separate(self.subject, near, self.library.bank, self.takes_out)
        if found is None:
            return near
        for one in found.dropped:
            self._rule_out(one, f"does not fit {found.steps[-1].judged}, which was built to separate")
        return list(found.kept)

    def _confirmed(self, fitting: list[Score], own: Prepared, first: Answer) -> list[Score]:
        """Fitting entries that explain the answer to the problem asked about as well, where that can be afforded."""
        g, rows = self.asked.geometry, len(own.known(0).trace.gemm1_out)
        if g.hidden_size * g.intermediate_size > SMALL and rows > 64:
            return fitting
        self.case.say(f"the entry named, on {self.asked.name}")
        search = Search([first], Hypotheses(own, self.takes_out))
        kept = []
        for one in fitting[:3]:
            far = search.score(one.name, [0], one.recipe, one.recipe)
            if far.worst <= FIT:
                kept.append(one)
            else:
                self._rule_out(one, f"fits the panel, but lies {far.worst:.3g} units off on {self.asked.name}")
        return kept

    def _rule_out(self, one: Score, why: str) -> None:
        self.ruled_out.append(f"{one.name} ({FAULTS[one.name].stage}): {why}")

    def _named(self, fitting: Sequence[Score], wrong: Sequence[int], scores: Sequence[Score]) -> tuple[Suspect, ...]:
        found = []
        for one in fitting[:MOST_SUSPECTS]:
            fault = FAULTS[one.name]
            evidence = (
                f"{fault.summary}: under this the reference gives the candidate's answers on {len(one.distances)} "
                f"steps of the panel, within {one.worst:.2g} of a re-quantisation's noise (recipe {one.recipe.name}); "
                f"the right kernel lies {max(one.right[k] / one.noise[k] for k in one.right):.3g} units off"
            )
            show = self._shows(one, wrong)
            found.append(Suspect(fault.stage, one.name, evidence, one.match, fault.source, self.case.replay(show)))
        others = [one for one in scores if one.name not in {two.name for two in fitting}]
        if others:
            nearest = others[0]
            self._rule_out(nearest, f"the next of {len(FAULTS)} entries, lies {nearest.units:.3g} units off on average")
        return tuple(found)

    def _shows(self, one: Score, wrong: Sequence[int]) -> list[str]:
        """Problems that show the entry: one, or two in turn for what a call leaves behind."""
        steps = self.library.panel.steps
        furthest = max(one.right, key=lambda k: one.right[k] / one.noise[k])
        shown = steps[wrong[0] if wrong else furthest]
        if self._is_state(one) and shown != steps[0]:
            return [steps[0].problem, shown.judged]
        return [shown.judged]

    def _is_state(self, one: Score) -> bool:
        return FAULTS[one.name].stage == "state"

    def _voted(
        self,
        scores: Sequence[Score],
        search: Search,
        wrong: Sequence[int],
        recipe: Recipe,
        verdicts: Sequence[Verdict],
        findings: Sequence[Finding],
    ) -> tuple[Suspect, ...]:
        """Stages by votes, where no entry fits."""
        self.facts += [f"{one.name}: {one.detail}" for one in findings if one.passed is False]
        if scores:
            best = scores[0]
            self.ruled_out.append(
                f"no catalogue entry fits: of {len(FAULTS)}, {best.name} comes nearest and leaves {best.worst:.3g} "
                f"units of one re-quantisation's noise on its worst step ({FIT:g} allowed)"
            )
        good = sorted({one.name for one in findings if one.passed})
        if good:
            self.ruled_out.append(f"laws and read-outs that hold: {', '.join(good)}")
        partial = partial_matches(search.answers, search.hypotheses, wrong[:2], recipe)
        failed = {c.name: c for k in wrong for c in verdicts[k].checks if not c.passed and c.name in CHECK_STAGES}
        told = {one.text for one in self.geometry}
        facts = [
            *self.geometry,
            *(Fact(c.detail, CHECK_STAGES[c.name]) for c in failed.values() if c.detail not in told),
        ]
        problem = self._problem_of(wrong) or self.asked.name
        unsteady = self._unsteady(verdicts)
        decisive = unsteady or self._stages() or self._decisive()
        self.facts += [one.text for one in decisive]
        if unsteady:  # what was read out of such a candidate says little
            partial, findings = [], []
        ranked = stage_votes(partial, findings, facts, decisive)
        return tuple(self._suspect(stage, reason, problem) for stage, _, reason in ranked[:MOST_SUSPECTS])

    def _stages(self) -> list[Fact]:
        """The first stage that does not follow from the one before, where the candidate shows its stages."""
        for name in dict.fromkeys((self.asked.name, *(one.judged for one in self.library.panel.steps))):
            inputs = make_inputs(Problem.parse(name)).to(self.case.device)
            trace = self.case.traced(inputs)
            if trace is None:
                return []
            found = judge_trace(trace, inputs)
            if found:
                return found[:1]
        return []

    def _unsteady(self, verdicts: Sequence[Verdict]) -> list[Fact]:
        """Two calls with the same inputs that differ: something is left behind by the first."""
        found = [(v.problem, c.detail) for v in verdicts for c in v.checks if c.name == "repeat" and not c.passed]
        return [Fact(f"{found[0][0]}: {found[0][1]}", ("state", "state", "combine"))] if found else []

    def _decisive(self) -> list[Fact]:
        """What the routing matrix and gemm2's inverted weights say."""
        if self.at_home:
            return []
        like = self.library.like
        self.case.say("the routing matrix, and what gemm2 was fed")
        found = []
        read = read_routing_weights(self.call, Problem.parse(regrouped(DIAGNOSIS[0], like)), self.case.device)
        outside = not any(one.text.endswith(INSIDE) for one in self.geometry)
        if outside and read is not None and (fact := judge_routing(read)):
            found.append(fact)
        prepared = Prepared((Step(regrouped(PROBLEM, like)),), self.case.device)
        rows = ask(self.subject, prepared, 0).rows
        if rows is not None and not found:
            inputs, known = prepared.judged(0), prepared.known(0)
            found += look_inside(rows[: inputs.seq_len], inputs, known.trace)
        return found

    def _problem_of(self, wrong: Sequence[int]) -> str:
        return self.library.panel.steps[wrong[0]].judged if wrong else ""

    def _suspect(self, stage: str, evidence: str, problem: str) -> Suspect:
        return Suspect(stage, None, evidence, None, None, self.case.replay([problem]))

    # The smallest problem

    def _shrunk(self, start: str) -> str | None:
        if self.case.shrink_seconds <= 0:
            return None
        self.case.say("the smallest problem that still fails")
        deadline = time.perf_counter() + self.case.shrink_seconds

        def fails(problem: Problem) -> bool:
            if time.perf_counter() > deadline or not self._in_its_model(problem):
                return False
            prepared = Prepared((Step(problem.name),), self.case.device)
            return self._judge(prepared, ask(self.subject, prepared, 0), 0).status == FAIL

        problem = Problem.parse(start)
        if not fails(problem):
            return None  # what was seen needs an earlier call
        return shrink(problem, fails)[0].name

    def _in_its_model(self, problem: Problem) -> bool:
        """Whether the candidate can know the problem's routing groups: always, unless it answers for one model's."""
        g, like = problem.geometry, self.library.like
        return like is None or (g.n_group, g.topk_group, g.top_k) == (like.n_group, like.topk_group, like.top_k)

    def _explanation(
        self,
        correct: bool,
        recipe: str | None,
        suspects: tuple[Suspect, ...],
        facts: tuple[str, ...] = (),
        shrunk: str | None = None,
    ) -> Explanation:
        return Explanation(
            self.asked.name,
            self.case.candidate,
            correct,
            recipe,
            suspects,
            (*self.facts, *facts),
            tuple(self.ruled_out),
            shrunk,
        )


EXACTLY = 0.05
"""Average distance, in units of one re-quantisation's noise, below which an entry gives the very same answers."""
