"""moeref under torchrun: the same results with any number of ranks, and what happens when one dies or hangs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as distributed
from ep_torchrun import PROBLEMS, finish, outcomes, rank_processes, slow_kernel, start

from moeref.ranks.board import LARGEST, Board
from moeref.ranks.world import World

CANDIDATES = Path(__file__).parent / "ep_candidates.py"
EP = ["small-t32-o0-iid-model_like-s0", "small-t12-o16-ties-model_like-s3"]

on_request = pytest.mark.skipif(
    "MOEREF_SLOW" not in os.environ, reason="half a minute each: MOEREF_SLOW=1 pytest tests/test_ranks_runs.py"
)


def words(problems: list[str]) -> list[str]:
    return [word for problem in problems for word in ("--problem", problem)]


def compare_ep(tmp_path: Path, candidate: str, ranks: list[int]) -> list[dict[str, object]]:
    """Run --ep with each number of ranks; every run must give the same. Returns what they gave."""
    found = []
    for count in ranks:
        target = tmp_path / f"{count}.json"
        code, output = finish(start(count, "verify", candidate, "--ep", *words(EP), "--json", str(target)))
        assert code in (0, 1), output
        found.append(outcomes(target))
    assert all(one == found[0] for one in found)
    return found[0]


def test_torchrun_alone_makes_ranks() -> None:
    other = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert World.of(other) is None  # a pod of another launcher
    place = World.of({**other, "TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"})
    assert place is not None and (place.rank, place.size, place.hosted) == (0, 1, False)
    assert place.device("cpu") == "cpu" and place.backend("cpu") == "gloo"


def test_the_board_holds_objects_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    store = distributed.HashStore()
    monkeypatch.setattr(World, "open_store", lambda *arguments: store)
    board = Board(World(0, 1, 0, 1, "", 0, False, 0))
    assert board.get("x") is None
    for what in ("short", bytes(2 * LARGEST + 1)):
        board.put("x", what)
        assert board.get("x") == what
    assert [board.first("y", 1), board.first("y", 2)] == [1, 1]
    assert [board.take_number("n") for _ in range(3)] == [0, 1, 2]


def test_a_fault_of_one_rank_alone_is_found_and_its_rank_named(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    run = start(2, "verify", f"{CANDIDATES}:wrong_on_rank_one", "--ep", *words(EP[:1]), "--json", str(target))
    code, output = finish(run)
    assert code == 1, output
    assert "shard 2 (experts 16..23, rank 1), shard 3 (experts 24..31, rank 1)" not in output  # each its own expert
    assert "shard 2 (experts 16..23, rank 1) missing: it leaves out expert 16" in output
    (outcome,) = outcomes(target)
    assert [shard["sign"] for shard in outcome["shards"]] == ["", "", "missing", "missing"]


def test_a_rank_that_dies_and_one_that_hangs_lose_one_problem_each(tmp_path: Path) -> None:
    candidate, target = slow_kernel(tmp_path, hostile=True), tmp_path / "out.json"
    begun = time.monotonic()
    run = start(2, "verify", candidate, *words(PROBLEMS[:6]), "--rank-limit", "15", "--json", str(target))
    code, output = finish(run)
    assert code == 1, output
    assert time.monotonic() - begun < 120
    found = outcomes(target)
    assert [one["problem"] for one in found] == PROBLEMS[:6]
    assert [one["status"] for one in found] == ["PASS", "PASS", "ERROR", "PASS", "ERROR", "PASS"]
    assert "its process was ended by SIGKILL" in found[2]["message"] and found[2]["message"].startswith("rank ")
    assert "no end after 15 s; its process was killed" in found[4]["message"]
    assert "4 of 6 PASS (4 PASS, 2 ERROR)" in output


@pytest.mark.slow
@on_request
def test_wrong_usage_is_said_once(tmp_path: Path) -> None:
    code, output = finish(start(2, "verify", f"{CANDIDATES}:no_such", *words(PROBLEMS[:1])))
    assert code == 1  # torchrun makes 1 of every other code
    assert output.count("no function 'no_such'") == 1, output


@pytest.mark.slow
@on_request
@pytest.mark.parametrize("candidate", ["torch_grouped", f"{CANDIDATES}:offset_subtracted_twice"])
def test_ep_does_not_depend_on_the_number_of_ranks(tmp_path: Path, candidate: str) -> None:
    found = compare_ep(tmp_path, candidate, [1, 2, 4, 8])
    assert [one["problem"] for one in found] == EP


def dealt(tmp_path: Path, ranks: int) -> list[dict[str, object]]:
    target = tmp_path / f"{ranks}.json"
    command = ["verify", f"{CANDIDATES}:last_local_expert_dropped", *words(PROBLEMS), "--json", str(target)]
    code, output = finish(start(ranks, *command))
    assert code == 1, output
    return outcomes(target)


@pytest.mark.slow
@on_request
def test_verdicts_and_their_order_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    found = [dealt(tmp_path, ranks) for ranks in (1, 2, 4)]
    assert found[0] == found[1] == found[2]
    assert [one["problem"] for one in found[0]] == PROBLEMS


@pytest.mark.slow
@on_request
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_the_process_that_torchrun_started_is_killed_or_stopped(
    tmp_path: Path, rank: int, kind: signal.Signals
) -> None:
    """torchrun ends the run then; what is left reports, and a stopped process is not waited for."""
    target = tmp_path / "out.json"
    run = start(2, "verify", slow_kernel(tmp_path, 0.6), *words(PROBLEMS), "--json", str(target))
    rank_processes(run, 1 - rank, "moeref.ranks.child")
    rank_processes(run, rank, "moeref.interop.worker")
    time.sleep(3)
    victim = next(p for p in rank_processes(run, rank, "verify"))
    os.kill(victim, kind)
    begun = time.monotonic()
    code, output = finish(run)
    assert code == 1 and time.monotonic() - begun < 60, output
    found = outcomes(target)
    assert [one["problem"] for one in found] == PROBLEMS
    statuses = [one["status"] for one in found]
    assert statuses.count("PASS") >= 5 and set(statuses) == {"PASS", "ERROR"}, output
    assert f"rank {rank}" in output and "gives no sign" in output


@pytest.mark.slow
@on_request
def test_a_rank_that_dies_under_ep_loses_one_problem(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    command = ["verify", slow_kernel(tmp_path, hostile=True), "--ep", *words(PROBLEMS[:6]), "--rank-limit", "8"]
    code, output = finish(start(2, *command, "--json", str(target)))
    assert code == 1, output
    assert [one["status"] for one in outcomes(target)] == ["PASS", "PASS", "ERROR", "PASS", "ERROR", "PASS"]


@pytest.mark.slow
@on_request
def test_fuzz_draws_and_shrinks_alike_with_any_number_of_ranks(tmp_path: Path) -> None:
    said = []
    for ranks in (1, 3):
        database = str(tmp_path / str(ranks))
        command = ["fuzz", f"{CANDIDATES}:last_local_expert_dropped", "--examples", "30", "--database", database]
        code, output = finish(start(ranks, *command))
        assert code == 1, output
        drawn = output[output.index("problems drawn (") :].partition(")")[0]
        said.append((drawn, output[output.index("smallest failing problem") :].partition("\n")[0]))
    assert said[0] == said[1]


@pytest.mark.slow
@on_request
def test_bench_times_each_problem_on_one_rank(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    command = ["bench", "torch_grouped", *words(PROBLEMS[:3]), "--seconds", "1", "--json", str(target)]
    code, output = finish(start(2, *command))
    assert code == 0, output
    rows = json.loads(target.read_text())["rows"]
    assert [row["problem"] for row in rows] == PROBLEMS[:3]
    assert all(row["status"] == "PASS" and row["latencies"] for row in rows)
