"""Read-out of the scales: which activation, gemm1 and gemm2 scale was really used for every token and block.

Token t belongs to one local expert and has payload in one block k of H alone, at a place that only this expert's
gemm1 rows look at; the other experts that it chooses give zero. In every I-block j one up row and one gate row are not
zero, so C has one element a block, and gemm2 sends block j to column j of every H-block h:

    out[t, 128 h + j] = w * xs[k, t] S1[e, j, k] * GATE xs[k, t] S1[e, I/128 + j, k] * S2[e, h, j]

With all scales one this is the baseline (it drops out: only ratios are read, so wrong weights or gains don't disturb).
Then one family of scales at a time takes powers of two that spell each scale's index in octal, one digit a call:
log2(out / baseline) is 1 + digit, twice that for activations, whose scale enters up and gate. 0 means not applied.
Scales are negative where one sign of the output can show that.
One element a block, or several within 2**16, pass any re-quantisation unharmed; the exponent is read to 1/4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moeref.diagnose.readout.craft import GATE, Stand, choose, companions, put
from moeref.diagnose.readout.maps import INVERSE, NONE, SIGN, UNSCALED, ZERO, Map, describe, flat
from moeref.diagnose.result import Finding
from moeref.inputs import Inputs
from moeref.spec import BLOCK

DIGIT = 8
MAX_TOKENS = 256  # beyond, a diagonal of (expert, block) pairs that still has every expert and every block
HALF = BLOCK // 2  # up rows look at the first half of an activation block, gate rows at the second


@dataclass(frozen=True)
class Pattern:
    """Which token stands for what: all [T] int64."""

    expert: torch.Tensor  # local slot
    up_block: torch.Tensor  # block of H that up reads
    gate_block: torch.Tensor


def read_scales(stand: Stand) -> list[Finding]:
    """Index maps of the three scale tensors."""
    g = stand.geometry
    inner = min(g.intermediate_size // BLOCK, BLOCK)
    pattern = _pattern(stand, g.hidden_size // BLOCK)
    inputs = _crafted(stand, pattern, inner)
    base = _read(stand, inputs, inner)  # [T, H/128, I/128]
    came = torch.isfinite(base) & (base != 0)
    if not bool(came.all()):
        lost = int((~came).any(2).any(1).sum())
        detail = f"nothing could be read: {lost} of {len(base)} crafted tokens gave zero, NaN or inf with all scales 1"
        names = ("activation_scale_map", "gemm1_scale_map", "gemm2_scale_map")
        return [Finding(name, False, detail, ("topk", "permute", "gemm1", "gemm2")) for name in names]
    return [
        _activation_map(stand, inputs, pattern, base),
        _gemm1_map(stand, inputs, pattern, base),
        _gemm2_map(stand, inputs, pattern, base),
    ]


def _finding(name: str, text: str, count: int, *stages: str) -> Finding:
    return Finding(name, not text, text or f"{count} scales read are the right ones", stages if text else ())


def _grid(*axes: torch.Tensor) -> torch.Tensor:
    """Index tensors that broadcast together -> [n, axes] int64."""
    full = torch.broadcast_tensors(*axes)  # type: ignore[no-untyped-call]
    return torch.stack([axis.reshape(-1) for axis in full], -1)


def _activation_map(stand: Stand, inputs: Inputs, pattern: Pattern, base: torch.Tensor) -> Finding:
    """(block, token) of every scale used. Up and gate read the same block, so the exponent counts twice.

    Scales and gate's payload are negative, so gate is positive and the output negative. With up to two blocks the
    tokens change blocks in a second turn, so that every (block, token) is read.
    """
    blocks, inner = base.shape[1], base.shape[2]
    tokens = torch.arange(len(base), device=base.device)
    true, seen = [], []
    for turn in range(blocks if blocks <= 2 else 1):
        block = (pattern.up_block + turn) % blocks
        probe = _with_payload(stand, inputs, replace(pattern, up_block=block, gate_block=block), gate_sign=-1.0)
        index = _decode(stand, probe, base, "hidden_states_scale", slice(None), given=-1.0, comes=-1.0, times=2)
        true.append(torch.stack([block, tokens], 1)[:, None].expand(-1, inner, -1).reshape(-1, 2))
        seen.append(index[:, 0].reshape(-1))
    text = describe(torch.cat(true), torch.cat(seen), (blocks, len(tokens)), ("block", "token"))
    names = ("activation_scale", "permute", "requantize")
    return _finding("activation_scale_map", text, sum(map(len, seen)), *names)


def _gemm1_map(stand: Stand, inputs: Inputs, pattern: Pattern, base: torch.Tensor) -> Finding:
    """(expert, row block, block) of every scale used by up and by gate.

    Once the up rows' scales are spelled, as negative numbers: a gate that has one of them gives zero. Once the gate
    rows' scales are. Up reads another block than gate, so an exchange of the two shows in the second as well.
    """
    blocks, inner = base.shape[1], base.shape[2]
    rows = inputs.gemm1_weights_scale.shape[1]
    shape, axes = (stand.geometry.num_local_experts, rows, blocks), ("expert", "row block", "block")
    column = torch.arange(inner, device=base.device)
    up, gate = (
        _grid(pattern.expert[:, None], row, block[:, None])
        for row, block in ((column, pattern.up_block), (column + rows // 2, pattern.gate_block))
    )
    up_part, gate_part = (slice(None), slice(0, rows // 2)), (slice(None), slice(rows // 2, None))
    name = "gemm1_weights_scale"
    up_seen = _decode(stand, inputs, base, name, up_part, given=-1.0, comes=-1.0)[:, 0].reshape(-1)
    gate_seen = _decode(stand, inputs, base, name, gate_part)[:, 0].reshape(-1)

    def predict(apply: Map) -> torch.Tensor:
        up_read, gate_read = apply(up), apply(gate)
        up_is_gate, gate_is_gate = up_read[:, 1] >= rows // 2, gate_read[:, 1] >= rows // 2
        nothing = torch.full_like(up_seen, NONE)
        first = torch.where(gate_is_gate & ~up_is_gate, flat(up_read, shape), nothing)
        second = torch.where(up_is_gate, flat(up_read, shape), flat(gate_read, shape))
        return torch.cat([first, torch.where(up_is_gate == gate_is_gate, nothing, second)])

    if bool((up_seen == ZERO).all()) and bool((gate_seen == UNSCALED).all()):
        text = "gate rows have scales of up rows"  # which ones can't be told: the sign of one hides the other
    else:
        text = describe(torch.cat([up, gate]), torch.cat([up_seen, gate_seen]), shape, axes, predict)
    return _finding("gemm1_scale_map", text, 2 * len(up), "gemm1_scale", "swiglu", "requantize")


def _gemm2_map(stand: Stand, inputs: Inputs, pattern: Pattern, base: torch.Tensor) -> Finding:
    """(expert, row block, block) of every scale used. The scales are negative."""
    blocks, inner = base.shape[1], base.shape[2]
    row, column = torch.arange(blocks, device=base.device), torch.arange(inner, device=base.device)
    true = _grid(pattern.expert[:, None, None], row[:, None], column)
    seen = _decode(stand, inputs, base, "gemm2_weights_scale", slice(None), given=-1.0, comes=-1.0).reshape(-1)
    shape = tuple(inputs.gemm2_weights_scale.shape)
    text = describe(true, seen, shape, ("expert", "row block", "block"))
    return _finding("gemm2_scale_map", text, len(seen), "gemm2_scale", "requantize")


def _pattern(stand: Stand, blocks: int) -> Pattern:
    """Every (local expert, block) pair, or a diagonal of them; gate reads the block after up's."""
    real = stand.problem.real_experts
    count = min(len(real) * blocks, max(MAX_TOKENS, len(real), blocks))
    token = torch.arange(count, device=stand.device)
    expert = token % len(real)
    block = token // len(real) % blocks if count == len(real) * blocks else token % blocks
    return Pattern(expert + real[0] - stand.problem.offset, block, (block + 1) % blocks)


def _crafted(stand: Stand, pattern: Pattern, inner: int) -> Inputs:
    g = stand.geometry
    inputs = stand.blank(len(pattern.expert))
    place = torch.arange(g.num_local_experts, device=stand.device) % HALF  # where an expert looks, [L]
    slot = torch.arange(g.num_local_experts, device=stand.device)[:, None, None]
    row = torch.arange(inner, device=stand.device)
    row = row * BLOCK + (37 * row + 5) % BLOCK  # one row of each I-block
    block = torch.arange(g.hidden_size // BLOCK, device=stand.device) * BLOCK
    look = place[:, None, None] + block
    put(inputs.gemm1_weights, (slot, row[:, None], look), 1.0)
    put(inputs.gemm1_weights, (slot, g.intermediate_size + row[:, None], look + HALF), GATE)
    target = block[:, None] + torch.arange(inner, device=stand.device)  # [H/128, inner]
    put(inputs.gemm2_weights, (slot, target, row), 1.0)
    chosen, offset = [], stand.problem.offset
    for own in pattern.expert.tolist():
        ids = companions(g, own + offset)
        local = [e - offset for e in ids[1:] if 0 <= e - offset < g.num_local_experts]
        assert all(e % HALF != own % HALF for e in local) or g.top_k > HALF  # they look elsewhere, and give zero
        chosen.append(ids)
    choose(inputs, chosen)
    return _with_payload(stand, inputs, pattern)


def _with_payload(stand: Stand, inputs: Inputs, pattern: Pattern, gate_sign: float = 1.0) -> Inputs:
    """The same inputs with activations where the pattern has them."""
    hidden = torch.zeros_like(inputs.hidden_states.view(torch.uint8)).view(inputs.hidden_states.dtype)
    token, place = torch.arange(len(hidden), device=stand.device), pattern.expert % HALF
    put(hidden, (token, pattern.up_block * BLOCK + place), 1.0)
    put(hidden, (token, pattern.gate_block * BLOCK + HALF + place), gate_sign)
    return replace(inputs, hidden_states=hidden)


def _with(inputs: Inputs, name: str, tensor: torch.Tensor) -> Inputs:
    return replace(inputs, **{name: tensor})  # type: ignore[arg-type]


def _read(stand: Stand, inputs: Inputs, inner: int) -> torch.Tensor:
    """out as [T, H/128, inner]."""
    answer = stand.call(inputs).float()
    return answer.view(len(answer), -1, BLOCK)[:, :, :inner]


def _decode(
    stand: Stand,
    inputs: Inputs,
    base: torch.Tensor,
    name: str,
    part: slice | tuple[slice, slice],
    given: float = 1.0,
    comes: float = 1.0,
    times: int = 1,
) -> torch.Tensor:
    """Flat index of the scale used for each reading, [T, H/128, inner] int64, or what else was seen (maps.UNREAD).

    Only `part` of the scales spell their index, with the sign `given`; the others stay one. The output should have the
    sign `comes`, and the scale enters it `times` times.
    """
    ones = torch.ones_like(getattr(inputs, name))
    number = torch.arange(ones.numel(), device=ones.device).view(ones.shape)
    index = torch.zeros(base.shape, dtype=torch.int64, device=base.device)
    fits, fits_inverse, signed, zero, plain = (torch.ones_like(base, dtype=torch.bool) for _ in range(5))
    weight = 1
    while weight == 1 or weight < number.numel():
        scale = ones.clone()
        scale[part] = (given * torch.exp2(1.0 + number // weight % DIGIT))[part]
        ratio = _read(stand, _with(inputs, name, scale), base.shape[2]) / base
        power = torch.log2(ratio.abs()) / times
        rounded = power.round().nan_to_num(nan=99.0, posinf=99.0, neginf=99.0)
        whole = (power - rounded).abs() * times < 0.25
        fits &= whole & (rounded >= 1) & (rounded <= DIGIT)
        fits_inverse &= whole & (rounded <= -1) & (rounded >= -DIGIT)
        plain &= whole & (rounded == 0)
        zero &= ratio.abs() < 2.0**-20
        signed &= ratio * comes > 0
        index += (rounded.long() - 1).clamp(0, DIGIT - 1) * weight
        weight *= DIGIT
    seen = torch.full_like(index, NONE)
    seen[zero], seen[plain], seen[fits_inverse] = ZERO, UNSCALED, INVERSE
    good = fits & (index < number.numel())
    seen[good & ~signed] = SIGN
    return torch.where(good & signed, index, seen)
