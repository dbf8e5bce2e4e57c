"""Muon over ranks: every matrix is orthogonalised once in the world, by the rank that owns it.

A matrix that is cut or replicated over ranks costs two all-to-alls: its pieces to its owner, the result back. Parameters
travel together, in rounds of bounded size; while one round computes, the pieces of the next are under way. That is
2 (N - 1) / N of the matrices' bytes, the floor. Owners are chosen by cost, largest first, so that ranks finish together.
Experts that are whole on a rank (expert parallelism, or FSDP2 along dimension 0) never come here. What it gives up: a
matrix is not computed by several ranks together, so a model of few large matrices keeps some ranks waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from .muon import CHUNK, Task, apply_update, decay, finish, matrices, matrix_shapes, momentum_updates

Index = tuple[slice | Tensor, ...]


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor: an index into the whole, and its shape."""

    index: Index
    shape: tuple[int, ...]
    replica: tuple[int, ...]  # the rank's coordinates on the mesh dimensions that replicate

    @property
    def size(self) -> int:
        """Elements."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Layout:
    """Who holds what of one tensor: the pieces in the order of the group's ranks."""

    group: ProcessGroup
    pieces: tuple[Piece, ...]

    def senders(self, owner: int) -> set[int]:
        """The ranks whose pieces make the whole for `owner`: those of its own replica."""
        return {rank for rank, piece in enumerate(self.pieces) if piece.replica == self.pieces[owner].replica}


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank; shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_whole(tensor: Tensor) -> bool:
    """Whether all matrices that this rank holds of a parameter are uncut and nobody else's to update."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
        return True
    cut = {_dimension(placement, tensor.ndim) for placement in tensor.placements} - {None}
    return tensor.ndim == 3 and cut == {0}


def layout_of(tensor: Tensor, replicas: ProcessGroup | None) -> Layout:
    """The layout of a DTensor, or of a plain tensor that every rank of `replicas` has a copy of.

    Raises:
        ValueError: a placement other than Shard and Replicate.
    """
    if isinstance(tensor, DTensor):
        group = mesh_group(tensor.device_mesh)
        pieces = _mesh_pieces(tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape))
        return Layout(group, tuple(pieces[rank] for rank in dist.get_process_group_ranks(group)))
    assert replicas is not None
    shape = tuple(tensor.shape)
    whole = tuple(slice(0, size) for size in shape)
    return Layout(replicas, tuple(Piece(whole, shape, (rank,)) for rank in range(replicas.size())))


def mesh_group(mesh: DeviceMesh) -> ProcessGroup:
    """The process group of all ranks of a mesh."""
    if mesh.size() == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return world
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


@lru_cache(maxsize=4096)
def _mesh_pieces(
    mesh: DeviceMesh, placements: tuple[Placement, ...], shape: tuple[int, ...]
) -> dict[int, Piece]:
    """What every rank of a mesh holds. No process group is kept: meshes that are equal may have different ones."""
    dimensions = [_dimension(placement, len(shape)) for placement in placements]
    pieces: dict[int, Piece] = {}
    for place in itertools.product(*(range(size) for size in mesh.mesh.shape)):
        indices = [torch.arange(size) for size in shape]
        for step, (placement, dimension) in enumerate(zip(placements, dimensions, strict=True)):
            if dimension is not None:
                indices[dimension] = _shard(
                    placement, indices[dimension], dimension, len(shape), mesh.size(step), place[step]
                )
        replica = tuple(place[step] for step, dimension in enumerate(dimensions) if dimension is None)
        piece = Piece(tuple(map(_as_slice, indices)), tuple(len(index) for index in indices), replica)
        pieces[int(mesh.mesh[place])] = piece
    return pieces


def _shard(placement: Any, index: Tensor, dimension: int, ndim: int, num_chunks: int, chunk: int) -> Tensor:
    """Which of `index` a rank gets, by the placement's own rule (strided shards have theirs)."""
    view = index.view([-1 if d == dimension else 1 for d in range(ndim)])
    shards, _ = placement._split_tensor(view, num_chunks, with_padding=False, contiguous=True)
    return shards[chunk].flatten()


def _dimension(placement: Placement, ndim: int) -> int | None:
    """The tensor dimension that a placement cuts; None if it replicates."""
    if placement.is_replicate():
        return None
    if placement.is_partial():
        raise ValueError(f"A parameter is placed as {placement}: expected Shard or Replicate.")
    return int(getattr(placement, "dim")) % ndim  # noqa: B009 - Shard and _StridedShard share no typed base


def _as_slice(index: Tensor) -> slice | Tensor:
    if len(index) == 0:
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def assign_owners(costs: Sequence[int], ranks: int) -> list[int]:
    """An owner for every cost, such that the largest sum of a rank is small: largest first, to the least loaded."""
    load, owners = [0] * ranks, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        owner = min(range(ranks), key=load.__getitem__)
        load[owner] += costs[item]
        owners[item] = owner
    return owners


@dataclass
class Shared:
    """A task whose matrices more than one rank has a part in."""

    task: Task
    layout: Layout
    owner: int = 0

    def others(self) -> set[int]:
        """Ranks that send pieces to the owner."""
        return self.layout.senders(self.owner) - {self.owner}


class Round:
    """Tasks of one group that travel together."""

    def __init__(self, items: Sequence[Shared]) -> None:
        self.items = items
        self.group = items[0].layout.group
        self.rank, self.size = self.group.rank(), self.group.size()
        self.dtype = items[0].task.dtype
        self.num_bytes = 0  # sent by this rank to others

    def gather(self) -> None:
        """Advance the momenta and send the pieces on their way to the owners."""
        updates: list[Tensor] = []
        for item in self.items:
            updates.extend(update.to(self.dtype) for update in momentum_updates([item.task]))
        self.updates = updates
        here = self.rank
        sends = [
            [updates[i] for i, item in enumerate(self.items) if item.owner == rank and here in item.others()]
            for rank in range(self.size)
        ]
        receives = [
            [
                item.layout.pieces[rank].size
                for item in self.items
                if item.owner == here and rank in item.others()
            ]
            for rank in range(self.size)
        ]
        anything = any(item.others() for item in self.items)
        self.arrivals = self._exchange(sends, receives) if anything else [iter(())] * self.size

    def compute(self) -> None:
        """Wait for the pieces, orthogonalise what this rank owns, and send the results on their way."""
        self._wait()
        results: list[Tensor] = []
        for item, update in zip(self.items, self.updates, strict=True):
            if item.owner == self.rank:
                results.append(_orthogonal(item, self._assemble(item, update)))
        self.updates = []
        owned = [item for item in self.items if item.owner == self.rank]
        sends = [
            [result[item.layout.pieces[rank].index] for item, result in zip(owned, results, strict=True)]
            if rank != self.rank
            else []
            for rank in range(self.size)
        ]
        receives = [
            [item.layout.pieces[self.rank].size for item in self.items if item.owner == rank]
            if rank != self.rank
            else []
            for rank in range(self.size)
        ]
        self.results = iter(results)
        self.arrivals = self._exchange(sends, receives)

    def apply(self) -> None:
        """Wait for the results and update this rank's part of every weight."""
        self._wait()
        for item in self.items:
            piece = item.layout.pieces[self.rank]
            if item.owner == self.rank:
                update = next(self.results)[piece.index]
            else:
                update = next(self.arrivals[item.owner]).view(piece.shape)
            decay([item.task])
            _apply(item, update, piece)
            finish(item.task)

    def _assemble(self, item: Shared, mine: Tensor) -> Tensor:
        whole = mine.new_empty(item.task.shape)
        whole[item.layout.pieces[self.rank].index] = mine
        for rank in sorted(item.others()):
            piece = item.layout.pieces[rank]
            whole[piece.index] = next(self.arrivals[rank]).view(piece.shape)
        return whole

    def _exchange(self, sends: list[list[Tensor]], receives: list[list[int]]) -> list[Iterator[Tensor]]:
        """Start one all-to-all; per rank, what it will have sent, cut into its tensors."""
        device = self.items[0].task.weight.device
        flat = [piece.reshape(-1) for pieces in sends for piece in pieces]
        outgoing = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=device)
        sizes_out = [sum(piece.numel() for piece in pieces) for pieces in sends]
        sizes_in = [sum(sizes) for sizes in receives]
        incoming = torch.empty(sum(sizes_in), dtype=self.dtype, device=device)
        self.num_bytes += outgoing.numel() * outgoing.element_size()
        self._outgoing = outgoing  # must live until the exchange is over
        self._work = dist.all_to_all_single(
            incoming, outgoing, sizes_in, sizes_out, group=self.group, async_op=True
        )
        return [
            iter(part.split(sizes)) for part, sizes in zip(incoming.split(sizes_in), receives, strict=True)
        ]

    def _wait(self) -> None:
        work = getattr(self, "_work", None)
        if work is not None:
            work.wait()
        self._work, self._outgoing = None, None


def rounds(items: Iterable[Shared], limit: int = CHUNK) -> list[Round]:
    """Cut the shared tasks into rounds of at most `limit` elements, with balanced owners in every group of ranks."""
    by_kind: dict[tuple[int, torch.dtype], list[Shared]] = {}
    for item in items:
        by_kind.setdefault((id(item.layout.group), item.task.dtype), []).append(item)
    result: list[Round] = []
    for kind in by_kind.values():
        owners = assign_owners([item.task.cost for item in kind], kind[0].layout.group.size())
        for item, owner in zip(kind, owners, strict=True):
            item.owner = owner
        # A round takes from every owner in turn: all have something to do in each.
        queues = [[item for item in kind if item.owner == rank] for rank in range(max(owners) + 1)]
        batch: list[Shared] = []
        held = 0
        for item in itertools.chain.from_iterable(itertools.zip_longest(*queues)):
            if item is None:
                continue
            size = int(torch.Size(item.task.shape).numel())
            if batch and held + size > limit:
                result.append(Round(batch))
                batch, held = [], 0
            batch.append(item)
            held += size
        result.append(Round(batch))
    return result


def step_shared(items: Sequence[Shared], meanwhile: Callable[[], None], limit: int = CHUNK) -> int:
    """Step all shared tasks; `meanwhile()` runs while the first pieces travel. Returns the bytes this rank sent."""
    pending = rounds(items, limit)
    if pending:
        pending[0].gather()
    meanwhile()
    for number, current in enumerate(pending):
        if number + 1 < len(pending):
            pending[number + 1].gather()
        current.compute()
        if number:
            pending[number - 1].apply()
    if pending:
        pending[-1].apply()
    return sum(current.num_bytes for current in pending)


def _orthogonal(item: Shared, whole: Tensor) -> Tensor:
    """U V^T of every matrix in an assembled parameter."""
    result = torch.empty_like(whole)
    blocks = item.task.group["row_blocks"]
    for source, target in zip(matrices(whole, blocks), matrices(result, blocks), strict=True):
        target.copy_(item.task.orthogonal(source))
    return result


def _apply(item: Shared, update: Tensor, piece: Piece) -> None:
    """Apply a piece of the update; where row blocks have different scales, run by run."""
    task = item.task
    shapes = matrix_shapes(task.shape, task.group["row_blocks"])
    ratios = {task.ratio(rows, columns) for _, rows, columns in shapes}
    if len(ratios) == 1:
        apply_update(task, task.weight, update, *shapes[0][1:])
        return
    rows = torch.arange(task.shape[-2])[piece.index[-2]].to(task.weight.device)
    first, period = 0, sum(size for _, size, _ in shapes)
    for _, size, columns in shapes:
        mine = ((rows % period) >= first) & ((rows % period) < first + size)
        part = task.weight[..., mine, :]
        apply_update(task, part, update[..., mine, :], size, columns)
        task.weight[..., mine, :] = part
        first += size
