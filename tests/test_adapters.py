"""Adapters over stand-ins: every variant passes `verify` on a CPU, wrong libraries fail, needs are one sentence."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import candidates
from stand_ins import flashinfer as flashinfer_stand_in
from stand_ins import sgl_kernel as sglang_stand_in

from moe_fast.backends import Backend, backends, sglang_triton
from moe_fast.backends import candidates as named
from moe_fast.backends._adapter import KeptBuffers, Needs, Prepared, backend, chooser
from moe_fast.target import Target
from moeref.interop.candidates import Unsupported
from moeref.make import make_inputs
from moeref.spec import PRESETS, Problem
from moeref.suites import small_suite
from moeref.verify import Options, verify

FILE = Path(candidates.__file__)
IN_PROCESS = Options(isolate=False)
BASES = ("flashinfer_trtllm", "flashinfer_cutlass", "sglang_blockwise", "sglang_triton", "deep_gemm")
FEW = (
    "small-t33-o0-iid-model_like-s0",
    "small-t16-o8-iid-published-s0",
    "small-t80-o16-skewed-model_like-s0",
    "small_kimi-t33-o12-iid-heterogeneous-s0",
)


def outcomes(name: str, problems: list[str]) -> dict[str, tuple[str, str]]:
    """Problem -> (status, text)."""
    asked = [(problem, Problem.parse(problem)) for problem in problems]
    found = verify(f"{FILE}:{name}", asked, IN_PROCESS)
    return {one.label: (one.verdict.status, one.verdict.message) for one in found}


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_passes_the_small_suite_over_its_stand_in(name: str) -> None:
    found = outcomes(name, [problem.name for problem in small_suite()])
    nothing_to_test = {problem for problem in found if "-t0-" in problem or "no_local_work" in problem}
    for problem, (status, text) in found.items():
        offset = Problem.parse(problem).offset
        inside = (
            0
            <= offset
            <= Problem.parse(problem).geometry.num_experts - Problem.parse(problem).geometry.num_local_experts
        )
        if name.startswith("flashinfer") and not inside:
            assert status == "UNSUPPORTED" and "offset" in text, (problem, status, text)
        else:
            assert status == ("INCONCLUSIVE" if problem in nothing_to_test else "PASS"), (problem, status, text)


@pytest.mark.parametrize("name", [name for name in candidates.VARIANTS if name not in BASES])
def test_every_other_variant_passes_too(name: str) -> None:
    assert {status for status, _ in outcomes(name, list(FEW)).values()} == {"PASS"}


def gate_up_swapped(library: SimpleNamespace) -> None:
    """Whatever multiplies silu(gate) by up takes the halves the other way round."""
    if hasattr(library, "silu_and_mul"):
        right = library.silu_and_mul
        library.silu_and_mul = lambda x, out: right(x.roll(x.shape[1] // 2, dims=1), out)
    for name, first in (("trtllm_fp8_block_scale_moe", 4), ("cutlass_fused_moe", 3)):
        if hasattr(library, name):
            setattr(library, name, halves_exchanged(getattr(library, name), first))
    if hasattr(library, "contiguous"):
        right_gemm = library.contiguous

        def contiguous(a: Any, b: Any, d: torch.Tensor, layout: torch.Tensor) -> None:
            right_gemm(a, b, d, layout)
            if b[0].shape[1] != a[0].shape[1] or d.shape[1] == 512:
                d.copy_(d.roll(d.shape[1] // 2, dims=1))

        library.contiguous = contiguous


def halves_exchanged(function: Callable[..., Any], argument: int) -> Callable[..., Any]:
    """The function with gemm1's rows, its positional argument of that number, exchanged."""

    def call(*args: Any, **kwargs: Any) -> Any:
        weight = args[argument]
        swapped = weight.view(torch.uint8).roll(weight.shape[1] // 2, dims=1).view(weight.dtype)
        return function(*args[:argument], swapped, *args[argument + 1 :], **kwargs)

    return call


def ids_taken_as_local(library: SimpleNamespace) -> None:
    """Ids or rows of the wrong kind: global ids where local ones are wanted, or the other way round."""
    if hasattr(library, "cutlass_fused_moe"):
        fused = library.cutlass_fused_moe
        library.cutlass_fused_moe = lambda *args, ep_rank, **kwargs: fused(*args, ep_rank=0, **kwargs)
        whole = library.trtllm_fp8_block_scale_moe
        library.trtllm_fp8_block_scale_moe = lambda *args, **kwargs: whole(*args[:13], 0, *args[14:], **kwargs)
    for name in ("prepare_moe_input", "moe_align_block_size"):
        if hasattr(library, name):
            setattr(library, name, next_expert(getattr(library, name)))
    if hasattr(library, "contiguous"):
        right = library.contiguous
        library.contiguous = lambda a, b, d, layout: right(
            a, b, d, torch.where(layout >= 0, (layout + 1) % len(b[0]), -1)
        )


def next_expert(function: Callable[..., None]) -> Callable[..., None]:
    """The function with every local id taken for the one after."""

    def call(ids: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        function(torch.where(ids >= 0, (ids + 1) % 8, -1).to(torch.int32), *args, **kwargs)

    return call


@pytest.mark.parametrize("wrong", [gate_up_swapped, ids_taken_as_local])
@pytest.mark.parametrize("name", BASES)
def test_a_wrong_library_fails(
    name: str, wrong: Callable[[SimpleNamespace], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = candidates.LIBRARIES[candidates.VARIANTS[name][0]]()
    wrong(library)
    monkeypatch.setattr(candidates, name, candidates.over(name, library))
    asked = [("one", Problem.parse(FEW[1]))]
    (outcome,) = verify(f"stand_ins.candidates:{name}", asked, IN_PROCESS)
    assert outcome.verdict.status == "FAIL", outcome.verdict


def test_variants_differ_in_what_they_ask_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace, the swap, the quantisation and the buffers are what each variant says."""
    seen: dict[str, list[Any]] = {}
    for name in (name for name in candidates.VARIANTS if name.startswith("sglang_blockwise")):
        library = sglang_stand_in.library()
        right, quantise = library.fp8_blockwise_scaled_grouped_mm, library.sgl_per_token_group_quant_8bit
        log: list[Any] = []
        library.fp8_blockwise_scaled_grouped_mm = lambda *args, log=log, right=right: (
            log.append((args[-1].numel(), args[0].data_ptr())) or right(*args)
        )
        library.sgl_per_token_group_quant_8bit = lambda *args, log=log, quantise=quantise, **kwargs: (
            log.append("quantised") or quantise(*args, **kwargs)
        )
        inputs = make_inputs(Problem.parse(FEW[0]))
        run = candidates.over(name, library)
        kept = [run(*inputs.args(), n_group=4, topk_group=2, top_k=4) for _ in range(2)]
        assert torch.equal(*kept)
        seen[name] = log
    sizes = {name: {entry[0] for entry in log if isinstance(entry, tuple)} for name, log in seen.items()}
    assert sizes["sglang_blockwise"] == sizes["sglang_blockwise_quant"] == {1 << 30}
    assert sizes["sglang_blockwise_workspace"] == sizes["sglang_blockwise_improved"] == {90_000}
    quantised = {name: log.count("quantised") for name, log in seen.items()}
    assert quantised["sglang_blockwise"] == quantised["sglang_blockwise_swap"] == 0
    assert quantised["sglang_blockwise_quant"] == quantised["sglang_blockwise_buffers"] == 2
    assert quantised["sglang_blockwise_improved"] == 0
    outputs = [entry[1] for entry in seen["sglang_blockwise_buffers"] if isinstance(entry, tuple)]
    assert outputs[:2] == outputs[2:]


def test_the_old_gate_gives_the_same_and_says_what_it_does_not_know() -> None:
    library = sglang_stand_in.library(old_gate=True)
    library.moe_fused_gate = sglang_stand_in.moe_fused_gate_old
    old, new = candidates.over("sglang_blockwise_swap", library), candidates.over("sglang_blockwise_swap")
    inputs = make_inputs(Problem.parse(FEW[0]))
    groups = {"n_group": 4, "topk_group": 2, "top_k": 4}
    assert torch.equal(old(*inputs.args(), **groups), new(*inputs.args(), **groups))
    with pytest.raises(Unsupported, match="got 24 in 1 groups: install sglang-kernel"):
        old(*make_inputs(Problem.parse(FEW[3])).args(), n_group=1, topk_group=1, top_k=4)


def test_tuning_is_asked_for_at_the_first_call_of_a_size() -> None:
    asked: list[bool] = []
    library = flashinfer_stand_in.library()
    tune = library.autotune
    library.autotune = lambda mode: asked.append(mode) or tune(mode)
    run = candidates.over("flashinfer_trtllm_tuned", library)
    for problem in (FEW[0], FEW[0], FEW[1]):
        run(*make_inputs(Problem.parse(problem)).args(), n_group=4, topk_group=2, top_k=4)
    assert asked == [True, False, True]


def on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], modules: tuple[str, ...] = ()) -> None:
    """Pretend that the CUDA device is of that capability and that only these modules are installed."""
    card = Target("cuda", "Card", capability, 132, 80 << 30, "3.6.0")
    monkeypatch.setattr("moe_fast.backends._adapter.target_of", lambda device: card)
    monkeypatch.setattr("moe_fast.backends._adapter.has_module", lambda name: name in modules)


CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", list(candidates.VARIANTS))
def test_each_need_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = backends()[name]
    reason = one.unsupported(PRESETS["dsv3"], torch.device("cpu"))
    assert reason is not None and reason.startswith("needs a ") and reason.endswith("this is a CPU")
    assert one.priority < min(backends()[other].priority for other in ("reference", "torch_grouped"))
    on(monkeypatch, (8, 0))
    assert str(one.unsupported(PRESETS["dsv3"], CUDA)).endswith(": Card is 8.0")
    right = (10, 0) if "trtllm" in name else (9, 0)
    on(monkeypatch, right)
    assert "pip install 'moeref[" in str(one.unsupported(PRESETS["dsv3"], CUDA))


def test_a_geometry_beyond_the_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, (9, 0), ("flashinfer",))
    cutlass = backends()["flashinfer_cutlass"]
    assert "at most 8 experts" in str(cutlass.unsupported(replace(PRESETS["dsv3"], top_k=9), CUDA))
    assert "at most 384" in str(cutlass.unsupported(replace(PRESETS["kimi"], num_experts=480), CUDA))
    assert "32 groups of 32" in str(cutlass.unsupported(replace(PRESETS["dsv3"], n_group=4, topk_group=2), CUDA))
    assert "must divide" in str(cutlass.unsupported(replace(PRESETS["dsv3"], num_local_experts=31), CUDA))
    on(monkeypatch, (10, 0), ("flashinfer",))
    trtllm = backends()["flashinfer_trtllm"]
    assert "at most 8 of 256" in str(trtllm.unsupported(replace(PRESETS["dsv3"], top_k=9), CUDA))
    assert "at most 4 groups" in str(trtllm.unsupported(replace(PRESETS["dsv3"], topk_group=5), CUDA))
    assert "must have a choice" in str(trtllm.unsupported(replace(PRESETS["small"], topk_group=1, top_k=8), CUDA))


def test_a_library_that_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> SimpleNamespace:
        raise ImportError("libcudart.so.12:\ncannot open")

    on(monkeypatch, (9, 0), ("somewhere",))
    one = backend("one", load, lambda *_: None, "requant", Needs(("somewhere",), "", (9,)), "")
    reason = one.unsupported(PRESETS["dsv3"], CUDA)
    assert reason == "its library is installed but can't be used: ImportError: libcudart.so.12: cannot open"


def stub(name: str, reason: str | None) -> Backend:
    """A backend that fills its output with its name's length."""

    def run(*ten: Any, out: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        return torch.full(ten[2].shape, float(len(name)), dtype=torch.bfloat16)

    return Backend(name, run, "requant", False, lambda geometry, device: reason, -1, name)


def test_a_chooser_takes_the_first_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Problem.parse(FEW[0]))
    groups = {"n_group": 4, "topk_group": 2, "top_k": 4}
    one = chooser("either", (stub("abc", "no card"), stub("abcd", None)), "either of two")
    assert one.unsupported(PRESETS["small"], inputs.device) is None
    assert float(one.run(*inputs.args(), **groups)[0, 0]) == 4
    none = chooser("neither", (stub("abc", "no card"), stub("abcd", "no luck")), "")
    assert none.unsupported(PRESETS["small"], inputs.device) == "abc: no card; abcd: no luck"
    with pytest.raises(Unsupported, match="no luck"):
        none.run(*inputs.args(), **groups)
    monkeypatch.setattr("moe_fast.backends.backends", lambda: {"either": one})
    resolve = named()["either"].resolve
    assert resolve is not None
    resolved = resolve(PRESETS["small"], inputs.device)
    assert (resolved.name, resolved.recipe, resolved.summary) == ("either", "requant", "either of two; here abcd")


@pytest.mark.parametrize(("name", "choices"), [
    ("flashinfer", ("flashinfer_trtllm", "flashinfer_cutlass")), ("sglang", ("sglang_blockwise", "sglang_triton")),
])  # fmt: skip
def test_flashinfer_and_sglang_choose(name: str, choices: tuple[str, ...]) -> None:
    assert tuple(one.name for one in backends()[name].choices) == choices
    assert "this is a CPU" in str(backends()[name].unsupported(PRESETS["dsv3"], torch.device("cpu")))


def test_a_layout_is_made_once_and_again_when_the_weights_change() -> None:
    made: list[int] = []
    prepared = Prepared(lambda weight: made.append(1) or weight.clone())
    weight = torch.arange(4.0)
    assert torch.equal(prepared(weight), weight) and torch.equal(prepared(weight.detach()), weight)
    assert len(made) == 1
    weight[1:2].mul_(3.0)  # through a view
    assert torch.equal(prepared(weight), weight) and len(made) == 2
    assert torch.equal(prepared(weight[1:]), weight[1:]) and len(made) == 3  # another tensor on the same memory
    for _ in range(20):  # memory that is freed and taken again at the same address
        other = torch.full((4,), float(len(made)))
        assert torch.equal(prepared(other), other)
        del other
        gc.collect()
    assert len(made) == 23 and len(prepared._kept) <= 4
    with torch.inference_mode():
        weight = torch.ones(2)
        assert prepared(weight) is not prepared(weight)


def test_buffers_are_kept_for_the_last_size() -> None:
    buffers = KeptBuffers(lambda device, size: torch.empty(size))
    cpu = torch.device("cpu")
    first = buffers(cpu, 3)
    assert buffers(cpu, 3) is first and buffers(cpu, 4) is not first and buffers(cpu, 3) is not first


def test_sglangs_shipped_table_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ships no table"):
        sglang_triton.shipped_table(tmp_path)
    for version, rows in (("3_4_0", 16), ("3_5_1", 32)):
        folder = tmp_path / "srt/layers/moe/moe_runner/triton_utils/configs" / f"triton_{version}"
        folder.mkdir(parents=True)
        (folder / sglang_triton.TABLE).write_text(f'{{"1": {{"BLOCK_SIZE_M": {rows}}}}}')
    assert sglang_triton.shipped_table(tmp_path) == {1: {"BLOCK_SIZE_M": 32}}
