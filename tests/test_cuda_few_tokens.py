"""The one-launch kernel: its twin against the reference, its compilation, and on a GPU the kernel against its twin."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from test_cuda_build import disassembled

from moe_fast.kernels import cuda_few_tokens as few
from moe_fast.kernels.cuda_build import ARCH, compile_nvcc, source_text
from moe_fast.pipelines import hopper_few_tokens
from moeref.inputs import Inputs
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.spec import PRESETS, Geometry, Problem, Recipe

SMS = 132
FITTING = ("dsv3", "kimi", "kimi_full", "small", "small_kimi")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def groups(g: Geometry) -> tuple[int, int, int]:
    return g.top_k, g.n_group, g.topk_group


@pytest.mark.parametrize("offset", [8, -5, 20])
@pytest.mark.parametrize("preset", ["small", "small_kimi"])
def test_the_twin_is_the_reference_under_its_recipe(preset: str, offset: int) -> None:
    inputs = make_inputs(Problem.parse(f"{preset}-t8-o{offset}-iid-model_like-s0"))
    output = torch.full((8, inputs.geometry.hidden_size), torch.nan, dtype=torch.bfloat16)
    few.few_tokens_torch(*inputs.args(), output, *groups(inputs.geometry))
    want = moe(inputs, Recipe(requantize=1)).output
    # Both round to bf16 (2^-9 each); a value of SwiGLU at an e4m3 boundary may fall to either side in single rows.
    error = (output.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert float(error) < 2**-7
    assert bool(((output == 0).all(1) == (want == 0).all(1)).all())


@pytest.mark.parametrize("preset", FITTING)
def test_presets_fit(preset: str) -> None:
    g = PRESETS[preset]
    assert few.unfit(g.num_experts, g.num_local_experts, g.hidden_size, g.intermediate_size, g.top_k, SMS) is None


@pytest.mark.parametrize(
    ("experts", "hidden", "inter", "reason"),
    [
        (256, 8320, 2048, "hidden_size is at most 8192"),
        (256, 7168, 18432, "too large beside"),
        (256, 1024, 14336, "twelve slots"),
        (1024, 256, 128, "the scores of 1024 experts"),
    ],
)
def test_what_does_not_fit_says_why(experts: int, hidden: int, inter: int, reason: str) -> None:
    assert reason in str(few.unfit(experts, 32, hidden, inter, 8, SMS))


@needs_nvcc
@pytest.mark.parametrize("preset", FITTING)
def test_compiles_without_spills_and_fits_shared_memory(preset: str, tmp_path: Path) -> None:
    g = PRESETS[preset]
    sizes = (g.num_local_experts, g.hidden_size, g.intermediate_size)
    defines = few.defines(g.num_experts, g.n_group, g.topk_group, g.top_k, *sizes, SMS)
    binary, report = compile_nvcc(source_text("few_tokens.cu"), [f"{key}={value}" for key, value in defines], ARCH)
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"} and "warning" not in report, report
    slots, slot = few.ring(g.hidden_size, g.intermediate_size, g.num_local_experts, g.top_k)
    (own,) = re.findall(r"(\d+) bytes smem", report)
    assert slots * slot + int(own) <= few.SHARED_BYTES
    sass = disassembled(binary, tmp_path)
    assert "HMMA.16816.F32" in sass or "QMMA" in sass
    assert sass.count("UBLKCP") >= 2


def cases() -> list[str]:
    """Every number of tokens; shards before, inside and past the experts; ties, idle, signed scales."""
    shapes = [f"{preset}-t{t}-o{o}" for preset, o in (("small", 8), ("small_kimi", 6)) for t in range(1, 9)]
    names = [f"{shape}-{kind}-s0" for shape in shapes for kind in ("iid-published", "deepseek_like-model_like")]
    names += [f"small-t7-o{offset}-iid-model_like-s1" for offset in (-5, 0, 24, 29)]
    names += ["small-t8-o16-ties-model_like-s0", "small-t7-o8-no_local_work-model_like-s0"]
    names += ["small-t8-o8-one_expert-outlier-s0", "small-t8-o8-underflow-model_like-s0"]
    names += ["e64l64h384i640k8g8t4-t8-o0-iid-published-s0", "e16l16h128i384k2g16t3-t5-o0-iid-model_like-s0"]
    names += ["e40l8h1152i1280k6g4t2-t6-o16-deepseek_like-heterogeneous-s2"]
    return [*names, "dsv3-t1-o32-deepseek_like-published-s0", "dsv3-t8-o0-deepseek_like-model_like-s1"]


def run_kernel(inputs: Inputs, backend: str = "hopper_few_tokens") -> torch.Tensor:
    from moe_fast.backends import by_name

    output = torch.full(inputs.hidden_states.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    top_k, n_group, topk_group = groups(inputs.geometry)
    by_name(backend).run(*inputs.args(), output, n_group=n_group, topk_group=topk_group, top_k=top_k)
    return output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", cases())
def test_the_kernel_does_what_its_twin_does(name: str) -> None:
    inputs = make_inputs(Problem.parse(name)).to("cuda")
    want = torch.full(inputs.hidden_states.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    few.few_tokens_torch(*inputs.args(), want, *groups(inputs.geometry))
    got = run_kernel(inputs)
    assert torch.equal(got.view(torch.int16), run_kernel(inputs).view(torch.int16)), "not the same bytes again"
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert float(error) < 2**-7, "as the twin against the reference"
    assert bool(((got == 0).all(1) == (want == 0).all(1)).all())
    if inputs.seq_len > 1:  # a token is the same whoever is beside it
        one = Inputs(**{**vars(inputs), **_only(inputs, inputs.seq_len - 1)})
        assert torch.equal(run_kernel(one)[0].view(torch.int16), got[-1].view(torch.int16))


def _only(inputs: Inputs, token: int) -> dict[str, torch.Tensor]:
    part = slice(token, token + 1)
    return {
        "routing_logits": inputs.routing_logits[part].contiguous(),
        "hidden_states": inputs.hidden_states[part].contiguous(),
        "hidden_states_scale": inputs.hidden_states_scale[:, part].contiguous(),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_longer_calls_are_cut_into_eights() -> None:
    inputs = make_inputs(Problem.parse("small-t21-o8-iid-published-s0")).to("cuda")
    got = run_kernel(inputs)
    want = torch.empty_like(got)
    few.few_tokens_torch(*inputs.args(), want, *groups(inputs.geometry))
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert float(error) < 2**-7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("busy", [False, True])
def test_calls_in_a_row_share_a_workspace_and_nothing_else(busy: bool) -> None:
    """Each overwrites the last one's SwiGLU; busy: beside matrix products, so that CTAs come late and by turns."""
    names = ("dsv3-t8-o0-deepseek_like-model_like-s1", "dsv3-t8-o0-iid-published-s2", "dsv3-t3-o0-iid-model_like-s3")
    several = [make_inputs(Problem.parse(name)).to("cuda") for name in names]
    want = [run_kernel(inputs) for inputs in several]
    outputs = [torch.empty_like(out) for out in want]
    beside, large = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(beside):
            for _ in range(8 if busy else 0):
                torch.mm(large, large)
        for at in (0, 1, 0, 2, 1, 2):
            outputs[at].fill_(torch.nan)
            inputs, g = several[at], several[at].geometry
            hopper_few_tokens.run(
                *inputs.args(), outputs[at], n_group=g.n_group, topk_group=g.topk_group, top_k=g.top_k
            )
        torch.cuda.synchronize()
        for got, one in zip(outputs, want, strict=True):
            assert torch.equal(got.view(torch.int16), one.view(torch.int16))
