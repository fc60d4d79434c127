"""Laws about scales: powers of two moved from one factor to another, and blocks of zeros.

A power of two commutes with every rounding of every recipe (casts take their scale from the block's own largest
magnitude), so these hold bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moeref.diagnose.laws_bench import Bench, law, not_finite
from moeref.diagnose.result import Finding
from moeref.inputs import FP8
from moeref.spec import BLOCK


def _powers(count: int, device: torch.device) -> torch.Tensor:
    """[count] powers of two, different ones side by side: 4, 1/8, 2, 1/4, 8, 1/2, and again."""
    exponents = torch.tensor([2.0, -3.0, 1.0, -2.0, 3.0, -1.0], device=device).repeat(count // 6 + 1)[:count]
    return torch.exp2(exponents)


@law("activation_scale", "gemm1_scale", "gemm1")
def trade_along_hidden(bench: Bench) -> Finding:
    """Activation scale of block k times 2**a, gemm1 scale column k times 2**-a: nothing changes."""
    inputs = bench.inputs
    powers = _powers(inputs.geometry.hidden_size // BLOCK, inputs.device)
    changed = replace(
        inputs,
        hidden_states_scale=inputs.hidden_states_scale * powers[:, None],
        gemm1_weights_scale=inputs.gemm1_weights_scale / powers,
    )
    return bench.compare("trade_along_hidden", bench.call(changed), bench.answer)


@law("gemm1_scale", "gemm2_scale", "swiglu", "requantize")
def trade_along_intermediate(bench: Bench) -> Finding:
    """gemm1 scale of up rows' block j times 2**b, gemm2 scale column j times 2**-b: nothing changes."""
    inputs = bench.inputs
    blocks = inputs.geometry.intermediate_size // BLOCK
    powers = _powers(blocks, inputs.device)
    gemm1_scale = inputs.gemm1_weights_scale.clone()
    gemm1_scale[:, :blocks] *= powers[:, None]
    changed = replace(inputs, gemm1_weights_scale=gemm1_scale, gemm2_weights_scale=inputs.gemm2_weights_scale / powers)
    return bench.compare("trade_along_intermediate", bench.call(changed), bench.answer)


@law("gemm2_scale", "gemm2", "output")
def scale_of_output(bench: Bench) -> Finding:
    """gemm2 scale of row block h times 2**c: the output's block h times 2**c."""
    inputs = bench.inputs
    powers = _powers(inputs.geometry.hidden_size // BLOCK, inputs.device)
    changed = replace(inputs, gemm2_weights_scale=inputs.gemm2_weights_scale * powers[:, None])
    answer = bench.call(changed)
    back = answer / powers.repeat_interleave(BLOCK).to(answer.dtype)  # exact
    return bench.compare("scale_of_output", back, bench.answer)


@law("requantize", "activation_scale", "gemm1", "gemm2")
def zero_blocks(bench: Bench) -> Finding:
    """A block of zeros is finite, and counts as nothing whichever factor holds the zeros.

    Once the activations of block 0 and the up rows of block 0 are zero, once instead the columns of both weights that
    would multiply them; in both, the last rows of gemm2 are zero and so must be the output's last block.
    """
    inputs = bench.inputs
    g = inputs.geometry
    first = slice(0, BLOCK)
    several = g.hidden_size > BLOCK  # with one block of activations its zeros would leave nothing to compare
    hidden = inputs.hidden_states.view(torch.uint8).clone()
    gemm1 = inputs.gemm1_weights.view(torch.uint8)
    gemm2 = inputs.gemm2_weights.view(torch.uint8).clone()
    if several:
        hidden[:, first] = 0
        gemm2[:, g.hidden_size - BLOCK :] = 0
    up_zero, columns_zero = gemm1.clone(), gemm1.clone()
    up_zero[:, first] = 0
    columns_zero[:, :, first] = 0 if several else columns_zero[:, :, first]
    with_zeros = replace(
        inputs, hidden_states=hidden.view(FP8), gemm1_weights=up_zero.view(FP8), gemm2_weights=gemm2.view(FP8)
    )
    got = bench.call(with_zeros)
    gemm2_without = gemm2.clone()
    gemm2_without[:, :, first] = 0
    without = replace(inputs, gemm1_weights=columns_zero.view(FP8), gemm2_weights=gemm2_without.view(FP8))
    want = bench.call(without)
    tail = got[:, g.hidden_size - BLOCK :]
    if several and bool((tail != 0).any()):
        rows = int((tail != 0).any(1).sum())
        detail = f"rows of zeros in gemm2_weights give an output that is not zero in {rows} tokens"
        return Finding("zero_blocks", False, detail, ("requantize", "gemm2", "output"))
    return not_finite("zero_blocks", bench, got) or bench.compare("zero_blocks", got, want, inputs=without)
