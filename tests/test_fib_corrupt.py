"""A data set from elsewhere: what is wrong is named in one sentence; nothing runs, nothing is written outside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fib_data import (
    SMALL,
    blob,
    put,
    put_definition,
    put_routing,
    put_solution,
    put_workloads,
    solution_json,
    workload_json,
)
from safetensors.torch import save_file

from moeref.inputs import TENSOR_FIELDS, expected_layout
from moeref.interop.flashinfer_bench import (
    FibError,
    definition_json,
    definition_name,
    export,
    read_data_set,
    read_definition,
    read_workloads,
)
from moeref.interop.solution import leads_out
from moeref.spec import Problem
from moeref.verify import Options
from moeref.verify_data_set import jobs, judge_job

HERE = Options(isolate=False)
NAME = definition_name(SMALL)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A data set beside a secret file and an empty folder; whatever a test does, nothing else may appear outside."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.safetensors").write_bytes(b"")
    root = tmp_path / "data_set"
    root.mkdir()
    put_definition(root)
    put_workloads(root, workload_json("aaaa1111"))
    put_solution(root, solution_json("right"))
    return root


def everything_outside(root: Path) -> set[str]:
    return {str(path.relative_to(root.parent)) for path in root.parent.rglob("*") if root not in (path, *path.parents)}


def judged(root: Path, **wanted: Any) -> list[tuple[str, str]]:
    """(status, message) of every solution and workload, then of every broken part."""
    data = read_data_set(root)
    found, _ = jobs(data, **wanted)
    outcomes = [one.outcome.verdict for job in found for one in judge_job(data, job, HERE)]
    return [(one.status, one.message) for one in outcomes] + [("ERROR", one.message) for one in data.broken]


def one_error(root: Path, said: str, status: str = "ERROR") -> None:
    """The data set gives exactly one ERROR, in one line that holds `said`; nothing was written outside."""
    wrong = [(came, message) for came, message in judged(root) if came != "PASS"]
    assert len(wrong) == 1, wrong
    assert wrong[0][0] == status and said in wrong[0][1] and "\n" not in wrong[0][1], wrong
    assert everything_outside(root) == {"outside", "outside/secret.safetensors"}


def test_the_world_is_right(world: Path) -> None:
    assert judged(world) == [("PASS", "")]


# ---- paths


@pytest.mark.parametrize(
    "path", ["../outside/secret.safetensors", "blob/../../outside/secret.safetensors", "/etc/passwd"]
)
def test_a_blob_path_that_leads_out_is_not_read(world: Path, path: str) -> None:
    put_workloads(world, workload_json("aaaa1111", inputs={"routing_logits": blob(path, "routing_logits")}))
    one_error(world, "which leads out of it; nothing was read")


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_link_that_leads_out_is_not_followed(world: Path, by_folder: bool) -> None:
    outside = world.parent / "outside"
    if by_folder:
        (world / "blob").symlink_to(outside, target_is_directory=True)
    else:
        (world / "blob").mkdir()
        (world / "blob/secret.safetensors").symlink_to(outside / "secret.safetensors")
    inputs = {"routing_bias": blob("blob/secret.safetensors", "routing_bias")}
    put_workloads(world, workload_json("aaaa1111", inputs=inputs))
    one_error(world, "is a link that leads out of the data set")


@pytest.mark.parametrize("part", ["definitions", "workloads", "solutions"])
def test_files_that_are_links_out_are_not_read(world: Path, part: str) -> None:
    target = world.parent / "outside/secret.safetensors"
    ending = "jsonl" if part == "workloads" else "json"
    folder = world / part / "other" / NAME
    folder.mkdir(parents=True)
    link = folder / f"{NAME}.{ending}"
    link.symlink_to(target)
    one_error(world, "is a link that leads out of the data set")


def test_a_link_within_the_data_set_is_fine(world: Path) -> None:
    inputs = put_routing(world, "blob/real.safetensors")
    (world / "blob/alias.safetensors").symlink_to("real.safetensors")
    inputs["routing_bias"] = blob("blob/alias.safetensors", "routing_bias")
    put_workloads(world, workload_json("aaaa1111", inputs=inputs))
    assert judged(world) == [("PASS", "")]


@pytest.mark.parametrize(
    ("path", "out"),
    [
        *((path, False) for path in ("a.py", "a/./b.py", "..a/b..py")),
        *((path, True) for path in ("", ".", "..", "/a", "a/../b", "..\\b", "C:\\b", "C:b", "a\0b", "\\\\host\\b")),
    ],
)
def test_what_leads_out(path: str, out: bool) -> None:
    assert leads_out(path) is out


def _sentinel(world: Path) -> str:
    """Code that shows by a file that it was run."""
    return f"open({str(world.parent / 'outside/sentinel')!r}, 'w').close()\ndef run(*ten): pass\n"


def test_the_sentinel_shows_when_code_runs(world: Path) -> None:
    put_solution(world, solution_json("runs", sources=[{"path": "main.py", "content": _sentinel(world)}]))
    judged(world)
    assert "outside/sentinel" in everything_outside(world)


@pytest.mark.parametrize("path", ["../outside/sentinel.py", "{outside}/sentinel.py", "a/../../outside/sentinel.py"])
@pytest.mark.parametrize("language", ["python", "cuda"])
def test_a_source_path_that_leads_out_writes_and_runs_nothing(world: Path, path: str, language: str) -> None:
    path = path.format(outside=world.parent / "outside")
    code = _sentinel(world)
    for entry in (path, "main.py"):
        sources = [{"path": path, "content": code}, {"path": "main.py", "content": code}]
        spec = {"entry_point": f"{entry}::run", "language": language}
        put_solution(world, solution_json("bad", sources=sources, spec=spec))
        one_error(world, "leads out of its folder")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec": {"entry_point": "../../outside/secret.py::run"}}, "entry_point: expected FILE::FUNCTION"),
        ({"sources": [{"path": "main.py", "content": "{code}"}] * 2}, "'main.py' stands there twice"),
        ({"definition": "moe_fp8_block_scale_ds_routing_topk1_ng1_kg1_e1_h128_i128"}, "no definition"),
        ({"sources": [{"path": "main.py"}]}, "content: expected str, got nothing"),
        ({"spec": {"entry_point": "main.txt::run"}}, "entry_point"),
        ({"spec": {"dependencies": "torch"}}, "dependencies: expected list"),
    ],
)
def test_a_malformed_solution_runs_nothing(world: Path, changes: dict[str, Any], said: str) -> None:
    changes = json.loads(json.dumps(changes).replace('"{code}"', json.dumps(_sentinel(world))))
    sources = changes.pop("sources", [{"path": "main.py", "content": _sentinel(world)}])
    put_solution(world, solution_json("bad", sources=sources, **changes))
    one_error(world, said)


def test_sources_that_can_not_lie_together(world: Path) -> None:
    sources = [{"path": name, "content": _sentinel(world)} for name in ("main.py/x.py", "main.py")]
    put_solution(world, solution_json("bad", sources=sources))
    one_error(world, "can't be written")


def test_reading_and_showing_run_nothing(world: Path) -> None:
    from moeref.report.show_fib import describe

    put_solution(world, solution_json("bad", sources=[{"path": "main.py", "content": _sentinel(world)}]))
    put_definition(world, reference=_sentinel(world))
    assert any("solution bad by tester" in line for line in describe(world))
    assert everything_outside(world) == {"outside", "outside/secret.safetensors"}


def test_export_does_not_follow_links_out(world: Path) -> None:
    (world / "blob").symlink_to(world.parent / "outside", target_is_directory=True)
    with pytest.raises(FibError, match="link that leads out of the data set: nothing was written"):
        export(Problem(SMALL, 4, 0, "iid", "model_like", 0), world)
    assert everything_outside(world) == {"outside", "outside/secret.safetensors"}
    assert len(read_workloads(world / f"workloads/moe/{NAME}.jsonl")) == 1


# ---- JSON


BAD_TEXTS = ["{", "[]", "null", "", '{"name": 3}', "[" * 100_000, '{"name": "\\ud800"}']


@pytest.mark.parametrize("text", BAD_TEXTS, ids=range(len(BAD_TEXTS)))
def test_bad_json_is_one_error_of_its_file(world: Path, text: str) -> None:
    bad = put(world, f"definitions/moe/{NAME.replace('_e8_', '_e9_')}.json", text)
    one_error(world, str(bad))
    bad.unlink()
    bad = put(world, f"solutions/tester/moe/{NAME}/bad.json", text)
    one_error(world, str(bad))
    bad.unlink()
    if text:  # an empty line is no line
        lines = put_workloads(world, workload_json("aaaa1111"), text)
        one_error(world, f"{lines} line 2")


def test_bytes_that_are_no_text(world: Path) -> None:
    bad = put(world, f"definitions/moe/{NAME.replace('_e8_', '_e9_')}.json", "")
    bad.write_bytes(b"\xff\xfe")
    one_error(world, "expected a FlashInfer-Bench definition in UTF-8")


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"routing_logits": {"type": "zeros"}}, "routing_logits: expected type random or safetensors"),
        (
            {"routing_logits": {"type": "safetensors", "path": 3, "tensor_key": "x"}},
            "routing_logits.path: expected a string",
        ),
        ({"local_expert_offset": {"type": "random"}}, "local_expert_offset: expected type scalar"),
        ({"local_expert_offset": {"type": "scalar", "value": 8.5}}, "expected a whole number, got 8.5"),
        ({"local_expert_offset": {"type": "scalar", "value": True}}, "local_expert_offset: expected type scalar"),
        ({"local_expert_offset": {"type": "scalar", "value": 32}}, "offset=32: expected -7..31"),
        ({"routed_scaling_factor": {"type": "scalar", "value": "2.5"}}, "routed_scaling_factor: expected type scalar"),
        ({"weights": {"type": "random"}}, "got ['weights']"),
    ],
)
def test_a_malformed_workload(world: Path, inputs: dict[str, Any], said: str) -> None:
    put_workloads(world, workload_json("aaaa1111", inputs=inputs), workload_json("bbbb2222"))
    one_error(world, said)


def test_axes_uuids_and_definitions_of_workloads(world: Path) -> None:
    one = workload_json("bbbb2222")
    for change, said in (
        ({"workload": {**one["workload"], "axes": {"seq_len": -1}}}, "seq_len: expected 0 or more, got -1"),
        ({"workload": {**one["workload"], "axes": {}}}, "seq_len: expected an integer, got nothing"),
        ({"workload": {**one["workload"], "uuid": "aaaa1111"}}, "the workload aaaa1111 stands in the data set twice"),
        ({"workload": None}, "workload: expected an object, got nothing"),
        ({"definition": NAME + "0"}, f"no definition {NAME}0"),
        ({"solution": "mine"}, "solution: expected null in a workload, got 'mine'"),
    ):
        put_workloads(world, workload_json("aaaa1111"), {**one, **change})
        one_error(world, said)
    with pytest.raises(FibError, match=r"line 2 is no workload"):
        read_workloads(world / f"workloads/moe/{NAME}.jsonl")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["axes"].pop("hidden_size"), "axis hidden_size: expected an integer, got nothing"),
        (
            lambda d: d["axes"]["hidden_size"].update(value=512),
            "axis hidden_size: expected 256 as in the name, got 512",
        ),
        (lambda d: d["axes"]["num_hidden_blocks"].update(value=3), "axis num_hidden_blocks: expected 2"),
        (lambda d: d["axes"]["num_experts"].update(value=30), "E=30 must be a multiple of n_group=4"),
        (lambda d: d["axes"]["seq_len"].update(type="const"), "axis seq_len: expected a variable one"),
        (
            lambda d: d["inputs"]["hidden_states_scale"]["shape"].reverse(),
            "hidden_states_scale: expected shape [2, seq_len]",
        ),
        (
            lambda d: d["inputs"]["routing_bias"].update(dtype="float32"),
            "routing_bias: expected dtype bfloat16, got 'float32'",
        ),
        (lambda d: d["inputs"].pop("routing_bias"), "inputs: expected routing_logits, routing_bias"),
        (lambda d: d["outputs"].clear(), "outputs: expected output alone, got none"),
        (lambda d: d["outputs"]["output"].update(dtype="float16"), "output: expected dtype bfloat16, got 'float16'"),
        (lambda d: d.update(name=d["name"].replace("_kg2", "")), "which holds the routing groups"),
        (lambda d: d.update(inputs=[]), "inputs: expected an object"),
    ],
)
def test_a_malformed_definition(tmp_path: Path, change: Any, said: str) -> None:
    data = definition_json(SMALL)
    change(data)
    with pytest.raises(FibError) as caught:
        read_definition(put(tmp_path, "d.json", data))
    assert said in str(caught.value)


# ---- blobs


@pytest.mark.parametrize("name", TENSOR_FIELDS)
def test_blobs_of_another_shape_dtype_or_key(world: Path, name: str) -> None:
    shape, dtype = expected_layout(SMALL, 6)[name]
    right = torch.zeros(shape).to(dtype)
    longer, other = torch.zeros(*shape[:-1], shape[-1] + 1).to(dtype), torch.zeros(shape, dtype=torch.float16)
    (world / "blob").mkdir()
    kind = str(dtype).removeprefix("torch.")
    for tensor, key, said in (
        (longer, name, f"{name}: expected {list(shape)} {kind}, "),
        (other, name, f"{list(shape)} F16"),
        (right, "elsewhere", f"has no tensor '{name}'; it has ['elsewhere']"),
    ):
        save_file({key: tensor}, world / "blob/x.safetensors")
        put_workloads(world, workload_json("aaaa1111", inputs={name: blob("blob/x.safetensors", name)}))
        one_error(world, said)


def test_blobs_that_are_missing_truncated_pointers_or_not_finite(world: Path) -> None:
    inputs = put_routing(world)
    put_workloads(world, workload_json("aaaa1111", inputs=inputs))
    path = world / "blob/routing.safetensors"
    whole = path.read_bytes()
    for content, said in (
        (whole[:-1], "is no safetensors file that can be read"),
        (whole[:7], "is no safetensors file that can be read"),
        (b"", "is no safetensors file that can be read"),
        (b"\xff" * 64, "is no safetensors file that can be read"),
    ):
        path.write_bytes(content)
        one_error(world, said)
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 14446592\n")
    one_error(world, "is a Git LFS pointer to 14446592 bytes", status="UNSUPPORTED")
    logits = torch.zeros(6, 32)
    logits[2, 3] = torch.nan
    save_file({"routing_logits": logits, "routing_bias": torch.zeros(32, dtype=torch.bfloat16)}, path)
    one_error(world, "holds 1 NaN or inf")
    path.unlink()
    one_error(world, "no file 'blob/routing.safetensors'")
    os.mkfifo(path)  # opening it would wait for ever
    one_error(world, "expected a regular file")
    path.unlink()
    path.symlink_to(path)
    one_error(world, "can't be opened")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FibError, match="no folder"):
        read_data_set(tmp_path / "nowhere")
    with pytest.raises(FibError, match="expected one of the folders definitions, workloads, solutions"):
        read_data_set(tmp_path)
    put(tmp_path, "definitions/gemm/gemm_n256.json", "{")
    data = read_data_set(tmp_path)  # other operations are none of our business, broken or not
    assert not data.definitions and not data.broken
