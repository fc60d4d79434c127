"""The report's section: what was tested of the candidate, what was not, and why. Counts on xdist's controller too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from moeref.suites import published
from moeref.testing.plugin import MARKERS, PREFIX

STATUSES = ("PASS", "FAIL", "ERROR", "UNSUPPORTED", "INCONCLUSIVE")

REASONS_SHOWN = 12
"""Lines about items that tested nothing; -v shows all."""


def properties(report: pytest.TestReport | pytest.CollectReport) -> dict[str, Any]:
    """What an item of the suite recorded, without the prefix; {} for another's test."""
    recorded = getattr(report, "user_properties", ())
    return {name.removeprefix(PREFIX): value for name, value in recorded if name.startswith(PREFIX)}


def reason(report: pytest.TestReport) -> str:
    """Why an item was skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    return text.removeprefix("Skipped: ")


class Summary:
    """Collects what the suite's items report."""

    def __init__(self, config: pytest.Config) -> None:
        self.candidate = str(config.getoption("moe_candidate"))
        self.all = bool(config.getoption("moe_all"))
        self.verbose = config.get_verbosity() > 0
        self.seen: list[tuple[pytest.TestReport, dict[str, Any]]] = []

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """INCONCLUSIVE is an outcome of its own: neither a pass, nor left out like a skip."""
        if report.when == "call" and report.skipped and properties(report).get("status") == "INCONCLUSIVE":
            return "inconclusive", "?", "INCONCLUSIVE"
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what the suite's items say, once each."""
        found = properties(report)
        if "check" in found and (report.when == "call" or (report.when == "setup" and report.outcome != "passed")):
            self.seen.append((report, {"status": "ERROR", **found}))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Nothing judged is not a success: exit code 5, as for a run that collected nothing."""
        if exitstatus == pytest.ExitCode.OK and self.seen and not self._count("PASS"):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The section."""
        if not self.seen:
            return
        devices = sorted({str(found["device"]) for _, found in self.seen if "device" in found})
        terminalreporter.section(f"moeref: {self.candidate} on {', '.join(devices) or 'no device'}")
        for line in [*self._table(), *self._tested(), *self._untested()]:
            terminalreporter.line(line)

    def _count(self, status: str, check: str = "") -> int:
        return sum(found["status"] == status and check in ("", found["check"]) for _, found in self.seen)

    def _table(self) -> list[str]:
        shown = [status for status in STATUSES if self._count(status) or status == "PASS"]
        lines = [" " * 12 + "".join(f"{status:>14}" for status in shown)]
        drawn = self._drawn()
        for marker in MARKERS:
            check = marker.removeprefix(PREFIX)
            if not any(found["check"] == check for _, found in self.seen):
                continue
            counts = "".join(f"{self._count(status, check) or '-':>14}" for status in shown)
            extra = ", ".join(f"{number} {status}" for status, number in drawn.most_common()) if check == "fuzz" else ""
            lines.append(f"{check:<12}{counts}" + (f"   {drawn.total()} problems drawn: {extra}" if extra else ""))
        return lines

    def _drawn(self) -> Counter[str]:
        drawn: Counter[str] = Counter()
        for _, found in self.seen:
            for status in STATUSES:
                drawn[status] += int(found.get(f"drawn_{status}", 0))
        return +drawn

    def _tested(self) -> list[str]:
        """What passed under which recipe, how much work there was, and which stages the data could show."""
        lines = []
        recipes = Counter((f["recipe"], f["recipe_found"]) for _, f in self.seen if "recipe" in f)
        if recipes:
            named = ", ".join(f"{name} ({how}, {number})" for (name, how), number in recipes.most_common())
            lines.append(f"judged under recipe: {named}")
        judged = [found for _, found in self.seen if "active_tokens" in found and found["check"] != "fuzz"]
        if judged:
            tokens, rows, runs = (
                sum(int(f[name]) for f in judged) for name in ("active_tokens", "local_rows", "expert_runs")
            )
            lines.append(
                f"really tested: {tokens} tokens with local work, {rows} local rows, {runs} expert runs in "
                f"{len(judged)} problems" + (", beside those drawn" if self._drawn() else "")
            )
            stages = Counter(stage for found in judged for stage in str(found["tells"]).split(", ") if stage)
            told = ", ".join(f"{stage} {number}" for stage, number in stages.items())
            lines.append(f"problems whose data tell right from wrong: {told or 'none'} of {len(judged)}")
        return lines

    def _untested(self) -> list[str]:
        """What was no test, with the reason, and what was left out."""
        lines = []
        for status, what in (("INCONCLUSIVE", "vacuous, no pass"), ("UNSUPPORTED", "not run")):
            why: dict[str, list[str]] = {}
            for report, found in self.seen:
                if found["status"] == status:
                    why.setdefault(reason(report), []).append(_item(report))
            if why:
                lines.append(f"{status} ({what}):")
            entries = list(why.items())
            for text, items in entries if self.verbose else entries[:REASONS_SHOWN]:
                who = ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
                lines.append(f"  {who}: {text}")
            if len(entries) > REASONS_SHOWN and not self.verbose:
                lines.append(f"  and {len(entries) - REASONS_SHOWN} more reasons: -v shows them")
        on_cpu = any(found["check"] == "published" and found.get("device") == "cpu" for _, found in self.seen)
        if on_cpu and not self.all:
            left = ", ".join(f"{one.short} (seq_len {one.seq_len})" for one in published(True, False)[1])
            lines.append(f"left for --moe-all: {left}")
        if not self._count("PASS") and not self._count("FAIL") and not self._count("ERROR"):
            lines.append("nothing could be judged: that is no success, the exit code is 5")
        return lines


def _item(report: pytest.TestReport) -> str:
    """An item's name without its file: 'split' of test_law[split]."""
    name = report.nodeid.rpartition("::")[2]
    return name.partition("[")[2].removesuffix("]") or name
