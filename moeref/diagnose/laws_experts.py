"""Laws about experts: ranks add up, names do not matter, a common bias does not, unchosen ones are not read."""

from __future__ import annotations

from dataclasses import replace

import torch

from moeref.diagnose.laws_bench import NOISE, Bench, law, not_applicable, not_finite
from moeref.diagnose.result import Finding
from moeref.inputs import FP8, Inputs
from moeref.judge.noise import Noise, fit, output_noise
from moeref.judge.ties import ambiguous_tokens
from moeref.reference import moe, permute, route
from moeref.spec import Geometry

MAX_RANKS = 16  # that ranks_add_up runs; ranks that no token chose are left out beyond that
NAN_OCTET = 0x7F


@law("offset", "permute", "topk", "combine")
def ranks_add_up(bench: Bench) -> Finding:
    """The outputs of all expert-parallel ranks add up to the layer with all experts.

    The sum is compared with the reference's sum before rounding; variances of the ranks' roundings add.
    """
    name, g = "ranks_add_up", bench.geometry
    offsets = list(range(0, g.num_experts, g.num_local_experts))
    if len(offsets) < 2:
        return not_applicable(name, "one rank holds all experts")
    for seq_len in (8, 2, 1):  # fewer tokens where they would choose too many ranks
        first = bench.make(seq_len, 0, "model_like")
        ids = route(first.routing_logits, first.routing_bias, g, first.routed_scaling_factor).topk_ids
        chosen = [o for o in offsets if bool(((ids >= o) & (ids < o + g.num_local_experts)).any())]
        ranks = offsets if len(offsets) <= MAX_RANKS else chosen
        if len(ranks) <= MAX_RANKS:
            break
    if not first.seq_len:
        return not_applicable(name, "every token comes near a tie")
    answers, exact, noises = [], [], []
    for offset in ranks:
        inputs = bench.make(seq_len, offset, "model_like")
        answers.append(bench.call(inputs).float())
        trace = moe(inputs)
        exact.append(trace.unrounded)
        noises.append(output_noise(trace, inputs, bench.widest))
    total, expected = torch.stack(answers).sum(0), torch.stack(exact).sum(0)
    if not bool(torch.isfinite(total).all()):
        return Finding(name, False, "NaN or inf in the output of a rank", ("combine", "output"))
    active = expected.any(1).nonzero().squeeze(1)
    found = fit(total, replace(trace, unrounded=expected), added(noises), active, grouped=False)
    where = f"sum over {len(ranks)} ranks, {len(expected)} tokens: z {found.overall.value:.3g}"
    detail = f"{where}, {found.overall.limit:.3g} allowed; worst token {found.rows.value:.3g} times its limit"
    stages = () if found.passed else ("offset", "permute", "topk", "combine")
    return Finding(name, found.passed, detail, stages, z=found.overall.value)


def added(noises: list[Noise]) -> Noise:
    """The noise of a sum of independent outputs for the same tokens.

    A part with share v of the row's variance adds f v to what columns share, f**2 v**2 / n to the sum of squares that
    the number n of independent errors stands for, and v times its largest.
    """
    variance = torch.stack([noise.variance for noise in noises]).sum(0)
    shares = [(noise.variance / variance).nan_to_num(nan=0.0).mean(1) for noise in noises]  # [T] each
    shared, squares, largest = (torch.zeros_like(shares[0]) for _ in range(3))
    for noise, share in zip(noises, shares, strict=True):
        shared = shared + share * noise.shared
        squares = squares + (share * noise.shared).square() / noise.freedom
        largest = torch.maximum(largest, share * noise.largest)
    freedom = torch.where(squares > 0, shared.square() / squares, torch.ones_like(shared)).clamp(min=1.0)
    return Noise(variance, shared, freedom, largest, noises[0].sources)


@law("offset", "permute", "bias", "topk", "combine")
def relabelling(bench: Bench) -> Finding:
    """Experts renamed within their group, logits, bias and weights with them: nothing changes.

    Experts of this rank swap names among themselves, others too. Runs stand elsewhere and the sum over a token's
    experts is added in another order.
    """
    inputs, name = bench.inputs, "relabelling"
    moved = _renamed(bench.geometry, inputs.local_expert_offset)
    source = torch.tensor(moved, device=inputs.device)  # [E]: the old id that now has this id
    if moved == list(range(len(moved))):
        return not_applicable(name, "no group has two experts on the same side of the rank's border")
    slots = torch.arange(bench.geometry.num_local_experts, device=inputs.device)
    ids = slots + inputs.local_expert_offset
    real = (ids >= 0) & (ids < len(moved))
    slots[real] = source[ids[real]] - inputs.local_expert_offset
    changed = replace(
        inputs,
        routing_logits=inputs.routing_logits[:, source],
        routing_bias=inputs.routing_bias[source],
        gemm1_weights=inputs.gemm1_weights.view(torch.uint8)[slots].view(FP8),
        gemm1_weights_scale=inputs.gemm1_weights_scale[slots],
        gemm2_weights=inputs.gemm2_weights.view(torch.uint8)[slots].view(FP8),
        gemm2_weights_scale=inputs.gemm2_weights_scale[slots],
    )
    return bench.compare(name, bench.call(changed), bench.answer, NOISE)


def _renamed(g: Geometry, offset: int) -> list[int]:
    """For each id the old id that moves there: one step round among the local, and among the other, ids of a group."""
    moved = list(range(g.num_experts))
    for start in range(0, g.num_experts, g.group_size):
        group = range(start, start + g.group_size)
        for local in (True, False):
            ids = [e for e in group if (offset <= e < offset + g.num_local_experts) == local]
            for here, there in zip(ids, [*ids[1:], *ids[:1]], strict=True):
                moved[here] = there
    return moved


@law("bias", "groups", "topk", "weights")
def bias_shift(bench: Bench) -> Finding:
    """The same number added to every bias changes no choice and no weight.

    The bias is rounded to multiples of 1/32 within [-1, 1], so that it stays exact in bfloat16 when 2 is added or 4
    subtracted; tokens that come near a tie under any of the three are left out.
    """
    inputs = bench.inputs
    bias = (inputs.routing_bias.float().clamp(-1, 1) * 32).round() / 32
    shifted = [replace(inputs, routing_bias=(bias + shift).bfloat16()) for shift in (0.0, 2.0, -4.0)]
    clear = torch.ones(inputs.seq_len, dtype=torch.bool, device=inputs.device)
    for one in shifted:
        routing = route(one.routing_logits, one.routing_bias, bench.geometry, one.routed_scaling_factor)
        clear[ambiguous_tokens(one, routing)] = False
    if not bool(clear.any()):
        return not_applicable("bias_shift", "every token comes near a tie")
    plain, *others = [one.take(clear.nonzero().squeeze(1)) for one in shifted]
    want = bench.call(plain)
    finding = Finding("bias_shift", True, "")
    for other, shift in zip(others, ("+2", "-4"), strict=True):
        finding = bench.compare("bias_shift", bench.call(other), want, inputs=plain)
        if finding.passed is False:
            return replace(finding, detail=f"bias {shift}: {finding.detail}")
    return finding


@law("weights", "combine")
def scaling_factor(bench: Bench) -> Finding:
    """Twice the routed_scaling_factor gives twice the output."""
    inputs = replace(bench.inputs, routed_scaling_factor=2 * bench.inputs.routed_scaling_factor)
    return bench.compare("scaling_factor", bench.call(inputs) / 2, bench.answer)


def _runs(inputs: Inputs) -> torch.Tensor:
    """Rows of each local expert, [L] int64."""
    g = inputs.geometry
    routing = route(inputs.routing_logits, inputs.routing_bias, g, inputs.routed_scaling_factor)
    return permute(routing.topk_ids, g, inputs.local_expert_offset).expert_offsets.diff()


@law("requantize", "combine", "permute")
def zero_expert(bench: Bench) -> Finding:
    """An expert that gives zero is finite, and counts as nothing whichever of its two weights is zero."""
    inputs = bench.inputs
    busiest = int(_runs(inputs).argmax())
    answers = []
    for name in ("gemm1_weights", "gemm2_weights"):
        weight = getattr(inputs, name).view(torch.uint8).clone()
        weight[busiest] = 0
        changed = replace(inputs, **{name: weight.view(FP8)})
        answers.append(bench.call(changed))
    finding = not_finite("zero_expert", bench, answers[0])
    return finding or bench.compare("zero_expert", answers[0], answers[1], inputs=changed)


@law("permute", "gemm1", "gemm2")
def unchosen_not_read(bench: Bench) -> Finding:
    """NaN in weights and scales of local experts that nobody chose changes nothing."""
    inputs = bench.inputs
    unwanted = min(max(inputs.local_expert_offset, 0) + 1, inputs.local_expert_offset + len(inputs.gemm1_weights) - 1)
    bias = inputs.routing_bias.clone()
    bias[min(unwanted, len(bias) - 1)] = -8.0
    clean = replace(inputs, routing_bias=bias)
    idle = _runs(clean) == 0
    if not bool(idle.any()):
        return not_applicable("unchosen_not_read", "every local expert is always chosen")
    poisoned: dict[str, torch.Tensor] = {}
    for name in ("gemm1_weights", "gemm2_weights"):
        weight = getattr(inputs, name).view(torch.uint8).clone()
        weight[idle] = NAN_OCTET
        scale = getattr(inputs, f"{name}_scale").clone()
        scale[idle] = torch.nan
        poisoned |= {name: weight.view(FP8), f"{name}_scale": scale}
    want = bench.call(clean)
    dirty = replace(clean, **poisoned)  # type: ignore[arg-type]
    return bench.compare("unchosen_not_read", bench.call(dirty), want, inputs=clean)
