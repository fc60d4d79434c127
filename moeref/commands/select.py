"""Which problems a command runs: published workloads, the small suite, or named ones."""

from __future__ import annotations

from moeref.spec import Problem, SpecError


def select_problems(
    workloads: str, names: list[str], small: bool, everything: bool, values: str, seed: int, device: str
) -> tuple[list[tuple[str, Problem]], list[str]]:
    """((label, problem) to run, labels of published workloads left out).

    workloads: uuid prefixes, comma-separated. Raises SpecError for an unknown prefix or problem; kinds are
    checked by check_kinds, once routing kinds that come from files have been read.
    """
    from moeref.suites import published, small_suite
    from moeref.workloads import find

    left_out: list[str] = []
    if names:
        chosen = [(name, Problem.parse(name)) for name in names]
    elif small:
        chosen = [(one.name, one) for one in small_suite(seed)]
    elif workloads:
        wanted = find([part.strip() for part in workloads.split(",") if part.strip()])
        chosen = [(w.short, w.problem(values, seed)) for w in wanted]
    else:
        taken, left = published(device == "cpu", everything)
        chosen = [(w.short, w.problem(values, seed)) for w in taken]
        left_out = [f"{w.short} (seq_len {w.seq_len})" for w in left]
    return chosen, left_out


def check_kinds(problems: list[Problem]) -> None:
    """Raise SpecError for unknown kinds before the first problem runs."""
    from moeref.routings import routing_kind
    from moeref.values import VALUES

    for problem in problems:
        routing_kind(problem.routing)
        if problem.values not in VALUES:
            raise SpecError(f"unknown value kind '{problem.values}': expected one of {', '.join(VALUES)}")
