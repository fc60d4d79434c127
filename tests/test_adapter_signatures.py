"""Every call that an adapter makes binds to the real function's signature: as recorded, and as installed here."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from real_signatures import installed, parse, recorded, version_of
from stand_ins import candidates, sgl_kernel

from moe_fast.backends import _sglang_gate
from moeref.make import make_inputs
from moeref.spec import Problem

Calls = dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]


def calls_of(name: str, old_gate: bool = False) -> Calls:
    """Library function -> the arguments of each call that one call of the adapter makes."""
    module, _ = candidates.VARIANTS[name]
    calls: Calls = {}

    def spy(attribute: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(attribute, []).append((args, kwargs))
            return function(*args, **kwargs)

        return call

    library = sgl_kernel.library(old_gate) if old_gate else candidates.LIBRARIES[module]()
    if old_gate:
        library.moe_fused_gate = sgl_kernel.moe_fused_gate_old
    watched = {key: spy(key, value) if key in module.FUNCTIONS else value for key, value in vars(library).items()}
    inputs = make_inputs(Problem.parse("small-t9-o8-iid-model_like-s0"))
    groups = {key: getattr(inputs.geometry, key) for key in ("n_group", "topk_group", "top_k")}
    candidates.over(name, SimpleNamespace(**watched))(*inputs.args(), **groups)
    return calls


def bind(signature: inspect.Signature, calls: list[Any], what: str, adapter: str) -> None:
    """Fail with one sentence where a call does not fit."""
    for args, kwargs in calls:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            pytest.fail(f"{what} no longer takes the call of moe_fast/backends/{adapter}.py: {error}", pytrace=False)


def places(name: str, attribute: str) -> tuple[str, ...]:
    """The dotted names at which a release may have the function."""
    module, _ = candidates.VARIANTS[name]
    wanted: tuple[str, ...] = module.FUNCTIONS[attribute]
    if attribute == "moe_fused_gate":
        return tuple(place for place in wanted if not place.startswith("sgl_kernel."))
    return wanted


PAIRS = [(name, attribute) for name, (module, _) in candidates.VARIANTS.items() for attribute in module.FUNCTIONS]
UNCALLED = {
    ("flashinfer_trtllm", "autotune"), ("flashinfer_trtllm_shuffled", "autotune"),
    ("flashinfer_trtllm_no_pdl", "autotune"), ("deep_gemm", "masked"), ("deep_gemm_masked", "contiguous"),
    ("sglang_blockwise", "sgl_per_token_group_quant_8bit"), ("sglang_blockwise_swap", "sgl_per_token_group_quant_8bit"),
    ("sglang_blockwise_improved", "silu_and_mul"),
    ("sglang_blockwise_improved", "sgl_per_token_group_quant_8bit"),
}  # fmt: skip
"""Functions that a variant does not call."""


@pytest.mark.parametrize(("name", "attribute"), PAIRS)
def test_calls_bind_to_the_recorded_signature(name: str, attribute: str) -> None:
    calls = calls_of(name).get(attribute, [])
    assert bool(calls) == ((name, attribute) not in UNCALLED), "the variant's calls have changed"
    entries = {place: recorded()[place] for place in places(name, attribute) if place in recorded()}
    assert entries or attribute == "alignment", f"{attribute} is not in tests/signatures.json"
    for place, entry in entries.items():
        bind(parse(entry["signature"]), calls, f"{place} of {entry['of']}", candidates.VARIANTS[name][0].__name__)


@pytest.mark.parametrize(("name", "attribute"), PAIRS)
def test_calls_bind_to_the_installed_signature(name: str, attribute: str) -> None:
    wanted = places(name, attribute)
    versions = {place: version_of(place) for place in wanted}
    present = [place for place in wanted if versions[place]]
    if not present:
        pytest.skip(f"{wanted[0].split('.')[0]} is not installed")
    signatures = {place: installed(place) for place in present}
    found = {place: signature for place, signature in signatures.items() if signature is not None}
    if not found and attribute in ("moe_fused_gate", "alignment"):
        pytest.skip(f"{attribute} can't be read without a GPU here")
    if not found:
        pytest.fail(f"{versions[present[0]]} has no {' or '.join(present)} any more", pytrace=False)
    calls = calls_of(name).get(attribute, [])
    for place, signature in found.items():
        bind(signature, calls, f"{place} of {versions[place]}", candidates.VARIANTS[name][0].__name__)


def test_the_old_gates_call_binds_too() -> None:
    entry = recorded()["sgl_kernel.moe_fused_gate"]
    calls = calls_of("sglang_blockwise", old_gate=True)["moe_fused_gate"]
    bind(parse(entry["signature"]), calls, entry["of"], _sglang_gate.__name__)


def test_a_changed_signature_fails_with_a_clear_message() -> None:
    calls = calls_of("sglang_blockwise")["shuffle_rows"]
    with pytest.raises(pytest.fail.Exception, match=r"x 9 no longer takes the call of .*sglang_blockwise.py: missing"):
        bind(parse("(input_tensor, dst2src_map, shape, stream)"), calls, "shuffle_rows of x 9", "sglang_blockwise")


@pytest.mark.parametrize("place", sorted(recorded()))
def test_stand_ins_have_the_real_parameters(place: str) -> None:
    """A stand-in takes no argument that the real function does not have; positional ones stand in the same places."""
    attribute = {
        "m_grouped_fp8_fp4_gemm_nt_contiguous": "contiguous", "m_grouped_fp8_fp4_gemm_nt_masked": "masked",
    }.get(place.rpartition(".")[2], place.rpartition(".")[2])  # fmt: skip
    function = sgl_kernel.moe_fused_gate_old if place == "sgl_kernel.moe_fused_gate" else None
    for library in candidates.LIBRARIES.values():
        function = function or getattr(library(), attribute, None)
    assert function is not None
    ours = list(inspect.signature(function).parameters.values())
    real = list(parse(recorded()[place]["signature"]).parameters.values())
    assert {one.name for one in ours} <= {one.name for one in real}
    needed = [one.name for one in real if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    assert [one.name for one in ours][: len(needed)] == needed
