"""How the experts of a layer are cut into expert-parallel shards. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeref.spec import Geometry, Problem, SpecError


@dataclass(frozen=True)
class Shard:
    """The experts first .. first+size-1 of a layer; number `index` of `count` shards."""

    index: int
    count: int
    first: int  # local_expert_offset
    size: int  # num_local_experts

    @property
    def name(self) -> str:
        """As reports say it."""
        return f"shard {self.index} (experts {self.first}..{self.first + self.size - 1})"

    def problem(self, layer: Problem) -> Problem:
        """This shard of the layer's problem. Its routing has to be drawn as the layer's (make_inputs' routed_as)."""
        geometry = replace(layer.geometry, num_local_experts=self.size)
        return replace(layer, geometry=geometry, offset=self.first)


def cut(geometry: Geometry, count: int = 0) -> list[Shard]:
    """Shard i of `count` begins at expert i * E // count, so sizes differ by at most one; together they are 0 .. E-1.

    count 0: as many as the geometry's num_local_experts asks for, E / L rounded up. Raises SpecError for a count that
    would leave a shard without an expert.
    """
    experts = geometry.num_experts
    count = count or -(-experts // geometry.num_local_experts)
    if not 1 <= count <= experts:
        raise SpecError(f"--shards {count}: expected 1..{experts}, at least one of {experts} experts for each shard")
    bounds = [index * experts // count for index in range(count + 1)]
    return [Shard(i, count, bounds[i], bounds[i + 1] - bounds[i]) for i in range(count)]


def dealt(shards: list[Shard], rank: int, ranks: int) -> list[Shard]:
    """The shards of one of `ranks` processes: neighbouring ones, in turn; none for a process too many."""
    if ranks >= len(shards):
        return shards[rank : rank + 1]
    return [shard for shard in shards if shard.index * ranks // shard.count == rank]
