"""Calling a candidate and recording everything that it does. The same code runs in the worker and in-process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moeref.inputs import Inputs
from moeref.interop.candidates import Candidate, Unsupported
from moeref.interop.shared_inputs import Opened, written_to
from moeref.reference import Trace

LARGEST_OUTPUT = 16
"""An output of more than so many times the expected bytes is judged by its shape and dtype alone."""


@dataclass
class CandidateRun:
    """What a run of a candidate on one problem left behind."""

    status: str = "ok"  # 'ok', 'error' or 'unsupported'
    message: str = ""  # one paragraph; empty where all went well
    traceback: str = ""  # with what the candidate printed last; for --debug
    outputs: list[Any] = field(default_factory=list)  # CPU copies, one a call; of any shape and dtype
    poisoned: bool = False  # destination-passing: outputs were written into buffers filled with POISONS in turn
    changed_inputs: list[str] = field(default_factory=list)
    aliased_inputs: list[str] = field(default_factory=list)  # inputs whose memory an output shares
    overwritten_result: bool = False  # a call wrote to, or returned, the memory of the result before
    recipe: str = "auto"  # declared
    deterministic: bool = False  # declared
    inexact: str = ""  # declared: laws that are not kept bit for bit, comma-separated
    seconds: list[float] = field(default_factory=list)  # each call, until the device is done
    notes: list[str] = field(default_factory=list)  # worth saying, but no fault
    takes_groups: bool = True  # n_group, topk_group and top_k; one that does not knows its own model's only
    printed: str = ""  # the last lines on stdout and stderr, on failure; empty in-process
    cause: str = ""  # of an error: 'import' or 'timeout' where it was that, else ''


class Misbehaved(Exception):
    """The candidate returned something that can't be judged."""


def failed(error: BaseException, doing: str, run: CandidateRun) -> CandidateRun:
    """`run` turned into an error with one paragraph about what was raised while `doing`."""
    run.status, run.message = "error", f"{doing}: {_sentence(error)}"
    run.traceback = "".join(traceback.format_exception(error))
    return run


def _sentence(error: BaseException) -> str:
    if isinstance(error, Misbehaved):
        return str(error)
    text = " ".join(str(error).split())
    text = text[:500] + (" ..." if len(text) > 500 else "")
    what = f"raised {type(error).__name__}" + (f": {text}" if text else "")
    if isinstance(error, SystemExit):
        what = f"called sys.exit({error.code!r})"
    elif is_out_of_memory(error):
        what = f"ran out of memory: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        what += f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})"
    return what


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the host ran out."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in ("out of memory", "can't allocate memory"))


def observe(
    candidate: Candidate,
    opened: Opened,
    device: torch.device,
    poisons: Sequence[float],
    keep: Callable[[torch.Tensor], torch.Tensor],
    announce: Callable[[str], None] = lambda stage: None,
    then: Opened | None = None,
) -> CandidateRun:
    """Call the candidate once for each of `poisons` on the opened inputs, moved to `device`; record what it does.

    poisons    what an output buffer holds before each call.
    then       other inputs of the same shapes: copied over the first ones, in place, after the first call.
    keep       makes the CPU copy of an output at once: a later call may overwrite the original.
    announce   is told each stage: 'preparing', 'call N', 'checking call N'.
    Raises nothing that the candidate raises; KeyboardInterrupt passes.
    """
    run = CandidateRun(recipe=candidate.recipe, deterministic=candidate.deterministic, inexact=candidate.inexact)
    stage = "preparing"

    def enter(name: str) -> None:
        nonlocal stage
        stage = name
        announce(name)

    try:
        enter("preparing")
        geometry = opened.inputs.geometry
        reason = candidate.unsupported(geometry, device)
        if reason is not None:
            run.status, run.message = "unsupported", reason
            return run
        if candidate.resolve is not None:
            candidate = candidate.resolve(geometry, device)
            run.recipe, run.deterministic = candidate.recipe, candidate.deterministic
        run.takes_groups = bool(candidate.geometry_keywords)
        run.poisoned = candidate.output_argument is not None
        if device.type == "cuda":
            with torch.cuda.device(device):
                _calls(candidate, opened, device, poisons, keep, enter, run, then)
        else:
            _calls(candidate, opened, device, poisons, keep, enter, run, then)
    except KeyboardInterrupt:
        raise
    except Unsupported as error:
        run.status, run.message = "unsupported", str(error)
    except BaseException as error:  # SystemExit and whatever else a candidate may throw
        return failed(error, stage, run)
    return run


def _calls(
    candidate: Candidate,
    opened: Opened,
    device: torch.device,
    poisons: Sequence[float],
    keep: Callable[[torch.Tensor], torch.Tensor],
    enter: Callable[[str], None],
    run: CandidateRun,
    then: Opened | None,
) -> None:
    on_cpu = device.type == "cpu"
    inputs = opened.inputs if on_cpu else opened.inputs.to(device)
    pristine = opened.pristine if on_cpu else inputs.map(torch.clone)
    previous: tuple[torch.Tensor, torch.Tensor] | None = None  # the last result and the copy made of it at once
    for call, poison in enumerate(poisons):
        if call == 1 and then is not None:
            inputs, pristine = _refilled(inputs, then), then.pristine if on_cpu else then.inputs.to(device)
        enter(f"call {call + 1}")
        result = _call(candidate, inputs, poison, device, run)
        enter(f"checking call {call + 1}")
        for name in _overlapping(result, inputs):
            _add(run.aliased_inputs, name)
        for name in _restore_changed(inputs, pristine):
            _add(run.changed_inputs, name)
        expected = inputs.seq_len * inputs.geometry.hidden_size * 2
        if result.nbytes > LARGEST_OUTPUT * expected + 2**20:
            run.outputs.append(torch.zeros((), dtype=result.dtype).expand(result.shape))
            return  # of a wrong shape in any case: no second call
        kept = keep(result)
        run.outputs.append(kept)
        if previous is not None:
            first, copy = previous
            run.overwritten_result |= _share_memory(first, result) or not _same_bytes(first.cpu(), copy)
        previous = result, kept


def _refilled(inputs: Inputs, then: Opened) -> Inputs:
    """`then` in the memory of `inputs`: what a server does whose buffers stay where they are."""
    for name, tensor in then.pristine.tensors().items():
        getattr(inputs, name).view(torch.uint8).copy_(tensor.view(torch.uint8))
    return replace(
        inputs,
        local_expert_offset=then.inputs.local_expert_offset,
        routed_scaling_factor=then.inputs.routed_scaling_factor,
    )


def _call(candidate: Candidate, inputs: Inputs, poison: float, device: torch.device, run: CandidateRun) -> torch.Tensor:
    """One call: its result, a strided tensor on `device`. Appends to run.seconds; raises Misbehaved."""
    geometry = inputs.geometry
    shape = (inputs.seq_len, geometry.hidden_size)
    # other tensor objects on the same memory: resizing or transposing one in place stays there
    arguments = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs.args()]
    keywords: dict[str, Any] = {name: getattr(geometry, name) for name in candidate.geometry_keywords}
    buffer = None
    if candidate.output_argument is not None:
        buffer = torch.full(shape, poison, dtype=torch.bfloat16, device=device)
        if candidate.output_argument:
            keywords[candidate.output_argument] = buffer.detach()
        else:
            arguments.append(buffer.detach())
    _synchronise(device)
    start = time.perf_counter()
    returned = candidate.run(*arguments, **keywords)
    _synchronise(device)
    run.seconds.append(time.perf_counter() - start)
    if isinstance(returned, Trace):
        _add(run.notes, "returned a Trace: its output is judged")
        returned = returned.output
    if buffer is not None:
        if isinstance(returned, torch.Tensor) and returned.numel() and not _share_memory(returned, buffer):
            _add(
                run.notes,
                "returned a tensor beside the output buffer; the buffer is judged: declare "
                'MOEREF = {"destination_passing": False} to have the returned one judged',
            )
        return buffer
    expected = f"expected a bfloat16 tensor {list(shape)} on {device}"
    if returned is None:
        raise Misbehaved(
            f"returned None, {expected}; to write into an output buffer instead, name a parameter 'out' or declare "
            'MOEREF = {"destination_passing": True}'
        )
    if not isinstance(returned, torch.Tensor):
        inner = ""
        if isinstance(returned, tuple | list | dict):
            kinds = [type(item).__name__ for item in (returned.values() if isinstance(returned, dict) else returned)]
            inner = f" of {', '.join(kinds[:8]) or 'nothing'}"
        raise Misbehaved(f"returned a {type(returned).__module__}.{type(returned).__qualname__}{inner}, {expected}")
    if returned.layout != torch.strided:
        raise Misbehaved(f"returned a tensor of layout {returned.layout}, {expected}")
    if returned.device != device and (returned.device.type != "cpu" or device.type != "cpu"):
        raise Misbehaved(f"returned a tensor on {returned.device}, {expected}")
    if not returned.is_contiguous():
        _add(run.notes, f"returned a tensor that is not contiguous: strides {list(returned.stride())}")
    return returned.detach().resolve_conj().resolve_neg()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _add(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and end of the memory below a tensor."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    (start1, stop1), (start2, stop2) = _span(one), _span(other)
    return one.device == other.device and start1 < stop2 and start2 < stop1


def _overlapping(result: torch.Tensor, inputs: Inputs) -> list[str]:
    return [name for name, tensor in inputs.tensors().items() if _share_memory(result, tensor)]


def _restore_changed(inputs: Inputs, pristine: Inputs) -> list[str]:
    """Names of the inputs whose bytes are no longer those of `pristine`; they get them back."""
    tensors, before = inputs.tensors(), pristine.tensors()
    suspects = written_to(tensors) if inputs.device.type == "cpu" else set(tensors)
    changed = [name for name in tensors if name in suspects and not _same_bytes(tensors[name], before[name])]
    for name in changed:
        tensors[name].view(torch.uint8).copy_(before[name].view(torch.uint8))
    return changed


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes: NaN equals NaN, 0.0 is not -0.0."""
    if not one.numel():
        return True
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
