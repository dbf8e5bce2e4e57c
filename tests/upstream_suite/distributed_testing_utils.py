"""The module that starts one process per rank, which the source distribution leaves out: gloo on this machine's CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`run_distributed(n)(function)(*args)` runs `function(rank, *args)` in n processes; any failure is raised."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                store = os.path.join(folder, "store")
                _start_rank_processes(_run_rank, (function, world_size, store, args), world_size)

        return run

    return decorate


def _run_rank(rank: int, function: Callable[..., None], world_size: int, store: str, args: tuple) -> None:
    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def _start_rank_processes(function: Callable[..., None], args: tuple, nprocs: int) -> None:
    mp.spawn(function, args=args, nprocs=nprocs)


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """A CPU process has nothing to choose."""
