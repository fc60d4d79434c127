"""The command line as a user meets it: exit codes, messages, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_fast.backends import backends
from moeref.spec import PRESETS

WRONG = Path(__file__).parent / "wrong"
ONE = "small-t16-o8-iid-model_like-s0"


def moeref(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moeref", *words], capture_output=True, text=True, timeout=300)


def test_a_right_candidate_exits_0_and_writes_json(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    done = moeref("verify", "torch_grouped", "--problem", ONE, "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 PASS" in done.stdout and "really tested" in done.stdout
    data = json.loads(target.read_text())
    outcome = data["outcomes"][0]
    assert (outcome["problem"], outcome["status"], outcome["recipe"]) == (ONE, "PASS", "exact")
    assert outcome["figures"]["matched"]["published"] == 1.0
    assert {"form", "finite", "idle_rows", "matched_ratio", "noise_rows"} <= {c["name"] for c in outcome["checks"]}


def test_a_wrong_candidate_exits_1_and_prints_its_repeat_command() -> None:
    candidate = f"{WRONG / 'gate_up_swapped.py'}:run"
    done = moeref("verify", candidate, "--problem", ONE)
    assert done.returncode == 1
    assert "FAIL" in done.stdout and "noise_rows" in done.stdout
    assert f"--problem {ONE}" in done.stdout and "repeat: moeref verify" in done.stdout


def test_the_matched_ratio_alone_passes_a_wrong_factor_and_says_what_it_missed() -> None:
    candidate = f"{WRONG / 'scaling_2_1.py'}:run"
    assert moeref("verify", candidate, "--problem", ONE).returncode == 1
    done = moeref("verify", candidate, "--problem", ONE, "--criterion", "matched-ratio")
    assert done.returncode == 0
    assert "does not see" in done.stdout and "noise_rows" in done.stdout


def test_nothing_tested_is_not_a_pass() -> None:
    done = moeref("verify", "torch_grouped", "--problem", "small-t4-o8-no_local_work-model_like-s0")
    assert done.returncode == 3 and "INCONCLUSIVE" in done.stdout
    done = moeref("verify", "torch_grouped", "--problem", "small-t0-o8-iid-model_like-s0")
    assert done.returncode == 3 and "no token" in done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["verify", "--problem", "nonsense"], "expected GEOMETRY-tT-oOFFSET"),
        (["verify", "--problem", "small-t4-o8-odd-model_like-s0"], "unknown routing kind 'odd'"),
        (["verify", "--problem", "small-t4-o8-iid-odd-s0"], "unknown value kind 'odd'"),
        (["verify", "--problem", "small-t4-o99-iid-model_like-s0"], "offset=99"),
        (["verify", "--workloads", "zzz"], "expected the start of one of"),
        (["verify", "--small", "--all"], "exclude each other"),
        (["verify", "--recipe", "odd", "--problem", ONE], "unknown recipe 'odd'"),
        (["verify", "--preset", "odd", "--problem", ONE], "unknown preset 'odd'"),
        (["verify", "--criterion", "odd"], "expected all or matched-ratio"),
        (["verify", "--device", "tpu", "--problem", ONE], "expected auto, cpu, cuda"),
        (["verify", "--device", "cuda:99", "--problem", ONE], "CUDA devices"),
        (["verify", "--trials", "0", "--problem", ONE], "expected at least 1"),
        (["verify", "--json", "/nowhere/at/all.json"], "does not exist"),
        (["verify", "no_such_candidate", "--problem", ONE], "no_such_candidate"),
        (["verify", "no_such_file.py:run", "--problem", ONE], "no_such_file.py"),
        (["show", "nonsense"], "expected GEOMETRY-tT-oOFFSET"),
    ],
)
def test_wrong_usage_exits_2_with_one_message(words: list[str], text: str) -> None:
    done = moeref(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert text in done.stderr and "Traceback" not in done.stderr + done.stdout


def test_show_and_backends() -> None:
    done = moeref("show", "1a4c")
    assert done.returncode == 0
    assert "[901, 7168]" in done.stdout and "experts hit" in done.stdout and "FLOPs" in done.stdout
    stated = backends()["hopper_cuda"].workspace
    assert stated is not None
    assert "bytes of workspace" in done.stdout and f"hopper_cuda {stated(PRESETS['dsv3'], 901):,}" in done.stdout
    done = moeref("backends")
    assert done.returncode == 0 and "torch_grouped" in done.stdout and "ready" in done.stdout


@pytest.mark.parametrize(
    "words", [["--help"], ["backends"], ["show", "1a4c"], ["verify", "torch_grouped", "--problem", ONE]]
)
def test_a_reader_that_goes_away_ends_the_command_in_silence(words: list[str]) -> None:
    """As `moeref ... | head` does. What was cut off has not passed: exit code 1, as click's."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "moeref", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['moeref', 'verify', '--help']\n"
        "from moeref.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--workloads" in done.stdout, done.stderr
