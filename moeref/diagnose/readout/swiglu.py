"""Read-outs of what a fused kernel keeps private: its SwiGLU, and the value that gemm2 really reads.

Both use one local expert (the other chosen ones are all zero) and an identity in gemm2, so out[t, i] = w * C[t, i].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import gelu, silu

from moeref.diagnose.readout.craft import GATE, Stand, choose, companions, put
from moeref.diagnose.result import Finding
from moeref.inputs import FP8
from moeref.quant import FP8_MAX, dequantize_1x128, ldexp, power_of_two_ceil, quantize_1x128
from moeref.spec import BLOCK

# The activation

BELOW, ABOVE = 3 * 2.0**-8 + 2.0**-12, 2.0**-7 + 2.0**-12
"""Relative error of silu * up, towards zero and away: SwiGLU's output rounded to bfloat16 2**-8, the layer's 2**-8, or
2**-7 towards zero where it is cut off. The baseline token is a power of two, for all weights are one. Up and gate are
e4m3 numbers times a power of two, which no recipe rounds; a block with one element is re-quantised without loss by
amax/448 (but not by a power of two: see `_judge_activation`)."""

SIGMOID = 2.0**-12
"""Absolute error allowed to a sigmoid: half of the 2**-11 of the hardware's approximate tanh, as in
(1 + tanh(x / 2)) / 2."""

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu(up) * gate: up and gate are swapped": lambda up, gate: silu(up) * gate,
    "sigmoid(gate) * up": lambda up, gate: torch.sigmoid(gate) * up,
    "gelu(gate) * up": lambda up, gate: gelu(gate) * up,
    "gelu(gate, tanh form) * up": lambda up, gate: gelu(gate, approximate="tanh") * up,
    "relu(gate) * up": lambda up, gate: torch.relu(gate) * up,
    "gate * sigmoid(1.702 gate) * up": lambda up, gate: gate * torch.sigmoid(1.702 * gate) * up,
    "silu(gate) * (up + 1)": lambda up, gate: silu(gate) * (up + 1),
    "silu(gate) * up with gate cut at 7": lambda up, gate: silu(gate.clamp(max=7)) * up,
    "silu(gate) * up, both cut at 7": lambda up, gate: silu(gate.clamp(max=7)) * up.clamp(-7, 7),
    "silu(gate) * up with gate cut at 10": lambda up, gate: silu(gate.clamp(max=10)) * up,
    "silu(gate) * up, both cut at 10": lambda up, gate: silu(gate.clamp(max=10)) * up.clamp(-10, 10),
    "silu(gate) without up": lambda up, gate: silu(gate),
    "gate * up": lambda up, gate: gate * up,
}


def read_activation(stand: Stand) -> list[Finding]:
    """silu(gate) * up over gates from -20 to 20 and some far out, up of both signs, and a token of zeros.

    The token's one activation scale is |gate|; payloads 1 and +-1 make up = +-|gate| and gate.
    """
    near = [k * 2.0**power for power in range(-6, 2) for k in range(8, 16) if k * 2.0**power <= 20]
    gates = [GATE, *near, *(-x for x in near), 96.0, 1024.0, *(3.0, -3.0, 0.5, -0.5, 12.0, -12.0)]
    signs = [1.0] * (len(gates) - 6) + [-1.0] * 6
    gate = torch.tensor([*gates, 0.0], device=stand.device)  # the last token: zeros
    up = torch.tensor([*signs, 0.0], device=stand.device) * gate.abs()
    inputs = stand.blank(len(gate), factor=float(stand.geometry.top_k))
    expert, slot = stand.middle_expert(), stand.middle_expert() - stand.problem.offset
    choose(inputs, [companions(stand.geometry, expert)] * len(gate))
    put(inputs.hidden_states, (slice(None), 0), up.sign())
    put(inputs.hidden_states, (slice(None), 1), gate.sign())
    inputs.hidden_states_scale.copy_(gate.abs().clamp(min=1 / 8).expand_as(inputs.hidden_states_scale))
    put(inputs.gemm1_weights, (slot, 0, 0), 1.0)
    put(inputs.gemm1_weights, (slot, stand.geometry.intermediate_size, 1), 1.0)
    put(inputs.gemm2_weights, (slot, 0, 0), 1.0)
    answer = stand.call(inputs).float()
    return [_zero("swiglu_zero", answer[-1:]), _judge_activation(up[:-1], gate[:-1], answer[:-1, 0])]


def _zero(name: str, rows: torch.Tensor) -> Finding:
    """Rows of tokens whose every C is zero."""
    bad = int((~(rows == 0)).any(1).sum())
    detail = f"{bad} of {len(rows)} tokens with all zero gave NaN, inf or something" if bad else "zero gives zero"
    return Finding(name, not bad, detail, ("requantize", "swiglu") if bad else ())


def _judge_activation(up: torch.Tensor, gate: torch.Tensor, out: torch.Tensor) -> Finding:
    name, stages = "swiglu", ("swiglu", "gemm1")

    def fits(rule: Activation) -> torch.Tensor:
        """[n] bool: within the tolerance of the rule, or, if that holds nowhere near, of its value cast to e4m3 with a
        power-of-two scale, that is to four significant bits."""
        due = rule(up, gate)
        size, slack = due.abs(), SIGMOID * (up * gate).abs()
        least, most = size * (1 - BELOW) - slack, size * (1 + ABOVE) + slack
        # the first token is the baseline: whatever weight or gain there is drops out
        away = out / out[0] * torch.where(due < 0, -1.0, 1.0) * due[0].sign()
        direct = (away * size[0] >= least) & (away * size[0] <= most)
        if bool(direct.all()):
            return direct
        away = away * _four_bits(size[0])
        cast = (away >= _four_bits(least) * (1 - BELOW)) & (away <= _four_bits(most) * (1 + ABOVE))
        return cast if int(cast.sum()) > int(direct.sum()) else direct

    if not bool(torch.isfinite(out[0]) & (out[0] != 0)):
        detail = f"nothing could be read: up = gate = {GATE:g} gave {float(out[0]):g}"
        return Finding(name, False, detail, ("topk", "permute", "swiglu"))
    right = fits(lambda up, gate: silu(gate) * up)
    if bool(right.all()):
        return Finding(name, True, f"silu(gate) * up at {len(gate)} gates from -20 to 20, at 64, 96 and 1024")
    like = next((rule for rule in ACTIVATIONS if bool(fits(ACTIVATIONS[rule]).all())), "")
    wrong = gate[~right]
    detail = f"{len(wrong)} of {len(gate)} gates, from {float(wrong.min()):g} to {float(wrong.max()):g}, do not give "
    detail += "silu(gate) * up"
    worst = int((~right).nonzero()[0])
    due = silu(gate) * up
    detail += f"; gate {float(gate[worst]):g}, up {float(up[worst]):g}: {float(out[worst] * due[0] / out[0]):.4g}, "
    detail += f"expected {float(due[worst]):.4g}"
    return Finding(name, False, detail + (f"; as if {like}" if like else ""), stages)


def _four_bits(values: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(values)  # mantissa in [1/2, 1)
    return ldexp((mantissa * 16).round(), exponent - 4)


# The re-quantised value

MATCH = 2.0**-7
"""Relative distance within which an element counts as the emulated one: bfloat16 output, at most 2**-8, and a gain read
from the same. Neighbouring e4m3 numbers lie 2**-4 and more apart."""

OTHERWISE = 0.02
"""Share of elements that may differ from an emulation: a division by 448 / amax instead of a product, or a scale
rounded otherwise, moves only what lies next to the middle of two e4m3 numbers."""

OWN_WAY = 0.045
"""Largest relative root mean square error of a block that is like no emulation: e4m3 with the scale rounded up to a
power of two loses 2**-3 / sqrt(12) = 3.6 % where all values lie just above a power of two; a quarter is added."""


def _e4m3(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()


def _e4m3_truncated(values: torch.Tensor) -> torch.Tensor:
    nearest = values.clamp(-FP8_MAX, FP8_MAX).to(FP8)
    over = nearest.float().abs() > values.abs()
    return (nearest.view(torch.uint8) - over.to(torch.uint8)).view(FP8).float()


def _e5m2(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e5m2).float()


def _blockwise(
    c: torch.Tensor,
    cast: Callable[[torch.Tensor], torch.Tensor] = _e4m3,
    largest: float = FP8_MAX,
    width: int = BLOCK,
    power: bool = False,
) -> torch.Tensor:
    """c [T, I] cast with one scale per 1 x width block."""
    blocks = c.view(len(c), -1, width)
    scale = blocks.abs().amax(-1, keepdim=True) / largest
    scale = power_of_two_ceil(scale) if power else scale
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (cast(blocks / scale) * scale).view_as(c)


Rounding = Callable[[torch.Tensor], torch.Tensor]

LEGAL: dict[str, Rounding] = {
    "none": lambda c: c,
    "e4m3, amax/448 per 1x128": _blockwise,
    "e4m3, power-of-two scale per 1x128": lambda c: _blockwise(c, power=True),
    "e4m3, amax/240 per 1x128": lambda c: _blockwise(c, largest=240.0),
}
COARSE: dict[str, Rounding] = {
    "e4m3 with one scale a token": lambda c: _blockwise(c, width=c.shape[1]),
    "e4m3 with one scale for all tokens": lambda c: _blockwise(c.reshape(1, -1), width=c.numel()).view_as(c),
    "e4m3 with no scale": _e4m3,
    "e4m3 cut towards zero, amax/448 per 1x128": lambda c: _blockwise(c, _e4m3_truncated),
    "e4m3 cut towards zero, power-of-two scale per 1x128": lambda c: _blockwise(c, _e4m3_truncated, power=True),
    "e5m2 per 1x128": lambda c: _blockwise(c, _e5m2),
    "e5m2 per 1x128, power-of-two scale": lambda c: _blockwise(c, _e5m2, power=True),
    "e4m3, amax/480 per 1x128, saturated": lambda c: _blockwise(c, largest=480.0),
    "e4m3, power-of-two scale rounded up after the cast": lambda c: _late(c),
}
GEMM1: dict[str, Rounding] = {
    "": lambda x: x,
    ", gemm1_out bfloat16": lambda x: x.bfloat16().float(),
    ", gemm1_out e4m3 too": lambda x: dequantize_1x128(*quantize_1x128(x)),
    ", gemm1_out e4m3 with power-of-two scale too": lambda x: dequantize_1x128(*quantize_1x128(x, "ue8m0")),
}


def _late(c: torch.Tensor) -> torch.Tensor:
    payload, scale = quantize_1x128(c)
    return dequantize_1x128(payload, power_of_two_ceil(scale))


def read_requantized(stand: Stand) -> list[Finding]:
    """Which rounding lies between SwiGLU and gemm2.

    gate is GATE times the token's scale, where silu is linear; up rows hold two e4m3 payloads of different size, so
    that values lie between e4m3's numbers. Blocks differ in size by 1/32 and in the place of amax between powers of
    two, tokens by factors of 1, 1.25, 1.5 and 1.75: a coarser scale rounds otherwise. Weights are all one.
    """
    g = stand.geometry
    inner, hidden = g.intermediate_size, g.hidden_size
    sizes = torch.tensor([1.0, 1.25, 1.5, 1.75, 1.0, 0.0], device=stand.device)  # the last token: zeros
    inputs = stand.blank(len(sizes), factor=float(g.top_k))
    expert, slot = stand.middle_expert(), stand.middle_expert() - stand.problem.offset
    choose(inputs, [companions(g, expert)] * len(sizes))
    row = torch.arange(inner, device=stand.device)
    block, place = row // BLOCK, row % BLOCK
    octet = 0x79 - (29 * place + 7 * block) % 48 - 4 * (block % 2)  # 288 or 208 downwards over six octaves
    coarse = octet.to(torch.uint8).view(FP8).float() * (1 - 2 * (place % 3 == 1).float())  # signs differ
    fine = (octet - 24 - 8 * (place % 2) + place % 5).to(torch.uint8).view(FP8).float()  # 1/16 or 1/8 of that
    put(inputs.gemm1_weights, (slot, row, 0), coarse)
    put(inputs.gemm1_weights, (slot, row, 2), fine)
    put(inputs.gemm1_weights, (slot, inner + row, 1), GATE)
    inputs.gemm1_weights_scale[slot, : inner // BLOCK] = torch.exp2(-5.0 * (torch.arange(inner // BLOCK) % 2))[
        :, None
    ].to(stand.device)
    put(inputs.hidden_states, (slice(0, len(sizes) - 1), slice(0, 3)), 1.0)
    inputs.hidden_states_scale.copy_(torch.where(sizes > 0, sizes, 1.0).expand_as(inputs.hidden_states_scale))
    got = []
    for start in range(0, inner, hidden):
        part = torch.arange(start, min(start + hidden, inner), device=stand.device)
        inputs.gemm2_weights.view(torch.uint8).zero_()
        put(inputs.gemm2_weights, (slot, part - start, part), 1.0)
        got.append(stand.call(inputs).float()[:, : len(part)])
    answer = torch.cat(got, 1)
    step = torch.exp2(-5.0 * (block % 2))
    up = (coarse + fine) * step * sizes[:-1, None]
    gate = (GATE * sizes[:-1, None]).expand_as(up)
    return [_zero("requantize_zero", answer[-1:]), _judge_rounding(up, gate, answer[:-1])]


def _judge_rounding(up: torch.Tensor, gate: torch.Tensor, got: torch.Tensor) -> Finding:
    name, stages = "requantize", ("requantize", "gemm2_scale")
    if not bool(torch.isfinite(got).all()) or not bool(got.any()):
        return Finding(name, False, "nothing could be read: NaN, inf, or all zero", stages)
    best: dict[bool, tuple[float, str]] = {}
    for legal, table in ((True, LEGAL), (False, COARSE)):
        tried = []
        for suffix, before in GEMM1.items():
            c = silu(before(gate)) * before(up)
            tried += [(_differ(got, rule(c)), rounding + suffix) for rounding, rule in table.items()]
        best[legal] = min(tried, key=lambda one: one[0])  # the first among equals
    share, like = best[True]
    coarse_share, coarse_like = best[False]
    if share <= OTHERWISE and share <= coarse_share:
        return Finding(name, True, f"re-quantisation: {like} ({share:.1%} of the elements lie elsewhere)")
    if coarse_share <= OTHERWISE:
        return Finding(name, False, f"re-quantisation behaves like {coarse_like}", stages)
    exact = silu(gate) * up
    gain = (got / exact).median()
    error = ((got / gain - exact) / exact).view(len(got), -1, BLOCK).square().mean(-1).sqrt().amax()
    detail = f"re-quantisation is like no known one (nearest: {min(best.values())[1]}); largest relative error of a "
    detail += f"block {float(error):.3g}, {OWN_WAY:g} allowed"
    passed = bool(error <= OWN_WAY)
    return Finding(name, passed, detail, () if passed else stages)


def _differ(got: torch.Tensor, due: torch.Tensor) -> float:
    """Share of elements that are not the emulated ones, after a common gain."""
    there = due != 0
    gain = (got[there] / due[there]).median()
    return float(((got - gain * due).abs() > MATCH * (gain * due).abs()).float().mean())
