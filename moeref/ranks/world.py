"""What torchrun says of this process, and the store that its ranks share. Imports torch only when asked for a store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class World:
    """One rank among `size`, as torchrun's environment variables have it."""

    rank: int
    size: int
    local_rank: int  # among the ranks of this host
    local_size: int
    address: str
    port: int
    hosted: bool  # torchrun itself serves the store: it outlives every rank
    attempt: int  # torchrun's --max-restarts starts all ranks anew

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> World | None:
        """This process's place, or None where torchrun has not started it.

        Other launchers set RANK and MASTER_ADDR too, some for every process of a pod: they are not taken for torchrun.
        """
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        try:
            return cls(
                rank=int(environment["RANK"]),
                size=int(environment["WORLD_SIZE"]),
                local_rank=int(environment.get("LOCAL_RANK", "0")),
                local_size=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
                address=environment["MASTER_ADDR"],
                port=int(environment["MASTER_PORT"]),
                hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
            )
        except (KeyError, ValueError):
            return None

    def open_store(self, part: str, owner: bool = False) -> Any:
        """A connection of its own to a part of the ranks' store, a torch.distributed.Store.

        owner: this is the rank's first one, which serves the others where rank 0 has to. Raises RuntimeError where
        nobody answers within a minute.
        """
        from datetime import timedelta

        import torch.distributed as dist

        c10d: Any = dist
        serves = owner and self.rank == 0 and not self.hosted
        minute = timedelta(seconds=60)
        store = c10d.TCPStore(self.address, self.port, None, serves, timeout=minute, wait_for_workers=False)
        return c10d.PrefixStore(f"moeref/{self.attempt}/{part}", store)

    def device(self, text: str) -> str:
        """The device of this rank: 'auto' and 'cuda' stand for GPU LOCAL_RANK of this host, ranks past the last GPU
        begin with the first one again; 'cpu' and 'cuda:N' for themselves."""
        import torch

        count = torch.cuda.device_count() if text in ("auto", "cuda") else 0
        return f"cuda:{self.local_rank % count}" if count else text

    def backend(self, device: str) -> str:
        """The library that adds up tensors on these devices: NCCL where every rank of the host has a GPU of its own."""
        import torch

        own_gpu = device.startswith("cuda") and self.local_size <= torch.cuda.device_count()
        return "nccl" if own_gpu else "gloo"
