"""What one rank holds of a model, read off the model that training would build, without its storage.

A model is laid out on the meta device under a process group that talks to nobody, so that a terabyte over thousands of
ranks is measured in seconds, on one process. Everything is counted on the real objects: DTensors' local parts, FSDP2's
parameter groups, MuonClip's own state. `share_of` lays out all layers of any rank; `layer_kinds` one of each kind, which
gives the first rank of any stage in a tenth of the time. What it gives up: it needs torch.distributed for itself, and the
ranks of a stage other than the first, which holds the most, are not planned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..configuration_kimi_k2 import KimiK2Config
from ..optim import MuonClip
from ..optim.distributed import is_whole, local
from ..optim.muon import Task
from .layout import Layout
from .model import lay_out
from .parts import Cut, Gathered, Part, Share, add_up


class Kinds(NamedTuple):
    """One part of each kind, on the first rank of its stage, with ranks counted from there."""

    embed: Part
    dense: Part | None
    moe: Part | None
    head: Part

    def stage(self, num_dense: int, num_moe: int, is_first: bool, is_last: bool) -> list[Part]:
        """The parts of a stage with so many layers, in the model's order."""
        parts = [self.embed] * is_first
        for part, count in ((self.dense, num_dense), (self.moe, num_moe)):
            if count:
                assert part is not None
                parts += [part] * count
        return parts + [self.head] * is_last


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
    """Lay out all layers of `rank` and measure them.

    Args:
        optimizer: `muon_clip` or `adamw`.
        options: MuonClip's own (`state_dtype`, `master_weights`, ...).

    Raises:
        ValueError: the layout does not fit the configuration.
    """
    parts = measure(config, layout, rank, dtype, mixed_precision, optimizer, options)
    return add_up(list(parts.values()), layout, rank)


def layer_kinds(
    config: KimiK2Config,
    layout: Layout,
    dtype: torch.dtype,
    mixed_precision: bool,
    optimizer: str,
    options: Mapping[str, Any],
) -> Kinds:
    """One layer of each kind, the embedding and the head, as the first rank of a stage holds them; see `share_of`.

    The number of stages does not matter, but whether there are several may.
    """
    num_dense = min(config.first_k_dense_replace or 0, config.num_hidden_layers)
    has_dense, has_moe = num_dense > 0, num_dense < config.num_hidden_layers
    # Without shards a model is wrapped only if it has stages: two stages then, each with as many layers.
    num_stages = 2 if layout.pipeline > 1 and layout.shard == 1 else 1
    num_layers = num_stages * (has_dense + has_moe)
    small = KimiK2Config.from_dict(
        config.to_dict()
        | {
            "num_hidden_layers": num_layers,
            "first_k_dense_replace": has_dense * (1 if has_moe else num_layers),
        }
    )
    layout = dataclasses.replace(layout, pipeline=num_stages)
    first = measure(small, layout, 0, dtype, mixed_precision, optimizer, options)
    last = first
    if num_stages > 1:
        last = measure(small, layout, layout.data_size, dtype, mixed_precision, optimizer, options)
    head = last["head"]
    offset = (1 - num_stages) * layout.data_size
    return Kinds(
        embed=first["embed"],
        dense=first["layers.0"] if has_dense else None,
        moe=first[f"layers.{int(has_dense)}"] if has_moe else None,
        head=dataclasses.replace(head, groups=tuple(group.moved(offset) for group in head.groups)),
    )


def measure(
    config: KimiK2Config,
    layout: Layout,
    rank: int,
    dtype: torch.dtype,
    mixed_precision: bool,
    optimizer: str,
    options: Mapping[str, Any],
) -> dict[str, Part]:
    """The parts that `rank` holds: `embed`, `layers.0` and so on, `head`; see `share_of`."""
    layout.check(config, layout.world_size)
    with fake_world(rank, layout.world_size):
        model = lay_out(config, layout, dtype, mixed_precision)
        names = {id(parameter): _part(name) for name, parameter in model.named_parameters()}
        found = {name: Part(0, 0, 0, 0, 0, (), (), (), 0) for name in dict.fromkeys(names.values())}

        def add(name: str, **values: Any) -> None:
            part = found[name]
            found[name] = dataclasses.replace(
                part, **{field: getattr(part, field) + value for field, value in values.items()}
            )

        for parameter in model.parameters():
            routed = parameter.numel() if parameter.ndim == 3 else 0
            size = local(parameter).nbytes
            add(names[id(parameter)], num_parameters=parameter.numel(), num_routed=routed, weights=size)
        for name, buffer in model.named_buffers():
            if (part := _part(name)) in found:
                add(part, buffers=buffer.nbytes)
        for parameters, group in _gathered(model):
            (name,) = {names[id(parameter)] for parameter in parameters}
            held = group.numel // len(group.shard_ranks) * group.storage
            padding = held - sum(local(parameter).nbytes for parameter in parameters)
            add(name, groups=(group,), buffers=padding)
        _step(model, layout, optimizer, options, names, add)
        return found


def _part(name: str) -> str:
    if "layers." in name:
        return "layers." + name.split("layers.")[1].split(".")[0]
    return "embed" if "embed_tokens" in name else "head" if "rotary" not in name else "tables"


def _gathered(model: nn.Module) -> Iterator[tuple[list[Tensor], Gathered]]:
    """FSDP2's parameter groups, each with its parameters."""
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
            parameters: list[Tensor] = [p.sharded_param for p in group.fsdp_params]
            yield (
                parameters,
                Gathered(
                    numel=sum(p.padded_sharded_param_size.numel() for p in group.fsdp_params) * shard.numel(),
                    storage=stored.itemsize,
                    gather=gather.itemsize,
                    reduce=(group.mp_policy.reduce_dtype or gather).itemsize,
                    shard_ranks=tuple(shard.tolist()),
                    replica_ranks=tuple(replicas.tolist()),
                    # FSDP2 leaves the root gathered too: its backward comes at once.
                    keeps=group.post_forward_mesh_info is None or not name,
                ),
            )


def _step(
    model: nn.Module,
    layout: Layout,
    optimizer: str,
    options: Mapping[str, Any],
    names: Mapping[int, str],
    add: Any,
) -> None:
    """Make the optimizer's state as the first step does, and note what MuonClip would compute where."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    if optimizer == "adamw":
        kept: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        kept.step()
    else:
        kept = muon = MuonClip.for_model(model, lr=1e-3, **options)
        first = layout.stage(dist.get_rank()) * layout.data_size
        with torch.no_grad():
            for number, group in enumerate(muon.param_groups):
                if group["algorithm"] == "adamw":
                    muon._adamw(group, group["params"])
                    continue
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    task = muon._task(name, parameter, group)
                    part = names[id(parameter)]
                    if is_whole(parameter) and (isinstance(parameter, DTensor) or layout.data_size == 1):
                        add(part, whole=((number, task),))
                    else:
                        add(part, cuts=((number, _cut(parameter, task, layout, first)),))
        for name, item in muon._attention.items():
            add(_part(name), num_heads=item.rows.num_heads)
        muon.close()
    for parameter, state in kept.state.items():
        tensors = [local(value) for value in state.values() if isinstance(value, Tensor)]
        add(names[id(parameter)], optimizer=sum(tensor.nbytes for tensor in tensors))


def _cut(parameter: Tensor, task: Task, layout: Layout, first: int) -> Cut:
    ranks, replicas = tuple(range(layout.data_size)), layout.data_size
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        ranks = tuple(rank - first for rank in mesh.mesh.flatten().tolist())
        replicas = math.prod(
            mesh.size(step) for step, placement in enumerate(parameter.placements) if placement.is_replicate()
        )
    piece = local(parameter).numel()
    return Cut(task.cost, parameter.numel(), piece, task.dtype.itemsize, ranks, replicas)
