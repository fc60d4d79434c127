"""moeref bench: what a row holds, who gets no figure, turns, files, and the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moeref.bench.ceilings import Ceilings, measure_ceilings
from moeref.bench.lane import LaneFailed, Study
from moeref.bench.references import published_moe
from moeref.bench.result import BenchFileError, Latency, Result, Row
from moeref.bench.rotation import Work
from moeref.bench.run import Bench, Entry, Options
from moeref.bench.stats import Spread, spread
from moeref.bench.stopwatch import COLD, EAGER, GRAPH, WARM
from moeref.cli import app
from moeref.judge.compare import row_errors
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.report.bench_markdown import to_markdown
from moeref.report.bench_plot import NothingToPlot, write_plot
from moeref.report.bench_table import Table, ceilings_line, summary
from moeref.spec import Problem, SpecError

ONE = "small-t16-o8-iid-model_like-s0"
IDLE = "small-t7-o8-no_local_work-model_like-s0"
CEILINGS = Ceilings(10.0, 8.0, 0.5, "float32 by hand", {})

FILE = """
from _layer import trace_of

def right(*ten, n_group, topk_group, top_k):
    return trace_of(ten, n_group, topk_group, top_k).output

def wrong(*ten, n_group, topk_group, top_k):
    return right(*ten, n_group=n_group, topk_group=topk_group, top_k=top_k) * 2

KEPT = {}
def kept(*ten, n_group, topk_group, top_k):
    "Right for every set of inputs when it is judged: each address is new then."
    where = ten[2].data_ptr(), len(KEPT) < 5
    if where not in KEPT:
        KEPT[where] = right(*ten, n_group=n_group, topk_group=topk_group, top_k=top_k)
        if where[1]:
            return KEPT.setdefault(len(KEPT), KEPT.pop(where))
    return KEPT[where].clone()

CALLS = []
def refuses(*ten, n_group, topk_group, top_k):
    "Some of these values only, after the judge's calls, which the first set of inputs gets."
    CALLS.append(1)
    if len(CALLS) > 2 and ten[8] == 8:
        from moeref.interop.candidates import Unsupported
        raise Unsupported("offset 8 is not a multiple of 16")
    return right(*ten, n_group=n_group, topk_group=topk_group, top_k=top_k)

def dies(*ten, n_group, topk_group, top_k):
    import os
    KEPT[len(KEPT)] = 1
    if len(KEPT) > 4: os._exit(3)
    return right(*ten, n_group=n_group, topk_group=topk_group, top_k=top_k)
"""


@pytest.fixture(scope="module")
def candidate_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The functions of FILE."""
    file = tmp_path_factory.mktemp("bench") / "mine.py"
    folder = Path(__file__).parent / "wrong"
    file.write_text(f"import sys\nsys.path.append({str(folder)!r})\n{FILE}")
    return file


@pytest.fixture(scope="module")
def rows(candidate_file: Path) -> dict[str, Row]:
    """One run of six candidates on one problem, by their names."""
    names = [f"{candidate_file}:{name}" for name in ("right", "wrong", "kept", "refuses", "dies")]
    options = Options(repeat=4, rotations=2, caches=(COLD, WARM), timeout=60)
    with Bench([*names, "hopper_triton"], options) as running:
        found = running.run("one", Problem.parse(ONE), CEILINGS)
    return {row.candidate.rpartition(":")[2]: row for row in found}


def test_a_passing_row_holds_every_figure(rows: dict[str, Row]) -> None:
    row = rows["right"]
    assert (row.status, row.message, row.recipe, row.primary) == ("PASS", "", "exact", "eager cold")
    assert list(row.latencies) == ["eager cold", "eager warm"]
    spread_of = row.latencies["eager cold"].device
    assert spread_of.count == 4 and 0 < spread_of.p10 <= spread_of.median <= spread_of.p90
    assert row.ratio == 1.0 and row.reference is not None and row.reference > 0
    assert (row.local_rows, row.experts_hit) == (11, 6)
    assert row.weight_bytes == 6 * 3 * 256 * 256 and row.flops == 11 * 6 * 256 * 256
    assert row.floor == max(row.weight_bytes / 10e9, row.flops / 0.5e12) and row.bound == "memory"
    assert row.seconds == spread_of.median
    assert row.times_floor == pytest.approx(spread_of.median / row.floor)
    assert row.speedup == pytest.approx(row.reference / spread_of.median)
    assert row.gbps == pytest.approx(row.weight_bytes / spread_of.median / 1e9)
    assert row.tflops == pytest.approx(row.flops / spread_of.median / 1e12)
    assert row.kernels is None and row.workspace is None  # not measured on a CPU


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("wrong", "FAIL", "noise_rows"),
        ("kept", "FAIL", r"call \d+ \(eager, \w+\): \d+ of 16 rows lie further than"),
        ("dies", "ERROR", "exit code 3"),
        ("refuses", "UNSUPPORTED", "^offset 8 is not a multiple of 16$"),
        ("hopper_triton", "UNSUPPORTED", "needs a Hopper GPU"),
    ],
)
def test_without_a_pass_there_is_no_speed(rows: dict[str, Row], name: str, status: str, message: str) -> None:
    row = rows[name]
    assert row.status == status and re.search(message, row.message), row.message
    assert not row.latencies and not row.primary
    assert row.seconds is row.speedup is row.gbps is row.tflops is row.times_floor is row.ratio is row.worst_row is None
    command = (
        "bench" if name in ("kept", "refuses", "dies") else "verify"
    )  # verify can't show what only repeated calls do
    assert row.repeat.startswith(f"moeref {command} ") and f"--problem {ONE}" in row.repeat


def test_a_problem_that_is_refused_in_a_call_leaves_the_next_one_its_turn(candidate_file: Path) -> None:
    problems = [ONE, ONE.replace("-o8-", "-o0-")]
    with Bench([f"{candidate_file}:refuses"], Options(repeat=3, rotations=2)) as running:
        told = [running.run("", Problem.parse(name), CEILINGS)[0] for name in problems]
    assert [row.status for row in told] == ["UNSUPPORTED", "PASS"] and told[1].seconds is not None
    assert not running.tracebacks


def test_nothing_to_test_is_not_timed() -> None:
    with Bench(["torch_grouped"], Options(repeat=3, rotations=2)) as running:
        row = running.run("idle", Problem.parse(IDLE), CEILINGS)[0]
    assert row.status == "INCONCLUSIVE" and not row.latencies


# ---- turns


class FakeLane:
    """Answers at once, and writes down when it was asked."""

    def __init__(self, name: str, log: list[str], seconds: float = 1.0, capture: Exception | None = None) -> None:
        self.candidate, self.log, self.seconds, self._capture = name, log, seconds, capture

    def expect(self, number: int, place: Any, limit: float) -> None:
        self.log.append(f"{self.candidate} expect {limit:g}")

    def warm_up(self) -> None:
        self.log.append(f"{self.candidate} warm")

    def study(self) -> Study:
        return Study(3, 1, 1000, ["a note"])

    def capture(self) -> None:
        if self._capture:
            raise self._capture

    def stop(self) -> None:
        self.log.append(f"{self.candidate} stop")

    def open(self, described: Any) -> None:
        self.log.append(f"{self.candidate} open")

    def measure(self, mode: str, cache: str, calls: int, warm_ups: int) -> list[tuple[float, float | None]]:
        self.log.append(f"{self.candidate} {mode} {cache} {calls}+{warm_ups}")
        return [(self.seconds, 0.1 if mode == EAGER else None)] * calls


def fake(names: list[str], options: Options, log: list[str], **more: Any) -> tuple[Bench, list[Entry]]:
    entries = [Entry(FakeLane(name, log, **more), ways=list(options.ways)) for name in names]  # type: ignore[arg-type]
    return Bench([], options), entries


def gpu(options: Options) -> Options:
    """Options as for a GPU, where there is none."""
    object.__setattr__(options, "modes", (GRAPH, EAGER))
    return options


def test_candidates_take_turns_call_by_call() -> None:
    log: list[str] = []
    bench, entries = fake(["a", "b"], Options(repeat=3), log)
    bench._take_turns(entries)
    assert log == ["a eager cold 1+0", "b eager cold 1+0"] * 3


def test_on_a_gpu_turns_are_blocks_with_a_warm_up() -> None:
    log: list[str] = []
    bench, entries = fake(["a", "b"], Options(repeat=8), log)
    bench.device = torch.device("cuda", 0)
    bench._take_turns(entries)
    assert log == ["a eager cold 5+1", "b eager cold 5+1", "a eager cold 3+1", "b eager cold 3+1"]


def test_the_time_budget_ends_rounds_but_leaves_a_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10000, 5))  # every look at the clock is five seconds later
    monkeypatch.setattr("moeref.bench.run.time.perf_counter", lambda: next(clock))
    log: list[str] = []
    bench, entries = fake(["a"], Options(repeat=30, seconds=1.0), log)
    bench._take_turns(entries)
    assert len(log) == 3


def test_a_capture_that_fails_falls_back_to_eager_calls_in_a_fresh_process() -> None:
    log: list[str] = []
    options = gpu(Options(repeat=3, caches=(COLD, WARM)))
    bench, entries = fake(["a"], options, log, capture=LaneFailed("it waits for the device"))
    entries[0].worst_row = 0.02
    bench._prepare(entries[0], [], [None])  # type: ignore[list-item]
    assert log == ["a expect 0.04", "a warm", "a stop", "a open", "a expect 0.04", "a warm"]
    assert entries[0].ways == [(EAGER, COLD), (EAGER, WARM)]
    assert entries[0].notes == ["a note", "no CUDA graph, eager calls only: it waits for the device"]


def test_a_gpu_row_is_led_by_the_cold_graph_and_has_host_times() -> None:
    log: list[str] = []
    options = gpu(Options(repeat=3, caches=(COLD, WARM)))
    bench, entries = fake(["a"], options, log, seconds=1e-4)
    bench._prepare(entries[0], [], [])
    bench._take_turns(entries)
    row = bench._row("one", Problem.parse(ONE), entries[0], Work(11, 6, 1e6, 1e6), 2e-3, CEILINGS)
    assert row.primary == "graph cold" and list(row.latencies) == [
        "graph cold",
        "graph warm",
        "eager cold",
        "eager warm",
    ]
    assert row.latencies["graph cold"].host is None and row.latencies["eager cold"].host == spread([0.1] * 3)
    assert (row.kernels, row.copies, row.workspace, row.speedup) == (3, 1, 1000, pytest.approx(20))
    table = Table(["one"], ["a"], "cuda")
    assert "graph cold" in table.line(row) and "3+1" in table.line(row)
    assert "eager cold 100 us (host 100000)" in table.below(row)[0]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"repeat": 2}, "at least 3"),
        ({"rotations": 1}, "at least 2"),
        ({"seconds": 0}, "more than 0"),
        ({"reference": "odd"}, "expected one of moeref"),
        ({"modes": (GRAPH,)}, "need a GPU"),
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Options(**wrong)


# ---- references and ceilings


@pytest.mark.parametrize("name", [ONE, "small-t33-o28-deepseek_like-heterogeneous-s0", "small_kimi-t9-o-2-iid-tiny-s1"])
def test_the_published_way_gives_the_same_output(name: str) -> None:
    inputs = make_inputs(Problem.parse(name))
    errors = row_errors(published_moe(inputs), moe(inputs).output)
    assert float(errors.max()) < 2.0**-8  # both are rounded to bfloat16, from sums in another order


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeref.bench.ceilings.CPU_BYTES", 2**24)
    found = measure_ceilings(torch.device("cpu"))
    assert 0.1 < found.read_gbps < 1e4 and 0.1 < found.copy_gbps < 1e4 and 1e-4 < found.tflops < 1e3
    work = Work(1, 1, 3e9, 1e3)
    assert found.floor(work) == pytest.approx(3 / found.read_gbps) and found.bound(work) == "memory"
    assert found.bound(Work(1, 1, 1, 1e15)) == "arithmetic"


# ---- files


def result_of(rows: dict[str, Row]) -> Result:
    return Result({"torch": "2"}, "cpu", {"repeat": 4}, CEILINGS, "moeref", tuple(rows.values()))


def test_json_holds_everything_and_reads_back(rows: dict[str, Row], tmp_path: Path) -> None:
    result = result_of(rows)
    result.write(tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text())
    assert (data["kind"], data["schema"]) == ("moeref bench", 1)
    assert set(data) == {*Result.__dataclass_fields__, "kind", "schema"}
    derived = {"seconds", "speedup", "gbps", "tflops", "times_floor"}
    assert all(set(row) == {*Row.__dataclass_fields__, *derived} for row in data["rows"])
    assert Result.read(tmp_path / "out.json") == result


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda data: data.update(kind="other"), "expected a file that"),
        (lambda data: data.update(schema=99), "schema 99"),
        (lambda data: data["rows"][0].pop("status"), "status"),
        (lambda data: data["ceilings"].pop("read_gbps"), "read_gbps"),
    ],
)
def test_a_file_that_is_something_else(
    rows: dict[str, Row], tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], text: str
) -> None:
    data = result_of(rows).to_json()
    spoil(data)
    (tmp_path / "out.json").write_text(json.dumps(data))
    with pytest.raises(BenchFileError, match=text):
        Result.read(tmp_path / "out.json")


def test_the_markdown_table_is_square_and_shows_no_speed_without_a_pass(rows: dict[str, Row]) -> None:
    page = to_markdown(result_of(rows))
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows) and len({line.count(" | ") for line in lines}) == 1
    failed = next(line for line in lines if ":wrong`" in line)
    assert failed.split("|")[6].strip() == "FAIL" and not re.search(r"\d", "".join(failed.split("|")[8:]))
    assert "noise_rows" in page and "needs a Hopper GPU" in page and "read 10 GB/s" in page


def test_the_terminal_shows_no_speed_without_a_pass(rows: dict[str, Row]) -> None:
    table = Table(["one"], [row.candidate for row in rows.values()], "cpu")
    assert table.line(rows["right"]).split()[5:8] == ["PASS", "eager", "cold"]
    assert table.line(rows["wrong"]).endswith("FAIL") and "repeat: moeref verify" in "\n".join(
        table.below(rows["wrong"])
    )
    told = "\n".join(summary(result_of(rows)))
    assert "1 of 1 timed (1 PASS); 8 timed outputs, all compared" in told and "1 UNSUPPORTED" in told
    assert "x first" in table.header() and "x first" not in Table(["one"], ["a"], "cpu").header()
    assert "0.5 TFLOP/s" in ceilings_line(CEILINGS)


def test_the_plot_is_drawn_or_says_why_not(rows: dict[str, Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    many = [
        replace(rows["right"], seq_len=n, floor=n * 1e-5, latencies=_slower(rows["right"], n)) for n in (1, 16, 901)
    ]
    write_plot(replace(result_of(rows), rows=tuple(many)), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    write_plot(replace(result_of(rows), rows=tuple(many)), tmp_path / "out.svg")
    drawn = (tmp_path / "out.svg").read_text()
    assert "<svg" in drawn and "<!-- floor -->" in drawn and ":right (eager cold) -->" in drawn
    with pytest.raises(NothingToPlot, match="no candidate has passed"):
        write_plot(replace(result_of(rows), rows=(rows["wrong"],)), tmp_path / "none.png")


def _slower(row: Row, times: int) -> dict[str, Latency]:
    one = row.latencies["eager cold"].device
    return {"eager cold": Latency(Spread(one.median * times, one.p10 * times, one.p90 * times, one.count), None)}


# ---- the command line


def test_the_command_writes_its_files_and_shows_an_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("moeref.bench.ceilings.CPU_BYTES", 2**24)
    files = {ending: tmp_path / f"out.{ending}" for ending in ("json", "md", "png")}
    outputs = ["--markdown", str(files["md"]), "--plot", str(files["png"])]
    words = ["bench", "torch_grouped", "hopper_triton", "--problem", ONE, "--repeat", "3", "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--json", str(files["json"]), *outputs])
    assert done.exit_code == 0, done.output
    assert "x floor" in done.output and "needs a Hopper GPU" in done.output
    assert all(file.stat().st_size > 100 for file in files.values())
    files["md"].unlink()
    again = CliRunner().invoke(app, ["bench", "--from", str(files["json"]), "--markdown", str(files["md"])])
    assert again.exit_code == 0 and files["md"].exists()
    rows = [line for line in done.output.splitlines() if line.startswith(ONE)]
    assert rows and all(line in again.output for line in rows)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--mode", "odd"], "expected auto, graph"),
        (["--cache", "odd"], "expected auto, cold"),
        (["--mode", "graph", "--device", "cpu", "--problem", ONE], "CUDA graphs need a GPU"),
        (["--reference", "odd"], "expected one of moeref, published"),
        (["--small", "--all"], "exclude each other"),
        (["--repeat", "-1"], "expected 0 or more"),
        (["--repeat", "1", "--problem", ONE], "at least 3"),
        (["--plot", "out.doc"], "ends in .png"),
        (["--json", "/nowhere/at/all.json"], "does not exist"),
        (["--problem", "nonsense"], "expected GEOMETRY"),
        (["--problem", "small-t4-o8-odd-model_like-s0"], "unknown routing kind"),
        (["--workloads", "zzz"], "expected the start of one of"),
        (["no_such_candidate", "--problem", ONE], "no_such_candidate"),
        (["--from", "no_such.json"], "no_such.json"),
        (["torch_grouped", "--from", "x.json"], "no candidates or problems"),
    ],
)
def test_wrong_usage_exits_2_with_one_message(words: list[str], text: str) -> None:
    done = CliRunner().invoke(app, ["bench", *words])
    assert done.exit_code == 2, done.output
    assert text in done.output and "Traceback" not in done.output
