"""A rank's share of a stage as the sum of its parts: embedding, layers, head.

Layers of one kind are alike, so that a stage of any length follows from one measured layer of each kind (share.py), and
61 layers over thousands of ranks need not be laid out. Everything adds up but MuonClip's step: which rank computes which
matrix, and what it allocates meanwhile, are settled over all parts, by the optimizer's own code.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..optim.distributed import assign_owners
from ..optim.muon import CHUNK, Task, step_local
from .layout import Layout

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Gathered:
    """One group of parameters that FSDP2 gathers and reduces together.

    Attributes:
        numel: elements of the whole group, padded for even shards.
        storage, gather, reduce: bytes an element has in storage, gathered, and in a gradient under way.
        shard_ranks, replica_ranks: who it is cut over, and who has the same cut.
        keeps: stays gathered between forward and backward.
    """

    numel: int
    storage: int
    gather: int
    reduce: int
    shard_ranks: Ranks
    replica_ranks: Ranks
    keeps: bool

    def moved(self, offset: int) -> Gathered:
        """The same on ranks further on."""
        return dataclasses.replace(
            self,
            shard_ranks=_moved(self.shard_ranks, offset),
            replica_ranks=_moved(self.replica_ranks, offset),
        )


@dataclass(frozen=True)
class Cut:
    """A parameter of MuonClip's whose matrices several ranks have parts or copies of.

    Attributes:
        cost: of orthogonalising it; owners are chosen by it.
        numel, piece: elements of the whole, and of what this rank holds.
        itemsize: bytes of an element under way.
        ranks: that hold it, counted from the first of the stage.
        replicas: copies of every piece.
    """

    cost: int
    numel: int
    piece: int
    itemsize: int
    ranks: Ranks
    replicas: int


@dataclass(frozen=True)
class Part:
    """What a rank holds of the embedding, of one layer, or of the last norm and the head. Local bytes.

    Attributes:
        num_parameters, num_routed: over all ranks, and those of them that are routed experts'.
        buffers: with FSDP2's padding.
        groups: FSDP2's parameter groups.
        whole: MuonClip's tasks that need nobody else, each with the number of its optimizer group.
        cuts: the others.
        num_heads: attention heads, whose largest logits are compared after a step.
    """

    num_parameters: int
    num_routed: int
    weights: int
    optimizer: int
    buffers: int
    groups: tuple[Gathered, ...]
    whole: tuple[tuple[int, Task], ...]
    cuts: tuple[tuple[int, Cut], ...]
    num_heads: int


@dataclass(frozen=True)
class Share:
    """What a rank of a pipeline stage holds: bytes that stay, and what the collectives need to know.

    Attributes:
        num_parameters: of the whole stage, over all ranks.
        weights, gradients, optimizer, buffers: local bytes; gradients in the parameters' dtype. `buffers` holds FSDP2's
            padding.
        groups: FSDP2's parameter groups; empty where nothing is sharded.
        step_workspace: peak of what MuonClip allocates to step the matrices that are whole on the rank.
        muon_sent: bytes that MuonClip sends for matrices that are cut.
        data_ranks, expert_ranks: ranks that the stage's weights, and its routed experts, are dealt out to.
        num_heads: attention heads of all layers, whose largest logits are compared after a step.
    """

    rank: int
    num_parameters: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    groups: tuple[Gathered, ...]
    step_workspace: int
    muon_sent: int
    data_ranks: Ranks
    expert_ranks: Ranks
    num_heads: int

    def moved(self, offset: int) -> Share:
        """The same on ranks further on."""
        return dataclasses.replace(
            self,
            rank=self.rank + offset,
            groups=tuple(group.moved(offset) for group in self.groups),
            data_ranks=_moved(self.data_ranks, offset),
            expert_ranks=_moved(self.expert_ranks, offset),
        )


def add_up(parts: Sequence[Part], layout: Layout, rank: int) -> Share:
    """The share that consists of `parts`, in the model's order."""
    cuts = [cut for _, cut in sorted((e for part in parts for e in part.cuts), key=lambda entry: entry[0])]
    tasks = [
        task for _, task in sorted((e for part in parts for e in part.whole), key=lambda entry: entry[0])
    ]
    return _share(parts, layout, rank, step_workspace(tasks), muon_sent(cuts, layout.data_rank(rank)))


def estimate(parts: Sequence[Part], layout: Layout, is_last: bool, gather: int, reduce: int) -> Share:
    """The share of the stage's first rank if `parts`, measured on one rank, were cut evenly. Takes no measurement.

    What it leaves out is small: padding, odd cuts, and which rank gets which of MuonClip's matrices.

    Args:
        is_last: the last of the parts is the head, which stays gathered.
        gather, reduce: bytes of an element that FSDP2 gathers, and of a gradient under way.
    """
    first_of_shards = tuple(range(0, layout.data_size, layout.shard))

    def cut(part: Part, is_head: bool) -> Part:
        storage = part.weights // max(part.num_parameters, 1)
        groups = []
        dense = part.num_parameters - (part.num_routed if layout.expert > 1 else 0)
        for numel, every, keeps in (
            (dense, 1, is_head),
            (part.num_parameters - dense, layout.expert, False),
        ):
            ranks = tuple(range(0, layout.shard, every))
            groups.append(Gathered(numel // every, storage, gather, reduce, ranks, first_of_shards, keeps))
        return dataclasses.replace(
            part,
            weights=part.weights // layout.shard,
            optimizer=part.optimizer // layout.shard,
            buffers=0,
            groups=tuple(group for group in groups if group.numel) if layout.splits_the_model else (),
        )

    tasks = [task for part in parts for _, task in part.whole]
    routed = max((task.weight.nbytes for task in tasks if len(task.shape) == 3), default=0)
    other = sum(task.weight.numel() * task.dtype.itemsize for task in tasks if len(task.shape) == 2)
    sent = 2 * other // layout.shard if layout.data_size > 1 else 0
    cuts = [cut(part, is_last and place == len(parts)) for place, part in enumerate(parts, 1)]
    # float32 momenta of a chunk, what Newton-Schulz makes of them, and one matrix's products
    return _share(cuts, layout, 0, 3 * routed // layout.shard, sent)


def _share(parts: Sequence[Part], layout: Layout, rank: int, workspace: int, sent: int) -> Share:
    first = layout.stage(rank) * layout.data_size
    expert_first = rank - layout.data_rank(rank) % layout.shard % layout.expert
    weights = sum(part.weights for part in parts)
    return Share(
        rank=rank,
        num_parameters=sum(part.num_parameters for part in parts),
        weights=weights,
        gradients=weights,
        optimizer=sum(part.optimizer for part in parts),
        buffers=sum(part.buffers for part in parts),
        groups=tuple(group for part in parts for group in part.groups),
        step_workspace=workspace,
        muon_sent=sent,
        data_ranks=tuple(range(first, first + layout.data_size)),
        expert_ranks=tuple(range(expert_first, expert_first + layout.expert)),
        num_heads=sum(part.num_heads for part in parts),
    )


def muon_sent(cuts: Sequence[Cut], here: int) -> int:
    """What the rank sends in optim.distributed.step_shared, from the same owners, without asking for every piece.

    Args:
        here: the rank, counted from the first of the stage.
    """
    shared: dict[Ranks, list[Cut]] = {}
    for cut in cuts:
        shared.setdefault(cut.ranks, []).append(cut)
    sent = 0
    for ranks, items in shared.items():
        place = ranks.index(here)
        for cut, owner in zip(items, assign_owners([cut.cost for cut in items], len(ranks)), strict=True):
            size = len(ranks) // cut.replicas
            if owner == place:
                sent += (cut.replicas * cut.numel - cut.piece) * cut.itemsize
            elif owner // size == place // size:
                sent += cut.piece * cut.itemsize
    return sent


@torch.no_grad()
def step_workspace(tasks: Sequence[Task]) -> int:
    """Peak of what MuonClip allocates beside weights, gradients and states while it steps whole matrices."""
    few = _few(tasks)
    with Peak(t for task in few for t in (task.weight, task.grad, task.momentum, task.copy)) as peak:
        step_local(few)
    return peak.bytes


def _few(tasks: Sequence[Task]) -> list[Task]:
    """Without what repeats: a task that fills a chunk of the step alone meets its like before and after.

    Of a run of such tasks the first two and the last two have other neighbours than the rest.
    """
    runs: list[Task] = []
    ordered = sorted(tasks, key=lambda task: (task.group["rule"], task.weight.shape))
    for _, entries in groupby(ordered, key=lambda task: (id(task.group), task.weight.shape)):
        run = list(entries)
        alone = 2 * run[0].weight.numel() > CHUNK
        runs += run[:2] + run[-2:] if alone and len(run) > 4 else run
    return runs


class Peak(TorchDispatchMode):
    """The largest sum of bytes that were allocated inside and alive at one time.

    Args:
        existing: tensors that were there before; None entries are passed over.
    """

    def __init__(self, existing: Iterable[Tensor | None] = ()) -> None:
        super().__init__()
        self.bytes = 0
        self._now = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in existing if tensor is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count storage that is new."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._alive:
                storage = tensor.untyped_storage()
                self._alive.add(key)
                self._now += storage.nbytes()
                self.bytes = max(self.bytes, self._now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self._now -= num_bytes


def _moved(ranks: Ranks, offset: int) -> Ranks:
    return tuple(rank + offset for rank in ranks)
