"""Check and time the CUDA kernels in one call: python -m moe_fast.tools.cuda_lab [--variants c1 c2]  [--tokens ...]

Every variant (cluster size) runs in a process of its own with a time limit, for a broken pipeline
hangs. Checks first, on ragged made-up counts with signed scales and poisoned outputs, against the torch twins; then
times at DeepSeek-V3's sizes with a routing drawn as the published workloads. Prints as it goes and a table last.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from moe_fast.kernels import cuda_combine, cuda_grouped_gemm
from moe_fast.kernels.cuda_build import compiler, cubin
from moe_fast.kernels.cuda_grouped_gemm import Direct, num_tiles, scale_stride

SECONDS = 60
FLOPS_PER_ROW = {"gemm1": 2 * 4096 * 7168, "gemm2": 2 * 7168 * 2048}
VARIANTS = ("c2", "c1")


@dataclass
class Case:
    """Device tensors of one problem."""

    hidden_states: torch.Tensor  # [T, H]
    hidden_states_scale: torch.Tensor  # [H/128, T]
    gemm1_weights: torch.Tensor  # [L, 2I, H]
    gemm1_weights_scale: torch.Tensor
    gemm2_weights: torch.Tensor  # [L, H, I]
    gemm2_weights_scale: torch.Tensor
    index: torch.Tensor  # [P]
    offsets: torch.Tensor  # [L+1]
    token_rows: torch.Tensor  # [T, K] a token's rows, ascending, then -1
    token_weights: torch.Tensor  # [T, K] beside them

    def listed(self, fewest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens with that many rows at least, and the list's bounds, as combine wants them."""
        tokens = ((self.token_rows >= 0).sum(1) >= fewest).nonzero().squeeze(1).to(torch.int32)
        return tokens, torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device)

    def direct(self, output: torch.Tensor) -> Direct:
        """What the GEMMs can write without combine."""
        rows = (self.token_rows >= 0).sum(1)
        token, slot = (self.token_rows >= 0).nonzero(as_tuple=True)
        targets = torch.empty(len(self.index), 2, dtype=torch.int32, device=output.device)
        at = self.token_rows[token, slot].long()
        targets[at, 0] = torch.where(rows[token] == 1, token, -1).to(torch.int32)
        targets[at, 1] = self.token_weights[token, slot].view(torch.int32)
        idle = (rows == 0).nonzero().squeeze(1).to(torch.int32)
        return Direct(output, targets, idle, torch.tensor([len(idle)], dtype=torch.int32, device=output.device))

    def outputs(self) -> dict[str, torch.Tensor]:
        """Poisoned outputs and zero counters, some rows longer than needed."""
        rows, device = scale_stride(len(self.index) + 40), self.index.device
        hidden, inner = self.gemm2_weights.shape[1:]
        return {
            "requantized": torch.full((rows, inner), 0x7F, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
            "requantized_scale": torch.full((inner // 128, rows), torch.nan, device=device),
            "gemm2_out": torch.full((rows, hidden), torch.nan, dtype=torch.bfloat16, device=device),
            "output": torch.full((len(self.hidden_states), hidden), torch.nan, dtype=torch.bfloat16, device=device),
            "counters": torch.zeros(4, dtype=torch.int32, device=device),
            "tiles_done": torch.zeros(num_tiles(rows, len(self.offsets) - 1), dtype=torch.int32, device=device),
        }


def fp8(*shape: int) -> torch.Tensor:
    """Clamped normals as e4m3."""
    return torch.randn(shape, device="cuda").clamp_(-2, 2).to(torch.float8_e4m3fn)


def make_case(local_slot: torch.Tensor, hidden: int, inner: int) -> Case:
    """local_slot [T, L]: slot of the choice that is local expert l, or -1."""
    tokens, local = local_slot.shape
    expert, token = torch.nonzero(local_slot.T >= 0, as_tuple=True)
    token_rows = torch.full((tokens, 8), -1, dtype=torch.int32, device="cuda")
    lower = (local_slot >= 0).cumsum(1) - 1  # of a token's local experts
    token_rows[token, lower[token, expert]] = torch.arange(len(token), dtype=torch.int32, device="cuda")
    offsets = torch.zeros(local + 1, dtype=torch.int32, device="cuda")
    offsets[1:] = (local_slot >= 0).sum(0).cumsum(0)
    return Case(
        fp8(tokens, hidden),
        torch.randn(hidden // 128, tokens, device="cuda"),
        torch.stack([fp8(2 * inner, hidden) for _ in range(local)]),
        torch.randn(local, 2 * inner // 128, hidden // 128, device="cuda"),
        torch.stack([fp8(hidden, inner) for _ in range(local)]),
        torch.randn(local, hidden // 128, inner // 128, device="cuda"),
        token.to(torch.int32),
        offsets,
        token_rows,
        torch.rand(tokens, 8, device="cuda"),
    )


def ragged_slots(counts: list[int], tokens: int) -> torch.Tensor:
    """local_slot [T, L] with that many rows an expert; expert l takes slot l % 8 of tokens spread over the batch."""
    slots = torch.full((tokens, len(counts)), -1, dtype=torch.int32, device="cuda")
    for expert, count in enumerate(counts):
        slots[torch.randperm(tokens - 1, device="cuda")[:count], expert] = expert % 8  # the last token stays idle
    return slots


def drawn_slots(tokens: int, seed: int) -> torch.Tensor:
    """local_slot of DeepSeek-V3's routing, drawn as the published workload of that length."""
    from moe_fast.kernels.routing import route_torch
    from moeref.routings import draw_routing
    from moeref.spec import PRESETS, Problem
    from moeref.workloads import WORKLOADS

    offset = next((w.offset for w in WORKLOADS if w.seq_len == tokens), 32)
    logits, bias = draw_routing(Problem(PRESETS["dsv3"], tokens, offset, "deepseek_like", "published", seed))

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="cuda")

    slots = ints(tokens, 32)
    weights = torch.zeros(tokens, 8, device="cuda")
    drawn = torch.from_numpy(logits).cuda(), torch.from_numpy(bias).cuda().bfloat16()
    route_torch(
        *drawn, ints(tokens, 8), weights, slots, ints(tokens, 8), ints(1), ints(1), ints(1), ints(1), ints(1),
        offset, 2.5, 8, 4, 16,
    )  # fmt: skip
    return slots


def run_gemms(
    case: Case,
    to: dict[str, torch.Tensor],
    cluster: int,
    phases: int = 3,
    twin: bool = False,
    direct: Direct | None = None,
) -> None:
    """The grouped GEMMs or their twin; without routing, whose part zeroing tiles_done is."""
    call = cuda_grouped_gemm.grouped_gemms_torch if twin else cuda_grouped_gemm.grouped_gemms
    if phases == 3:
        to["tiles_done"].zero_()
    call(
        case.hidden_states, case.hidden_states_scale, case.gemm1_weights, case.gemm1_weights_scale,
        case.gemm2_weights, case.gemm2_weights_scale, case.index, case.offsets, to["requantized"],
        to["requantized_scale"], to["gemm2_out"], to["tiles_done"], to["counters"], direct, cluster, phases,
    )  # fmt: skip


def run_gemm1(case: Case, to: dict[str, torch.Tensor], cluster: int, twin: bool = False) -> None:
    """gemm1 or its twin."""
    run_gemms(case, to, cluster, 1, twin)


def run_gemm2(case: Case, to: dict[str, torch.Tensor], cluster: int, twin: bool = False) -> None:
    """gemm2 or its twin."""
    run_gemms(case, to, cluster, 2, twin)


def run_combine(
    case: Case, to: dict[str, torch.Tensor], listed: tuple[torch.Tensor, torch.Tensor], twin: bool = False
) -> None:
    """combine or its twin, for the tokens that Case.listed gave."""
    call = cuda_combine.combine_torch if twin else cuda_combine.combine
    call(to["gemm2_out"], case.token_weights, case.token_rows, *listed, to["output"])


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 error; NaN when anything is NaN."""
    return ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30)).item()


def check(case: Case, cluster: int) -> str:
    """Compare every stage with its twin on the same inputs; outputs past the last row must keep their poison."""
    rows = len(case.index)
    got, want = case.outputs(), case.outputs()
    run_gemm1(case, got, cluster)
    run_gemm1(case, want, cluster, twin=True)
    torch.cuda.synchronize()
    scale = distance(got["requantized_scale"][:, :rows], want["requantized_scale"][:, :rows])
    bytes_got, bytes_want = (t["requantized"][:rows].view(torch.uint8) for t in (got, want))
    other = (bytes_got != bytes_want).float().mean().item() if rows else 0.0
    values = [
        t["requantized"][:rows].float() * t["requantized_scale"][:, :rows].T.repeat_interleave(128, 1)
        for t in (got, want)
    ]
    value = distance(*values)
    want["requantized"].copy_(got["requantized"])
    want["requantized_scale"].copy_(got["requantized_scale"])
    run_gemm2(case, got, cluster)
    run_gemm2(case, want, cluster, twin=True)
    torch.cuda.synchronize()
    second = distance(got["gemm2_out"][:rows], want["gemm2_out"][:rows])
    want["gemm2_out"].copy_(got["gemm2_out"])
    run_combine(case, got, case.listed(0))
    run_combine(case, want, case.listed(0), twin=True)
    torch.cuda.synchronize()
    third = distance(got["output"], want["output"])
    kept = (
        (got["requantized"][rows:].view(torch.uint8) == 0x7F).all()
        and got["requantized_scale"][:, rows:].isnan().all()
        and got["gemm2_out"][rows:].isnan().all()
        and (got["counters"] == 0).all()
    )
    # Both in one launch, only rows without combine: the same bytes but for those rows, rounded once, not twice.
    again = case.outputs()
    run_gemms(case, again, cluster, direct=case.direct(again["output"]))
    run_combine(case, again, case.listed(2))
    alone = (case.token_rows >= 0).sum(1) == 1
    same = torch.equal(again["output"][~alone].view(torch.int16), got["output"][~alone].view(torch.int16))
    fourth = distance(again["output"][alone], got["output"][alone])
    fine = scale < 2e-3 and other < 0.02 and second < 3e-3 and third < 3e-3 and fourth < 3e-3 and bool(kept) and same
    return (
        f"gemm1 scale {scale:.1e} bytes differ {other:.2%} value {value:.1e}; gemm2 {second:.1e}; combine {third:.1e}; "
        f"alone {fourth:.1e}; poison kept {bool(kept)}; repeats {same}{'' if fine else '  <-- WRONG'}"
    )


_flush: list[torch.Tensor] = []


def median_us(call: Callable[[], None], repeats: int = 12) -> float:
    """Median of graph replays, the L2 overwritten before each."""
    if not _flush:
        _flush.append(torch.zeros(64 * 2**20, dtype=torch.float32, device="cuda"))
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    pairs = []
    for _ in range(repeats + 3):
        _flush[0].zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(1000 * a.elapsed_time(b) for a, b in pairs[3:])


def time_case(case: Case, name: str, cluster: int) -> None:
    """Print a line of the table."""
    rows, to, listed = len(case.index), case.outputs(), case.listed(2)  # a graph's capture can't make the list
    gemm1 = median_us(lambda: run_gemm1(case, to, cluster))
    gemm2 = median_us(lambda: run_gemm2(case, to, cluster))
    both = median_us(lambda: run_gemms(case, to, cluster))
    last = median_us(lambda: run_combine(case, to, listed))
    rates = [rows * FLOPS_PER_ROW[k] / t / 1e6 for k, t in (("gemm1", gemm1), ("gemm2", gemm2))]
    print(
        f"TABLE {name:6s} {rows:6d} {gemm1:8.1f} {rates[0]:6.0f} {gemm2:8.1f} {rates[1]:6.0f} {both:8.1f} {last:8.1f}",
        flush=True,
    )


def one(name: str, tokens: list[int], timing: bool) -> None:
    """Check and time one variant in this process."""
    found = re.fullmatch(r"c(\d+)", name)
    if found is None:
        raise SystemExit(f"variant {name}: expected c1 or c2")
    cluster = int(found[1])
    torch.manual_seed(1)
    ragged = {
        "ragged": ([0, 1, 127, 0, 128, 129, 255, 256, 257, 300, 8, 0], 400, 512, 384),
        "one row": ([0, 0, 1, 0], 3, 128, 128),
        "no row": ([0, 0, 0], 5, 256, 256),
    }
    for label, (counts, count, hidden, inner) in ragged.items():
        print(f"{name} {label}:", end=" ", flush=True)
        print(check(make_case(ragged_slots(counts, count), hidden, inner), cluster), flush=True)
    for count in tokens:
        case = make_case(drawn_slots(count, 0), 7168, 2048)
        sizes = case.offsets.diff()
        print(f"{name} {count} tokens, rows {len(case.index)}, {sizes.min()}..{sizes.max()} an expert:", end=" ")
        print(check(case, cluster), flush=True)
        if timing:
            time_case(case, name, cluster)


def build(name: str) -> None:
    """Compile a variant into the cache folder."""
    cubin("grouped_gemm.cu", dict(cuda_grouped_gemm.defines(int(name.removeprefix("c")))))


def main() -> None:
    """Parse arguments; compile all, then a process for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--tokens", type=int, nargs="*", default=[901, 14107])
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of each variant")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--one", help="run this variant here")
    options = parser.parse_args()
    if options.one:
        one(options.one, options.tokens, not options.no_timing)
        return
    print(f"compiling with {compiler()}", flush=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(build, options.variants))
    table = []
    for name in options.variants:
        command = [sys.executable, "-u", "-m", "moe_fast.tools.cuda_lab", "--one", name]
        command += ["--tokens", *map(str, options.tokens), *(["--no-timing"] if options.no_timing else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                said, _ = process.communicate(timeout=options.seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                said = process.communicate()[0] + f"\n{name}: still running after {options.seconds} s, ended"
        table += [line.removeprefix("TABLE ") for line in said.splitlines() if line.startswith("TABLE ")]
        print("\n".join(line for line in said.splitlines() if not line.startswith("TABLE "))[-4000:], flush=True)
    print("name     rows    gemm1   TF/s    gemm2   TF/s     both  combine (us)")
    print("\n".join(table))


if __name__ == "__main__":
    main()
