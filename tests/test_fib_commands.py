"""`moeref fib` and `verify --routing-from` as a user meets them: exit codes, messages, commands that repeat."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fib_data import (
    DESTINATION,
    TEN,
    put_definition,
    put_routing,
    put_solution,
    put_workloads,
    solution_json,
    with_core,
    workload_json,
)
from typer.testing import CliRunner, Result

from moeref.cli import app
from moeref.interop.flashinfer_bench import capture_routing
from moeref.routings import ELSEWHERE

WRONG = Path(__file__).parent / "wrong"


def moeref(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_the_commands(tmp_path: Path) -> None:
    root = str(tmp_path / "data_set")
    done = moeref("fib", "export", "small-t6-o8-deepseek_like-published-s0", root, "--only-routing")
    assert done.exit_code == 0, done.output
    done = moeref("fib", "show", root)
    assert done.exit_code == 0 and "; small-t6-o8-captured_" in done.output
    done = moeref("fib", "verify", root)
    assert done.exit_code == 2 and "no MoE solutions of them: name one with --candidate" in done.output
    wrong = put_solution(tmp_path / "data_set", with_core("wrong", DESTINATION.replace("core(" + TEN, "-core(" + TEN)))
    traces, out = tmp_path / "traces.jsonl", tmp_path / "out.json"
    written = ("--traces", str(traces), "--json", str(out))
    done = moeref("fib", "verify", root, "--no-isolate", "--seed", "3", "--preset", "contest", *written)
    assert done.exit_code == 1 and "wrong: 0 of 1 PASS" in done.output
    assert len(traces.read_text().splitlines()) == len(json.loads(out.read_text())["outcomes"]) == 1
    command = next(line for line in done.output.splitlines() if "repeat: " in line).split("repeat: ")[1]
    assert "--seed 3 --preset contest --no-isolate" in command
    again = moeref(*shlex.split(command)[1:])
    assert again.exit_code == 1 and "wrong: 0 of 1 PASS" in again.output
    done = moeref("fib", "show", str(wrong))
    assert done.exit_code == 0 and "solution wrong by tester, python, destination-passing" in done.output
    done = moeref("fib", "verify", root, "--candidate", "torch_grouped", "--no-isolate")
    assert done.exit_code == 0 and "torch_grouped: 1 of 1 PASS" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--solution", "nobody"), "no solution 'nobody': there are wrong"),
        (("--workload", "ffff"), "no workload starts with 'ffff': there are aaaa1111"),
        (("--definition", "e999"), "no definition fits e999"),
        (("--candidate", "x", "--solution", "y"), "exclude each other"),
        (("--candidate", "no_such_candidate"), "unknown candidate"),
        (("--traces", "/no/such/folder/x.jsonl"), "the folder /no/such/folder does not exist"),
        (("--criterion", "most"), "expected all or matched-ratio"),
        (("--preset", "odd"), "unknown preset 'odd'"),
    ],
)
def test_wrong_usage_is_one_sentence(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    put_definition(tmp_path)
    put_workloads(tmp_path, workload_json("aaaa1111"))
    put_solution(tmp_path, solution_json("wrong"))
    done = moeref("fib", "verify", str(tmp_path), *words)
    assert done.exit_code == 2 and said in done.output and len(done.output.splitlines()) == 1


def test_the_problem_of_captured_routing_repeats_from_a_command(tmp_path: Path) -> None:
    put_definition(tmp_path)
    put_workloads(tmp_path, workload_json("aaaa1111", inputs=put_routing(tmp_path)))
    (name,) = capture_routing(tmp_path)
    words = ("verify", f"{WRONG / 'gate_up_swapped.py'}:run", "--problem", f"small-t6-o8-{name}-published-s0")
    del ELSEWHERE[name]
    done = moeref(*words, "--no-isolate")
    assert done.exit_code == 2 and "--routing-from" in done.output
    done = moeref(*words, "--routing-from", str(tmp_path), "--no-isolate")
    assert done.exit_code == 1 and f"--routing-from {tmp_path}" in done.output
    command = next(line for line in done.output.splitlines() if "repeat: " in line).split("repeat: ")[1]
    fresh = subprocess.run([sys.executable, "-m", *shlex.split(command)], capture_output=True, text=True, timeout=300)
    assert fresh.returncode == 1 and "0 of 1 PASS (1 FAIL)" in fresh.stdout
