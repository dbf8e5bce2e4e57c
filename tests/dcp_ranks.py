"""What the ranks run for tests/conversion/test_dcp.py: torch's own saves of sharded tensors."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

# Rows and columns of 2 ranks, none of which they divide, and one rank without any.
PLACEMENTS: dict[str, tuple[tuple[int, ...], Placement]] = {
    "rows": ((5, 7), Shard(0)),
    "one row": ((1, 6), Shard(0)),
    "columns": ((4, 7), Shard(1)),
    "depth": ((2, 3, 5), Shard(2)),
    "vector": ((9,), Shard(0)),
    "everywhere": ((3, 2), Replicate()),
}


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The same numbers on every rank, in bfloat16 for every other seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.bfloat16 if seed % 2 else torch.float32)


def run(rank: int, store: str, weights: str, out: str) -> None:
    """Save `PLACEMENTS` and a model's tensors in both formats, and what FSDP2 makes of a module."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    plain = torch.load(weights)
    odd = {
        name: distribute_tensor(values(shape, seed), mesh, [place])
        for seed, (name, (shape, place)) in enumerate(PLACEMENTS.items())
    }
    model = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in plain.items()}
    moment = {f"exp_avg.{name}": torch.ones(2) for name in list(plain)[:3]}
    for form in SerializationFormat:
        state = {"model": model, "optim": moment, "step": 3}
        dcp.save(odd, storage_writer=FileSystemWriter(f"{out}/odd {form.name}", serialization_format=form))
        dcp.save(
            state, storage_writer=FileSystemWriter(f"{out}/model {form.name}", serialization_format=form)
        )
    module = torch.nn.Linear(6, 11)
    with torch.no_grad():
        module.weight.copy_(values((11, 6), 0))
        module.bias.copy_(values((11,), 2))
    fully_shard(module, mesh=mesh)
    dcp.save(module.state_dict(), checkpoint_id=Path(out, "fsdp"))
    dist.destroy_process_group()
