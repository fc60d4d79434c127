"""Laws about tokens: their order, their company, their copies, and zeros among them."""

from __future__ import annotations

from dataclasses import replace

import torch

from moeref.diagnose.laws_bench import NOISE, ORDER, Bench, law, not_applicable
from moeref.diagnose.result import Finding
from moeref.draw import Stream
from moeref.inputs import FP8

ORDER_OF_TOKENS = 21  # Philox field


@law("permute", "activation_scale", "requantize", "combine")
def permutation(bench: Bench) -> Finding:
    """Tokens in another order give the same rows in that order."""
    inputs = bench.inputs
    drawn = Stream(bench.problem.seed, ORDER_OF_TOKENS).permutation(inputs.seq_len)
    order = torch.from_numpy(drawn).to(inputs.device)
    return bench.compare("permutation", bench.call(inputs.take(order)), bench.answer[order], ORDER, tokens=order)


@law("permute", "activation_scale", "requantize", "combine")
def split(bench: Bench) -> Finding:
    """A batch cut into three (a single token first) gives the same rows as the whole."""
    inputs = bench.inputs
    tokens = torch.arange(inputs.seq_len, device=inputs.device)
    parts = [part for part in tokens.tensor_split((1, 1 + inputs.seq_len // 3)) if len(part)]
    got = torch.cat([bench.call(inputs.take(part)) for part in parts])
    return bench.compare("split", got, bench.answer, NOISE)


@law("permute", "activation_scale", "requantize", "combine")
def duplicates(bench: Bench) -> Finding:
    """Equal tokens of one batch get equal rows."""
    inputs = bench.inputs
    half = torch.arange((inputs.seq_len + 1) // 2, device=inputs.device)
    answer = bench.call(inputs.take(torch.cat([half, half])))
    return bench.compare("duplicates", answer[len(half) :], answer[: len(half)], ORDER, tokens=half)


@law("permute", "requantize", "combine")
def zero_tokens(bench: Bench) -> Finding:
    """A token of zeros gets a row of zeros and leaves the other rows as they were."""
    inputs = bench.inputs
    zeroed = torch.arange(inputs.seq_len, device=inputs.device) % 3 == 1
    if not bool(zeroed.any()):
        return not_applicable("zero_tokens", "fewer than two tokens")
    payload = inputs.hidden_states.view(torch.uint8).clone()
    payload[zeroed] = 0
    answer = bench.call(replace(inputs, hidden_states=payload.view(FP8)))
    bad = (~torch.isfinite(answer) | (answer != 0)).any(1) & zeroed
    if bool(bad.any()):
        detail = f"{int(bad.sum())} of {int(zeroed.sum())} tokens of zeros gave a row that is not zero"
        return Finding(
            "zero_tokens", False, f"{detail} (first: row {int(bad.nonzero()[0])})", ("requantize", "permute")
        )
    rest = (~zeroed).nonzero().squeeze(1)
    return bench.compare("zero_tokens", answer[rest], bench.answer[rest], tokens=rest)
