"""What is computed, in integers and names: Geometry, Recipe, Problem. Standard library only.

A Problem's printed name is its whole content: parsing the name gives the Problem back, and the Problem
gives every input byte (moeref.make). Axes: T tokens, E experts, L local experts, K top_k, H hidden, I intermediate.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

BLOCK = 128
"""Side of a quantisation block: activations 1x128, weights 128x128."""

DEFAULT_SCALING = 2.5
"""routed_scaling_factor of DeepSeek-V3 and of the 19 published workloads."""


class SpecError(ValueError):
    """A geometry, recipe or problem name that means nothing; the message says what was expected."""


@dataclass(frozen=True)
class Geometry:
    """Model and shard sizes. Raises SpecError when they contradict each other."""

    num_experts: int  # E, over all ranks
    num_local_experts: int  # L, on this rank
    hidden_size: int  # H
    intermediate_size: int  # I; gemm1 has 2I rows, [up ; gate]
    top_k: int  # K
    n_group: int
    topk_group: int

    def __post_init__(self) -> None:
        wrong = []
        if min(self.num_experts, self.num_local_experts, self.top_k, self.n_group, self.topk_group) < 1:
            wrong.append("every count must be at least 1")
        elif self.num_experts % self.n_group:
            wrong.append(f"E={self.num_experts} must be a multiple of n_group={self.n_group}")
        else:
            if self.topk_group > self.n_group:
                wrong.append(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
            reach = min(self.topk_group, self.n_group) * self.group_size
            if self.top_k > reach:
                wrong.append(f"top_k={self.top_k} exceeds the {reach} experts of {self.topk_group} groups")
        if self.num_local_experts > self.num_experts:
            wrong.append(f"L={self.num_local_experts} exceeds E={self.num_experts}")
        for axis, size in (("H", self.hidden_size), ("I", self.intermediate_size)):
            if size < BLOCK or size % BLOCK:
                wrong.append(f"{axis}={size} must be a positive multiple of {BLOCK}")
        if wrong:
            raise SpecError(f"geometry {self.code}: " + "; ".join(wrong))

    @property
    def group_size(self) -> int:
        """Experts in one group, E / n_group."""
        return self.num_experts // self.n_group

    @property
    def code(self) -> str:
        """All seven sizes as one word, e.g. e16l4h256i128k4g4t2."""
        return (
            f"e{self.num_experts}l{self.num_local_experts}h{self.hidden_size}i{self.intermediate_size}"
            f"k{self.top_k}g{self.n_group}t{self.topk_group}"
        )

    @property
    def name(self) -> str:
        """The preset's name where there is one, else the code."""
        return next((name for name, preset in PRESETS.items() if preset == self), self.code)

    @classmethod
    def parse(cls, text: str) -> Geometry:
        """The geometry of a preset's name or of a code. Raises SpecError."""
        if text in PRESETS:
            return PRESETS[text]
        found = re.fullmatch(r"e(\d+)l(\d+)h(\d+)i(\d+)k(\d+)g(\d+)t(\d+)", text)
        if not found:
            known = ", ".join(PRESETS)
            raise SpecError(f"unknown geometry '{text}': expected one of {known}, or a code like e16l4h256i128k4g4t2")
        return cls(*(int(size) for size in found.groups()))


PRESETS: dict[str, Geometry] = {}
PRESETS["dsv3"] = Geometry(256, 32, 7168, 2048, 8, 8, 4)  # DeepSeek-V3/R1, expert parallel 8
PRESETS["kimi"] = Geometry(384, 48, 7168, 2048, 8, 1, 1)  # Kimi-K2, expert parallel 8
PRESETS["kimi_full"] = Geometry(384, 384, 7168, 2048, 8, 1, 1)  # Kimi-K2, one rank
PRESETS["small"] = Geometry(32, 8, 256, 256, 4, 4, 2)  # DeepSeek's structure in milliseconds
PRESETS["small_kimi"] = Geometry(24, 6, 256, 256, 4, 1, 1)  # Kimi's: one group


@dataclass(frozen=True)
class Recipe:
    """Every rounding that the ten inputs' shapes leave open. The default is the published definition: none.

    gemm1_out     'fp32', or 'bf16': gemm1's result is rounded to bf16 before SwiGLU.
    requantize    0 never; 1: SwiGLU's output becomes e4m3 with a scale per 1x128 block; 2: gemm1's output does so too
                  (FlashInfer's Blackwell kernel stores both in e4m3).
    scale         'fp32' (amax/448), or 'ue8m0': that scale rounded up to a power of two before the cast.
    topk_weights  'fp32', or 'bf16': routing weights rounded to bf16 before combine.
    """

    gemm1_out: str = "fp32"
    requantize: int = 0
    scale: str = "fp32"
    topk_weights: str = "fp32"

    def __post_init__(self) -> None:
        legal = {
            "gemm1_out": ("fp32", "bf16"),
            "requantize": (0, 1, 2),
            "scale": ("fp32", "ue8m0"),
            "topk_weights": ("fp32", "bf16"),
        }
        for field, values in legal.items():
            if getattr(self, field) not in values:
                raise SpecError(f"recipe {field}={getattr(self, field)!r}: expected one of {values}")
        if self.scale == "ue8m0" and not self.requantize:
            raise SpecError("recipe scale='ue8m0' names the re-quantisation's scale: set requantize to 1 or 2")

    @property
    def name(self) -> str:
        """Parts joined by '+'; 'exact' where nothing is rounded."""
        parts = [
            "bf16_gemm1" if self.gemm1_out == "bf16" else "",
            ("", "requant", "requant2")[self.requantize],
            "ue8m0" if self.scale == "ue8m0" else "",
            "bf16_weights" if self.topk_weights == "bf16" else "",
        ]
        return "+".join(part for part in parts if part) or "exact"

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe of a name such as 'exact' or 'bf16_gemm1+requant+ue8m0'. Raises SpecError."""
        recipe = cls()
        parts = text.split("+")
        changes: dict[str, dict[str, object]] = {
            "exact": {},
            "bf16_gemm1": {"gemm1_out": "bf16"},
            "requant": {"requantize": 1},
            "requant2": {"requantize": 2},
            "ue8m0": {"scale": "ue8m0"},
            "bf16_weights": {"topk_weights": "bf16"},
        }
        for part in sorted(parts, key=lambda part: part == "ue8m0"):  # ue8m0 qualifies requant: it goes last
            twice = parts.count(part) > 1 or {"requant", "requant2"} <= set(parts)
            if part not in changes or ("exact" in parts and len(parts) > 1) or twice:
                raise SpecError(
                    f"unknown recipe '{text}': expected 'exact', or parts of {', '.join(changes)} joined by +"
                )
            recipe = replace(recipe, **changes[part])  # type: ignore[arg-type]
        return recipe


EXACT = Recipe()
"""The published definition: float32 throughout, one final cast to bf16."""


@dataclass(frozen=True)
class Problem:
    """One set of ten inputs. `name` reproduces every byte: geometry-tT-oOFFSET-ROUTING-VALUES-sSEED[-fFACTOR]."""

    geometry: Geometry
    seq_len: int  # T, 0 allowed
    offset: int  # local_expert_offset: first expert of this rank; experts outside 0..E-1 are skipped
    routing: str  # a name of moeref.routings.ROUTINGS or ELSEWHERE
    values: str  # a name of moeref.values.VALUES
    seed: int
    factor: float = DEFAULT_SCALING  # routed_scaling_factor

    def __post_init__(self) -> None:
        if self.seq_len < 0:
            raise SpecError(f"seq_len={self.seq_len}: expected 0 or more tokens")
        if not 0 <= self.seed < 2**63:
            raise SpecError(f"seed={self.seed}: expected 0 <= seed < 2**63")
        if not math.isfinite(self.factor):
            raise SpecError(f"factor={self.factor}: expected a finite routed_scaling_factor")
        low, high = -self.geometry.num_local_experts, self.geometry.num_experts
        if not low < self.offset < high:
            raise SpecError(
                f"offset={self.offset}: expected {low + 1}..{high - 1}, so that at least one of the "
                f"{self.geometry.num_local_experts} local experts is one of 0..{high - 1}"
            )

    @property
    def name(self) -> str:
        """The printed name."""
        tail = "" if self.factor == DEFAULT_SCALING else f"-f{float(self.factor)!r}"
        return f"{self.geometry.name}-t{self.seq_len}-o{self.offset}-{self.routing}-{self.values}-s{self.seed}{tail}"

    @property
    def real_experts(self) -> range:
        """Global ids of the local experts that exist: offset .. offset+L-1 within 0..E-1."""
        geometry = self.geometry
        return range(max(self.offset, 0), min(self.offset + geometry.num_local_experts, geometry.num_experts))

    @classmethod
    def parse(cls, name: str) -> Problem:
        """The problem of a printed name. Kinds are checked when inputs are made. Raises SpecError."""
        pattern = r"([a-z0-9_]+)-t(\d+)-o(-?\d+)-([a-z0-9_]+)-([a-z0-9_]+)-s(\d+)(?:-f(-?[0-9.e+]+(?:e-\d+)?))?"
        found = re.fullmatch(pattern, name)
        if not found:
            raise SpecError(
                f"unknown problem '{name}': expected GEOMETRY-tT-oOFFSET-ROUTING-VALUES-sSEED[-fFACTOR], "
                "e.g. dsv3-t16-o32-iid-published-s0"
            )
        geometry, seq_len, offset, routing, values, seed, factor = found.groups()
        try:
            scaling = float(factor) if factor else DEFAULT_SCALING
        except ValueError as error:
            raise SpecError(f"problem '{name}': factor '{factor}' is no number") from error
        return cls(Geometry.parse(geometry), int(seq_len), int(offset), routing, values, int(seed), scaling)
