"""Read-outs of the accumulators: how much of a small number survives between +448**2 and -448**2.

In each product s = 2**k stands beside the large pair, k from 16 downwards, one token each; a second output column adds
s alone. The smallest k from which on all survive tells the fraction bits kept: exponent of the large number minus k.

Fewer than 13 fail. Hopper's FP8 tensor cores align the products of a 128-block to the largest one and keep 13 fraction
bits, which every kernel on them inherits. From block to block the sum must be float32, as every block has a scale of
its own: with three blocks, one for each of the three numbers, 20 bits are needed, three less than float32 has. With two
blocks s shares one with a half of the pair, and 13 are all that can be asked; a bfloat16 sum, which keeps 7, and a
float16 one, which overflows or keeps 10, show there too.
"""

from __future__ import annotations

import torch

from moeref.diagnose.readout.craft import GATE, Stand, choose, companions, locals_together, put
from moeref.diagnose.result import Finding
from moeref.inputs import Inputs
from moeref.quant import FP8_MAX
from moeref.spec import BLOCK

NEEDED_BITS, NEEDED_ACROSS = 13, 20
LARGE_EXPONENT = 17  # of 448**2
SURVIVES = 2.0**-5
"""s counts as kept within this share: both columns are rounded to bfloat16, 2**-7 each at most, and a re-quantised s is
the same in both. s is a power of two, so an accumulator keeps all of it or nothing."""

CHUNK = 32  # what one tensor-core instruction sums over in FP8


def _places(size: int) -> tuple[tuple[int, int, int], tuple[int, int, int] | None]:
    """Where +448**2, s and -448**2 stand: within a block, in different chunks; and across blocks, three or else two."""
    within = (0, CHUNK, 2 * CHUNK)
    if size <= BLOCK:
        return within, None
    return within, (0, BLOCK + CHUNK, 2 * BLOCK + 2 * CHUNK) if size > 2 * BLOCK else (0, CHUNK, BLOCK + 2 * CHUNK)


def read_gemm1_accumulator(stand: Stand) -> list[Finding]:
    """gemm1: the pair within one block of H, and across blocks; tokens of each kind choose by where they have payload.

    Up row 0 sees all, up row 1 only s; both C go to a column of their own. s is 2**k as payload, with weight 1 or 2**8
    (at the next place), up to 2**15: float16 holds it.
    """
    g, powers = stand.geometry, torch.arange(-9, 16)
    kinds = [places for places in _places(g.hidden_size) if places]
    inputs, slot = _one_expert(stand, len(powers) * len(kinds))
    rows, gates = slice(0, 2), slice(g.intermediate_size, g.intermediate_size + 2)
    put(inputs.gemm1_weights, (slot, gates, 3 * CHUNK), GATE)
    put(inputs.hidden_states, (slice(None), 3 * CHUNK), 1.0)
    small = torch.exp2(powers.float())
    for turn, (plus, own, minus) in enumerate(kinds):
        tokens = slice(turn * len(powers), (turn + 1) * len(powers))
        put(inputs.gemm1_weights, (slot, 0, plus), FP8_MAX)
        put(inputs.gemm1_weights, (slot, rows, own), 1.0)
        put(inputs.gemm1_weights, (slot, rows, own + 1), 256.0)
        put(inputs.gemm1_weights, (slot, 0, minus), FP8_MAX)
        put(inputs.hidden_states, (tokens, plus), FP8_MAX)
        put(inputs.hidden_states, (tokens, own), torch.where(powers <= 8, small, 0.0))
        put(inputs.hidden_states, (tokens, own + 1), torch.where(powers > 8, small / 256, 0.0))
        put(inputs.hidden_states, (tokens, minus), -FP8_MAX)
    put(inputs.gemm2_weights, (slot, 0, 0), 1.0)
    put(inputs.gemm2_weights, (slot, 1, 1), 1.0)
    answer = stand.call(inputs).float().view(len(kinds), len(powers), -1)
    return _both("gemm1", g.hidden_size, [(one[:, 0], one[:, 1]) for one in answer], powers)


def read_gemm2_accumulator(stand: Stand) -> list[Finding]:
    """gemm2: the pair within one block of I, and across blocks.

    C is GATE times 448, 2**k and -448 at the places of both kinds, exact under any scale that amax gives. For each kind
    a column adds the three, the next one s alone; two more do so with weight 2**8 on s.
    """
    g, powers = stand.geometry, torch.arange(-6, 9)
    kinds = [places for places in _places(g.intermediate_size) if places]
    inputs, slot = _one_expert(stand, len(powers))
    for plus, own, minus in kinds:
        for place, value, source in ((plus, FP8_MAX, 0), (own, 1.0, 1), (minus, -FP8_MAX, 0)):
            put(inputs.gemm1_weights, (slot, place, source), value)
            put(inputs.gemm1_weights, (slot, g.intermediate_size + place, 2), GATE)
    put(inputs.hidden_states, (slice(None), 0), 1.0)
    put(inputs.hidden_states, (slice(None), 1), torch.exp2(powers.float()))
    put(inputs.hidden_states, (slice(None), 2), 1.0)
    for turn, (plus, own, minus) in enumerate(kinds):
        for column, weight in ((4 * turn, 1.0), (4 * turn + 2, 256.0)):
            put(inputs.gemm2_weights, (slot, column, plus), FP8_MAX)
            put(inputs.gemm2_weights, (slot, slice(column, column + 2), own), weight)
            put(inputs.gemm2_weights, (slot, column, minus), FP8_MAX)
    answer = stand.call(inputs).float()
    later = powers > 0
    pairs = []
    for first in range(0, 4 * len(kinds), 4):
        beside, alone = (torch.cat([answer[:, c], answer[later, c + 2]]) for c in (first, first + 1))
        pairs.append((beside, alone))
    return _both("gemm2", g.intermediate_size, pairs, torch.cat([powers, powers[later] + 8]))


def _both(stage: str, size: int, pairs: list[tuple[torch.Tensor, torch.Tensor]], powers: torch.Tensor) -> list[Finding]:
    """Findings for (s beside the pair, s alone) within a block and, where there are several, across."""
    found = [_judge(f"{stage}_accumulator", *pairs[0], powers, LARGE_EXPONENT, stage, NEEDED_BITS)]
    name = f"{stage}_across_blocks"
    if len(pairs) == 1:
        return [*found, Finding(name, None, f"there is one block of {BLOCK} only")]
    needed = NEEDED_ACROSS if size > 2 * BLOCK else NEEDED_BITS
    return [*found, _judge(name, *pairs[1], powers, LARGE_EXPONENT, stage, needed)]


def read_combine_accumulator(stand: Stand) -> list[Finding]:
    """combine: experts that give +2**8, 2**k and -2**8 times the same weight, in two orders.

    Expert i of the chosen local ones looks at place i of the activations; GATE is common to all.
    """
    name, g, powers = "combine_accumulator", stand.geometry, torch.arange(-9, 8)
    chosen = locals_together(g, stand.problem.real_experts)
    local = [e for e in chosen if e in stand.problem.real_experts][: BLOCK - 1]
    if len(local) < 3:
        return [Finding(name, None, f"a token can have {len(local)} local experts, 3 are needed")]
    count = len(powers)
    inputs = stand.blank(3 * count, factor=float(g.top_k))
    choose(inputs, [chosen] * (3 * count))
    for place, expert in enumerate(local):
        slot = expert - stand.problem.offset
        put(inputs.gemm1_weights, (slot, 0, place), 1.0)
        put(inputs.gemm1_weights, (slot, g.intermediate_size, BLOCK - 1), GATE)
        put(inputs.gemm2_weights, (slot, 0, 0), 1.0)
    first, middle, last = 0, len(local) // 2, len(local) - 1
    small = torch.exp2(powers.float())
    orders = ((first, middle, last), (middle, first, last), (None, middle, None))  # places of +2**8, s, -2**8
    put(inputs.hidden_states, (slice(None), BLOCK - 1), 1.0)
    for turn, (plus, own, minus) in enumerate(orders):
        tokens = slice(turn * count, (turn + 1) * count)
        put(inputs.hidden_states, (tokens, own), small)
        if plus is not None and minus is not None:
            put(inputs.hidden_states, (tokens, plus), 256.0)
            put(inputs.hidden_states, (tokens, minus), -256.0)
    out = stand.call(inputs).float()[:, 0].view(3, count)
    findings = [_judge(name, out[turn], out[2], powers, 8, "combine", NEEDED_BITS) for turn in (0, 1)]
    return [next((finding for finding in findings if finding.passed is False), findings[0])]


def _one_expert(stand: Stand, seq_len: int) -> tuple[Inputs, int]:
    """Blank inputs whose tokens all choose the middle local expert, and its slot."""
    inputs = stand.blank(seq_len)
    choose(inputs, [companions(stand.geometry, stand.middle_expert())] * seq_len)
    return inputs, stand.middle_expert() - stand.problem.offset


def _judge(
    name: str, beside: torch.Tensor, alone: torch.Tensor, powers: torch.Tensor, exponent: int, stage: str, needed: int
) -> Finding:
    """beside [n]: 2**powers with the large pair; alone [n]: without it."""
    if not bool((torch.isfinite(alone) & (alone != 0)).all()):
        detail = "nothing could be read: the small number alone gave zero, NaN or inf"
        return Finding(name, False, detail, ("topk", "permute", stage))
    kept = ((beside / alone - 1).abs() <= SURVIVES).cpu()  # NaN: not kept
    lost = powers[~kept]
    bits = exponent - (int(lost.max()) + 1 if len(lost) else int(powers.min()))
    more = "" if len(lost) else " or more"
    detail = f"{bits}{more} fraction bits kept beside a large pair that cancels; {needed} needed"
    return Finding(name, bits >= needed, detail, () if bits >= needed else (stage,))
