"""FlashInfer-Bench's data sets: what is read, judged and written; and that its own package runs what we write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fib_data import (
    DESTINATION,
    SHARED,
    SMALL,
    TEN,
    TRITON,
    put_definition,
    put_routing,
    put_solution,
    put_workloads,
    solution_json,
    with_core,
    workload_json,
)

from moeref.interop.flashinfer_bench import (
    FibError,
    append_traces,
    capture_routing,
    definition_json,
    definition_name,
    export,
    prepare,
    read_data_set,
    read_definition,
    read_workloads,
)
from moeref.make import make_inputs
from moeref.reference import moe
from moeref.routings import ELSEWHERE
from moeref.spec import PRESETS, Geometry, Problem, SpecError
from moeref.verify import Options
from moeref.verify_data_set import Judged, jobs, judge_job
from moeref.workloads import WORKLOADS

DEFINITIONS = {"dsv3": "topk8_ng8_kg4_e32", "kimi": "topk8_ng1_kg1_e48", "kimi_full": "topk8_ng1_kg1_e384"}
HERE = Options(isolate=False)

published = pytest.mark.skipif(not SHARED.is_dir(), reason="the published definitions are not beside the project")


def judged(root: Path, options: Options = HERE, **wanted: Any) -> dict[str, Judged]:
    """Everything of a data set judged: solution/uuid -> what came out."""
    data = read_data_set(root)
    found, _ = jobs(data, **wanted)
    return {f"{one.job.name}/{one.workload.short}": one for job in found for one in judge_job(data, job, options)}


def statuses(root: Path, options: Options = HERE, **wanted: Any) -> dict[str, str]:
    return {label: one.outcome.verdict.status for label, one in judged(root, options, **wanted).items()}


@published
@pytest.mark.parametrize("preset", DEFINITIONS)
def test_the_published_definitions_load(preset: str) -> None:
    path = SHARED / f"definition_{DEFINITIONS[preset]}_h7168_i2048.json"
    definition = read_definition(path)
    assert definition.geometry == PRESETS[preset]
    assert definition.name == definition_name(PRESETS[preset])
    data = json.loads(path.read_text())
    ours = definition_json(PRESETS[preset])
    for part in ("inputs", "outputs"):  # the same tensors, axis by axis
        assert list(ours[part]) == list(data[part])
        for name, one in data[part].items():
            assert {key: one[key] for key in ("shape", "dtype")} == ours[part][name]


@published
def test_the_published_workloads_load() -> None:
    found = read_workloads(SHARED / "moe_workloads.jsonl")
    assert sorted((one.uuid, one.seq_len, one.offset) for one in found) == sorted(
        (one.uuid, one.seq_len, one.offset) for one in WORKLOADS
    )
    assert all(one.factor == 2.5 and set(one.blobs) == {"routing_logits", "routing_bias"} for one in found)


@pytest.mark.parametrize("preset", PRESETS)
def test_our_own_definitions_load(preset: str, tmp_path: Path) -> None:
    assert read_definition(put_definition(tmp_path, PRESETS[preset])).geometry == PRESETS[preset]


@pytest.mark.parametrize("preset", ["small", "small_kimi"])
def test_the_exported_reference_computes_the_same(preset: str) -> None:
    """It shares no code with moeref.reference; float32 sums in another order differ by less than a bf16 step."""
    names: dict[str, Any] = {}
    exec(definition_json(PRESETS[preset])["reference"], names)
    for kind in ("iid-model_like", "all_negative-heterogeneous", "fib_random-published"):
        inputs = make_inputs(Problem.parse(f"{preset}-t40-o6-{kind}-s2"))
        ours, theirs = moe(inputs).unrounded, names["run"](*inputs.args()).float()
        row = ours.norm(dim=1)
        assert bool((row > 0).any())
        assert bool(((ours - theirs).norm(dim=1) <= 2**-8 * row).all())  # half a step of bf16 is 2**-9 of an element


def test_solutions_of_both_styles_and_languages_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_definition(tmp_path)
    put_workloads(tmp_path, workload_json("aaaa1111", inputs=put_routing(tmp_path)), workload_json("bbbb2222"))
    wrong = DESTINATION.replace("core(" + TEN, "2 * core(" + TEN)
    for data in (
        solution_json("returns"),
        with_core("writes", DESTINATION),
        with_core("triton", TRITON, language="triton", dependencies=["triton>=3"]),
        with_core("wrong", wrong),
        solution_json("cuda", spec={"language": "cuda", "binding": "tvm-ffi", "entry_point": "k.cu::run"}),
        solution_json("tilelang", spec={"language": "tilelang"}),
        solution_json("needs", spec={"dependencies": ["no-such-package==1.0", "torch"]}),
    ):
        put_solution(tmp_path, data)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = judged(tmp_path)
    assert len(found) == 14  # seven solutions on two workloads
    by_solution = {label.split("/")[0]: one.outcome.verdict for label, one in found.items()}
    assert {name: verdict.status for name, verdict in by_solution.items()} == {
        "returns": "PASS",
        "writes": "PASS",
        "wrong": "FAIL",
        **dict.fromkeys(("triton", "cuda", "tilelang", "needs"), "UNSUPPORTED"),
    }
    assert "language cuda: only python and triton" in by_solution["cuda"].message
    assert "needs a GPU, or TRITON_INTERPRET=1" in by_solution["triton"].message
    assert "declares to need no-such-package==1.0, not installed" in by_solution["needs"].message
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert set(statuses(tmp_path, Options(), solutions=["triton"]).values()) == {"PASS"}  # a process that sees it


def test_a_solution_has_its_definitions_groups_built_in(tmp_path: Path) -> None:
    from moeref.interop.candidates import load

    path = put_solution(tmp_path, solution_json("one"))
    candidate = load(str(path), tmp_path / "scratch")
    cpu = torch.device("cpu")
    assert candidate.unsupported(SMALL, cpu) is None
    assert "it is written for" in (candidate.unsupported(PRESETS["small_kimi"], cpu) or "")
    takes = f"def run({TEN}, *, n_group, topk_group, top_k): pass"
    path = put_solution(tmp_path, solution_json("two", sources=[{"path": "main.py", "content": takes}]))
    assert load(str(path), tmp_path / "scratch").unsupported(PRESETS["small_kimi"], cpu) is None


def test_workloads_make_the_inputs_that_they_describe(tmp_path: Path) -> None:
    put_definition(tmp_path)
    whole = Problem.parse("small-t6-o8-iid-heterogeneous-s3")
    export(whole, tmp_path)
    half = workload_json("cccc3333", inputs={"routing_logits": put_routing(tmp_path)["routing_logits"]})
    put_workloads(
        tmp_path,
        (tmp_path / f"workloads/moe/{definition_name(SMALL)}.jsonl").read_text().strip(),
        workload_json("aaaa1111", inputs=put_routing(tmp_path)),
        workload_json("bbbb2222"),
        half,
    )
    data = read_data_set(tmp_path)
    assert not data.broken
    definition = data.definitions[definition_name(SMALL)]
    full, captured, drawn, mixed = (prepare(one, definition, tmp_path, 4) for one in data.workloads[definition.name])
    made, expected = full.make(full.problem), make_inputs(whole)
    for name, tensor in expected.tensors().items():
        assert torch.equal(tensor.view(torch.uint8), getattr(made, name).view(torch.uint8)), name
    assert (made.local_expert_offset, made.routed_scaling_factor) == (8, 2.5)
    assert drawn.problem.name == "small-t6-o8-fib_random-published-s4"
    assert captured.problem.routing.startswith("captured_") and captured.problem.values == "published"
    random, logits = drawn.make(drawn.problem), captured.make(captured.problem).routing_logits
    both = mixed.make(mixed.problem)
    assert torch.equal(both.routing_logits, logits) and torch.equal(both.routing_bias, random.routing_bias)
    assert not torch.equal(logits, random.routing_logits)
    assert torch.equal(both.gemm1_weights_scale, random.gemm1_weights_scale)


def test_captured_routing_replays_by_name_from_the_same_files(tmp_path: Path) -> None:
    put_definition(tmp_path)
    put_workloads(tmp_path, workload_json("aaaa1111", inputs=put_routing(tmp_path)))
    (name,) = capture_routing(tmp_path)
    problem = Problem(SMALL, 6, 8, name, "published", 0)
    inputs = make_inputs(problem)
    del ELSEWHERE[name]
    with pytest.raises(SpecError, match=r"is read from files: .* --routing-from"):
        make_inputs(problem)
    assert capture_routing(tmp_path / "blob/routing.safetensors") == [name]
    again = make_inputs(Problem.parse(problem.name))
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(_eight(inputs), _eight(again), strict=True)
    )
    fewer = make_inputs(Problem(SMALL, 2, 8, name, "published", 0))
    assert torch.equal(fewer.routing_logits, inputs.routing_logits[:2])
    with pytest.raises(SpecError, match="has 6 tokens"):
        make_inputs(Problem(SMALL, 7, 8, name, "published", 0))
    with pytest.raises(SpecError, match="has 32 experts, small_kimi has 24"):
        make_inputs(Problem(PRESETS["small_kimi"], 4, 6, name, "published", 0))
    put_routing(tmp_path, seq_len=5)
    assert capture_routing(tmp_path / "blob/routing.safetensors") != [name]  # other bytes, another name


def _eight(inputs: Any) -> list[torch.Tensor]:
    return list(inputs.tensors().values())


def test_export_refuses_what_would_not_be_the_same(tmp_path: Path) -> None:
    problem = Problem.parse("small-t6-o8-iid-model_like-s3")
    with pytest.raises(FibError, match="use that kind, or write all"):
        export(problem, tmp_path, only_routing=True)
    assert not list(tmp_path.iterdir())
    export(problem, tmp_path)
    with pytest.raises(FibError, match="already"):
        export(problem, tmp_path)
    other = Geometry(16, 8, 256, 256, 4, 4, 2)  # E does not stand in a definition's name
    with pytest.raises(FibError, match=r"is of geometry e32l8.*the problem of e16l8"):
        export(Problem(other, 6, 0, "iid", "model_like", 0), tmp_path)
    assert len(read_workloads(tmp_path / f"workloads/moe/{definition_name(SMALL)}.jsonl")) == 1


# ---- with FlashInfer-Bench's own package


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path_factory.mktemp("fib_cache")))
    return pytest.importorskip("flashinfer_bench.data", reason="flashinfer-bench is not installed")


def test_a_folder_made_by_its_own_classes_round_trips(package: Any, tmp_path: Path) -> None:
    root = tmp_path / "data_set"
    definition = package.Definition(**definition_json(SMALL))
    name = definition.name
    package.save_json_file(definition, root / f"definitions/moe/{name}.json")
    store = package.TraceSet(root=root, definitions={name: definition})
    inputs = make_inputs(Problem.parse("small-t6-o8-iid-published-s0"))
    routing = {"routing_logits": inputs.routing_logits, "routing_bias": inputs.routing_bias}
    path = store.add_workload_blob_tensor(name, "aaaa1111", routing)
    spec = workload_json(
        "aaaa1111", inputs={key: package.SafetensorsInput(path=path, tensor_key=key) for key in routing}
    )
    random = workload_json("bbbb2222", seq_len=3)
    store.add_workload_traces([package.Trace(**spec), package.Trace(**random)])
    for data in (solution_json("right"), with_core("wrong", DESTINATION.replace("core(" + TEN, "2 * core(" + TEN))):
        solution = package.Solution(**data)
        package.save_json_file(solution, root / f"solutions/tester/moe/{name}/{solution.name}.json")

    found = judged(root)
    assert {label: one.outcome.verdict.status for label, one in found.items()} == {
        "right/aaaa1111": "PASS",
        "right/bbbb2222": "PASS",
        "wrong/aaaa1111": "FAIL",
        "wrong/bbbb2222": "FAIL",
    }
    lines = root / f"traces/moe/{name}.jsonl"
    lines.parent.mkdir(parents=True)
    append_traces(lines, [one.trace("cpu") for one in found.values()])  # type: ignore[misc]

    loaded = package.TraceSet.from_path(str(root))
    assert [one.workload.uuid for one in loaded.workloads[name]] == ["aaaa1111", "bbbb2222"]
    by_name = {f"{one.solution}/{one.workload.uuid}": one for one in loaded.traces[name]}
    assert {label: one.evaluation.status.value for label, one in by_name.items()} == {
        "right/aaaa1111": "PASSED",
        "right/bbbb2222": "PASSED",
        "wrong/aaaa1111": "INCORRECT_NUMERICAL",
        "wrong/bbbb2222": "INCORRECT_NUMERICAL",
    }
    assert by_name["right/aaaa1111"].workload == loaded.workloads[name][0].workload
    assert by_name["right/aaaa1111"].evaluation.correctness.extra["matched_ratio"] == 1.0
    assert by_name["right/aaaa1111"].evaluation.performance.speedup_factor == 0.0


def test_its_evaluator_runs_what_we_export_and_agrees(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole evaluator on the CPU: only the wait for a GPU is taken out."""
    from flashinfer_bench.bench.config import BenchmarkConfig
    from flashinfer_bench.bench.evaluators.lowbit import LowBitEvaluator
    from flashinfer_bench.compile import BuilderRegistry

    problem = Problem.parse("small-t16-o8-iid-model_like-s1")
    done = export(problem, tmp_path)
    noisy = DESTINATION.replace("core(" + TEN + ")", "core(" + TEN + ") * 1.01")
    for data in (solution_json("right"), with_core("off_by_1_percent", noisy)):
        put_solution(tmp_path, data)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    store = package.TraceSet.from_path(str(tmp_path))
    (definition,) = store.definitions.values()
    (line,) = store.workloads[done.definition.split("/")[-1].removesuffix(".json")]
    config = BenchmarkConfig(num_trials=1, rtol=0.2, atol=0.1, required_matched_ratio=0.85, profile_baseline=False)
    baseline = LowBitEvaluator.build_baseline(definition, line.workload, config, "cpu", tmp_path)
    for given, tensor in zip(baseline.inputs[0], make_inputs(problem).tensors().values(), strict=False):
        assert torch.equal(given.view(torch.uint8), tensor.view(torch.uint8))
    ours = judged(tmp_path)
    for solution in store.solutions[definition.name]:
        runnable = BuilderRegistry.get_instance().build(definition, solution)
        theirs, failure = LowBitEvaluator.check_correctness(
            definition, runnable, baseline.inputs, baseline.outputs, config, "", "cpu"
        )
        figures = ours[f"{solution.name}/{line.workload.uuid[:8]}"].outcome.verdict.figures
        assert failure is None and theirs.extra["matched_ratio"] == figures.matched["published"] == 1.0
        if solution.name != "right":  # its reference and ours may differ by one bf16 step of an element, 2**-7
            assert math.isclose(theirs.max_absolute_error, figures.max_absolute_error, rel_tol=0.5)
            assert theirs.max_absolute_error > 0
    assert ours[f"off_by_1_percent/{done.uuid[:8]}"].outcome.verdict.status == "FAIL"  # what the criterion lets through


def test_largest_errors_are_its_own(package: Any) -> None:
    from flashinfer_bench.bench.config import BenchmarkConfig
    from flashinfer_bench.bench.utils import compute_error_stats

    from moeref.judge.compare import CRITERIA, largest_errors, matched_per_token

    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1500, 64, generator=generator).bfloat16()
    output = (reference.float() * (1 + 0.3 * torch.randn(1500, 64, generator=generator))).bfloat16()
    config = BenchmarkConfig(rtol=0.2, atol=0.1, required_matched_ratio=0.85)
    most_abs, most_rel, _, ratio = compute_error_stats(output, reference, config)
    assert largest_errors(output, reference) == (most_abs, most_rel)
    assert math.isclose(float(matched_per_token(output, reference, CRITERIA["published"]).mean()), ratio, rel_tol=1e-12)
    output[3, 3] = math.nan
    assert all(math.isnan(one) for one in largest_errors(output, reference))


STATUSES = {
    "right": ("return core(*ten)", "PASSED"),
    "nan": ("out = core(*ten); out[0] = float('nan'); return out", "INCORRECT_NUMERICAL"),
    "inf": ("out = core(*ten); out[0] = float('inf'); return out", "INCORRECT_NUMERICAL"),
    "short": ("return core(*ten)[:-1]", "INCORRECT_SHAPE"),
    "float": ("return core(*ten).float()", "INCORRECT_DTYPE"),
    "integer": ("return core(*ten).int()", "INCORRECT_DTYPE"),
    "raises": ("raise RuntimeError('no')", "RUNTIME_ERROR"),
    "hangs": ("import time; time.sleep(600)", "TIMEOUT"),
}


def test_every_verdict_is_a_trace_that_its_models_load(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeref.verify.LEAST_START", 6.0)  # else a first call may take 30 s
    put_definition(tmp_path)
    put_workloads(tmp_path, workload_json("aaaa1111"))
    for name, (body, _) in STATUSES.items():
        put_solution(tmp_path, with_core(name, f"from .core import run as core\ndef run(*ten):\n    {body}\n"))
        data = json.loads((tmp_path / f"solutions/tester/moe/{definition_name(SMALL)}/{name}.json").read_text())
        data["spec"]["destination_passing_style"] = False
        put_solution(tmp_path, data)
    put_solution(tmp_path, with_core("unimportable", "import no_such_module_at_all"))
    put_solution(tmp_path, with_core("other_name", "def kernel(*ten): pass"))
    put_solution(tmp_path, solution_json("cuda", spec={"language": "cuda"}))
    found = judged(tmp_path, solutions=[name for name in STATUSES if name != "hangs"])
    found |= judged(tmp_path, solutions=["unimportable", "other_name", "cuda"])
    found |= judged(tmp_path, Options(timeout=0.5), solutions=["hangs"])
    traces = {label.split("/")[0]: one.trace("cpu") for label, one in found.items()}
    assert traces.pop("cuda") is None
    path = tmp_path / "traces.jsonl"
    path.write_text('{"kept": true}')  # without a line end
    append_traces(path, [one for one in traces.values() if one is not None])
    first, *lines = path.read_text().splitlines()
    assert first == '{"kept": true}'
    loaded = {one.solution: one.evaluation for one in (package.Trace.model_validate_json(line) for line in lines)}
    expected = {name: status for name, (_, status) in STATUSES.items()}
    expected |= dict.fromkeys(("unimportable", "other_name"), "COMPILE_ERROR")
    assert {name: evaluation.status.value for name, evaluation in loaded.items()} == expected
    assert math.isnan(loaded["nan"].correctness.max_absolute_error)
    assert loaded["inf"].correctness.max_absolute_error == math.inf
    assert all(one.environment.hardware and one.environment.libs["torch"] for one in loaded.values())
