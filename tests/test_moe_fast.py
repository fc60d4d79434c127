"""moe_fast.moe, its checks, and the backends that every machine has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import moe_fast
from moe_fast.backends import Backend, NoBackend, backends, candidates, pick
from moe_fast.backends import torch_grouped as grouped
from moe_fast.target import target_of
from moeref.inputs import FIELDS, InputError, Inputs
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.spec import PRESETS, Geometry, Problem

PROBLEMS = (
    "small-t33-o8-iid-published-s0",
    "small-t64-o24-deepseek_like-heterogeneous-s1",
    "small-t24-o16-ties-model_like-s0",
    "small-t24-o0-near_ties-model_like-s0",
    "small-t24-o8-all_negative-model_like-s0",
    "small-t24-o8-underflow-model_like-s0",
    "small-t17-o29-iid-model_like-s0",
    "small-t17-o-5-iid-model_like-s0",
    "small-t7-o8-no_local_work-model_like-s0",
    "small-t200-o8-one_expert-outlier-s0",
    "small_kimi-t33-o6-deepseek_like-model_like-s0",
    "small_kimi-t33-o21-ties-heterogeneous-s0",
    "e16l16h128i384k2g16t3-t40-o0-iid-model_like-s0",  # groups of one
)


def groups(inputs: Inputs) -> dict[str, int]:
    g = inputs.geometry
    return {"n_group": g.n_group, "topk_group": g.topk_group, "top_k": g.top_k}


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", PROBLEMS)
def test_torch_grouped_equals_the_reference(name: str) -> None:
    inputs = make_inputs(Problem.parse(name))
    output = moe_fast.moe(*inputs.args(), backend="torch_grouped", **groups(inputs))
    trace = moe(inputs)
    assert output.dtype == torch.bfloat16 and output.shape == trace.output.shape
    assert relative(output, trace.unrounded) < 2.5e-3  # bf16's own rounding is 1.7e-3
    assert float((output != trace.output).float().mean()) < 0.02  # flips of that rounding alone
    idle = torch.ones(inputs.seq_len, dtype=torch.bool)
    idle[trace.permutation.permuted_idx_to_token_idx] = False
    assert not output[idle].any()


@pytest.mark.parametrize("constant", ["ROWS_AT_ONCE", "TOKENS_AT_ONCE", "ROWS_OF_PARTIALS", "COLUMNS_AT_ONCE"])
def test_chunks_change_nothing(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Problem.parse("small-t150-o8-skewed-model_like-s0"))
    whole = grouped.run(*inputs.args(), **groups(inputs))
    monkeypatch.setattr(grouped, constant, 128 if constant == "COLUMNS_AT_ONCE" else 7)
    assert relative(grouped.run(*inputs.args(), **groups(inputs)), whole) < 1e-3


def test_decode_is_exact_for_every_byte() -> None:
    octets = torch.arange(256, dtype=torch.uint8)
    decoded, expected = grouped.decode(octets), octets.view(torch.float8_e4m3fn).float()
    assert torch.equal(decoded.isnan(), expected.isnan()) and int(decoded.isnan().sum()) == 2
    numbers = ~expected.isnan()
    assert torch.equal(decoded[numbers].view(torch.int32), expected[numbers].view(torch.int32))  # -0.0 too
    assert grouped.decode(octets[:0]).shape == (0,)


@pytest.mark.parametrize("backend", ["torch_grouped", "reference", None])
def test_out_is_filled_and_returned_and_zero_tokens_work(backend: str | None) -> None:
    for name in ("small-t9-o8-iid-model_like-s0", "small-t0-o8-iid-model_like-s0"):
        inputs = make_inputs(Problem.parse(name))
        expected = moe_fast.moe(*inputs.args(), backend=backend, **groups(inputs))
        out = torch.full_like(expected, torch.nan)
        assert moe_fast.moe(*inputs.args(), out, backend=backend, **groups(inputs)) is out
        assert torch.equal(out, expected)


def test_routing_constants() -> None:
    assert vars(moe_fast.routing_constants(256)) == {"top_k": 8, "n_group": 8, "topk_group": 4}
    assert vars(moe_fast.routing_constants(384)) == {"top_k": 8, "n_group": 1, "topk_group": 1}
    with pytest.raises(ValueError, match=r"E=32"):
        moe_fast.routing_constants(32)


def test_the_models_groups_are_the_default() -> None:
    for geometry in (Geometry(256, 4, 128, 128, 8, 8, 4), Geometry(384, 4, 128, 128, 8, 1, 1)):
        inputs = make_inputs(Problem(geometry, 40, 8, "iid", "model_like", 0))
        assert torch.equal(moe_fast.moe(*inputs.args()), moe_fast.moe(*inputs.args(), **groups(inputs)))
    inputs = make_inputs(Problem.parse("small-t4-o8-iid-model_like-s0"))
    with pytest.raises(InputError, match=r"E=32.*pass n_group="):
        moe_fast.moe(*inputs.args())


WRONG: tuple[tuple[str, Any, str], ...] = (
    ("routing_logits", lambda x: x.double(), "expected dtype float32, got float64"),
    ("routing_bias", lambda x: x[:-1], r"expected shape \[32\], got \[31\]"),
    ("hidden_states", lambda x: x.float(), "expected dtype float8_e4m3fn"),
    ("hidden_states_scale", lambda x: x.T, r"got \[9, 2\] \(transposed\?\)"),
    ("gemm1_weights", lambda x: x.transpose(1, 2).contiguous(), r"expected shape \[8, 512, 256\]|contiguous"),
    ("gemm1_weights_scale", lambda x: None, "got NoneType"),
    ("gemm2_weights", lambda x: x.to("meta"), "expected device cpu as the other inputs, got meta"),
    ("gemm2_weights_scale", lambda x: x.half(), "expected dtype float32, got float16"),
    ("local_expert_offset", lambda x: 99, "expected -7..31"),
    ("routed_scaling_factor", lambda x: "2.5", "expected a float, got str"),
)


@pytest.mark.parametrize(("field", "change", "text"), WRONG)
def test_a_wrong_input_is_named(field: str, change: Any, text: str) -> None:
    inputs = make_inputs(Problem.parse("small-t9-o8-iid-model_like-s0"))
    ten = list(inputs.args())
    ten[FIELDS.index(field)] = change(ten[FIELDS.index(field)])
    with pytest.raises(InputError, match=f"{field}: .*({text})"):
        moe_fast.moe(*ten, **groups(inputs))


def test_inputs_that_fix_no_geometry_are_one_message() -> None:
    with pytest.raises(InputError, match="E can't be told"):
        moe_fast.moe(*[None] * 10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (torch.zeros(9, 128, dtype=torch.bfloat16), "expected shape"),
        (torch.zeros(9, 256), "expected dtype bfloat16"),
        (torch.zeros(256, 9, dtype=torch.bfloat16).T, "contiguous"),
        (torch.zeros(9, 256, dtype=torch.bfloat16, device="meta"), "expected device cpu"),
        (3, "expected a tensor or None, got int"),
    ],
)
def test_a_wrong_output_buffer_is_named(out: Any, text: str) -> None:
    inputs = make_inputs(Problem.parse("small-t9-o8-iid-model_like-s0"))
    with pytest.raises(InputError, match=f"out: .*{text}"):
        moe_fast.moe(*inputs.args(), out, **groups(inputs))


def test_an_address_that_the_backend_can_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Problem.parse("small-t9-o8-iid-model_like-s0"))
    ten, packed = list(inputs.args()), torch.empty(inputs.hidden_states.numel() + 8, dtype=torch.uint8)
    packed[8:] = inputs.hidden_states.view(torch.uint8).flatten()
    ten[2] = packed[8:].view(inputs.hidden_states.dtype).view(inputs.hidden_states.shape)
    past = ten[2].data_ptr() % 16
    assert past, "torch gives out addresses that are multiples of 16"
    want = moe_fast.moe(*inputs.args(), backend="reference", **groups(inputs))
    assert torch.equal(moe_fast.moe(*ten, backend="reference", **groups(inputs)), want)
    demanding = replace(backends()["reference"], aligned=("hidden_states", "out"))
    monkeypatch.setattr("moe_fast.backends.backends", lambda: {"reference": demanding})
    monkeypatch.setattr(moe_fast, "_checked", {})
    assert torch.equal(moe_fast.moe(*inputs.args(), backend="reference", **groups(inputs)), want)
    with pytest.raises(InputError, match=rf"hidden_states: .*multiple of 16 bytes.* got one {past} bytes past; clone"):
        moe_fast.moe(*ten, backend="reference", **groups(inputs))
    ten[2] = ten[2].clone()
    assert torch.equal(moe_fast.moe(*ten, backend="reference", **groups(inputs)), want)


def test_what_must_be_aligned_are_inputs_or_the_output() -> None:
    named = {backend.name: set(backend.aligned) for backend in backends().values() if backend.aligned}
    assert set().union(*named.values()) <= {*FIELDS, "out"}
    copied_by_16_bytes = {"hidden_states", "gemm1_weights", "gemm2_weights"}
    assert all(copied_by_16_bytes <= named[name] for name in ("hopper", "hopper_cuda", "hopper_few_tokens"))
    assert all({"routing_logits", "routing_bias"} <= named[name] for name in ("hopper", "hopper_cuda"))  # route.cu


def test_scales_are_not_read() -> None:
    inputs = make_inputs(Problem.parse("small-t9-o8-iid-model_like-s0"))
    inputs.gemm1_weights_scale.fill_(torch.nan)
    assert moe_fast.moe(*inputs.args(), **groups(inputs)).isnan().any()


def test_the_pick_is_the_highest_priority_that_can_run() -> None:
    found = backends()
    assert {"torch_grouped", "reference"} <= set(found)
    assert [b.priority for b in found.values()] == sorted((b.priority for b in found.values()), reverse=True)
    chosen = pick(PRESETS["dsv3"], torch.device("cpu"))
    assert chosen.name == "torch_grouped" and (chosen.recipe, chosen.deterministic) == ("exact", True)


def test_no_backend_lists_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    one: Backend = replace(backends()["reference"], unsupported=lambda geometry, device: "it is Sunday")
    monkeypatch.setattr("moe_fast.backends.backends", lambda: {"reference": one})
    with pytest.raises(NoBackend, match="reference: it is Sunday"):
        pick(PRESETS["dsv3"], torch.device("cpu"))
    inputs = make_inputs(Problem.parse("small-t9-o8-iid-model_like-s0"))
    monkeypatch.setattr(moe_fast, "_checked", {})
    with pytest.raises(RuntimeError, match="it is Sunday"):
        moe_fast.moe(*inputs.args(), backend="reference", **groups(inputs))
    reason = candidates()["moe_fast"].unsupported(PRESETS["dsv3"], torch.device("cpu"))
    assert reason is not None and "it is Sunday" in reason


def test_an_unknown_backend_is_a_clear_error() -> None:
    inputs = make_inputs(Problem.parse("small-t9-o8-iid-model_like-s0"))
    with pytest.raises(ValueError, match=r"unknown backend 'odd': expected one of .*torch_grouped"):
        moe_fast.moe(*inputs.args(), backend="odd", **groups(inputs))


def test_candidates_declare_what_the_backends_do() -> None:
    found = candidates()
    assert set(found) == {*backends(), "moe_fast"}
    auto = found["moe_fast"]
    assert auto.resolve is not None
    here = auto.resolve(PRESETS["small"], torch.device("cpu"))
    assert (here.recipe, here.deterministic, here.run) == ("exact", True, moe_fast.moe)
    assert all(one.output_argument == "out" for one in found.values())
    assert all(one.geometry_keywords == ("n_group", "topk_group", "top_k") for one in found.values())


def test_release_gives_back_what_pipelines_keep() -> None:
    pytest.importorskip("triton")
    from moe_fast.pipelines import hopper_triton as pipeline

    key = pipeline.Shape(16, 2, 2, 128, 128)
    kept = pipeline.workspace_for(key, 16, torch.device("cpu"))
    assert pipeline.workspace_for(key, 16, torch.device("cpu")) is kept
    for name in ("moe_fast", "hopper"):
        release = candidates()[name].release
        assert release is not None
        release()
        assert not pipeline._workspaces
        pipeline.workspace_for(key, 16, torch.device("cpu"))
    pipeline.release_workspaces()


def test_the_target_of_a_cpu() -> None:
    target = target_of("cpu")
    assert (target.kind, target.capability, target.is_hopper) == ("cpu", None, False) and target.sm_count >= 1
    with pytest.raises(ValueError, match="expected cpu"):
        target_of("meta")


def test_a_call_like_a_right_one_is_not_checked_again_and_any_other_is() -> None:
    problem = Problem.parse(PROBLEMS[0])
    inputs = make_inputs(problem)
    constants = {"n_group": problem.geometry.n_group, "topk_group": problem.geometry.topk_group}
    constants["top_k"] = problem.geometry.top_k
    ten = list(inputs.args())
    moe_fast.moe(*ten, **constants)
    known = len(moe_fast._checked)
    moe_fast.moe(*ten, **constants)
    assert len(moe_fast._checked) == known
    changes: dict[int, Any] = {
        0: ten[0].double(),
        2: ten[2].t().contiguous().t(),
        3: ten[3].to_sparse(),
        4: ten[4][:, :-1].contiguous(),
        8: problem.geometry.num_experts,
        9: "2.5",
    }
    for at, changed in changes.items():
        with pytest.raises(InputError, match=FIELDS[at]):
            moe_fast.moe(*ten[:at], changed, *ten[at + 1 :], **constants)
    assert len(moe_fast._checked) == known


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("tokens", [24, 300])
def test_tensors_may_lie_on_another_device_than_the_current_one(tokens: int) -> None:
    problem = Problem.parse(f"small-t{tokens}-o8-iid-model_like-s0")
    inputs = make_inputs(problem)
    outputs = []
    for device in ("cuda:0", "cuda:1"):
        outputs.append(moe_fast.moe(*inputs.to(device).args(), **groups(inputs)))
    assert outputs[1].device.index == 1 and torch.equal(outputs[0].cpu(), outputs[1].cpu())


def test_hopper_states_its_workspace_and_keeps_it_under_400_mb_at_any_length() -> None:
    pytest.importorskip("triton", reason="the Triton pipeline's workspace is sized by its tilings")
    for tokens in (1, 160, 161, 901, 14107, 100_000, 10**6):
        size = backends()["hopper"].workspace
        assert size is not None
        stated = size(PRESETS["dsv3"], tokens)
        assert stated is not None and 0 < stated < 400e6, tokens
    # Rows of 8 tokens a token in three buffers: 2048 e4m3, 16 float32 scales and 7168 bfloat16 each.
    cuda = backends()["hopper_cuda"].workspace
    assert cuda is not None and cuda(PRESETS["dsv3"], 1000) > 8000 * (2048 + 64 + 14336)  # type: ignore[operator]
