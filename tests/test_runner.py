"""Candidates that end or block their process or can't be loaded: each gets a clear record, the next problem runs."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runner_candidates import NAME, TEN, Case, case_in

from moe_fast.backends import backends
from moeref.interop.candidates import CandidateError
from moeref.interop.child import TAIL_LINES
from moeref.interop.runner import Runner
from moeref.interop.shared_inputs import OutputWriter, Place, SharedFile, SharedInputs, open_shared, written_to
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.spec import PRESETS, Problem


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with case_in(tmp_path_factory.mktemp("candidates") / "mine.py") as case:
        yield case


def test_one_process_serves_many_problems_and_reads_shared_inputs() -> None:
    with Runner("torch_grouped") as runner:
        for name in (NAME, "small-t0-o8-iid-model_like-s0", "small_kimi-t40-o22-ties-heterogeneous-s0"):
            with SharedInputs() as shared:
                inputs = make_inputs(Problem.parse(name), allocate=shared.allocate)
                run = runner.run(shared.describe(inputs))
            assert (run.status, run.recipe, run.deterministic, run.poisoned) == ("ok", "exact", True, True), run.message
            first, second = run.outputs
            assert torch.equal(first.view(torch.int16), second.view(torch.int16))
            assert first.shape == (inputs.seq_len, 256)
            assert torch.allclose(first.float(), moe(inputs).output.float(), rtol=0.02, atol=1e-3)


def test_moe_fast_stands_for_its_pick() -> None:
    with Runner("moe_fast", isolate=False) as runner:
        run = runner.run(make_inputs(Problem.parse(NAME)))
    assert (run.status, run.recipe, run.deterministic) == ("ok", "exact", True)


# the process ends with each of these, and another serves the next
DEADLY = {
    "os_exits": "call 1: its process ended with exit code 7",
    "segfaults": r"call 1: its process was ended by SIGSEGV \(segmentation fault\)",
    "kills": r"call 1: its process was ended by SIGKILL .*out of memory",
    "hangs": "call 1: no end after 1 s; its process was killed. --timeout sets the limit",
    "hangs_printing": "call 1: no end after 1 s",
    "closes_everything": "call 1: (it closed the pipe|no end after)",
    "forks": "exit code 7",
}


@pytest.mark.parametrize("function", DEADLY)
def test_what_only_a_process_can_survive(case: Case, function: str) -> None:
    assert case.there("wrong_shape").status == "ok"  # the first call in a process has more time
    start = time.monotonic()
    run = case.there(function)
    assert run.status == "error" and re.search(DEADLY[function], run.message), run.message
    assert time.monotonic() - start < 10
    if function == "segfaults":
        assert "Segmentation fault" in run.traceback and "in segfaults" in run.traceback  # faulthandler's
    assert len(run.printed.splitlines()) <= TAIL_LINES


def test_prints_stay_off_the_results_and_the_last_lines_are_kept(case: Case) -> None:
    run = case.there("prints")
    assert run.message.startswith("call 1: raised RuntimeError: after printing")
    lines = run.printed.splitlines()
    assert len(lines) == TAIL_LINES and lines[-2:] == ["line 199999", "to stderr"] and run.printed in run.traceback


@pytest.mark.parametrize("function", ["threads", "closes", "wrong_shape"])
def test_harmless_habits(case: Case, function: str) -> None:
    run = case.there(function)
    assert run.status == "ok", run.message


def test_children_end_with_the_worker(case: Case) -> None:
    with Runner(f"{case.file}:children") as runner:
        child = int(re.findall(r"child (\d+)", runner.run(case.inputs).message)[0])
        os.kill(child, 0)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(child):
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
def test_the_worker_ends_when_its_parent_dies(case: Case) -> None:
    code = (
        "import os\nfrom moeref.interop.runner import Runner\n"
        f"runner = Runner({str(case.file) + ':hangs'!r})\nrunner.__enter__()\n"
        "runner._worker.receive(60)\nprint(runner._worker._process.pid, flush=True)\nos._exit(0)\n"
    )
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path}
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def test_an_unsupported_candidate_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "needs 9 GPUs"
    broken = replace(backends()["reference"], unsupported=lambda geometry, device: reason)
    monkeypatch.setattr("moe_fast.backends.backends", lambda: {"reference": broken})
    with Runner("reference", isolate=False) as runner:
        run = runner.run(make_inputs(Problem.parse(NAME)))
    assert (run.status, run.message, run.outputs) == ("unsupported", reason, [])


@pytest.mark.parametrize("isolate", [True, False])
def test_a_file_that_cannot_be_imported_is_an_error_each_time(tmp_path: Path, case: Case, isolate: bool) -> None:
    file = tmp_path / "bad.py"
    file.write_text("print('before')\n1 / 0\n")
    with Runner(f"{file}:run", isolate=isolate) as runner:
        for _ in range(2):
            run = runner.run(case.inputs)
            assert run.status == "error" and "can't be imported: ZeroDivisionError" in run.message
            assert "Traceback" in run.traceback and (not isolate or run.printed == "before")


def test_a_file_that_ends_its_process_while_imported(tmp_path: Path, case: Case) -> None:
    file = tmp_path / "bad.py"
    file.write_text("import os\nos._exit(0)\n")
    with Runner(f"{file}:run") as runner:
        for _ in range(2):  # the second time at once: it would end again
            run = runner.run(case.inputs)
            assert run.message.startswith("importing the candidate: its process ended with exit code 0")


def test_a_candidate_that_does_not_exist(tmp_path: Path, case: Case) -> None:
    with pytest.raises(CandidateError, match="unknown candidate 'odd'"), Runner("odd"):
        pass
    with pytest.raises(CandidateError, match=r"no function 'rite'; did you mean right.*\?; found"):
        case.here("rite")
    with Runner(f"{case.file}:rite") as runner, pytest.raises(CandidateError, match=r"did you mean right"):
        runner.run(case.inputs)


def test_shared_memory_is_private_to_the_reader_and_knows_what_was_written() -> None:
    with SharedInputs() as shared:
        inputs = make_inputs(Problem(PRESETS["dsv3"], 0, 0, "iid", "model_like", 0), allocate=shared.allocate)
        opened = open_shared(shared.describe(inputs))
        assert opened.inputs.gemm1_weights.nbytes == 32 * 4096 * 7168  # mapped, never touched
        if Path("/proc/self/smaps").exists():
            assert written_to(opened.inputs.tensors()) == set()
            opened.inputs.gemm2_weights.view(torch.uint8)[31, -1, -1] = 1
            assert written_to(opened.inputs.tensors()) == {"gemm2_weights"}
            assert not inputs.gemm2_weights.view(torch.uint8)[31, -1, -1]
            assert not opened.pristine.gemm2_weights.view(torch.uint8)[31, -1, -1]


def test_tensors_pass_through_a_file() -> None:
    file = SharedFile()
    writer = OutputWriter(file.path)
    tensors = [torch.randn(5, 7), torch.zeros(0, 3), torch.arange(6).view(2, 3).T, torch.tensor(2.0)]
    kept = [writer.keep(tensor) for tensor in tensors]
    writer.note(torch.zeros(4, 2, dtype=torch.int8))
    read = [Place.from_json(place.to_json()).open(mmap.ACCESS_COPY) for place in writer.places]
    file.close()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(tensors, kept, read[:-1], strict=True))
    assert (read[-1].shape, read[-1].dtype) == ((4, 2), torch.int8)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_worker_survives_its_candidates(case: Case) -> None:
    file = case.file.parent / "on_gpu.py"
    file.write_text(
        f"""
import torch

def run({TEN}):
    assert x.device == torch.device("cuda", torch.cuda.current_device()), x.device
    if factor == 1: w2.view(torch.uint8)[0, 0, 0] ^= 1
    if factor == 2: return torch.zeros(x.shape, dtype=torch.bfloat16)
    if factor == 3: return torch.empty(1 << 45, device="cuda")
    if factor == 4:
        torch.arange(10, device="cuda")[torch.full((9,), 1 << 20, device="cuda")]  # a device-side assertion
        torch.cuda.synchronize()
    return torch.zeros(x.shape, dtype=torch.bfloat16, device="cuda")
"""
    )
    last = f"cuda:{torch.cuda.device_count() - 1}"
    with Runner(str(file), device=last) as runner:
        runs = [runner.run(replace(case.inputs, routed_scaling_factor=float(i))) for i in (0, 1, 2, 3, 4, 0)]
    assert [run.status for run in runs] == ["ok", "ok", "error", "error", "error", "ok"], [r.message for r in runs]
    assert [run.changed_inputs for run in runs[:2]] == [[], ["gemm2_weights"]]
    assert "returned a tensor on cpu, expected" in runs[2].message and "ran out of memory" in runs[3].message
    assert not runs[0].outputs[0].is_cuda


@pytest.mark.gpu
@needs_gpu
def test_torch_grouped_on_a_gpu() -> None:
    inputs = make_inputs(Problem.parse("small-t64-o8-deepseek_like-heterogeneous-s1"))
    with Runner("torch_grouped", device="cuda") as runner:
        run = runner.run(inputs)
    assert run.status == "ok" and torch.equal(*run.outputs), run.message
    assert torch.allclose(run.outputs[0].float(), moe(inputs).output.float(), rtol=0.02, atol=1e-3)
