"""What each rank does in tests/optim/test_ranks.py, and the one process it is held against.

Every parameter's gradient is drawn from a seed of its name, so that sums over ranks cannot differ in rounding and the
update can be asked for bit by bit; the logits come from real forward passes over shares of one batch.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.optim import MuonClip
from transformers_k2.optim.newton_schulz import choose_dtype

OPTIONS: dict[str, Any] = {"lr": 2e-2, "qk_clip_tau": 0.5, "nesterov": True}
# Experts alone are cut by expert parallelism when it spans all ranks, by both when it spans half of them.
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    2: {"fsdp": {"fsdp_size": 2}, "experts": {"fsdp_size": 2, "ep_size": 2}},
    4: {
        "fsdp": {"fsdp_size": 4},
        "experts": {"fsdp_size": 4, "ep_size": 4},
        "both": {"fsdp_size": 4, "ep_size": 2},
    },
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def set_gradients(named: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
    """A gradient for every parameter, the same on any number of ranks."""
    for name, param in named:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
        gradient = torch.randn(param.shape, generator=generator, dtype=torch.float32)
        if isinstance(param, DTensor):
            param.grad = distribute_tensor(gradient, param.device_mesh, param.placements, src_data_rank=None)
        else:
            param.grad = gradient


def batch(rank: int, ranks: int) -> torch.Tensor:
    """A rank's share of four sequences."""
    ids = torch.randint(3, 331, (4, 19), generator=torch.Generator().manual_seed(7))
    return ids[rank * 4 // ranks : (rank + 1) * 4 // ranks]


def start(rank: int, ranks: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)


def load(folder: Path, sizes: dict[str, int] | None) -> KimiK2ForCausalLM:
    options = {} if sizes is None else {"distributed_config": DistributedConfig(**sizes)}
    return AutoModelForCausalLM.from_pretrained(folder / "hub", **options).train()


def step_with(model: torch.nn.Module, optimizer: MuonClip, step: int, ids: torch.Tensor) -> None:
    """A forward and backward pass for the logits, drawn gradients, a step."""
    model(ids, labels=ids, use_cache=False).loss.backward()
    set_gradients(model.named_parameters(), step)
    optimizer.step()
    optimizer.zero_grad()


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    start(rank, ranks, folder)
    for name, sizes in LAYOUTS[ranks].items():
        model = load(folder, sizes)
        optimizer = MuonClip.for_model(model, **OPTIONS)
        for step in range(2):
            step_with(model, optimizer, step, batch(rank, ranks))
        stats = optimizer.qk_clip_stats()
        half = {key: whole(value) for key, value in model.state_dict().items()}
        dcp.save(
            {"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / f"{name}{ranks}"
        )
        step_with(model, optimizer, 2, batch(rank, ranks))
        seen = {
            "half": half,
            "end": {key: whole(value) for key, value in model.state_dict().items()},
            "stats": stats,
            "bytes": optimizer.communicated_bytes,
            "dense elements": sum(p.numel() for p in model.parameters() if p.ndim == 2 and p.shape[0] != 331),
            "bytes per element": choose_dtype("cpu").itemsize,
        }
        torch.save(seen, folder / f"{name}{ranks} {rank}.pt")
    # A checkpoint of another number of ranks and another layout continues bit for bit.
    for source, target in (("fsdp", "experts"), ("both", "fsdp")):
        other = 6 - ranks
        if not (folder / f"{source}{other} 0.pt").exists():
            continue
        saved = torch.load(folder / f"{source}{other} 0.pt")
        model = load(folder, LAYOUTS[ranks][target])
        copy_into(model, saved["half"])
        optimizer = MuonClip.for_model(model, **OPTIONS)
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / f"{source}{other}")
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        step_with(model, optimizer, 2, batch(rank, ranks))
        end = {key: whole(value) for key, value in model.state_dict().items()}
        torch.save(end, folder / f"resumed {source}{other} {target}{ranks} {rank}.pt")
    train_for_real(rank, ranks, folder)
    awkward(rank, ranks, folder)
    dist.destroy_process_group()


def awkward_parameters() -> dict[str, torch.Tensor]:
    """Whole tensors whose shards are uneven, empty, strided, across columns, or replicated."""
    shapes = {
        "rows": (9, 7),
        "fewer rows than ranks": (3, 7),
        "columns": (6, 11),
        "everywhere": (8, 5),
        "replicas of shards": (10, 6),
        "rows and columns": (10, 9),
        "strided": (13, 6),
        "experts": (6, 8, 5),
        "fused experts": (3, 18, 5),
        "experts cut inside": (3, 6, 10),
        "replicas of experts": (5, 4, 6),
        "fused": (2, 9, 7),
        "norm": (2,),
    }
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def awkward_groups(params: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Muon for all but the norm; one parameter is cut into blocks of different sizes, and so different scales."""
    special = ("norm", "fused", "fused experts")
    plain = [(name, value) for name, value in params.items() if name not in special]
    return [
        {"params": plain},
        {"params": [(name, params[name]) for name in ("fused", "fused experts")], "row_blocks": (1, 8)},
        {"params": [("norm", params["norm"])], "algorithm": "adamw"},
    ]


def run_awkward(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Three steps with drawn gradients."""
    optimizer = MuonClip(awkward_groups(params), lr=0.05, nesterov=True, update_rms=0.3)
    optimizer.track_update_rms = True
    for step in range(3):
        set_gradients(params.items(), step)
        optimizer.step()
    rms = {f"rms {name}": torch.tensor(value) for name, value in optimizer.update_rms().items()}
    return {name: whole(value) for name, value in params.items()} | rms


def awkward(rank: int, ranks: int, folder: Path) -> None:
    line, grid = init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", (2, ranks // 2))
    places: dict[str, tuple[Any, list[Any]]] = {
        "columns": (line, [Shard(1)]),
        "everywhere": (line, [Replicate()]),
        "replicas of shards": (grid, [Replicate(), Shard(0)]),
        "rows and columns": (grid, [Shard(1), Shard(0)]),
        "strided": (grid, [_StridedShard(0, split_factor=ranks // 2), Shard(0)]),
        "experts cut inside": (line, [Shard(2)]),
        "replicas of experts": (grid, [Replicate(), Shard(0)]),
        "fused": (line, [Shard(1)]),
    }
    params: dict[str, torch.Tensor] = {}
    for name, value in awkward_parameters().items():
        mesh, placements = places.get(name, (line, [Shard(0)]))
        shard = distribute_tensor(value, mesh, placements, src_data_rank=None)
        params[name] = torch.nn.Parameter(shard)
    torch.save(run_awkward(params), folder / f"awkward{ranks} {rank}.pt")


def copy_into(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for key, target in model.state_dict().items():
            value = values[key]
            if isinstance(target, DTensor):
                value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(value)


def train_for_real(rank: int, ranks: int, folder: Path) -> None:
    """DDP, and fully_shard by hand on uneven rows, both by loss and backward."""
    model = load(folder, None)
    ddp = DistributedDataParallel(model)
    optimizer = MuonClip.for_model(ddp, **OPTIONS, ns_dtype="float32")
    for _ in range(2):
        ddp(batch(rank, ranks), labels=batch(rank, ranks), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(
        {key: whole(value) for key, value in model.state_dict().items()}, folder / f"ddp{ranks} {rank}.pt"
    )

    model = load(folder, None)
    optimizer = MuonClip.for_model(model, **OPTIONS, ns_dtype="float32")  # hooks survive sharding
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    by_name = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [by_name[name] for name in group["param_names"]]
    for _ in range(2):
        model(batch(rank, ranks), labels=batch(rank, ranks), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(
        {key: whole(value) for key, value in model.state_dict().items()}, folder / f"hand{ranks} {rank}.pt"
    )


def one_process(folder: Path, real: bool) -> dict[str, Any]:
    model = load(folder, None)
    optimizer = MuonClip.for_model(model, **OPTIONS, **({"ns_dtype": "float32"} if real else {}))
    ids, seen = batch(0, 1), {}
    for step in range(2 if real else 3):
        if real:
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            step_with(model, optimizer, step, ids)
        if step == 1:
            seen["half"] = {key: whole(value) for key, value in model.state_dict().items()}
            seen["stats"] = optimizer.qk_clip_stats()
    return seen | {"end": {key: whole(value) for key, value in model.state_dict().items()}}
