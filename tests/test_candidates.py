"""How a text becomes a candidate, and what is said when it can't."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from moeref.interop import candidates as module
from moeref.interop.candidates import Candidate, CandidateBroken, CandidateError, known, load, locate
from moeref.spec import PRESETS

TEN = "a, b, c, d, e, f, g, h, i, j"
CPU = torch.device("cpu")


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def ten(extra: str = "") -> Any:
    return eval(f"lambda {TEN}{extra}: None")


@pytest.mark.parametrize(
    ("extra", "argument"),
    [
        ("", None),
        (", out", "out"),
        (", output=None", "output"),
        (", *, out", "out"),
        (", buffer", ""),
        (", workspace=None", None),
        (", out, workspace", "out"),
        (", /, buffer", ""),
        (", buffer, /", ""),
        (", n_group, topk_group, top_k", None),
        (", buffer, n_group, topk_group, top_k", ""),
        (", **rest", None),
    ],
)
def test_the_signature_says_how_the_output_goes(extra: str, argument: str | None) -> None:
    assert Candidate("x", ten(extra)).output_argument == argument


def test_a_declaration_goes_before_the_signature() -> None:
    assert Candidate("x", ten(", out"), destination_passing=False).output_argument is None
    assert Candidate("x", ten(), destination_passing=True).output_argument == ""
    assert Candidate("x", ten(", *, out"), destination_passing=True).output_argument == "out"
    assert Candidate("x", lambda *ten: None, destination_passing=True).output_argument == ""
    assert Candidate("x", dict).output_argument is None  # no signature to read


def test_the_groups_are_passed_to_those_who_take_all_three() -> None:
    assert Candidate("x", ten(", *, n_group, topk_group, top_k=8")).geometry_keywords == module.GEOMETRY_KEYWORDS
    assert Candidate("x", ten(", *, n_group")).geometry_keywords == ()
    assert Candidate("x", ten(", *, n_group, topk_group, top_k"), takes_geometry=False).geometry_keywords == ()
    assert Candidate("x", ten(", **rest"), takes_geometry=True).geometry_keywords == module.GEOMETRY_KEYWORDS


def test_a_file_with_and_without_function(tmp_path: Path) -> None:
    path = write(tmp_path, f"def run({TEN}): return 'run'\ndef other({TEN}): return 'other'\n")
    assert load(str(path)).run(*range(10)) == "run"
    assert load(f"{path}:other").run(*range(10)) == "other"
    assert load(f"{path}::other").name == f"{path}::other"


def test_files_of_one_name_stay_apart_and_import_their_siblings(tmp_path: Path) -> None:
    for word in ("one", "two"):
        (tmp_path / word).mkdir()
        write(tmp_path / word, f"WORD = '{word}'\n", f"sibling_{word}.py")
        write(tmp_path / word, f"from sibling_{word} import WORD\ndef run({TEN}): return WORD\n")
    first, second = (load(f"{tmp_path / word / 'mine.py'}:run") for word in ("one", "two"))
    assert (first.run(*range(10)), second.run(*range(10))) == ("one", "two")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def run(a): pass\ndef kernel(a): pass\n", "it has run, kernel"),
        ("def mine(a): pass\n", "it has none of run, kernel, moe.*found mine"),
        ("x = 1\n", "found no function"),
    ],
)
def test_a_file_without_one_obvious_function(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CandidateError, match=said):
        load(str(write(tmp_path, text)))


def test_near_misses_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "def fused_moe(a): pass\nnumber = 3\n")
    with pytest.raises(CandidateError, match=r"no function 'fused_mo'; did you mean fused_moe\?"):
        load(f"{path}:fused_mo")
    with pytest.raises(CandidateError, match="expected a function, 'number' is int; found fused_moe"):
        load(f"{path}:number")
    with pytest.raises(CandidateError, match=r"no file .*mime.py .*did you mean mine.py\?"):
        locate(f"{tmp_path / 'mime.py'}:run")
    with pytest.raises(CandidateError, match=r"the folder .* does not exist"):
        locate("no/such/folder/mine.py:run")
    with pytest.raises(CandidateError, match=r"unknown candidate 'torch_grupped'.*did you mean torch_grouped\?"):
        locate("torch_grupped")


@pytest.mark.parametrize("text", ["", "a/b", ":run", "package:", "a/b:run"])
def test_a_text_that_means_nothing(text: str) -> None:
    with pytest.raises(CandidateError, match=r"expected path/to/file.py:function"):
        load(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module_at_all\n", "needs the module 'no_such_module_at_all'"),
        ("def run(:\n", "syntax error.*line 1"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)\n", r"called sys.exit\(3\)"),
    ],
)
def test_code_that_cannot_be_imported(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CandidateBroken, match=said) as caught:
        load(str(write(tmp_path, text)))
    assert "Traceback" in caught.value.traceback and "Traceback" not in str(caught.value)


def test_a_module_and_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("moe_fast.backends.torch_grouped:run").output_argument == "out"
    monkeypatch.chdir(tmp_path)
    write(tmp_path, f"def run({TEN}): return 5\n", "module_in_cwd.py")
    assert load("module_in_cwd:run").run(*range(10)) == 5
    with pytest.raises(CandidateBroken, match="needs the module 'no_such_package'"):
        load("no_such_package.part:run")


def test_moeref_declares(tmp_path: Path) -> None:
    text = f"""
MOEREF = {{"recipe": "requant", "deterministic": True, "summary": "mine"}}
def run({TEN}): pass
def other({TEN}): pass
other.MOEREF = {{"recipe": "exact", "destination_passing": True}}
"""
    path = write(tmp_path, text)
    run, other = load(f"{path}:run"), load(f"{path}:other")
    assert (run.recipe, run.deterministic, run.output_argument, run.summary) == ("requant", True, None, "mine")
    assert (other.recipe, other.deterministic, other.output_argument) == ("exact", True, "")


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ("3", "MOEREF must be a dict, got int"),
        ("{'recpie': 'exact'}", r"unknown key 'recpie'; did you mean recipe\?"),
        ("{'deterministic': 1}", "must be a bool, got 1"),
        ("{'recipe': 'odd'}", "unknown recipe 'odd'"),
    ],
)
def test_a_wrong_declaration(tmp_path: Path, declared: str, said: str) -> None:
    with pytest.raises(CandidateError, match=said):
        load(str(write(tmp_path, f"MOEREF = {declared}\ndef run({TEN}): pass\n")))


def test_known_names() -> None:
    found = known()
    assert {"moe_fast", "torch_grouped", "reference"} <= set(found)
    assert load("torch_grouped").recipe == "exact" and load("moe_fast").name == "moe_fast"


def test_a_broken_entry_point_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("theirs", "no_such_package:candidates", module.GROUP)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    found = known()
    assert "torch_grouped" in found
    reason = found["theirs"].unsupported(PRESETS["dsv3"], CPU)
    assert reason is not None and "no_such_package" in reason


def solution(**changes: Any) -> dict[str, Any]:
    spec = {"language": "python", "entry_point": "pkg/main.py::run", "target_hardware": ["cpu"], "dependencies": []}
    sources = [
        {"path": "pkg/main.py", "content": f"from .part import WORD\ndef run({TEN}, output): return WORD\n"},
        {"path": "pkg/part.py", "content": "WORD = 'from part'\n"},
    ]
    whole = {
        "name": "my_solution",
        "definition": "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048",
        "author": "me",
        "spec": {**spec, **changes.pop("spec", {})},
        "sources": sources,
    }
    return {**whole, **changes}


def solution_file(folder: Path, data: Any) -> str:
    return str(write(folder, json.dumps(data), "solution.json"))


def test_a_solution_runs_from_its_sources(tmp_path: Path) -> None:
    candidate = load(solution_file(tmp_path, solution()), folder=tmp_path / "scratch")
    assert candidate.name == "my_solution" and candidate.output_argument == "output"
    assert candidate.run(*range(11)) == "from part"
    assert list((tmp_path / "scratch").rglob("main.py"))
    returning = solution_file(tmp_path, solution(spec={"destination_passing_style": False}))
    assert load(returning, folder=tmp_path / "other").output_argument is None


def test_a_solution_that_needs_a_build_is_unsupported(tmp_path: Path) -> None:
    candidate = load(solution_file(tmp_path, solution(spec={"language": "cuda", "entry_point": "a.cu::f"})))
    reason = candidate.unsupported(PRESETS["dsv3"], CPU)
    assert reason is not None and "cuda" in reason


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "name: expected str, got nothing"),
        (solution(name=3, author=None), "name: expected str, got 3; author: expected str, got nothing"),
        (solution(definition="gemm_n256"), "definition: expected moe_fp8_block_scale"),
        (solution(spec={"entry_point": "pkg/main.py"}), "entry_point: expected FILE::FUNCTION"),
        (solution(spec={"entry_point": "other.py::run"}), "FILE one of pkg/main.py"),
        (solution(spec={"entry_point": "pkg/main.py::runn"}), r"no function 'runn'; did you mean run\?"),
        (solution(sources=[{"path": "../x.py", "content": ""}], spec={"entry_point": "../x.py::run"}), "leads out"),
        (solution(sources=[{"path": "/x.py", "content": ""}], spec={"entry_point": "/x.py::run"}), "leads out"),
        (solution(sources=[{"path": "a\\..\\..\\x.py", "content": ""}]), "leads out"),
        (solution(sources=[{"path": "a.py"}]), "content: expected str, got nothing"),
    ],
)
def test_a_wrong_solution(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises(CandidateError, match=said):
        load(solution_file(tmp_path, data), folder=tmp_path / "scratch")
    assert {path.name for path in tmp_path.iterdir()} <= {"solution.json", "scratch"}


def test_a_solution_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match="expected a FlashInfer-Bench solution in JSON"):
        locate(str(write(tmp_path, "{", "solution.json")))


def test_candidates_py_brings_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['torch'] = None; import moeref.interop.candidates, moeref.interop.solution"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_laws_can_be_declared_inexact(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"
    file.write_text('MOEREF = {"inexact": "permutation,duplicates"}\n\ndef run(*ten): ...\n')
    assert load(f"{file}:run").inexact == "permutation,duplicates"
