"""The tables that moe_fast.tune keeps: files, lookups, and what the pipelines take from them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_fast import tuning
from moe_fast.target import Target
from moe_fast.tuning import table
from moe_fast.tuning.search import Count, Drawn, Timing, Variant
from moe_fast.tuning.table import Entry, Key, TableError
from moeref.inputs import Inputs
from moeref.make import make_inputs
from moeref.spec import PRESETS, Geometry, Problem

pytest.importorskip("triton")

from moe_fast.kernels.experts import Tiling
from moe_fast.tools import tune as tool

SMALL = PRESETS["small"]
CPU = torch.device("cpu")
CUT, OTHER, THIRD = (Tiling(16, 32, 64, 4, stages, 3, 2) for stages in (2, 3, 4))

TARGET = Target("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * 2**30, "3.9.0")
ENTRIES = (
    Entry(7, "hopper_few_tokens", CUT, 40.0, 50.0),
    Entry(80, "hopper_triton", OTHER, 300.0, 310.0),
    Entry(901, "hopper_cuda", None, 480.0, None),
)


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Key]:
    """The key of a card that is not there, in a folder of its own."""
    monkeypatch.setenv("MOE_FAST_CACHE", str(tmp_path / "kept"))
    monkeypatch.delenv(table.VARIABLE, raising=False)
    monkeypatch.setattr(table, "target_of", lambda device: TARGET)
    table.reread()
    yield Key.of(TARGET, SMALL)
    table.reread()


def saved(tokens: int, geometry: Geometry = SMALL, device: str = "cuda:0") -> Entry | None:
    g = geometry
    sizes = (g.num_experts, g.num_local_experts, g.hidden_size, g.intermediate_size, g.top_k, g.n_group, g.topk_group)
    return table.saved(tokens, torch.device(device), *sizes)


def test_a_table_comes_back_as_it_was_and_later_counts_join_it(key: Key) -> None:
    assert table.load(key) == ()
    path = table.save(key, ENTRIES)
    assert path == key.path and path.name == f"tuning-nvidia-h100-80gb-hbm3-132sm-{SMALL.code}.json"
    assert table.load(key) == ENTRIES
    newer = Entry(80, "hopper_cuda", OTHER, 290.0, 310.0)
    table.save(key, [newer, Entry(16, "hopper_triton", CUT, 1.0, 2.0)])
    assert [one.tokens for one in table.load(key)] == [7, 16, 80, 901] and table.load(key)[2] == newer
    assert list(path.parent.iterdir()) == [path]  # no half-written file


@pytest.mark.parametrize(
    ("tokens", "entry"),
    [(1, None), (2, 0), (7, 0), (8, None), (19, None), (20, 1), (80, 1), (81, None), (226, 2), (901, 2), (902, None)],
)
def test_a_call_takes_the_nearest_count_at_or_above_within_reach(tokens: int, entry: int | None) -> None:
    assert table.entry_for(tokens, ENTRIES) == (None if entry is None else ENTRIES[entry])


def test_a_lookup_reads_no_file_after_the_first(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    table.save(key, ENTRIES)
    reads: list[Key] = []
    real = table.load
    monkeypatch.setattr(table, "load", lambda key: reads.append(key) or real(key))
    assert [saved(tokens) for tokens in (7, 7, 80, 81, 901)] == [ENTRIES[0], ENTRIES[0], ENTRIES[1], None, ENTRIES[2]]
    assert saved(7, device="cpu") is None and saved(7, replace(SMALL, top_k=2)) is None
    assert [one.geometry for one in reads] == [SMALL.code, replace(SMALL, top_k=2).code]


def test_a_table_that_is_kept_while_the_process_runs_is_taken_up(key: Key) -> None:
    assert saved(7) is None
    table.save(key, ENTRIES)
    assert saved(7) == ENTRIES[0]
    assert tuning.forget() == [key.path] and saved(7) is None and tuning.forget() == []


def test_the_environment_turns_tables_off(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    table.save(key, ENTRIES)
    monkeypatch.setenv(table.VARIABLE, "0")
    assert saved(7) is None


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda d: d.update(sources="0123"), "measured with sources 0123"),
        (lambda d: d.update(triton="3.5.0"), "measured with triton 3.5.0, here is 3.9.0"),
        (lambda d: d.update(multiprocessors=114), "multiprocessors 114"),
        (lambda d: d.update(schema=2), "expected kind"),
        (lambda d: d.update(entries={}), "expected a list"),
        (lambda d: d["entries"].append(d["entries"][0]), "same tokens"),
        (lambda d: d["entries"][0].update(pipeline="sglang"), "pipeline sglang"),
        (lambda d: d["entries"][0].update(tokens=-1), "tokens -1"),
        (lambda d: d["entries"][1].update(tiling=None), "pipeline hopper_triton"),
        (lambda d: d["entries"][1]["tiling"].update(tile_rows=10**6), "tile_rows 1000000"),
        (lambda d: d["entries"][1]["tiling"].update(pdl=1), "pdl 1"),
        (lambda d: d["entries"][1]["tiling"].pop("warps"), "warps"),
        (lambda d: d["entries"][1].pop("us"), "us"),
        (lambda d: d["entries"].append(3), "not as expected"),
    ],
)
def test_a_stale_or_malformed_table_is_ignored_with_one_warning(
    key: Key, edit: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    change(table.save(key, ENTRIES), edit)
    with pytest.raises(TableError, match=reason):
        table.load(key)
    with pytest.warns(RuntimeWarning, match=reason) as told:
        assert [saved(tokens) for tokens in (7, 80, 901)] == [None] * 3
    assert len(told) == 1
    message = str(told[0].message)
    assert str(key.path) in message and "moe_fast.tune()" in message and "forget()" in message


def test_a_file_that_is_no_json_or_can_not_be_read_is_ignored_with_a_warning(key: Key) -> None:
    key.path.parent.mkdir()
    for spoil in (lambda: key.path.write_text('{"kind"'), lambda: key.path.write_bytes(b"\xff\xfe{")):
        spoil()
        table.reread()
        with pytest.warns(RuntimeWarning, match="is ignored: it"):
            assert saved(7) is None
    table.save(key, ENTRIES)  # a new table replaces it
    assert saved(7) == ENTRIES[0]


def test_a_changed_kernel_changes_the_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("kernels", "pipelines"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.cu").write_text("1")
    (tmp_path / "tuning").mkdir()
    monkeypatch.setattr(table, "__file__", str(tmp_path / "tuning" / "table.py"))
    seen = {table.source_hash.__wrapped__()}
    (tmp_path / "pipelines" / "one.cu").write_text("2")
    seen.add(table.source_hash.__wrapped__())
    (tmp_path / "pipelines" / "one.cu").rename(tmp_path / "kernels" / "two.cu")
    seen.add(table.source_hash.__wrapped__())
    (tmp_path / "kernels" / "notes.txt").write_text("no source")
    assert len(seen) == 3 and table.source_hash.__wrapped__() in seen


def test_a_folder_that_can_not_be_written_is_one_warning(key: Key, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file where the folder should be")
    timing = Timing(Variant("hopper_cuda"), (1.0, 1.0, 1.0))
    count = Count(16, Drawn(5, 4, 8), (timing,), (), timing.variant, timing.variant, None)
    result = tuning.Tuned("card", SMALL, (count,))
    with pytest.warns(RuntimeWarning, match="can't be written .*MOE_FAST_CACHE"):
        assert tuning.keep(result, key).file is None


def test_the_command_forgets_tables(key: Key) -> None:
    table.save(key, ENTRIES)
    app = tool.typer.Typer()
    app.command()(tool.main)
    done = CliRunner().invoke(app, ["--forget"])
    assert done.exit_code == 0 and f"removed: {key.path}" in done.stdout.replace("\n", "") and not key.path.exists()
    assert "no table is kept" in CliRunner().invoke(app, ["--forget"]).stdout


# ---- what calls take


@functools.cache
def inputs_of(tokens: int) -> Inputs:
    return make_inputs(Problem.parse(f"small-t{tokens}-o8-iid-model_like-s0"))


def test_hopper_takes_the_tables_pipeline_and_the_shipped_one_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fast.backends import hopper

    taken: list[str] = []
    in_cuda: list[bool] = []

    def note(name: str, more: dict[str, Any]) -> None:
        taken.append(name)
        in_cuda.append(more.get("cuda_routing", False))

    for name, module in hopper.BY_NAME.items():
        monkeypatch.setattr(module, "run", lambda *ten, name=name, **more: note(name, more))
    asked = []

    def fake(*key: Any) -> Entry | None:
        asked.append(key)
        return {7: ENTRIES[2], 901: ENTRIES[1], 16: ENTRIES[0]}.get(key[0])

    monkeypatch.setattr(hopper, "saved", fake)
    g = SMALL
    for tokens in (7, 16, 901, 160, 161):
        ten = [torch.empty(0)] * 8
        ten[1], ten[2] = torch.empty(g.num_experts), torch.empty(tokens, g.hidden_size)
        ten[6] = torch.empty(g.num_local_experts, g.hidden_size, g.intermediate_size)
        hopper.run(*ten, 0, 2.5, n_group=g.n_group, topk_group=g.topk_group, top_k=g.top_k)
    assert taken == ["hopper_cuda", "hopper_few_tokens", "hopper_triton", "hopper_triton", "hopper_cuda"]
    assert in_cuda == [name == "hopper_triton" for name in taken]
    assert asked[0] == (7, CPU, *(value for value in asdict(g).values()))


def test_the_triton_pipeline_takes_the_tables_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fast.pipelines import hopper_triton as pipeline

    taken: list[Tiling] = []
    monkeypatch.setattr(pipeline, "_run_slice", lambda *arguments: taken.append(arguments[-3]))
    monkeypatch.setattr(pipeline, "saved", lambda tokens, *sizes: {1024: ENTRIES[0], 7: ENTRIES[2]}.get(tokens))
    inputs = inputs_of(1031)
    groups = {"n_group": SMALL.n_group, "topk_group": SMALL.topk_group, "top_k": SMALL.top_k}
    pipeline.run(*inputs.args(), **groups)  # slices of 1024 and 7 tokens; the second entry has no tiling
    assert taken == [CUT, pipeline.choose_tiling(7)]
    pipeline.run(*inputs.args(), **groups, tiling=THIRD)
    assert taken[2:] == [THIRD, THIRD]
    pipeline.release_workspaces()
