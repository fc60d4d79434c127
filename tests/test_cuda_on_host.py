"""few_tokens.cu, its own source, run on the CPU under drawn schedules: against its twin, and broken on purpose."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_on_host import OnHost

from moe_fast.kernels.cuda_few_tokens import few_tokens_torch
from moeref.inputs import Inputs
from moeref.make import make_inputs
from moeref.spec import Problem

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")

RUNS = [  # problem, CTAs, slots of the ring (None: as on the card)
    ("small-t1-o8-iid-published-s0", 5, 9),
    ("small-t1-o8-iid-published-s0", 2, None),
    ("small-t8-o16-ties-model_like-s0", 3, 10),
    ("small-t3-o-5-iid-model_like-s1", 7, None),
    ("small_kimi-t8-o6-iid-published-s0", 2, 9),
    ("small-t7-o8-no_local_work-model_like-s0", 3, 9),
    ("small-t8-o8-one_expert-outlier-s0", 1, 9),
    ("small-t7-o8-underflow-published-s0", 3, 9),  # sigmoids out of the ordinary
]


def twin(inputs: Inputs) -> torch.Tensor:
    g = inputs.geometry
    output = torch.full((inputs.seq_len, g.hidden_size), torch.nan, dtype=torch.bfloat16)
    few_tokens_torch(*inputs.args(), output, g.top_k, g.n_group, g.topk_group)
    return output


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("name", "blocks", "slots"), RUNS)
def test_any_schedule_gives_the_twins_output(name: str, blocks: int, slots: int | None, tmp_path: Path) -> None:
    inputs = make_inputs(Problem.parse(name))
    kernel, want = OnHost(tmp_path, inputs, blocks, slots), twin(inputs)
    outputs = []
    for seed in range(2):
        status, output, counters = kernel(inputs, seed)
        assert status == 0, f"seed {seed}: {status} threads never end"
        assert not counters.any(), "counters must be zero again"
        outputs.append(output)
    assert torch.equal(outputs[0].view(torch.int16), outputs[1].view(torch.int16)), "the schedule shows in the bytes"
    # exp and the order of sums differ from the twin's: bf16's rounding may fall to either side (2^-8 of an element),
    # and an e4m3 value of SwiGLU (2^-4 of it) in one of some hundred.
    assert error(outputs[0], want) < 2**-7
    assert bool(((outputs[0] == 0).all(1) == (want == 0).all(1)).all())


def without(text: str, times: int = 1) -> Callable[[str], str]:
    """The edit that leaves `text` out."""

    def change(source: str) -> str:
        assert source.count(text) == times, f"{source.count(text)} times in the source: {text}"
        return source.replace(text, "")

    return change


def instead(text: str, other: str) -> Callable[[str], str]:
    """The edit that puts `other` in the place of `text`."""

    def change(source: str) -> str:
        assert source.count(text) == 1, f"{source.count(text)} times in the source: {text}"
        return source.replace(text, other)

    return change


BROKEN = {
    "the ring's parity": instead("u32 parity = 1, ", "u32 parity = 0, "),
    "nobody waits for gemm1": instead("__any_sync(ALL, swiglu.unwritten())", "false"),
    "values of an earlier call stay": instead("store_relaxed(to, __uint_as_float(UNWRITTEN))", "(void)to"),
    "counters are put back too early": without("    named_barrier_sync(ALL_DRAWN, 64);  // this CTA draws no more\n"),
    "weights overwrite tokens": without(
        "        if (first_round && slot == TOKENS_SLOT) barrier_wait(ring.tokens_empty, 0);\n"
    ),
    "one slot is not released": instead("ring.release(n, TILE_SLOTS, lane)", "ring.release(n, TILE_SLOTS - 1, lane)"),
    "a tile's parts are read too early": without(
        "        math_sync();  // the other buffer's readers have come here too, so it is free\n"
    ),
    "shares overlap": instead(
        "return int(u32(s) * u32(all) / gridDim.x);", "return s ? int(s * all / gridDim.x) - 1 : 0;"
    ),
    "gemm1's tiles are dealt otherwise than loaded": instead("tile == share; tile += shares", "tile == share; ++tile"),
    "gate and up swapped": instead("up * silu(gate)", "gate * silu(up)"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_kernel_is_seen(what: str, tmp_path: Path) -> None:
    assert seen("small-t8-o8-iid-published-s0", 3, 9, BROKEN[what], tmp_path), f"{what}: not seen in four schedules"


def test_a_sigmoid_out_of_the_ordinary_is_computed_anew(tmp_path: Path) -> None:
    as_usual = without("            if (!usual) score[0] = sigmoid(logit[0]), score[1] = sigmoid(logit[1]);\n")
    inputs = make_inputs(Problem.parse("small-t7-o8-iid-published-s0"))
    inputs.routing_logits[:, 9] = -120.0  # a local expert that no token may choose: its sigmoid is 0
    want, errors = twin(inputs), []
    for change in (str, as_usual):
        errors.append(error(OnHost(tmp_path / change.__name__, inputs, 3, 9, change)(inputs, 0)[1], want))
    assert errors[0] < 2**-7
    assert not errors[1] < 2**-7


def test_a_cta_that_is_late_with_blanking_is_waited_for(tmp_path: Path) -> None:
    blank = "        if (to) store_relaxed(to, __uint_as_float(UNWRITTEN));\n"
    late = "if (blockIdx.x == 0) for (int i = 0; i < 20000; ++i) host::let_others();\n"
    is_late = instead(blank, late + blank)
    no_wait = instead("load_acquire(p.counters + BLANKED) < shares", "false")
    assert not seen(*RUNS[0], is_late, tmp_path / "waits")
    assert seen(*RUNS[0], lambda source: no_wait(is_late(source)), tmp_path / "does not")


def test_tokens_that_come_late_are_waited_for(tmp_path: Path) -> None:
    not_early, first = (
        without("        if (lane == 0) load_tokens(p, ring);"),
        "            if (lane == 0) load_everything(p, s, ring);\n",
    )
    late = instead(first, "            if (lane == 0) load_tokens(p, ring);\n" + first)
    no_wait = without("        ring.await_tokens();\n")
    assert not seen(*RUNS[0], lambda source: late(not_early(source)), tmp_path / "waits")
    assert seen(*RUNS[0], lambda source: no_wait(late(not_early(source))), tmp_path / "does not")


def test_no_more_slots_are_under_way_than_there_may_be(tmp_path: Path) -> None:
    """More give the same bytes, later: only a count of the copies shows it. The tokens' copy may be one more."""
    copy = "        bulk_load(ring.slots + slot * SLOT, from, bytes, full, policy);\n"
    count = '        host::check(host::now->cta->copies.size() <= UNDER_WAY + 1, "too many copies under way");\n'
    counted = instead(copy, copy + count)
    no_wait = without("        barrier_wait(ring.full + late * 8, late_parity);\n")
    assert not seen(*RUNS[0], counted, tmp_path / "waits")
    assert seen(*RUNS[0], lambda source: no_wait(counted(source)), tmp_path / "does not")


def seen(name: str, blocks: int, slots: int | None, change: Callable[[str], str], folder: Path) -> bool:
    """Whether one of four schedules shows that the changed kernel is wrong."""
    inputs = make_inputs(Problem.parse(name))
    kernel, want = OnHost(folder, inputs, blocks, slots, change), twin(inputs)
    for seed in range(4):
        status, output, counters = kernel(inputs, seed)
        if status != 0 or bool(counters.any()) or not error(output, want) < 2**-7:
            return True
    return False
