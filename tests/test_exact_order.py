"""The exact-order variant: why its bytes can be the same everywhere, and that anything else would be noticed."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_fast
from moe_fast.backends import backends
from moe_fast.kernels import exact_twins as twins
from moe_fast.pipelines.exact_order import TOKENS_AT_ONCE, run
from moeref.inputs import Inputs
from moeref.make import make_inputs
from moeref.reference import moe, route
from moeref.spec import PRESETS, Problem, Recipe
from moeref.verify import Options, verify

CASES = Path(__file__).with_name("interpreted_exact_order.py")
GOLDEN = {
    "small-t33-o8-iid-published-s0": "b50940e616862ca19f93bbf1f40f2a3416f7e3feffcacc636d3a82e242d04d78",
    "small-t80-o16-skewed-model_like-s0": "88741daa9a2abb3b7fb9e8f9f80837dfe8020a5f9740715dfa04a032f3e9bcab",
    "small_kimi-t33-o12-iid-heterogeneous-s0": "a1c58c2dae50749c3df330874d94097a5e713855e6620ce5c11a9d7fc32035c9",
    "dsv3-t2-o32-iid-published-s0": "a99f7eb559534a81a849930e2c76cafb34cf14d5b24f1f0c0e0e7a886e8c6ad1",
}
"""Output's SHA-256: the same on every machine, CPU or GPU. A change of these is a change of the promise."""


def groups(inputs: Inputs) -> dict[str, int]:
    """The keywords that the ten inputs' shapes do not hold."""
    g = inputs.geometry
    return {"n_group": g.n_group, "topk_group": g.topk_group, "top_k": g.top_k}


def output(inputs: Inputs, **options: Any) -> torch.Tensor:
    """The pipeline's output."""
    return run(*inputs.args(), **groups(inputs), **options)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def floats(count: int) -> torch.Tensor:
    """float32 of every sign and exponent."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


# --- numbers --------------------------------------------------------------------------------------


def test_exp_is_rounded_correctly_but_for_one_case_in_ten_million() -> None:
    x = torch.cat([torch.linspace(-104, 89, 400_001), floats(400_000)])
    x = x[~x.isnan()]
    true = x.double().exp()  # under one unit of float64
    error = (twins.exp32(x).double() - true).abs()
    finite = (true < 3.4e38) & (true > 0)
    spacing = torch.ldexp(torch.ones_like(true), (torch.frexp(true)[1] - 24).clamp(min=-149))
    assert float((error / spacing)[finite].max()) < 0.5 + 2**-25  # docs/numerics.md; half of it is torch's own
    assert torch.equal(twins.exp32(x), true.float())  # none of these is so near a half that it matters
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 89.0, 3.4e38, -104.0, -3.4e38, 0.0, -0.0])
    torch.testing.assert_close(twins.exp32(special), torch.exp(special), rtol=0, atol=0, equal_nan=True)


def test_half_the_polynomial_would_show() -> None:
    full, x = twins.TAYLOR, torch.linspace(-0.34, 0.34, 10_001)
    try:
        twins.TAYLOR = (*full[:8], *[0.0] * 6)  # type: ignore[assignment]
        assert not torch.equal(twins.exp32(x), x.double().exp().float())
    finally:
        twins.TAYLOR = full


def test_sigmoid_and_silu_do_at_the_ends_what_the_definition_does() -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 88.0, -88.0, 89.0, -89.0, -3.4e38, 3.4e38, 1e-45])
    for mine, theirs in (
        (twins.sigmoid(x), 1.0 / (1.0 + torch.exp(-x))),
        (twins.silu(x), x / (1.0 + torch.exp(-x))),
        (twins.silu(x), torch.nn.functional.silu(x)),
    ):
        torch.testing.assert_close(mine, theirs, rtol=4 * 2**-23, atol=1e-37, equal_nan=True)
    many = torch.linspace(-30, 30, 100_001)
    torch.testing.assert_close(twins.silu(many), torch.nn.functional.silu(many), rtol=4 * 2**-23, atol=0)


def test_casts_are_what_torch_rounds_to() -> None:
    x = floats(1_000_000)
    x[::2] = (x[::2].view(torch.int32) & ~0x7FFF).view(torch.float32)  # halves
    ours = twins.encode_bf16(x).view(torch.bfloat16)
    assert torch.equal(ours[~x.isnan()], x.bfloat16()[~x.isnan()])
    assert {int(bits) & 0xFFFF for bits in twins.encode_bf16(x)[x.isnan()]} == {0x7FC0}

    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([numbers, halves, halves.nextafter(torch.tensor(0.0)), halves.nextafter(torch.tensor(449.0))])
    y = torch.cat([near, -near, x[x.abs() <= 448], torch.rand(100_000) * 900 - 450]).clamp(-448, 448)
    assert torch.equal(twins.encode_e4m3(y), y.to(torch.float8_e4m3fn).view(torch.uint8))
    assert twins.encode_e4m3(torch.tensor([torch.nan])).tolist() == [0x7F]

    octets = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(
        twins.decode_e4m3(octets), octets.view(torch.float8_e4m3fn).double(), rtol=0, atol=0, equal_nan=True
    )


# --- sums -----------------------------------------------------------------------------------------


def gemm(rows: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor, weights_scale: torch.Tensor) -> torch.Tensor:
    """One expert's rows [R, W] uint8 times its weights [N, W]."""
    out = torch.empty(len(rows), len(weights))
    offsets = torch.tensor([0, len(rows)], dtype=torch.int32)
    twins.grouped_gemm_torch(rows, scale, None, weights[None], weights_scale[None], offsets, out, len(rows))
    return out


def operands(blocks: int = 6) -> tuple[torch.Tensor, ...]:
    """Any e4m3 bytes but NaN: 2**-18 and 2**17 stand in one sum."""
    torch.manual_seed(0)
    rows = torch.randint(0, 256, (16, blocks * 128), dtype=torch.uint8) & 0xF7
    weights = torch.randint(0, 256, (128, blocks * 128), dtype=torch.uint8) & 0xF7
    return rows, weights, torch.randn(blocks, 16), torch.randn(1, blocks)


def test_the_order_within_a_block_changes_nothing_and_that_of_the_blocks_does() -> None:
    rows, weights, scale, weights_scale = operands()
    want = gemm(*operands())
    for seed in range(4):
        torch.manual_seed(seed)
        within = torch.cat([block * 128 + torch.randperm(128) for block in range(6)])
        assert torch.equal(gemm(rows[:, within], weights[:, within], scale, weights_scale), want)
    order = torch.arange(5, -1, -1)
    other = (order[:, None] * 128 + torch.arange(128)).flatten()
    turned = gemm(rows[:, other], weights[:, other], scale[order], weights_scale[:, order])
    assert not torch.equal(turned, want)
    torch.testing.assert_close(turned, want, rtol=1e-3, atol=1.0)


def test_a_float32_sum_within_a_block_would_show() -> None:
    rows, weights, _, _ = operands(1)
    x, w = twins.decode_e4m3(rows).float(), twins.decode_e4m3(weights).float()
    order = torch.randperm(128)
    assert not torch.equal(x @ w.T, x[:, order] @ w[:, order].T)


def test_the_largest_and_the_smallest_product_stand_in_one_exact_sum() -> None:
    rows = torch.full((1, 128), 0x7E, dtype=torch.uint8)  # 448
    weights = torch.full((128, 128), 0x7E, dtype=torch.uint8)
    rows[0, 0], weights[:, 0] = 0x01, 0x01  # 2**-9
    x, w = twins.decode_e4m3(rows), twins.decode_e4m3(weights)
    for order in (torch.arange(128), torch.arange(127, -1, -1)):
        total = 0.0
        for k in order.tolist():
            total += float(x[0, k]) * float(w[0, k])
        assert total == 127 * 448**2 + 2**-18
        assert total < 2**25 and (total * 2**18).is_integer() and total * 2**18 < 2**43


def test_a_fused_multiply_add_would_show() -> None:
    rows, weights, scale, weights_scale = operands()
    fused = torch.zeros(16, 128)
    for step in range(6):
        k = slice(step * 128, step * 128 + 128)
        product = (twins.decode_e4m3(rows[:, k]) @ twins.decode_e4m3(weights[:, k]).T).float()
        both = (scale[step].unsqueeze(1) * weights_scale[0, step]).double()
        fused = (fused.double() + product.double() * both).float()  # the product exact, the sum rounded
    want = gemm(rows, weights, scale, weights_scale)
    differing = int((fused != want).sum())
    assert differing > want.numel() // 10
    torch.testing.assert_close(fused, want, rtol=1e-3, atol=1.0)


# --- the whole call -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "small-t33-o8-iid-published-s0",
        "small-t40-o-3-iid-model_like-s0",
        "small-t16-o8-ties-model_like-s0",
        "small-t20-o30-skewed-outlier-s0",
        "small_kimi-t33-o12-iid-heterogeneous-s0",
        "small-t12-o8-underflow-tiny-s0",
    ],
)
def test_it_passes_the_judge(name: str) -> None:
    (found,) = verify("exact_order", [(name, Problem.parse(name))], Options(isolate=False))
    assert found.verdict.status == "PASS", found.verdict.message


@pytest.mark.parametrize("kind", ["iid", "ties", "all_negative", "underflow", "large_bias", "deepseek_like"])
def test_it_routes_as_the_definition_does(kind: str) -> None:
    inputs = make_inputs(Problem.parse(f"small-t64-o8-{kind}-model_like-s0"))
    want = route(inputs.routing_logits, inputs.routing_bias, inputs.geometry, 2.5)
    ids, weights = torch.empty(64, 4, dtype=torch.int32), torch.empty(64, 4)
    twins.route(inputs.routing_logits, inputs.routing_bias, ids, weights, 2.5, 4, 2)
    ascending, order = want.topk_ids.sort(dim=1)
    assert torch.equal(ids.long(), ascending)
    torch.testing.assert_close(weights, want.topk_weights.gather(1, order), rtol=1e-6, atol=0)


def test_permute_is_its_docstrings_example() -> None:
    ids = torch.tensor([[2, 5], [4, 5]], dtype=torch.int32)
    token_rows, row_tokens, offsets = (torch.empty(size, dtype=torch.int32) for size in ((2, 2), (4,), (3,)))
    twins.permute(ids, token_rows, row_tokens, offsets, 4)
    assert token_rows.tolist() == [[-1, 1], [0, 2]] and row_tokens[:3].tolist() == [1, 0, 1]
    assert offsets.tolist() == [0, 1, 3]


def test_neither_slices_nor_neighbours_nor_threads_change_a_byte() -> None:
    inputs = make_inputs(Problem.parse("small-t50-o8-skewed-published-s0"))
    want = output(inputs)
    for at_once in (1, 7, 49):
        assert torch.equal(output(inputs, tokens_at_once=at_once), want)
    backwards = torch.arange(49, -1, -1)
    assert torch.equal(output(inputs.take(backwards)), want[backwards])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(output(inputs), want)
    finally:
        torch.set_num_threads(threads)


def test_a_nan_stays_in_its_token_and_has_one_bit_pattern() -> None:
    inputs = make_inputs(Problem.parse("small-t33-o8-one_expert-model_like-s0"))
    want = output(inputs)
    inputs.hidden_states.view(torch.uint8)[5, 17] = 0xFF
    inputs.routing_logits[9, 3] = -torch.nan
    got = output(inputs)
    others = torch.tensor([token for token in range(33) if token not in (5, 9)])
    assert torch.equal(got[others], want[others])
    assert set(got.view(torch.int16)[5].tolist()) == {0x7FC0}
    assert set(got[9].view(torch.int16)[got[9].isnan()].tolist()) <= {0x7FC0}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_are_the_promised_ones(name: str) -> None:
    assert digest(output(make_inputs(Problem.parse(name)))) == GOLDEN[name]


def test_it_is_never_picked_and_can_be_asked_for() -> None:
    found = backends()
    mine = found["exact_order"]
    assert mine.priority < found["torch_grouped"].priority and (mine.recipe, mine.deterministic) == ("requant", True)
    assert mine.unsupported(PRESETS["dsv3"], torch.device("cpu")) is None
    for name in ("small-t9-o8-iid-model_like-s0", "small-t0-o8-iid-model_like-s0"):
        inputs = make_inputs(Problem.parse(name))
        out = torch.full(inputs.hidden_states.shape, torch.nan, dtype=torch.bfloat16)
        assert moe_fast.moe(*inputs.args(), out, backend="exact_order", **groups(inputs)) is out
        assert torch.equal(out, output(inputs))
        want = moe(inputs, Recipe.parse("requant")).unrounded
        torch.testing.assert_close(
            out.float(), want, rtol=2**-7, atol=0.02 * float(want.abs().max()) if len(want) else 0
        )


def test_the_workspace_is_bounded_at_any_length() -> None:
    size = backends()["exact_order"].workspace
    assert size is not None
    most = size(PRESETS["dsv3"], TOKENS_AT_ONCE["cuda"])
    assert most is not None and size(PRESETS["dsv3"], 14107) == most < 200e6


def test_the_twins_need_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from moe_fast.pipelines.exact_order import stages\n"
        "assert all(stage.__name__.endswith('_torch') for stage in stages(False))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CASES.parents[1])


# --- kernels --------------------------------------------------------------------------------------


def test_kernels_and_twins_have_one_signature() -> None:
    pytest.importorskip("triton")
    from moe_fast.pipelines.exact_order import stages

    for kernel, twin in zip(stages(True), stages(False), strict=True):
        assert twin.__name__ == f"{kernel.__name__}_torch" and inspect.signature(kernel) == inspect.signature(twin)


def test_kernels_give_the_twins_bytes_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(CASES.parent.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(CASES)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*GOLDEN, "small-t0-o8-iid-published-s0", "dsv3-t600-o32-iid-published-s0"])
def test_a_gpu_gives_the_cpus_bytes(name: str) -> None:
    inputs = make_inputs(Problem.parse(name))
    on_gpu = moe_fast.moe(*inputs.to("cuda").args(), backend="exact_order", **groups(inputs))
    assert digest(on_gpu) == digest(output(inputs))
    assert name not in GOLDEN or digest(on_gpu) == GOLDEN[name]
