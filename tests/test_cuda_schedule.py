"""The grouped GEMM's schedule, compiled for the host: every tile of every expert exactly once, whatever the counts."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from moe_fast.kernels.cuda_build import source_text

COMPILER = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the PATH")

# Reads lines of: experts columns counts...; prints a line of: ctas item rank expert column row live shared.
PROGRAM = """
#include <cstdio>
#include <vector>
template <int CTAS>
void walk(const std::vector<int>& counts, int columns) {
    const int experts = counts.size();
    std::vector<int> offsets(experts + 1), before(experts + 1);
    for (int e = 0; e < experts; ++e) {
        offsets[e + 1] = offsets[e] + counts[e];
        before[e + 1] = before[e] + count_items<CTAS, 128>(counts[e], columns);
    }
    for (int item = 0; item < before[experts]; ++item)
        for (int rank = 0; rank < CTAS; ++rank) {
            Plan p = plan_item<CTAS, 128>(item, rank, offsets.data(), before.data(), experts, columns);
            std::printf("%d %d %d %d %d %d %d %d\\n", CTAS, item, rank, p.expert, p.column, p.row, p.live, p.shared);
        }
}
int main() {
    for (int experts, columns; std::scanf("%d %d", &experts, &columns) == 2; std::puts("end")) {
        std::vector<int> counts(experts);
        for (int& c : counts) if (std::scanf("%d", &c) != 1) return 1;
        walk<1>(counts, columns);
        walk<2>(counts, columns);
    }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "walk.cpp").write_text("#define INLINE inline\n" + source_text("schedule.cuh") + PROGRAM)
    subprocess.run([str(COMPILER), "-std=c++17", "walk.cpp", "-o", "walk"], cwd=folder, check=True)
    return folder / "walk"


def cases() -> list[tuple[int, list[int]]]:
    """(columns, rows of each expert)."""
    draw = random.Random(7)
    made = [(1, [0]), (1, [1]), (3, [0, 0, 129, 0]), (16, [0] * 32), (28, [128, 256, 384, 127, 257, 1])]
    for _ in range(40):
        edges = [0, 0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, draw.randrange(2000)]
        made.append((draw.choice([1, 2, 3, 16]), [draw.choice(edges) for _ in range(draw.randrange(1, 40))]))
    return made


def test_every_tile_exactly_once(program: Path) -> None:
    lines = [f"{len(counts)} {columns} {' '.join(map(str, counts))}" for columns, counts in cases()]
    said = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    answers = said.split("end\n")[:-1]
    assert len(answers) == len(lines)
    for (columns, counts), answer in zip(cases(), answers, strict=True):
        offsets = [sum(counts[:e]) for e in range(len(counts))]
        want = {
            (e, column, offsets[e] + start): min(128, rows - start)
            for e, rows in enumerate(counts)
            for column in range(columns)
            for start in range(0, rows, 128)
        }
        for ctas in (1, 2):
            plans = [tuple(map(int, line.split()))[1:] for line in answer.splitlines() if line.startswith(f"{ctas} ")]
            live = [(e, column, row, rows) for _, _, e, column, row, rows, _ in plans if rows]
            assert sorted(live) == sorted((*tile, rows) for tile, rows in want.items()), (ctas, columns, counts)
            for first, second in zip(plans[::2], plans[1::2], strict=True) if ctas == 2 else ():
                assert first[0] == second[0] and first[2] == second[2] and first[6] == second[6]
                if first[6]:  # shared weights
                    assert first[3] == second[3] and second[4] == first[4] + 128 and second[5] > 0
                else:
                    assert first[4] == second[4] and first[5] > 0 and (second[3] == first[3] + 1 or second[5] == 0)
            idle = sum(1 for plan in plans if plan[5] == 0)
            assert idle == (sum(-(-rows // 128) % 2 for rows in counts) if ctas == 2 and columns % 2 else 0)
