"""How the processes of a run share a model: one frozen dataclass, checked before anything is allocated.

Dense weights lie on a mesh (pipeline, replicate, shard), routed experts on (pipeline, replicate, shard / expert, expert):
the ranks are the same, so expert parallelism costs no extra processes. Pipeline is the outermost dimension, because it
sends least, and expert the innermost, because it sends most: with 8 GPUs a node and `expert: 8` all-to-all never leaves
the node. What it gives up: tensor and context parallelism, which MuonClip and the CPU tests do not cover.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions. Their product, `expert` aside, is the number of processes.

    Attributes:
        replicate: copies of the model that see different data; with shard > 1 or pipeline > 1 hybrid sharding.
        shard: ranks that FSDP2 cuts every weight into.
        expert: ranks, of the `shard` ones, that routed experts are dealt out to whole; tokens travel to them.
        pipeline: consecutive stages of layers.
    """

    replicate: int = 1
    shard: int = 1
    expert: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name in ("replicate", "shard", "expert", "pipeline"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"parallel.{name} is {value!r}: expected an integer >= 1.")
        if self.shard % self.expert:
            raise ValueError(
                f"parallel.expert is {self.expert}: expected a divisor of parallel.shard, {self.shard}, because the "
                "experts are dealt out over the ranks that shard the model."
            )

    @property
    def data_size(self) -> int:
        """Ranks that read different rows."""
        return self.replicate * self.shard

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.pipeline * self.data_size

    @property
    def splits_the_model(self) -> bool:
        """Whether a rank holds less than the whole model."""
        return self.shard > 1 or self.pipeline > 1

    def data_rank(self, rank: int) -> int:
        """Which share of the data `rank` reads."""
        return rank % self.data_size

    def stage(self, rank: int) -> int:
        """Which pipeline stage `rank` belongs to."""
        return rank // self.data_size

    def check(self, config: Any, world_size: int) -> None:
        """Compare with a model's configuration and the number of processes.

        Raises:
            ValueError: a size that does not divide, with those that would.
        """
        if self.world_size != world_size:
            raise ValueError(
                f"parallel asks for {self.pipeline} x {self.replicate} x {self.shard} = {self.world_size} processes "
                f"(pipeline x replicate x shard), but {world_size} run: change one of them, or start "
                f"{self.world_size} processes."
            )
        experts = config.n_routed_experts
        if experts % self.expert:
            choices = [size for size in range(1, self.shard + 1) if experts % size == self.shard % size == 0]
            raise ValueError(
                f"parallel.expert is {self.expert}, but the model has {experts} routed experts: expected one of "
                f"{', '.join(map(str, choices))}."
            )
        if self.pipeline > config.num_hidden_layers:
            raise ValueError(
                f"parallel.pipeline is {self.pipeline}, but the model has {config.num_hidden_layers} layers: expected "
                "at most one stage a layer."
            )


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """The decoder layers of one pipeline stage: consecutive, as even as possible.

    The first and the last stage have the embedding and the head to carry beside their layers, so stages in the middle
    get what is left over.
    """
    base, rest = divmod(num_layers, num_stages)
    sizes = [base] * num_stages
    middle_first = sorted(range(num_stages), key=lambda number: (number in (0, num_stages - 1), number))
    for number in middle_first[:rest]:
        sizes[number] += 1
    start = sum(sizes[:stage])
    return range(start, start + sizes[stage])
