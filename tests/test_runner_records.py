"""What the runner records of a candidate's calls: errors, what is no result, inputs touched, rows never written."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from runner_candidates import Case, case_in

from moeref.interop import observe
from moeref.reference import moe


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with case_in(tmp_path_factory.mktemp("candidates") / "mine.py") as case:
        yield case


@pytest.mark.parametrize("function", ["right", "right_out"])
def test_a_right_candidate(case: Case, function: str) -> None:
    run = case.here(function, trials=2)
    assert (run.status, run.message, run.poisoned) == ("ok", "", function == "right_out")
    expected = moe(case.inputs).output
    assert len(run.outputs) == len(run.seconds) == 4
    assert all(torch.equal(output, expected) and output.dtype == torch.bfloat16 for output in run.outputs)
    assert not (run.changed_inputs or run.aliased_inputs or run.overwritten_result or run.notes)
    assert (run.recipe, run.deterministic) == ("auto", False)


IN_PROCESS = {
    "raises": ("error", r"call 1: raised ValueError: this is mine \(.*mine.py, line \d+, in raises\)"),
    "exits": ("error", r"call 1: called sys.exit\(3\)"),
    "interrupts": ("error", "call 1: raised GeneratorExit"),
    "nothing": ("error", r"call 1: returned None, expected a bfloat16 tensor \[9, 256\] on cpu; .*'out'"),
    "number": ("error", "returned a builtins.float, expected a bfloat16 tensor"),
    "pair": ("error", "returned a builtins.tuple of Tensor, int, expected"),
    "array": ("error", "returned a numpy.ndarray, expected"),
    "sparse": ("error", "layout torch.sparse_coo"),
    "meta": ("error", "returned a tensor on meta, expected .* on cpu"),
    "too_few": ("error", "raised TypeError: too_few.* takes 2 positional arguments but 10 were given"),
    "memory": ("error", "ran out of memory|raised RuntimeError"),
    "wrong_shape": ("ok", ""),
    "enormous": ("ok", ""),
    "with_gradient": ("ok", ""),
}


@pytest.mark.parametrize("function", IN_PROCESS)
def test_what_python_can_survive(case: Case, function: str) -> None:
    status, message = IN_PROCESS[function]
    run = case.here(function)
    assert run.status == status, run.message
    assert re.search(message, run.message), run.message
    assert "Traceback" not in run.message and "\n" not in run.message
    assert ("Traceback" in run.traceback) == (status == "error")


@pytest.mark.parametrize("function", ["raises", "exits", "nothing", "wrong_shape", "enormous"])
def test_some_of_them_in_one_worker_too(case: Case, function: str) -> None:
    status, message = IN_PROCESS[function]
    run = case.there(function)
    assert run.status == status and re.search(message, run.message), run.message
    if function == "wrong_shape":
        assert (run.outputs[0].shape, run.outputs[0].dtype) == ((3, 5), torch.float64)
    if function == "enormous":  # shape and dtype alone
        assert [(one.shape, one.dtype) for one in run.outputs] == [((1 << 20, 1 << 20), torch.bfloat16)]


@pytest.mark.parametrize("where", ["here", "there"])
def test_inputs_that_are_written_to(case: Case, where: str) -> None:
    run = getattr(case, where)("mutates")
    assert run.status == "ok" and sorted(run.changed_inputs) == ["gemm1_weights", "routing_bias"]
    run = getattr(case, where)("mutates_nothing")
    assert run.status == "ok" and run.changed_inputs == []
    assert case.here("reshapes").changed_inputs == []


@pytest.mark.parametrize(("function", "name"), [("view", "gemm2_weights"), ("numpy_view", "hidden_states_scale")])
def test_a_view_of_an_input(case: Case, function: str, name: str) -> None:
    run = case.here(function)
    assert run.status == "ok" and run.aliased_inputs == [name], run.message


@pytest.mark.parametrize("function", ["static", "late"])
def test_a_result_that_a_later_call_touches(case: Case, function: str) -> None:
    assert case.here(function).overwritten_result


def test_notes(case: Case) -> None:
    assert "the buffer is judged" in case.here("ignores_out").notes[0]
    assert "not contiguous" in case.here("transposed").notes[0]
    run = case.here("trace")
    assert run.notes == ["returned a Trace: its output is judged"]
    assert torch.equal(run.outputs[0], moe(case.inputs).output)


def test_poison_shows_what_is_not_written(case: Case) -> None:
    run = case.here("keeps_poison")
    first, second = run.outputs
    assert run.poisoned and first[0].isnan().all() and bool((second[0] == 1e4).all()) and not first[1:].any()


def test_declarations_arrive(case: Case) -> None:
    run = case.here("random")
    assert (run.recipe, run.deterministic) == ("requant", True) and not torch.equal(*run.outputs)


def test_memory_running_out_is_said() -> None:
    errors = (
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("can't allocate memory: you tried"),
    )
    assert all(observe.is_out_of_memory(error) for error in errors)
    assert not observe.is_out_of_memory(ValueError("out of memory"))
