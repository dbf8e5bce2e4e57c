"""Rows come back from the files of any ranks: DTensors that torch shards, and its `full_tensor` as the oracle."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from transformers_k2.parallel.shards import Shards, save_shards

# As FSDP2, HSDP, and routed experts on (efsdp, ep) place them; 7 and 3 rows leave ranks with fewer rows, or none.
PLACEMENTS: dict[str, list[Placement]] = {
    "shards": [Shard(0), Shard(0)],
    "copies of shards": [Replicate(), Shard(0)],
    "shards of copies": [Shard(0), Replicate()],
    "experts": [_StridedShard(0, split_factor=2), Shard(0)],
    "copies": [Replicate(), Replicate()],
}
SHAPES = {"even": (8, 3), "odd": (7, 2), "few": (3, 5), "one": (1, 4, 2), "vector": (13,)}


def wholes() -> dict[str, torch.Tensor]:
    """By placement and shape, in several dtypes."""
    torch.manual_seed(2)
    dtypes = [torch.float32, torch.bfloat16, torch.int64]
    values = {}
    for number, (name, shape) in enumerate((place, shape) for place in PLACEMENTS for shape in SHAPES):
        values[f"{name}/{shape}"] = (torch.randn(SHAPES[shape]) * 100).to(dtypes[number % 3])
    return {
        **values,
        "plain": torch.randn(5, 2),
        "scalar": torch.tensor(3.5),
        "empty dimension": torch.randn(2, 1),
    }


def placed(ranks: int) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("outer", "inner"))
    return {
        name: distribute_tensor(value, mesh, PLACEMENTS[name.split("/")[0]], src_data_rank=None)
        if "/" in name
        else value
        for name, value in wholes().items()
    }


def run(function: Callable[[int, int, Path], None], ranks: int, folder: Path) -> None:
    """`function(rank, ranks, folder)` in processes that share the seconds of their imports."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["transformers_k2.parallel.shards"])
    mp.start_processes(function, args=(ranks, folder), nprocs=ranks, start_method="forkserver")


def start(rank: int, ranks: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)


def write(rank: int, ranks: int, folder: Path) -> None:
    start(rank, ranks, folder)
    save_shards(folder / "shards", placed(ranks), writes_plain=rank == 0)
    dist.destroy_process_group()


def read(rank: int, ranks: int, folder: Path) -> None:
    """On other ranks than wrote it."""
    start(rank, ranks, folder)
    shards = Shards(folder / "shards")
    for name, tensor in placed(ranks).items():
        found = shards.like(name, tensor, shards.shapes[name])
        assert found.dtype == tensor.dtype
        if isinstance(tensor, DTensor):
            assert isinstance(found, DTensor)
            assert found.placements == tensor.placements
            assert torch.equal(found.to_local(), tensor.to_local()), name
            assert torch.equal(found.full_tensor(), tensor.full_tensor()), name
        else:
            assert torch.equal(found, tensor), name
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    (folder / "shards").mkdir()
    run(write, 4, folder)
    return folder


def test_one_process_reads_what_four_wrote(written: Path) -> None:
    shards = Shards(written / "shards")
    for name, value in wholes().items():
        assert shards.shapes[name] == tuple(value.shape)
        assert shards.dtype(name) == value.dtype
        rows = torch.arange(value.shape[0] if value.ndim else 0)
        assert torch.equal(shards.rows(name, value.shape, rows), value), name
        if value.ndim:
            some = torch.randperm(len(value))[: max(1, len(value) // 2)]
            assert torch.equal(shards.rows(name, value.shape, some), value[some]), name


def test_copies_are_written_once(written: Path) -> None:
    size = sum(path.stat().st_size for path in (written / "shards").iterdir())
    needed = sum(value.numel() * value.itemsize for value in wholes().values())
    headers = sum(
        int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in (written / "shards").iterdir()
    )
    assert size - headers == needed


@pytest.mark.slow
def test_two_processes_read_what_four_wrote(written: Path) -> None:
    run(read, 2, written)


def test_what_is_missing_is_named(written: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "shards").mkdir()
    for rank in (0, 1, 3):
        name = f"rank-{rank:05d}.safetensors"
        (folder / name).write_bytes((written / "shards" / name).read_bytes())
    shards = Shards(folder)
    with pytest.raises(ValueError, match="shards/even has 6 of the 8 rows asked for"):
        shards.rows("shards/even", (8, 3), torch.arange(8))
    with pytest.raises(ValueError, match=r"other is missing, expected shape \(2,\)"):
        shards.rows("other", (2,), torch.arange(2))
    with pytest.raises(ValueError, match=r"plain is \(5, 2\), expected shape \(5, 3\)"):
        shards.rows("plain", (5, 3), torch.arange(5))
    (folder / "rank-00003.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"rank-00003.safetensors is damaged"):
        Shards(folder)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no rank-"):
        Shards(empty)
