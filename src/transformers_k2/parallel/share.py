"""What one rank holds of a model, read off the model that training would build, without its storage.

`share_of` lays the model out on the meta device under a process group that talks to nobody, so that a terabyte laid out
over thousands of ranks is measured in a second, on one process. Everything is counted on the real objects: DTensors' local
parts, FSDP2's parameter groups, MuonClip's own state. What it gives up: it needs torch.distributed for itself, and the
ranks of a stage other than the first, which holds the most, are not looked at.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..configuration_kimi_k2 import KimiK2Config
from ..optim import MuonClip
from ..optim.distributed import assign_owners, is_whole, local
from ..optim.muon import Task, step_local
from .layout import Layout
from .model import lay_out

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Gathered:
    """One group of parameters that FSDP2 gathers and reduces together.

    Attributes:
        name: of its first module.
        numel: elements of the whole group, padded for even shards.
        storage, gather, reduce: bytes an element has in storage, gathered, and in a gradient under way.
        shard_ranks, replica_ranks: who it is cut over, and who has the same cut.
        keeps: stays gathered between forward and backward.
    """

    name: str
    numel: int
    storage: int
    gather: int
    reduce: int
    shard_ranks: Ranks
    replica_ranks: Ranks
    keeps: bool


@dataclass(frozen=True)
class Share:
    """The first rank of a pipeline stage: bytes that stay, and what the collectives need to know.

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


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """A process group of `world_size` ranks, of which only `rank` exists; its collectives do nothing.

    Raises:
        ValueError: torch.distributed is in use.
    """
    if dist.is_initialized():
        raise ValueError(
            "A plan needs torch.distributed for itself, but a process group is initialised: expected a process outside "
            "of the training run."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share_of(
    config: KimiK2Config,
    layout: Layout,
    rank: int,
    dtype: torch.dtype,
    mixed_precision: bool,
    optimizer: str,
    options: Mapping[str, Any],
) -> Share:
    """Lay out `rank`'s share and measure it.

    Args:
        optimizer: `muon_clip` or `adamw`.
        options: MuonClip's own (`state_dtype`, `master_weights`, ...).

    Raises:
        ValueError: the layout does not fit the configuration.
    """
    layout.check(config, layout.world_size)
    with fake_world(rank, layout.world_size):
        model = lay_out(config, layout, dtype, mixed_precision)
        parameters = list(model.parameters())
        gradients = sum(local(parameter).nbytes for parameter in parameters)
        groups = tuple(_gathered(model))
        held = sum(group.numel // len(group.shard_ranks) * group.storage for group in groups)
        stepped = _optimizer(model, optimizer, options)
        first = layout.stage(rank) * layout.data_size
        expert_first = rank - layout.data_rank(rank) % layout.shard % layout.expert
        return Share(
            rank=rank,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            weights=gradients,
            gradients=gradients,
            optimizer=stepped.state,
            buffers=sum(buffer.nbytes for buffer in model.buffers()) + (held - gradients if groups else 0),
            groups=groups,
            step_workspace=stepped.workspace,
            muon_sent=stepped.sent,
            data_ranks=tuple(range(first, first + layout.data_size)),
            expert_ranks=tuple(range(expert_first, expert_first + layout.expert)),
            num_heads=stepped.num_heads,
        )


def _gathered(model: nn.Module) -> Iterator[Gathered]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            if id(group) in seen:  # the last norm and the head are two modules of one group
                continue
            seen.add(id(group))
            first = group.fsdp_params[0]
            stored = first.sharded_param.dtype
            gather = group.mp_policy.param_dtype or stored
            mesh = group.mesh_info.mesh.mesh
            place = (mesh == dist.get_rank()).nonzero()[0].tolist()
            shard = mesh if mesh.ndim == 1 else mesh[place[0]]
            replicas = mesh[:, place[1]] if mesh.ndim == 2 else mesh[place[0] : place[0] + 1]
            yield Gathered(
                name=name,
                numel=sum(p.padded_sharded_param_size.numel() for p in group.fsdp_params) * shard.numel(),
                storage=stored.itemsize,
                gather=gather.itemsize,
                reduce=(group.mp_policy.reduce_dtype or gather).itemsize,
                shard_ranks=tuple(shard.tolist()),
                replica_ranks=tuple(replicas.tolist()),
                # FSDP2 leaves the root gathered too: its backward comes at once.
                keeps=group.post_forward_mesh_info is None or not name,
            )


class _Stepped(NamedTuple):
    state: int
    workspace: int
    sent: int
    num_heads: int


def _optimizer(model: nn.Module, optimizer: str, options: Mapping[str, Any]) -> _Stepped:
    """Make the optimizer's state as the first step does, and run the part of that step that needs nobody else."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    if optimizer == "adamw":
        kept = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        kept.step()
        return _Stepped(_state_bytes(kept), 0, 0, 0)
    muon = MuonClip.for_model(model, lr=1e-3, **options)
    tasks: list[tuple[Tensor, Task]] = []
    with torch.no_grad():
        for group in muon.param_groups:
            if group["algorithm"] == "adamw":
                muon._adamw(group, group["params"])
            else:
                names = group["param_names"]
                tasks += [(p, muon._task(n, p, group)) for n, p in zip(names, group["params"], strict=True)]
        state = _state_bytes(muon)
        whole = [task for parameter, task in tasks if is_whole(parameter)]
        kept_tensors = [t for task in whole for t in (task.weight, task.grad, task.momentum, task.copy)]
        with Peak(tensor for tensor in kept_tensors if tensor is not None) as peak:
            step_local(whole)
    num_heads = sum(item.rows.num_heads for item in muon._attention.values())
    muon.close()
    return _Stepped(state, peak.bytes, _sent(tasks), num_heads)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(local(tensor).nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _sent(tasks: list[tuple[Tensor, Task]]) -> int:
    """What this rank sends in optim.distributed.step_shared, from the same owners, without asking for every piece."""
    shared: dict[Ranks, list[tuple[DTensor, Task]]] = {}
    for parameter, task in tasks:
        if isinstance(parameter, DTensor) and not is_whole(parameter):
            ranks = tuple(parameter.device_mesh.mesh.flatten().tolist())
            shared.setdefault(ranks, []).append((parameter, task))
    sent = 0
    for ranks, items in shared.items():
        here = ranks.index(dist.get_rank())
        owners = assign_owners([task.cost for _, task in items], len(ranks))
        for (parameter, task), owner in zip(items, owners, strict=True):
            piece, mesh = local(parameter).numel(), parameter.device_mesh
            replicas = math.prod(
                mesh.size(step)
                for step, placement in enumerate(parameter.placements)
                if placement.is_replicate()
            )
            size = len(ranks) // replicas
            if owner == here:
                sent += (replicas * parameter.numel() - piece) * task.dtype.itemsize
            elif owner // size == here // size:
                sent += piece * task.dtype.itemsize
    return sent


class Peak(TorchDispatchMode):
    """The largest sum of bytes that were allocated inside and alive at one time.

    Args:
        existing: tensors that were there before.
    """

    def __init__(self, existing: Iterator[Tensor] | Any = ()) -> None:
        super().__init__()
        self.bytes = 0
        self._now = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in existing}

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
