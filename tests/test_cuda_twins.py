"""The CUDA pipeline for many tokens with its kernels' twins in their place: what they leave to one another adds up."""

from __future__ import annotations

import pytest
import torch
from judging import prepare, verdict

from moe_fast.kernels import cuda_combine, cuda_grouped_gemm, cuda_later_windows, cuda_route
from moe_fast.pipelines import hopper_cuda

PROBLEMS = (
    "small-t70-o8-iid-published-s0",
    "small-t150-o8-deepseek_like-model_like-s1",
    "small-t64-o16-ties-model_like-s0",
    "small-t40-o8-no_local_work-model_like-s0",
    "small-t200-o8-one_expert-model_like-s0",
    "small_kimi-t33-o6-deepseek_like-heterogeneous-s0",
)


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins instead of kernels, and no workspace from another test's sizes."""
    for module, names in (
        (cuda_route, ("route", "place")),
        (cuda_grouped_gemm, ("grouped_gemms",)),
        (cuda_combine, ("combine",)),
        (cuda_later_windows, ("later_windows",)),
    ):
        for name in names:
            monkeypatch.setattr(hopper_cuda, name, getattr(module, f"{name}_torch"))
    hopper_cuda.release_workspaces()


def run(name: str) -> torch.Tensor:
    """The pipeline's output on a poisoned buffer."""
    inputs, _ = prepare(name)
    g = inputs.geometry
    out = torch.full((inputs.seq_len, g.hidden_size), torch.nan, dtype=torch.bfloat16)
    return hopper_cuda.run(*inputs.args(), out, n_group=g.n_group, topk_group=g.topk_group, top_k=g.top_k)


@pytest.mark.parametrize("name", PROBLEMS)
def test_twins_in_a_row_are_the_layer(name: str) -> None:
    judged = verdict(name, run(name), recipe="requant")
    assert judged.status == ("INCONCLUSIVE" if "no_local_work" in name else "PASS"), judged


@pytest.mark.parametrize(("constant", "value"), [("ROW_BUFFER_BYTES", 1), ("TOKEN_BUFFER_BYTES", 10_000)])
def test_windows_and_slices_change_nothing(constant: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = PROBLEMS[1]
    whole = run(name)
    monkeypatch.setattr(hopper_cuda, constant, value)
    hopper_cuda.release_workspaces()
    parts = run(name)
    inputs, _ = prepare(name)
    shape = hopper_cuda.Shape(inputs.seq_len, *inputs.gemm2_weights.shape[:1], 8, *inputs.gemm2_weights.shape[1:])
    assert shape.windows.count > 1 or shape.tokens_at_once < inputs.seq_len
    assert ((parts.float() - whole.float()).norm() / whole.float().norm()).item() < 2e-3  # bf16's rounding


@pytest.mark.parametrize("tokens", [1, 31, 32, 33])
def test_one_window_has_launches_of_its_own_at_any_length(tokens: int) -> None:
    shape = hopper_cuda.Shape(tokens, 8, 4, 256, 256)
    assert shape.windows.count == 1 and shape.usual_windows(32) == 1


@pytest.mark.parametrize(("share", "usual"), [(0.0, 1), (1.0, 2), (100.0, 9)])
def test_windows_with_launches_of_their_own(share: float, usual: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_cuda, "ROW_BUFFER_BYTES", 1)  # 1,024 rows a window, of which 768 begin a new one
    monkeypatch.setattr(hopper_cuda, "USUAL_SHARE", share)
    shape = hopper_cuda.Shape(800, 32, 8, 128, 128)
    assert shape.windows.count == 9 and shape.usual_windows(256) == usual


def test_windows_that_share_a_launch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "small-t900-o8-iid-model_like-s0"
    monkeypatch.setattr(hopper_cuda, "ROW_BUFFER_BYTES", 1)
    outputs = []
    for share in (100.0, 0.0):
        monkeypatch.setattr(hopper_cuda, "USUAL_SHARE", share)
        hopper_cuda.release_workspaces()
        outputs.append(run(name))
    (space,) = hopper_cuda._workspaces.values()
    assert (space.expert_offsets[:, -1] > 0).sum() > 1  # windows with rows
    assert torch.equal(*outputs)
    monkeypatch.setattr(hopper_cuda, "later_windows", lambda *args: None)
    assert not torch.equal(run(name), outputs[0]), "the later windows' rows are not left out unseen"


def test_a_row_that_nobody_writes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: torch.Tensor, **options: object) -> None:
        cuda_route.place_torch(*args, **options)  # type: ignore[arg-type]
        args[6][..., 0] = -1  # row_targets: no row is all of its token

    monkeypatch.setattr(hopper_cuda, "place", forgetful)
    assert verdict(PROBLEMS[1], run(PROBLEMS[1]), recipe="requant").status == "FAIL"
