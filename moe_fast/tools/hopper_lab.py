"""Check and time many tilings of the Triton pipeline in one call: python -m moe_fast.tools.hopper_lab [--tokens ...]

For a kernel author with little time on a GPU. Real DeepSeek-V3 geometry (H 7168, I 2048, E 256, L 32), routing drawn
as the published workloads, values on the device. Prints every result as it comes and a table last: median time of
CUDA-graph replays with a cold L2, whole call with routing, beside local rows, experts hit and the multiple of the
floor (hit experts x 44.04 MB at 3084 GB/s).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from moe_fast.kernels.experts import Tiling
from moe_fast.pipelines.hopper_triton import choose_tiling, run
from moeref.inputs import Inputs
from moeref.reference import Trace, moe
from moeref.routings import draw_routing
from moeref.spec import PRESETS, Problem, Recipe
from moeref.workloads import WORKLOADS

GEOMETRY = PRESETS["dsv3"]
READ_GBPS = 3084.0
EXPERT_BYTES = 3 * GEOMETRY.hidden_size * GEOMETRY.intermediate_size
REQUANT = Recipe(requantize=1)

SMALL = {
    "n32u2s3x3": Tiling(16, 32, 64, 4, 3, 3, 3, 2, 2),
    "n32u2s5x2": Tiling(16, 32, 64, 4, 5, 5, 2, 2, 2),
    "n32u4s2x2": Tiling(16, 32, 64, 4, 2, 2, 2, 4, 4),
    "n64u2s3x2": Tiling(16, 64, 128, 4, 3, 3, 2, 2, 2),
    "n64u2s3x2m64": Tiling(16, 64, 64, 4, 3, 3, 2, 2, 4),
    "n64u4s3x1": Tiling(16, 64, 128, 4, 3, 3, 1, 4, 4),
    "n128w8u2s3x1": Tiling(16, 128, 256, 8, 3, 3, 1, 2, 2),
}
MIDDLE = {
    "b64n64s4x2": Tiling(64, 64, 128, 4, 4, 4, 2),
    "b64n64s3x2": Tiling(64, 64, 128, 4, 3, 3, 2),
    "b32n64u2s2x2": Tiling(32, 64, 128, 4, 2, 2, 2, 2, 2),
    "b32n64s5x2": Tiling(32, 64, 128, 4, 5, 5, 2),
    "b64n128w8s4x1": Tiling(64, 128, 256, 8, 5, 5, 1),
}
"""Named by tile rows, part1, unrolling, stages, programs a multiprocessor."""


def weights(signed: bool) -> dict[str, torch.Tensor]:
    """The four weight tensors on the device: e4m3 of clamped normals; scales normal, or positive and near 0.02."""
    g, device = GEOMETRY, "cuda"
    h, i, n = g.hidden_size, g.intermediate_size, g.num_local_experts
    made = {}
    for name, rows, columns in (("gemm1_weights", 2 * i, h), ("gemm2_weights", h, i)):
        weight = torch.empty(n, rows, columns, dtype=torch.float8_e4m3fn, device=device)
        for expert in range(n):
            weight[expert] = torch.randn(rows, columns, device=device).clamp_(-2, 2).to(torch.float8_e4m3fn)
        scale = torch.randn(n, rows // 128, columns // 128, device=device)
        made[name] = weight
        made[name + "_scale"] = scale if signed else 0.02 * (0.5 + scale.abs())
    return made


def inputs_for(tokens: int, offset: int, seed: int, made: dict[str, torch.Tensor]) -> Inputs:
    """Ten inputs with DeepSeek-like routing."""
    logits, bias = draw_routing(Problem(GEOMETRY, tokens, offset, "deepseek_like", "published", seed))
    h = GEOMETRY.hidden_size
    hidden = torch.randn(tokens, h, device="cuda").clamp_(-2, 2).to(torch.float8_e4m3fn)
    return Inputs(
        routing_logits=torch.from_numpy(logits).cuda(),
        routing_bias=torch.from_numpy(bias).cuda().bfloat16(),
        hidden_states=hidden,
        hidden_states_scale=torch.randn(h // 128, tokens, device="cuda"),
        local_expert_offset=offset,
        routed_scaling_factor=2.5,
        geometry=GEOMETRY,
        **made,
    )


def errors(got: torch.Tensor, trace: Trace) -> str:
    """Relative L2 error over active rows, the worst row, and whether idle rows are zero."""
    idle = torch.ones(len(got), dtype=torch.bool, device=got.device)
    idle[trace.permutation.permuted_idx_to_token_idx] = False
    got, want = got.float(), trace.unrounded
    rows = (got - want).norm(dim=1) / want.norm(dim=1)
    rows = rows[~idle]
    zero = bool((got[idle] == 0).all())
    total = ((got - want).norm() / want.norm()).item()
    bad = "" if zero and total < 1.2e-2 else "  <-- WRONG"
    return f"rel {total:.2e} worst row {rows.max().item() if len(rows) else 0:.2e} idle rows zero {zero}{bad}"


_flush: list[torch.Tensor] = []
_clean = False


def flush() -> None:
    """Overwrite the L2, which leaves it full of modified lines; with --clean then read it full of unmodified ones."""
    _flush[0].zero_()
    if _clean:
        _flush[0].sum()


def median_us(call: Callable[[], Any], replays: int) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of graph replays in microseconds, the L2 overwritten before each."""
    if not _flush:
        _flush.append(torch.zeros(64 * 2**20, dtype=torch.float32, device="cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    pairs = []
    for _ in range(replays + 5):
        flush()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    times = sorted(1000 * a.elapsed_time(b) for a, b in pairs[5:])
    return statistics.median(times), times[len(times) // 10], times[len(times) * 9 // 10]


def profile(call: Callable[[], Any]) -> str:
    """Microseconds a kernel, from the profiler, L2 cold."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(5):
            flush()
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in record.events():
        if event.name.endswith("_kernel"):
            found.setdefault(event.name, []).append(event.device_time)
    return "  ".join(f"{name} {statistics.median(times):.1f}" for name, times in found.items())


def study(tokens: int, made: dict[str, torch.Tensor], options: argparse.Namespace) -> list[str]:
    """Check and time every variant at one size; returns the lines of the table."""
    offset = next((w.offset for w in WORKLOADS if w.seq_len == tokens), 32)
    inputs = inputs_for(tokens, offset, options.seed, made)
    trace = moe(inputs, REQUANT)
    bounds = trace.permutation.expert_offsets
    rows, hit = int(bounds[-1]), int((bounds.diff() > 0).sum())
    floor = hit * EXPERT_BYTES / READ_GBPS / 1e3
    print(f"T={tokens}: {rows} rows on {hit} experts, floor {floor:.0f} us", flush=True)
    variants = {"default": choose_tiling(tokens), **(SMALL if tokens <= 128 else MIDDLE)}
    lines = []
    first: torch.Tensor | None = None
    for name, tiling in variants.items():
        if options.variants and name not in options.variants:
            continue
        for pdl in (True, False) if name == "default" else (tiling.pdl,):
            cut = Tiling(**{**vars(tiling), "pdl": pdl})
            label = name if pdl else name + "-nopdl"
            out = torch.full((tokens, GEOMETRY.hidden_size), torch.nan, dtype=torch.bfloat16, device="cuda")

            def call(cut: Tiling = cut, out: torch.Tensor = out) -> None:
                run(*inputs.args(), out, tiling=cut)

            try:
                call()
                verdict = errors(out, trace)
                out.fill_(torch.nan)
                mid, low, high = median_us(call, options.replays)
                again = errors(out, trace)
            except Exception as error:
                print(f"  {label}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            first = out.clone() if first is None else first
            verdict += "" if torch.equal(out, first) else " other bytes than the first variant"
            wrong = "" if "WRONG" not in verdict + again else " WRONG"
            lines.append(
                f"{tokens:6d} {rows:5d} {hit:3d} {floor:6.0f} {label:16s} {mid:8.1f} {low:8.1f} {high:8.1f} "
                f"{mid / floor:6.3f}{wrong}"
            )
            print(lines[-1] + f"  {verdict}" + (f"  {profile(call)}" if options.profile else ""), flush=True)
    return lines


def main() -> None:
    """Parse arguments, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 7, 16, 32, 55, 80, 901])
    parser.add_argument("--variants", nargs="*", help="only these")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signed", action="store_true", help="scales drawn from a normal distribution")
    parser.add_argument("--profile", action="store_true", help="add each kernel's time")
    parser.add_argument("--clean", action="store_true", help="time with an L2 that has nothing to write back")
    options = parser.parse_args()
    global _clean
    _clean = options.clean
    torch.manual_seed(options.seed)
    made = weights(options.signed)
    table = [line for tokens in options.tokens for line in study(tokens, made, options)]
    print("tokens  rows hit  floor variant              median      p10      p90 xfloor")
    print("\n".join(table))


if __name__ == "__main__":
    main()
