"""moe_fast.tune: what is chosen, by a fake timer; what is right, by moeref's judge on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moe_fast
from moe_fast import tuning
from moe_fast.tuning import table
from moe_fast.tuning.search import LEAST_GAIN, ROUNDS, Count, Discard, Drawn, Task, Variant, search
from moeref.bench.stopwatch import CpuStopwatch, Timed
from moeref.inputs import Inputs
from moeref.reference import moe, route
from moeref.routings import draw_routing
from moeref.spec import PRESETS, Geometry, Recipe

pytest.importorskip("triton")

from moe_fast.kernels.experts import Tiling
from moe_fast.tools import tune as tool
from moe_fast.tuning.runner import GpuRunner, draw
from moe_fast.tuning.variants import task_for

SMALL = PRESETS["small"]
CPU = torch.device("cpu")
CUT, OTHER, THIRD = (Tiling(16, 32, 64, 4, stages, 3, 2) for stages in (2, 3, 4))
SHIPPED, FAST, SLOW = (Variant("hopper_triton", cut) for cut in (CUT, OTHER, THIRD))
CUDA, FEW = Variant("hopper_cuda"), Variant("hopper_few_tokens")


class Fake:
    """Variants have times, one for all rounds or one a round, or an error that checking or timing raises."""

    def __init__(
        self, times: dict[Variant, float | list[float]], wrong: dict[Variant, Exception] | None = None
    ) -> None:
        self.times, self.wrong = times, wrong or {}
        self.log: list[str] = []
        self.late: dict[Variant, Exception] = {}

    def open(self, tokens: int) -> Drawn:
        self.log.append(f"open {tokens}")
        return Drawn(5, 4, 8)

    def check(self, variant: Variant) -> None:
        self.log.append(f"check {variant.name}")
        if variant in self.wrong:
            raise self.wrong[variant]

    def time(self, variant: Variant) -> float:
        done = sum(line == f"time {variant.name}" for line in self.log)
        self.log.append(f"time {variant.name}")
        if variant in self.late and done:
            raise self.late[variant]
        times = self.times[variant]
        return times[done] if isinstance(times, list) else times

    def close(self) -> None:
        self.log.append("close")


def found(
    times: dict[Variant, float | list[float]], wrong: dict[Variant, Exception] | None = None, shipped: Variant = SHIPPED
) -> Count:
    return search(Task(16, shipped, SHIPPED, tuple(times)), Fake(times, wrong))


# ---- what is chosen


def test_the_fastest_variant_is_chosen_and_timed_in_turn() -> None:
    fake = Fake({SHIPPED: 50.0, FAST: 40.0, CUDA: 60.0})
    count = search(Task(16, SHIPPED, SHIPPED, (SHIPPED, FAST, CUDA)), fake)
    assert (count.chosen, count.tiling) == (FAST, OTHER)
    assert [one.variant for one in count.timings] == [FAST, SHIPPED, CUDA]
    assert count.ratio(count.timings[0]) == pytest.approx(0.8) and not count.discarded
    names = [one.name for one in (SHIPPED, FAST, CUDA)]
    expected = ["open 16", *(f"check {one}" for one in names), *[f"time {one}" for one in names] * ROUNDS, "close"]
    assert fake.log == expected


@pytest.mark.parametrize(
    "times",
    [50.0, 50.0 * (1 - LEAST_GAIN) + 0.01, [30.0, 30.0, 50.0], 51.0],
    ids=["tie", "less than the least gain", "not in every round", "slower"],
)
def test_the_shipped_choice_stays_where_nothing_beats_it(times: float | list[float]) -> None:
    count = found({SHIPPED: 50.0, FAST: times})
    assert count.chosen == SHIPPED and count.tiling == CUT


def test_a_second_best_that_beats_the_shipped_one_is_taken_where_the_best_is_unsteady() -> None:
    assert found({SHIPPED: 50.0, FAST: [20.0, 20.0, 70.0], SLOW: 45.0}).chosen == SLOW


def test_a_wrong_variant_and_one_that_does_not_compile_are_left_out_and_named() -> None:
    wrong = {FAST: Discard("wrong: idle_rows"), SLOW: RuntimeError("out of resource:\n  shared memory")}
    count = found({SHIPPED: 50.0, FAST: 1.0, SLOW: 2.0, CUDA: 45.0}, wrong)
    assert count.chosen == CUDA and count.tiling == CUT
    assert dict(count.discarded) == {FAST: "wrong: idle_rows", SLOW: "RuntimeError: out of resource: shared memory"}
    assert count.timing(FAST) is None


def test_a_variant_that_goes_wrong_while_it_is_timed_is_left_out() -> None:
    fake = Fake({SHIPPED: 50.0, FAST: 1.0})
    fake.late[FAST] = Discard("wrong: graph replays give other bytes")
    count = search(Task(16, SHIPPED, SHIPPED, (SHIPPED, FAST)), fake)
    assert count.chosen == SHIPPED and [one.variant for one in count.timings] == [SHIPPED]
    assert count.discarded == ((FAST, "wrong: graph replays give other bytes"),)
    assert fake.log.count(f"time {FAST.name}") == 2 and fake.log[-1] == "close"


def test_the_pipeline_and_the_tiling_are_chosen_apart() -> None:
    count = found({SHIPPED: 50.0, FAST: 40.0, CUDA: 30.0})
    assert (count.chosen, count.tiling) == (CUDA, OTHER)
    count = found({FEW: 20.0, SHIPPED: 50.0, FAST: 40.0}, shipped=FEW)
    assert (count.chosen, count.tiling) == (FEW, OTHER)
    count = found({FEW: 45.0, SHIPPED: 50.0, FAST: 40.0}, shipped=FEW)
    assert (count.chosen, count.tiling) == (FAST, OTHER)


def test_without_a_right_shipped_choice_the_fastest_is_taken_and_without_any_nothing() -> None:
    broken = RuntimeError("it does not compile")
    count = found({SHIPPED: 1.0, FAST: 50.0, SLOW: 60.0}, {SHIPPED: broken})
    assert count.chosen == FAST and count.ratio(count.timings[0]) is None
    count = found({SHIPPED: 1.0, CUDA: 1.0}, {SHIPPED: broken, CUDA: broken})
    assert count.chosen is None and count.tiling is None and len(count.discarded) == 2
    assert tuning.Tuned("card", SMALL, (count,)).entries == ()


def test_an_interrupt_ends_the_search_and_gives_the_memory_back() -> None:
    fake = Fake({SHIPPED: 1.0}, {SHIPPED: KeyboardInterrupt()})  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt):
        search(Task(16, SHIPPED, SHIPPED, (SHIPPED,)), fake)
    assert fake.log[-1] == "close"


@pytest.mark.parametrize("tokens", [1, 7, 16, 32, 80, 160, 192, 193, 901, 14107])
def test_the_list_is_short_holds_the_shipped_choices_and_each_variant_once(tokens: int) -> None:
    task = task_for(tokens, PRESETS["dsv3"], CPU)
    assert {task.shipped, task.shipped_tiling, CUDA} <= set(task.variants)
    assert len(set(task.variants)) == len(task.variants) <= 9
    names = [one.name for one in task.variants]
    assert len(set(names)) == len(names)
    assert (task.shipped.pipeline == "hopper_cuda") == (tokens > 160)


def test_a_tiling_that_does_not_divide_the_geometry_is_not_tried() -> None:
    geometry = replace(SMALL, hidden_size=384)  # no multiple of 256
    for variant in task_for(901, geometry, CPU).variants:
        assert variant.tiling is None or geometry.hidden_size % variant.tiling.part2 == 0
    assert any(one.tiling and one.tiling.part2 == 256 for one in task_for(901, SMALL, CPU).variants)


# ---- what is right


class Clock(CpuStopwatch):
    """Replays on a CPU take 10 us."""

    def flush(self) -> None: ...

    def time(self, call: Callable[[], Any], mode: str) -> Timed:
        call()
        return Timed(1e-5, None, None)


class Replayed:
    def __init__(self, call: Callable[[], Any]) -> None:
        self.replay = call


def requantizing(change: Callable[[torch.Tensor], Any]) -> Callable[..., torch.Tensor]:
    """The layer with re-quantisation, then an edit of the output in place."""

    def run(*arguments: Any, n_group: int, topk_group: int, top_k: int) -> torch.Tensor:
        *ten, out = arguments
        out.copy_(moe(Inputs(*ten, geometry=SMALL), Recipe(requantize=1)).output)
        change(out)
        return out

    return run


def zeros(*arguments: Any, **groups: int) -> torch.Tensor:
    return arguments[-1].zero_()


def calls(right: int) -> Callable[[torch.Tensor], Any]:
    """Right so many times, then twice as large."""
    seen: list[int] = []

    def change(out: torch.Tensor) -> None:
        seen.append(1)
        out.mul_(2 if len(seen) > right else 1)

    return change


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> GpuRunner:
    monkeypatch.setattr("moe_fast.tuning.runner.capture", Replayed)
    candidates = {
        SHIPPED: requantizing(lambda out: None),
        FAST: requantizing(lambda out: out[0].mul_(2)),
        SLOW: requantizing(calls(2)),
        CUDA: zeros,
        FEW: lambda *arguments, **groups: arguments[-1],
    }
    runner = GpuRunner(SMALL, CPU, None, 0, run=lambda variant: candidates[variant], stopwatch=Clock())
    runner.open(16)
    return runner


def test_a_right_output_passes_and_what_has_its_bytes_is_not_judged_again(
    runner: GpuRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.check(SHIPPED)
    assert runner.time(SHIPPED) == pytest.approx(10)
    monkeypatch.setattr("moe_fast.tuning.runner.judge", None)
    runner.check(SHIPPED)


def test_an_output_that_is_scaled_zero_or_not_written_is_wrong(runner: GpuRunner) -> None:
    runner.check(SHIPPED)
    with pytest.raises(Discard, match="noise_rows"):
        runner.check(FAST)
    with pytest.raises(Discard, match="noise"):
        runner.check(CUDA)
    with pytest.raises(Discard, match="written"):
        runner.check(FEW)


def test_a_replay_with_other_bytes_than_the_checked_call_is_wrong(runner: GpuRunner) -> None:
    runner.check(SLOW)
    with pytest.raises(Discard, match="graph replays give other bytes"):
        runner.time(SLOW)


def test_a_graph_that_does_nothing_on_replay_is_wrong(runner: GpuRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.check(SHIPPED)
    monkeypatch.setattr("moe_fast.tuning.runner.capture", lambda call: Replayed(lambda: None))
    with pytest.raises(Discard, match="graph replays give other bytes"):
        runner.time(SHIPPED)


def test_a_whole_search_over_the_judge_keeps_the_right_ones_alone(runner: GpuRunner) -> None:
    task = Task(16, SHIPPED, SHIPPED, (SHIPPED, FAST, CUDA, FEW))
    (count,) = tuning.run_tasks([task], runner, progress=True)
    assert [one.variant for one in count.timings] == [SHIPPED] and count.chosen == SHIPPED
    assert {variant for variant, _ in count.discarded} == {FAST, CUDA, FEW}


@pytest.mark.parametrize("tokens", [1, 7, 160])
@pytest.mark.parametrize("offset", [None, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_draw_reaches_local_experts_and_says_how_many(tokens: int, offset: int | None, seed: int) -> None:
    problem, drawn = draw(SMALL, tokens, offset, seed)
    assert drawn.local_rows > 0 and (offset is None or drawn.offset == offset == problem.offset)
    logits, bias = (torch.from_numpy(part) for part in draw_routing(problem))
    chosen = route(logits, bias, SMALL, 2.5).topk_ids
    if offset is None:
        shards = [int((chosen // SMALL.num_local_experts == shard).sum()) for shard in range(4)]
        assert abs(drawn.local_rows - tokens) == min(abs(rows - tokens) for rows in shards if rows)  # K L / E = 1
    ids = chosen - drawn.offset
    local = ids[(ids >= 0) & (ids < SMALL.num_local_experts)]
    assert (len(local), len(local.unique())) == (drawn.local_rows, drawn.experts_hit)


def test_a_shard_that_gets_nothing_is_one_sentence() -> None:
    lonely = Geometry(256, 1, 128, 128, 1, 1, 1)
    with pytest.raises(ValueError, match="no token chose a local expert in 16 draws"):
        draw(lonely, 1, 255, 0)


# ---- how it is called


def test_without_a_gpu_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="this machine has no CUDA device"):
        moe_fast.tune()
    with pytest.raises(ValueError, match="expected one or more whole numbers above 0"):
        moe_fast.tune(tokens=(16, 0))
    done = CliRunner().invoke(command(), [])
    assert done.exit_code == 2 and "no CUDA device" in done.stderr and "Traceback" not in done.output


def command() -> Any:
    app = tool.typer.Typer()
    app.command()(tool.main)
    return app


def test_the_command_shows_every_variant_and_what_was_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = found({SHIPPED: 50.0, FAST: 40.0}, {CUDA: Discard("wrong: idle_rows")})
    second = replace(found({CUDA: 30.0, SHIPPED: 90.0, SLOW: 1.0}, {SLOW: Discard("wrong: [x]")}), tokens=901)
    result = tuning.Tuned("NVIDIA H100", SMALL, (first, second), tmp_path / "table.json")
    asked: list[Any] = []
    monkeypatch.setattr(tool.tuning, "tune", lambda *words, **options: asked.append((words, options)) or result)
    done = CliRunner().invoke(command(), ["--tokens", "16,901", "--geometry", "small", "--offset", "8"])
    assert done.exit_code == 0, done.output
    assert asked == [((SMALL, [16, 901], "cuda"), {"local_expert_offset": 8, "save": True, "seed": 0})]
    lines = done.stdout.splitlines()
    assert any(line.split()[-3:] == ["40.0", "0.800", "chosen"] for line in lines)
    assert any(line.split()[-3:] == ["50.0", "1.000", "shipped"] for line in lines)
    assert f"901 tokens: {SLOW.name} is left out: wrong: [x]" in lines
    assert (
        "the crossover to hopper_cuda lies between 16 and 901 tokens" in lines
        and str(tmp_path / "table.json") in done.stdout
    )
    assert any(line.split()[-3:] == ["30.0", "0.333", "chosen"] for line in lines)
    assert tool.crossover(replace(result, counts=(first,))) == (
        "hopper_cuda is not the fastest at 16 tokens, the most that were tuned"
    )
    assert tool.crossover(replace(result, counts=(second,))).startswith("hopper_cuda is the fastest at every")
    stays = tuning.Tuned("NVIDIA H100", SMALL, (found({SHIPPED: 50.0}),))
    monkeypatch.setattr(tool.tuning, "tune", lambda *words, **options: stays)
    assert "1.000  stays" in CliRunner().invoke(command(), []).stdout
    nothing = tuning.Tuned("NVIDIA H100", SMALL, (found({SHIPPED: 1.0}, {SHIPPED: Discard("wrong")}),))
    monkeypatch.setattr(tool.tuning, "tune", lambda *words, **options: nothing)
    done = CliRunner().invoke(command(), [])
    assert done.exit_code == 1 and "no variant was right" in done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--tokens", "1,x"], "separated by commas"),
        (["--geometry", "odd"], "unknown geometry"),
        (["--tokens", "0"], "above 0"),
    ],
)
def test_wrong_usage_exits_2_with_one_message(words: list[str], text: str) -> None:
    done = CliRunner().invoke(command(), words)
    assert done.exit_code == 2 and text in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_table_is_kept_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("MOE_FAST_TUNING", raising=False)
    table.reread()
    result = moe_fast.tune(tokens=(16,), progress=False)
    assert result.file is not None and result.entries
    sizes = (256, 32, 7168, 2048, 8, 8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table.saved(16, torch.device("cuda", torch.cuda.current_device()), *sizes) == result.entries[0]
    table.reread()
