"""The 19 published workloads of FlashInfer-Bench's DeepSeek-V3 FP8 MoE definition, as problems.

uuid, seq_len and local_expert_offset are the published ones; routed_scaling_factor is 2.5 in all. The published
routing tensors are captured ones kept in blobs, and the other tensors are drawn unseeded, so each workload stands
here for a problem with the same shape and offset, DeepSeek-like routing and the published value distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeref.spec import PRESETS, Problem, SpecError

DEFINITION = "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"


@dataclass(frozen=True)
class Workload:
    """One published row."""

    uuid: str
    seq_len: int
    offset: int

    @property
    def short(self) -> str:
        """The uuid's first eight characters, unique among the 19."""
        return self.uuid[:8]

    def problem(self, values: str = "published", seed: int = 0) -> Problem:
        """The workload as a problem."""
        return Problem(PRESETS["dsv3"], self.seq_len, self.offset, "deepseek_like", values, seed)


WORKLOADS: tuple[Workload, ...] = (
    Workload("e05c6c03-5603-4a1c-b34c-dcce0ecaeea4", 1, 32),
    Workload("b8f4f012-a32e-4356-b4e1-7665b3d598af", 7, 192),
    Workload("8cba5890-4288-448a-93b8-42c14c6b9420", 14, 0),
    Workload("2e69caee-ae5c-473b-aa99-5dc6659829d4", 15, 32),
    Workload("a7c2bcfd-a2f4-479e-8d32-200115df89cf", 16, 224),
    Workload("6230e838-67ca-41dd-a9d6-6f36b7676c6b", 32, 32),
    Workload("f7d6ac7c-24ec-47e4-aefc-4863a5e3e1d9", 52, 160),
    Workload("fc378037-e8fa-4305-b00f-4af47933fd53", 53, 32),
    Workload("76010cb4-f73c-4145-8365-8642a2ce99de", 54, 128),
    Workload("81955b1e-086f-49c1-9f40-a18a5aaf509d", 55, 128),
    Workload("4822167c-dae5-4bb1-bb53-e4adb256245b", 56, 64),
    Workload("74d7ff04-0365-4cf8-a824-ce61b7131dea", 57, 96),
    Workload("e626d3e6-6c29-4fd8-bb7c-5b09eec61702", 58, 64),
    Workload("eedc63b2-c03b-4cf2-8d16-1f46566e3af7", 59, 160),
    Workload("5eadab1e-a0e3-4966-b0fd-1115cd77497c", 62, 96),
    Workload("8f1ff9f1-6747-41d1-a1d8-2868cdacf893", 80, 96),
    Workload("1a4c6ba1-3cd2-4d7d-b716-84f2d52b69fc", 901, 96),
    Workload("58a34f27-7995-4155-8b46-f60a7225e20e", 11948, 128),
    Workload("5e8dc11c-f2a9-42d5-8dce-9419cbf34d5d", 14107, 32),
)


def find(prefixes: list[str]) -> list[Workload]:
    """The workloads whose uuid starts with one of the prefixes, in table order. Raises SpecError for an unknown one."""
    for prefix in prefixes:
        matches = [w for w in WORKLOADS if w.uuid.startswith(prefix)]
        if len(matches) != 1:
            known = ", ".join(w.short for w in WORKLOADS)
            what = "fits none" if not matches else f"fits {len(matches)}"
            raise SpecError(f"workload '{prefix}' {what} of the published uuids: expected the start of one of {known}")
    return [w for w in WORKLOADS if any(w.uuid.startswith(prefix) for prefix in prefixes)]
