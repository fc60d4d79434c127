"""Where inside of the experts an answer goes wrong: what gemm2 read, solved for from the output.

On a problem with H = 3 I, gemm2's weights of one expert [H, I] can be inverted in the sense of least squares. Rows of
tokens with a single local expert then give what gemm2 was fed. If a row lies in the span of the weights, gemm2 and all
after it are right; what it was fed is compared with SwiGLU's right result, and with the gate that it came from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeref.diagnose.explain.geometry import Fact
from moeref.inputs import Inputs
from moeref.quant import dequantize_1x128, dequantize_128x128
from moeref.reference import Trace, expert_spans, swiglu
from moeref.spec import BLOCK

PROBLEM = "e16l8h768i256k2g2t1-t64-o4-iid-model_like-s0"
"""H = 3 I: weights of independent entries have a condition number near (1 + 3**-0.5) / (1 - 3**-0.5) = 3.7."""

SPAN = 0.003
"""Share of a row's square that may lie outside of the span: twice the outputs' rounding and the accumulators', squared,
is 2**-15; a row of other weights leaves 1 - I / H = 2/3."""

CLOSE = 0.02
"""Squared distance of two inputs of gemm2 that a re-quantisation explains: 0.001 each, 3.7**2 times the output's."""


def look_inside(output: Tensor, inputs: Inputs, trace: Trace) -> list[Fact]:
    """Facts about where the experts go wrong in output [T, H]; empty where they are right or nothing can be said."""
    tokens = trace.permutation.permuted_idx_to_token_idx
    single = torch.bincount(tokens, minlength=inputs.seq_len) == 1
    fed, rows, outside, wrong = [], [], 0, 0
    for expert, span in expert_spans(trace.permutation.expert_offsets):
        own = torch.arange(span.start, span.stop, device=tokens.device)[single[tokens[span]]]
        if not len(own):
            continue
        weight = dequantize_128x128(inputs.gemm2_weights[expert], inputs.gemm2_weights_scale[expert].float())
        found = output[tokens[own]].double()
        good = torch.isfinite(found).all(1) & (found != 0).any(1)
        found, own = found[good], own[good]
        if not len(own):
            continue
        basis = weight.double()
        solved = torch.linalg.lstsq(basis, found.T).solution.T  # [n, I]
        left = (found - solved @ basis.T).square().sum(1) / found.square().sum(1)
        inside = left <= SPAN
        wrong += len(own)
        outside += int((~inside).sum())
        slot = trace.permutation.permuted_idx_to_slot[own]
        routed = trace.routing.topk_weights[tokens[own], slot].double()
        fed.append((solved / routed[:, None])[inside])
        rows.append(own[inside])
    if not wrong:
        return []
    if 2 * outside > wrong:
        return [_after(output, inputs, trace, single, outside, wrong)]
    return _before(torch.cat(fed), torch.cat(rows), inputs, trace)


def _after(output: Tensor, inputs: Inputs, trace: Trace, single: Tensor, outside: int, wrong: int) -> Fact:
    """The row is no product with the right weights: scales of gemm2, its sums, or what comes after."""
    lead = f"{outside} of {wrong} rows of single experts are no product of gemm2's weights with anything"
    share, plain = [], []
    tokens = trace.permutation.permuted_idx_to_token_idx
    for expert, span in expert_spans(trace.permutation.expert_offsets):
        own = torch.arange(span.start, span.stop, device=tokens.device)[single[tokens[span]]]
        for row in own.tolist():
            parts = _block_products(inputs, expert, trace.swiglu_out[row])  # [H/128, I/128, 128]
            found = output[tokens[row]].double().view(parts.shape[0], BLOCK)
            for block, due in zip(found, parts, strict=True):
                size = float(block.square().sum())
                if size and torch.isfinite(block).all():
                    fitted = torch.linalg.lstsq(due.T, block[:, None]).solution
                    share.append(float((block[:, None] - due.T @ fitted).square().sum()) / size)
                    plain.append(int((due.sum(0) @ block).abs() ** 2 > (1 - SPAN) * size * due.sum(0).square().sum()))
    explained = sum(one <= CLOSE for one in share) / max(len(share), 1)
    if explained > 0.9:
        text = f"{lead}; with other scales for its 128x128 blocks {explained:.0%} of the columns' blocks are explained"
        return Fact(text, ("gemm2_scale", "gemm2_scale", "gemm2"))
    right = sum(plain) / max(len(plain), 1)
    if right > 0.1:
        return Fact(f"{lead}; {right:.0%} of the 128-blocks of columns are right", ("gemm2", "output"))
    return Fact(f"{lead}, and no other scales of its blocks explain them", ("gemm2", "output"))


def _block_products(inputs: Inputs, expert: int, fed: Tensor) -> Tensor:
    """What each 128-block of I adds to each 128-block of H, [H/128, I/128, 128] float64. fed: [I]."""
    weight = dequantize_128x128(inputs.gemm2_weights[expert], inputs.gemm2_weights_scale[expert].float()).double()
    h, i = weight.shape
    parts = weight.view(h // BLOCK, BLOCK, i // BLOCK, BLOCK) * fed.double().view(i // BLOCK, BLOCK)
    return parts.sum(-1).transpose(1, 2)


def _before(fed: Tensor, rows: Tensor, inputs: Inputs, trace: Trace) -> list[Fact]:
    """What gemm2 was fed [n, I] beside SwiGLU's right result."""
    due = trace.swiglu_out[rows].double()
    far = _relative(fed, due)
    off = far > CLOSE
    if not bool(off.any()):
        return []
    lead = f"gemm2 and all after it are right; in {int(off.sum())} of {len(off)} rows it was fed something wrong"
    blocks = due.shape[1] // BLOCK
    x, r = fed[off].view(-1, blocks, BLOCK), due[off].view(-1, blocks, BLOCK)
    gains = (x * r).sum(-1, keepdim=True) / r.square().sum(-1, keepdim=True).clamp(min=1e-300)
    zero = x.abs().amax(-1) <= 0.01 * r.abs().amax(-1)
    multiple = (_relative(x.flatten(0, 1), (gains * r).flatten(0, 1)) <= CLOSE) | zero.flatten()
    if float(multiple.double().mean()) > 0.9:
        if bool((zero | ((gains.squeeze(-1) - 1).abs() < 0.1)).all()) and bool(zero.any()):
            which = sorted(set(zero.nonzero()[:, 1].tolist()))
            return [Fact(f"{lead}: blocks {which} of I are missing", ("gemm2", "gemm2", "requantize"))]
        return [Fact(f"{lead}: SwiGLU's right result with wrong scales of its 1x128 blocks", ("requantize",) * 2)]
    other = _of_other_tokens(fed[off], rows[off], inputs, trace)
    if other:
        return [Fact(f"{lead}: {other[0]}", other[1])]
    up, gate = trace.gemm1_out[rows[off]].double().chunk(2, dim=-1)
    rough = _function_of(gate, fed[off] / up, up, (fed[off] - due[off]).abs() > 0.1 * due[off].abs())
    if rough <= SMOOTH:
        return [Fact(f"{lead}: up times a function of the gate that is not silu", ("swiglu",) * 2)]
    size = due[off].abs()
    grid = ((fed[off] - due[off]).abs() <= 0.5 * size + 0.02 * size.amax(1, keepdim=True)).double().mean()
    if float(grid) > 0.97:
        return [Fact(f"{lead}: SwiGLU's result, rounded more coarsely than e4m3 does", ("requantize", "swiglu"))]
    return [Fact(f"{lead}: no function of the right gate and up", ("gemm1", "gemm1_scale", "activation_scale"))]


SMOOTH = 0.02
"""Variance between neighbours in the gate, over the variance of all: a function has none but the noise."""


def _relative(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().sum(-1) / (one.square().sum(-1) + other.square().sum(-1)).clamp(min=1e-300)


def _function_of(gate: Tensor, value: Tensor, up: Tensor, which: Tensor) -> float:
    """How far `value` is, where `which`, from a function of the gate: neighbours' squared steps over the variance."""
    usable = which & (up.abs() > 0.5 * up.abs().mean()) & torch.isfinite(value)
    order = gate[usable].argsort()
    taken = value[usable][order]
    if len(taken) < 64:
        return 1.0
    spread = float(taken.var())
    return float(taken.diff().square().quantile(0.8)) / 2 / spread if spread else 1.0


def _of_other_tokens(fed: Tensor, rows: Tensor, inputs: Inputs, trace: Trace) -> tuple[str, tuple[str, ...]] | None:
    """Whether most rows are SwiGLU's result of another token, or of its payload or its scales alone."""
    tokens = trace.permutation.permuted_idx_to_token_idx[rows]
    experts = torch.searchsorted(trace.permutation.expert_offsets, rows, right=True) - 1
    payload, scale = inputs.hidden_states, inputs.hidden_states_scale.T.float()
    everyone = torch.arange(len(payload), device=payload.device)
    count = [0, 0, 0]
    for expert in sorted(set(experts.tolist())):
        weight = dequantize_128x128(inputs.gemm1_weights[expert], inputs.gemm1_weights_scale[expert].float())
        for row, token in zip(fed[experts == expert], tokens[experts == expert], strict=True):
            own = token.expand_as(everyone)
            for kind, (one, other) in enumerate(((everyone, everyone), (everyone, own), (own, everyone))):
                taken = payload.view(torch.uint8)[one].view(payload.dtype)
                due = swiglu(dequantize_1x128(taken, scale[other]) @ weight.T).double()
                count[kind] += int(bool((_relative(row, due) <= CLOSE).any()))
    whole, payloads, scales = count
    most = max(count)
    if 2 * most <= len(fed):
        return None
    if most in (whole, payloads):
        what = "right result" if most == whole else "payload with their own scales"
        return f"{most} of them another token's {what}", ("permute", "permute", "gemm1")
    return f"{scales} of them their own payload with another token's scales", ("activation_scale", "activation_scale")
