"""The pytest plugin, used as somebody else would: in a project folder of its own, by pytest in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from moeref.diagnose.laws import LAWS
from moeref.diagnose.readout import READOUTS
from moeref.golden import cases
from moeref.interop.devices import usable_device
from moeref.spec import Problem, SpecError
from moeref.testing import items, plugin
from moeref.testing.session import Result, Session
from moeref.verify import Options

ROOT = Path(__file__).resolve().parents[1]
SUITE = plugin.SUITE
PLAIN = "small-t16-o8-iid-published-s0"
IDLE = "small-t7-o8-no_local_work-model_like-s0"

RIGHT = """
from moeref.inputs import Inputs
from moeref.reference import moe
from moeref.spec import Geometry

def run(*ten, n_group=8, topk_group=4, top_k=8):
    local, hidden, inner = ten[6].shape
    geometry = Geometry(ten[0].shape[1], local, hidden, inner, top_k, n_group, topk_group)
    return moe(Inputs(*ten, geometry=geometry)).output
"""
SWAPPED = """
import torch
import my_kernel

def run(*ten, n_group=8, topk_group=4, top_k=8):
    ten = list(ten)
    half = ten[6].shape[2]
    ten[4] = ten[4].view(torch.uint8).roll(half, 1).view(ten[4].dtype)
    ten[5] = ten[5].roll(half // 128, 1)
    return my_kernel.run(*ten, n_group=n_group, topk_group=topk_group, top_k=top_k)
"""  # gate and up, with their scales
FIXED = """
import my_kernel

def run(a, b, c, d, e, f, g, h, i, j):
    return my_kernel.run(a, b, c, d, e, f, g, h, i, j)
"""  # DeepSeek-V3's routing groups alone
RAISES = """
def helper():
    raise ValueError("no tile of 17 rows")

def run(*ten, n_group, topk_group, top_k):
    helper()
"""
OWN_TEST = """
import sys

def test_own(pytestconfig):
    loaded = {name for name in sys.modules if name.partition(".")[0] in ("moeref", "torch", "hypothesis", "numpy")}
    assert loaded == {"moeref", "moeref.testing", "moeref.testing.plugin"}
    assert pytestconfig.getoption("--require-gpu") == "mine"
"""
OWN_CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--require-gpu", default="mine")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel project, with nothing of moeref in it."""
    folder = tmp_path_factory.mktemp("project")
    kernels = {"my_kernel": RIGHT, "swapped": SWAPPED, "fixed": FIXED, "raises": RAISES}
    for name, text in kernels.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """pytest in the folder, with moeref on the path and not installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def judge(folder: Path, candidate: str, chosen: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The part of the suite that -k chooses, with five drawn problems."""
    given = ["-p", plugin.PLUGIN, "--moe-candidate", candidate, "--moe-examples", "5", "-k", chosen]
    return run_pytest(folder, *given, *words, "--pyargs", SUITE)


def outcomes(junit: Path) -> dict[str, tuple[str, dict[str, str], str]]:
    """name -> (outcome, properties without their prefix, message) of every case of a JUnit file."""
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        properties = {p.get("name", "").removeprefix("moe_"): p.get("value", "") for p in case.iter("property")}
        ends = [child for child in case if child.tag != "properties"]
        outcome = ends[0].tag if ends else "passed"
        found[case.get("name", "")] = (outcome, properties, (ends[0].get("message") or "") if ends else "")
    return found


def test_a_right_kernel_passes_and_what_is_vacuous_is_no_pass(project: Path) -> None:
    chosen = f"e05c6c03-t1 or {PLAIN} or {IDLE} or split or gemm2_scale_map or fuzz"
    done = judge(project, "my_kernel.py:run", chosen, "-W", "error", "--strict-markers", "--junitxml", "right.xml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout and "1 inconclusive" in done.stdout
    findings = sum(len(one.findings) for one in READOUTS.values())
    golden = sum(case.judges_candidates for case in cases())
    drawn, on_cpu = 1, 16
    assert f"collected {on_cpu + len(LAWS) + findings + golden + drawn} items" in done.stdout
    found = outcomes(project / "right.xml")
    assert {name: outcome for name, (outcome, _, _) in found.items()} == {
        "test_published[e05c6c03-t1]": "passed",
        f"test_golden[{PLAIN}]": "passed",
        f"test_golden[{IDLE}]": "skipped",
        "test_law[split]": "passed",
        "test_readout[gemm2_scale_map]": "passed",
        "test_fuzz[seed0x5]": "passed",
    }
    _, published, _ = found["test_published[e05c6c03-t1]"]
    assert published["problem"] == "dsv3-t1-o32-deepseek_like-published-s0"
    assert published["status"] == "PASS" and published["recipe"] == "exact" and published["device"] == "cpu"
    assert float(published["matched_ratio"]) == 1.0 and float(published["noise_z"]) < 1.5
    assert "no token chose a local expert" in found[f"test_golden[{IDLE}]"][2]
    assert "matched_ratio" not in found[f"test_golden[{IDLE}]"][1]
    # the section: a line a check, what was vacuous and why, what was left out
    section = done.stdout.partition("moeref: my_kernel.py:run on cpu")[2]
    assert "golden                   1             1" in section
    assert f"{IDLE}: no token chose a local expert" in section
    assert "5 problems drawn" in section
    assert "left for --moe-all: 1a4c6ba1 (seq_len 901), 58a34f27 (seq_len 11948), 5e8dc11c (seq_len 14107)" in section


def test_a_wrong_kernel_fails_by_named_checks_on_two_workers(project: Path) -> None:
    chosen = f"{PLAIN} or small-t16-o0 or swiglu or permutation"
    done = judge(project, "swapped.py:run", chosen, "-n", "2", "--junitxml", "wrong.xml")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 workers" in done.stdout and "3 failed, 2 passed" in done.stdout
    found = outcomes(project / "wrong.xml")
    outcome, properties, message = found["test_golden[small-t16-o0-iid-model_like-s0]"]
    assert outcome == "failure" and "noise_rows" in properties["failed"].split(", ")
    assert float(properties["noise_z"]) > 100 and "active tokens lie outside of what recipe" in message
    outcome, properties, message = found["test_readout[swiglu]"]
    assert outcome == "failure" and properties["suspects"].startswith("swiglu") and "up and gate are swapped" in message
    assert found["test_law[permutation]"][0] == "passed"  # a swap keeps every relation between tokens
    # the controller counts what both workers did
    section = done.stdout.partition("moeref: swapped.py:run on cpu")[2]
    assert "laws                     1             -" in section
    assert "readouts                 1             1" in section
    assert "golden                   -             2" in section
    # the sentence, not our frames; and commands that repeat it
    assert "Traceback" not in done.stdout and "session.py" not in done.stdout and "items.py" not in done.stdout
    problem = "e16l4h384i384k4g4t2-t24-o4-iid-model_like-s0"
    assert f"repeat: moeref verify swapped.py:run --problem {problem} --diagnose" in done.stdout
    # once with the failure and, where pytest takes the environment for a CI's, once more in its short summary
    (again,) = {line for line in done.stdout.splitlines() if line.startswith("in pytest:") and "[swiglu]" in line}
    words = shlex.split(again.removeprefix("in pytest:"))
    assert words[0] == "pytest"
    alone = run_pytest(project, *words[1:])
    assert alone.returncode == 1 and "1 failed in" in alone.stdout, alone.stdout + alone.stderr


def test_what_can_not_run_is_a_skip_and_alone_no_success(project: Path) -> None:
    done = judge(project, "fixed.py:run", f"split or {PLAIN} or fuzz or swiglu_zero", "-v")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    assert "4 skipped" in done.stdout
    assert "nothing could be judged" in done.stdout
    assert "takes no n_group, topk_group and top_k" in done.stdout and "--moe-geometry dsv3" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_require_gpu_fails_without_one(project: Path) -> None:
    done = judge(project, "my_kernel.py:run", "split", "--require-gpu")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout + done.stderr
    assert "--require-gpu: this machine has no CUDA device, nothing was run" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--pyargs", SUITE], "none was named: pass --moe-candidate path/to/my_kernel.py:run"),
        ([str(ROOT / "moeref" / "testing" / "suite")], "none was named: pass --moe-candidate"),
        (["--moe-candidate", "my_kernle.py:run"], "no file my_kernle.py"),
        (["--moe-candidate", "my_kernel.py", "--moe-geometry", "x"], "unknown geometry 'x'"),
        (["--moe-candidate", "my_kernel.py", "--moe-values", "x"], "--moe-values x: expected one of published"),
        (["--moe-candidate", "my_kernel.py", "--moe-examples", "0"], "--moe-examples: expected 1 or more"),
        (["--moe-candidate", "my_kernel.py", "--moe-device", "cpu", "--require-gpu"], "exclude each other"),
        (["--moe-candidate", "my_kernel.py", "--moe-device", "tpu"], "expected auto, cpu, cuda or cuda:N"),
    ],
    ids=["none", "path", "file", "geometry", "values", "examples", "gpu", "device"],
)
def test_wrong_use_is_one_sentence(project: Path, words: list[str], sentence: str) -> None:
    done = run_pytest(project, "-p", plugin.PLUGIN, *words)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_without_the_plugin_the_suite_says_so(project: Path) -> None:
    done = run_pytest(project, "-p", f"no:{plugin.PLUGIN}", "--pyargs", SUITE)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"{SUITE} needs its plugin: install moeref, or pass -p {plugin.PLUGIN}" in done.stderr


def test_a_project_that_does_not_use_it_does_not_notice_it(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(OWN_TEST)
    (tmp_path / "conftest.py").write_text(OWN_CONFTEST)
    done = run_pytest(tmp_path, "-p", plugin.PLUGIN, "-W", "error")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert "moeref:" not in done.stdout


def test_an_installed_moeref_registers_it_under_its_module_name() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert declared == {plugin.PLUGIN: plugin.PLUGIN}


class Worker(SimpleNamespace):
    """A pytest.Config as far as device_of looks."""

    def getoption(self, name: str) -> Any:
        return self.device


@pytest.mark.parametrize(
    ("device", "worker", "expected"),
    [
        ("auto", "gw0", "cuda"),
        ("auto", "gw1", "cuda:1"),
        ("auto", "gw2", "cuda:0"),
        ("cuda", "gw5", "cuda:1"),
        ("cuda:1", "gw2", "cuda:1"),
        ("cpu", "gw3", "cpu"),
    ],
)
def test_each_worker_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, device: str, worker: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config: Any = Worker(device=device, workerinput={"workerid": worker})
    assert items.device_of(config) == expected
    with pytest.raises(SpecError, match="--moe-device cuda:2: this machine has 2 CUDA devices"):
        usable_device("cuda:2", "--moe-device")


@pytest.mark.parametrize(
    ("status", "gpu_required", "outcome"),
    [
        ("PASS", True, None),
        ("FAIL", False, pytest.fail.Exception),
        ("ERROR", False, pytest.fail.Exception),
        ("UNSUPPORTED", False, pytest.skip.Exception),
        ("UNSUPPORTED", True, pytest.fail.Exception),
        ("INCONCLUSIVE", False, pytest.skip.Exception),
        ("INCONCLUSIVE", True, pytest.skip.Exception),  # of the problem, not of the machine
    ],
)
def test_what_a_status_becomes(
    status: str, gpu_required: bool, outcome: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "again", lambda item: "pytest ...")
    stub: Any = SimpleNamespace()
    result = Result(status, "said why; --timeout sets the limit", "moeref verify ...")
    if outcome is None:
        items.conclude(result, stub, gpu_required)
        return
    with pytest.raises(outcome, match="said why") as caught:
        items.conclude(result, stub, gpu_required)
    if status == "ERROR":
        assert "--moe-timeout sets the limit" in str(caught.value)  # as the option is called here
    assert ("repeat: moeref verify ..." in str(caught.value)) == (outcome is pytest.fail.Exception)


def test_an_error_shows_the_frames_of_the_candidate_alone(project: Path) -> None:
    problem = Problem.parse(PLAIN)
    with Session(str(project / "raises.py"), Options(isolate=False)) as session:
        result = session.problem(PLAIN, problem)
        law = session.law("split")
    for one in (result, law):
        assert one.status == "ERROR" and "no tile of 17 rows" in one.text
        assert "in helper" in one.details and "interop" not in one.details


@pytest.mark.parametrize("ask", [lambda s: s.law("split"), lambda s: s.readout("scales", "gemm2_scale_map")])
def test_the_real_geometry_needs_no_routing_groups(project: Path, ask: Callable[[Session], Result]) -> None:
    small = Problem.parse("e32l4h256i128k8g8t4-t8-o4-iid-model_like-s0").geometry  # dsv3's groups, small sizes
    with Session(str(project / "fixed.py"), Options(isolate=False), small) as session:
        assert ask(session).status == "PASS"
