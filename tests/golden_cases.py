"""Golden cases for tests: copies that may be damaged, small problems recorded as published ones are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from moeref.golden import Case, CaseResult, cases, find, write_case
from moeref.golden.catalogue import PUBLISHED, Spec
from moeref.spec import EXACT, Problem

WRONG = Path(__file__).parent / "wrong"
PLAIN = "small-t16-o0-iid-model_like-s0"
ROUNDED = "small-t5-o8-iid-published-s1@bf16_gemm1+requant"
DEEPSEEK = "small-t12-o24-deepseek_like-model_like-s0"
BALANCED = "small-t8-o8-balanced-heterogeneous-s0"
OPEN = "small-t64-o8-ties-model_like-s0"  # sums of two scores tie between groups but for float noise
SMALL = [case for case in cases(everything=True) if not case.sampled]


def copied(name: str, folder: Path) -> Case:
    """The project's case, in a folder of the test's own."""
    original = find([name])[0]
    case = Case(original.spec, folder)
    case.path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".safetensors"):
        shutil.copy(original.path.with_suffix(suffix), case.path.with_suffix(suffix))
    return case


def change(case: Case, stage: str, edit: Callable[[torch.Tensor], None], resealed: bool) -> None:
    """Edit one tensor of a case; resealed: with the manifest's digests made to fit, as a wrong recording has them."""
    manifest, tensors = case.manifest(), case.tensors(case.manifest())
    edit(tensors[stage])
    if resealed:
        case.save(manifest, tensors)
    else:
        save_file(tensors, case.path.with_suffix(".safetensors"))


def flip(bit: int, where: int = 0) -> Callable[[torch.Tensor], None]:
    """Flips one bit of the element at this flat position."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def edit(tensor: torch.Tensor) -> None:
        flat = tensor.view(-1).view(width[tensor.element_size()])
        flat[where] ^= 1 << bit

    return edit


def swap_ids(tensor: torch.Tensor) -> None:
    tensor[2, [0, 1]] = tensor[2, [1, 0]]


def sampled_case(folder: Path, problem: str) -> Case:
    """A case of the published kind, of a small problem."""
    case = Case(Spec("sampled", Problem.parse(problem), EXACT, PUBLISHED), folder)
    assert write_case(case, "a test")
    return case


def diverged(result: CaseResult) -> list[str]:
    """Stages that are not as recorded, in order."""
    return [one.stage for one in result.diverged]


def tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Truncated to 10 fraction bits."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)


def bf16(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to bfloat16."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)
