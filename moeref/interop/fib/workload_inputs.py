"""Workload -> the ten inputs: blobs read, scalars taken, 'random' drawn as FlashInfer-Bench draws, but with a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moeref.inputs import TENSOR_FIELDS, Inputs, expected_layout
from moeref.interop.fib.blobs import check_blob, read_blob
from moeref.interop.fib.captured import capture
from moeref.interop.fib.definition import Definition
from moeref.interop.fib.files import FibError
from moeref.interop.fib.workload import Workload
from moeref.make import Allocate, make_inputs, zeros
from moeref.routings import draw_routing
from moeref.spec import Problem, SpecError

ROUTING = ("routing_logits", "routing_bias")

RANDOM_VALUES = "published"
"""The value kind that draws as FlashInfer-Bench draws tensors of type 'random'."""

RANDOM_ROUTING = "fib_random"


@dataclass(frozen=True)
class Prepared:
    """A workload ready to be judged.

    problem   routing read from files is a routing kind of its own: where only routing is read, the problem's name says
              everything, and `moeref verify --problem NAME --routing-from DATASET` makes the same inputs.
    """

    problem: Problem
    workload: Workload
    root: Path  # of the data set

    @property
    def from_files(self) -> list[str]:
        """Inputs other than routing that are read from files."""
        return [name for name in self.workload.blobs if name not in ROUTING]

    def make(self, problem: Problem, allocate: Allocate = zeros) -> Inputs:
        """The ten inputs on the CPU, with moeref.make.make_inputs' signature. Raises FibError."""
        inputs = make_inputs(problem, allocate=allocate)
        layout = expected_layout(problem.geometry, problem.seq_len)
        for name in self.from_files:
            blob = self.workload.blobs[name]
            tensor = read_blob(self.root, blob.path, blob.tensor_key, name, *layout[name])
            getattr(inputs, name).view(torch.uint8).copy_(tensor.view(torch.uint8))
        return inputs


def prepare(workload: Workload, definition: Definition, root: Path, seed: int = 0) -> Prepared:
    """Read the workload's routing, name its problem, and see that its other blobs can be had.

    seed: of everything drawn; FlashInfer-Bench draws without one. Raises FibError, its kind FibUnsupported for a Git
    LFS pointer.
    """
    if workload.definition != definition.name:
        raise FibError(f"workload {workload.short}: its definition is {workload.definition}, not {definition.name}")
    try:
        drawn = Problem(
            definition.geometry, workload.seq_len, workload.offset, RANDOM_ROUTING, RANDOM_VALUES, seed, workload.factor
        )
    except SpecError as error:
        raise FibError(f"workload {workload.short}: {error}") from error
    layout = expected_layout(definition.geometry, workload.seq_len)
    try:
        read = {
            name: read_blob(root, blob.path, blob.tensor_key, name, *layout[name])
            for name, blob in workload.blobs.items()
            if name in ROUTING
        }
        for name in TENSOR_FIELDS:  # said before anything is computed, though read only when its turn comes
            if name in workload.blobs and name not in ROUTING:
                check_blob(root, workload.blobs[name].path, workload.blobs[name].tensor_key, name, *layout[name])
    except FibError as error:
        raise type(error)(f"workload {workload.short}: {error}") from error
    routing = RANDOM_ROUTING
    if read:
        tensors = dict(zip(ROUTING, (torch.from_numpy(part) for part in draw_routing(drawn)), strict=True))
        tensors["routing_bias"] = tensors["routing_bias"].bfloat16()
        tensors |= read
        routing = capture(tensors["routing_logits"], tensors["routing_bias"])
    problem = Problem(
        definition.geometry, workload.seq_len, workload.offset, routing, RANDOM_VALUES, seed, workload.factor
    )
    return Prepared(problem, workload, root)
