"""What an explanation holds: ranked suspects, and the facts that they rest on. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Suspect:
    """One thing that may be wrong, with its evidence.

    stage     named as the faults' stages are (moeref.diagnose.faults.STAGES).
    fault     name of a catalogue entry under which the reference answers as the candidate does; None where only the
              stage is suspected.
    evidence  one sentence with numbers.
    match     share of the candidate's error that the hypothesis explains, over every problem looked at together:
              1 - |candidate - hypothesis|^2 / |candidate - right kernel|^2, every row of an output weighted alike.
              1: the candidate does what the hypothesis does; 0: no better than a right kernel. None where no catalogue
              entry is meant.
    source    the catalogue entry's sources (issues and commits, or 'synthetic'); None without an entry.
    replay    one command line that shows it again.
    """

    stage: str
    fault: str | None
    evidence: str
    match: float | None
    source: str | None
    replay: str


@dataclass(frozen=True)
class Explanation:
    """Everything that `moeref explain` found out about one candidate on one problem."""

    problem: str  # name of the problem that was asked about
    candidate: str
    correct: bool  # nothing wrong was seen
    recipe: str | None  # name of the recipe that the candidate behaves like; None where no recipe could be told
    suspects: tuple[Suspect, ...] = ()  # best first; empty for a correct candidate
    facts: tuple[str, ...] = ()  # sentences of the error's geometry and of what laws and read-outs saw
    ruled_out: tuple[str, ...] = ()  # sentences: what was tested and does not fit
    shrunk: str | None = None  # name of the smallest problem that still fails

    @property
    def headline(self) -> str:
        """One sentence: the verdict and the first suspect."""
        if self.correct:
            return f"{self.candidate}: nothing is wrong; it behaves like recipe {self.recipe}"
        if not self.suspects:
            return f"{self.candidate} is wrong, and nothing known fits"
        first = self.suspects[0]
        cause = f"looks like {first.fault}" if first.fault else "no catalogue entry fits"
        return f"{self.candidate} is wrong: stage {first.stage}, {cause}"

    def to_json(self) -> dict[str, Any]:
        """Plain data: the fields by name, suspects best first."""
        return asdict(self)
