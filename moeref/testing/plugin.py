"""The pytest plugin: options and markers of moeref.testing.suite, and one section of the report.

    pytest --moe-candidate my_kernel.py:run --pyargs moeref.testing.suite

pytest loads it in every project of an environment that has moeref, so without --moe-candidate it does nothing, and
imports nothing but pytest. Where moeref is on the path without being installed: -p moeref.testing.plugin.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

import pytest

PLUGIN = __name__
SUITE = "moeref.testing.suite"

PREFIX = "moe_"
"""Of markers, and of JUnit properties, by which xdist's workers tell the controller."""

WHAT_TO_PASS = (
    f"{SUITE} judges a kernel of yours, and none was named: pass --moe-candidate path/to/my_kernel.py:run (or "
    "package.module:function, a name of `moeref backends`, or a solution.json)"
)

MARKERS = {
    "moe_published": "a published workload at the real geometry",
    "moe_laws": "a law of the layer that needs no reference",
    "moe_readouts": "crafted inputs that make the candidate show one of its stages",
    "moe_golden": "a recorded case",
    "moe_fuzz": "problems drawn by Hypothesis; a failing one is shrunk",
}
"""Marker -> what its items test. The order is that of the report's section."""

OPTIONS: dict[str, str | int | float] = {
    "candidate": "",
    "device": "auto",
    "recipe": "auto",
    "values": "published",
    "geometry": "",
    "examples": 100,
    "seed": 0,
    "golden": "",
    "timeout": 300.0,
}
"""--moe-... with a value -> its default."""

HELP = {
    "candidate": "The kernel to judge, e.g. my_kernel.py:run.",
    "device": "cpu, cuda or cuda:N; auto takes a GPU where there is one. Under xdist worker n gets GPU n modulo their "
    "number.",
    "recipe": "Judge under this recipe, e.g. requant; auto: the declared one, else found from the errors.",
    "values": "Value kind of the published workloads, e.g. model_like.",
    "geometry": "Geometry of laws, read-outs and fuzz, e.g. dsv3; without: small ones.",
    "examples": "Problems that the fuzz items draw together.",
    "seed": "Another seed draws other problems.",
    "golden": "Folder of golden cases; without: the checkout's own.",
    "timeout": "Seconds that one call may take; the first gets more, to compile.",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Every option but --require-gpu, see below."""
    group = parser.getgroup("moeref", f"moeref: judge a Mixture-of-Experts kernel (--pyargs {SUITE})")
    for name, default in OPTIONS.items():
        text = HELP[name] + (f" Default: {default}." if default != "" else "")
        group.addoption(f"--moe-{name}", metavar=name.upper(), type=type(default), default=default, help=text)
    text = "All 19 published workloads on a CPU too, and every golden case: minutes each."
    group.addoption("--moe-all", action="store_true", default=False, help=text)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None, object, object]:
    """Adds --require-gpu once the project's conftest has been read: one that it defines itself counts instead."""
    result = yield
    text = "A skip of an item of moeref.testing.suite is a failure, and so is a machine without a GPU."
    with contextlib.suppress(ValueError):  # the name is taken
        parser.getgroup("moeref").addoption("--require-gpu", action="store_true", default=False, help=text)
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Markers; with a candidate, the report's section. Raises UsageError for what could never run."""
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    candidate = config.getoption("moe_candidate")
    if not candidate:
        if any(_is_suite(argument) for argument in config.args):
            raise pytest.UsageError(WHAT_TO_PASS)
        return
    # Judge and candidate take turns in two processes: threads that spin while they wait would slow the other one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    under_xdist = getattr(config, "workerinput", None)
    if under_xdist is not None:  # workers share the cores; the controller checks the options and reports
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // under_xdist["workercount"])))
        return
    _check(config, candidate)
    from moeref.testing.summary import Summary

    config.pluginmanager.register(Summary(config), "moeref-summary")


def _is_suite(argument: str) -> bool:
    """Whether a command line's argument names the suite, or a part of it, as a module or as a path."""
    target = argument.partition("[")[0].partition("::")[0]
    if target == SUITE or target.startswith(f"{SUITE}."):
        return True
    folder = Path(__file__).parent / "suite"
    path = Path(target).absolute()
    return path == folder or folder in path.parents


def _check(config: pytest.Config, candidate: str) -> None:
    """Raise UsageError for a candidate that can't be found and for values that mean nothing."""
    from moeref.interop.candidates import locate
    from moeref.spec import Geometry, Recipe
    from moeref.values import VALUES

    option = config.getoption
    try:
        locate(candidate)
        if option("moe_geometry"):
            Geometry.parse(option("moe_geometry"))
        if option("moe_recipe") != "auto":
            Recipe.parse(option("moe_recipe"))
        if option("moe_device") not in ("auto", "cpu"):
            from moeref.interop.devices import usable_device

            usable_device(option("moe_device"), "--moe-device")
    except ValueError as error:  # CandidateError, SpecError
        raise pytest.UsageError(str(error)) from None
    if option("moe_values") not in VALUES:
        raise pytest.UsageError(f"--moe-values {option('moe_values')}: expected one of {', '.join(VALUES)}")
    if option("moe_examples") < 1:
        raise pytest.UsageError("--moe-examples: expected 1 or more; -m 'not moe_fuzz' leaves fuzz out")
    if not option("moe_timeout") > 0:
        raise pytest.UsageError("--moe-timeout: expected more than 0 seconds")
    if option("moe_device") == "cpu" and option("--require-gpu"):
        raise pytest.UsageError("--moe-device cpu and --require-gpu exclude each other: give one")
