"""The Runner on a GPU: draws inputs, has moeref judge what comes out, times graph replays with a cold L2."""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable

import torch

from moe_fast.backends import release_workspaces
from moe_fast.tuning.search import TRITON, Discard, Drawn, Variant
from moeref.bench.device_tools import Captured, capture
from moeref.bench.stopwatch import GRAPH, CudaStopwatch, Stopwatch
from moeref.inputs import FP8, Inputs
from moeref.interop.observe import CandidateRun
from moeref.judge.checks import POISONS
from moeref.judge.verdict import PASS, Known, judge
from moeref.reference import moe, permute, route
from moeref.routings import draw_routing
from moeref.spec import BLOCK, Geometry, Problem

REPLAYS = 10
"""Timed calls of a variant in one round."""

SEEDS = 16
"""Draws that are looked at for one in which a token chooses a local expert."""

FACTOR = 2.5  # DeepSeek-V3's routed_scaling_factor


def draw(geometry: Geometry, tokens: int, offset: int | None, seed: int) -> tuple[Problem, Drawn]:
    """A problem with DeepSeek-like routing, and what its routing is. Raises ValueError.

    offset: of the first local expert; None: the shard whose rows are nearest to the mean over shards. Draws in which
    no token chooses a local expert are passed over.
    """
    g = geometry
    for attempt in range(seed, seed + SEEDS):
        problem = Problem(g, tokens, offset or 0, "deepseek_like", "published", attempt)
        logits, bias = (torch.from_numpy(part) for part in draw_routing(problem))
        ids = route(logits, bias, g, FACTOR).topk_ids
        shards = (
            [offset] if offset is not None else range(0, g.num_experts - g.num_local_experts + 1, g.num_local_experts)
        )
        rows = {shard: permute(ids, g, shard).expert_offsets.diff() for shard in shards}
        mean = tokens * g.top_k * g.num_local_experts / g.num_experts
        hit = [shard for shard in rows if int(rows[shard].sum())]
        if hit:
            best = min(hit, key=lambda shard: abs(int(rows[shard].sum()) - mean))
            drawn = Drawn(int(rows[best].sum()), int((rows[best] > 0).sum()), best)
            return Problem(g, tokens, best, "deepseek_like", "published", attempt), drawn
    raise ValueError(
        f"{tokens} tokens, offset {offset}: no token chose a local expert in {SEEDS} draws; take more tokens"
    )


def make_weights(geometry: Geometry, device: torch.device, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The four weight tensors, made on the device: e4m3 of normals within +-2; positive scales that keep a product's
    size near that of what it is made from, so that gates lie where silu is curved."""
    g, made = geometry, {}
    for name, rows, columns in (
        ("gemm1_weights", 2 * g.intermediate_size, g.hidden_size),
        ("gemm2_weights", g.hidden_size, g.intermediate_size),
    ):
        weight = torch.empty(g.num_local_experts, rows, columns, dtype=FP8, device=device)
        for expert in range(g.num_local_experts):
            normal = torch.randn(rows, columns, device=device, generator=generator)
            weight[expert] = normal.clamp_(-2, 2).to(FP8)
        shape = (g.num_local_experts, rows // BLOCK, columns // BLOCK)
        spread = 0.5 + torch.randn(shape, device=device, generator=generator).abs()
        made[name], made[name + "_scale"] = weight, spread * (2 / columns**0.5)
    return made


def run_of(variant: Variant) -> Callable[..., torch.Tensor]:
    """The backend's function, which asks for no tuned table."""
    if variant.pipeline == TRITON:
        run = importlib.import_module("moe_fast.pipelines.hopper_triton").run
        return functools.partial(run, tiling=variant.tiling, cuda_routing=True)  # as backends/hopper.py calls it
    run = importlib.import_module(f"moe_fast.backends.{variant.pipeline}").run
    return functools.partial(run)


class GpuRunner:
    """Holds one geometry's weights. Memory: they (1.4 GB for DeepSeek-V3's shard), and a workspace a variant."""

    def __init__(
        self,
        geometry: Geometry,
        device: torch.device,
        offset: int | None,
        seed: int,
        run: Callable[[Variant], Callable[..., torch.Tensor]] = run_of,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.geometry, self.device, self.offset, self.seed = geometry, device, offset, seed
        self._run = run
        self._stopwatch = stopwatch or CudaStopwatch(device)
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._weights = make_weights(geometry, device, self._generator)
        self._forget()

    def close(self) -> None:
        """Forget the inputs, what was judged, the graphs, and every workspace that the pipelines keep: a capture makes
        one for its own stream, and calls make theirs anew."""
        self._forget()
        if self.device.type == "cuda":
            release_workspaces()
            torch.cuda.empty_cache()

    def _forget(self) -> None:
        self._inputs: Inputs | None = None
        self._known: Known | None = None
        self._name = ""
        self._right: list[torch.Tensor] = []
        self._output_of: dict[Variant, torch.Tensor] = {}
        self._graphs: dict[Variant, Captured] = {}

    def open(self, tokens: int) -> Drawn:
        """Draw inputs and compute the reference."""
        problem, drawn = draw(self.geometry, tokens, self.offset, self.seed)
        g, device = self.geometry, self.device
        logits, bias = draw_routing(problem)
        hidden = torch.randn(tokens, g.hidden_size, device=device, generator=self._generator).clamp_(-2, 2)
        scale = torch.randn(g.hidden_size // BLOCK, tokens, device=device, generator=self._generator)
        inputs = Inputs(
            routing_logits=torch.from_numpy(logits).to(device),
            routing_bias=torch.from_numpy(bias).to(device).bfloat16(),
            hidden_states=hidden.to(FP8),
            hidden_states_scale=0.5 + scale.abs(),
            local_expert_offset=drawn.offset,
            routed_scaling_factor=FACTOR,
            geometry=g,
            **self._weights,
        )
        self._inputs, self._name = inputs, problem.name
        self._known = Known(moe(inputs), inputs)
        self._out = torch.empty(tokens, g.hidden_size, dtype=torch.bfloat16, device=device)
        return drawn

    def check(self, variant: Variant) -> None:
        """Two calls into a buffer that was filled otherwise: the bytes of an output that was found right, or judged by
        every check of `moeref verify` under the recipe requant."""
        outputs = []
        for poison in POISONS:
            self._out.fill_(poison)
            self._call(variant)
            self._stopwatch.synchronise()
            outputs.append(self._out.clone())
        if not all(any(same_bytes(output, right) for right in self._right) for output in outputs):
            self._judge(outputs)
            self._right.append(outputs[0])
        self._output_of[variant] = outputs[0]

    def _judge(self, outputs: list[torch.Tensor]) -> None:
        assert self._inputs is not None and self._known is not None, "open first"
        run = CandidateRun(outputs=outputs, poisoned=True, deterministic=True)
        verdict = judge(self._name, self._inputs, self._known.trace, run, "requant", known=self._known)
        if verdict.status != PASS:
            raise Discard(f"wrong: {verdict.message}")

    def time(self, variant: Variant) -> float:
        """Median of REPLAYS graph replays with a cold L2, microseconds; the last output must be the checked one."""
        if variant not in self._graphs:
            self._graphs[variant] = capture(functools.partial(self._call, variant))
        self._out.fill_(torch.nan)
        took = []
        for _ in range(REPLAYS):
            self._stopwatch.flush()
            took.append(1e6 * self._stopwatch.time(self._graphs[variant].replay, GRAPH).seconds)
        if not same_bytes(self._out, self._output_of[variant]):
            raise Discard("wrong: graph replays give other bytes than the calls before")
        return statistics.median(took)

    def _call(self, variant: Variant) -> torch.Tensor:
        assert self._inputs is not None, "open first"
        g = self.geometry
        groups = {"n_group": g.n_group, "topk_group": g.topk_group, "top_k": g.top_k}
        return self._run(variant)(*self._inputs.args(), self._out, **groups)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of two bfloat16 tensors of one shape; NaN equals NaN."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))
