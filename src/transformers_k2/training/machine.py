"""The processes of a run: joining them, restarts, signals, and what they decide together.

Launchers (`accelerate launch`, torchrun, srun) start processes and set RANK, WORLD_SIZE and the address of rank 0; this
file joins them before Accelerate does, because a restarted attempt must not find the keys of the one before in the
launcher's store.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

# Loading a trillion parameters takes tens of minutes, and ranks finish at different times.
_TIMEOUT = timedelta(hours=2)


def join() -> int:
    """Join the process group that the launcher describes, if it describes one; the number of processes.

    Raises:
        ValueError: a launcher started several processes but did not say where they meet.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        return size
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start the processes with accelerate launch, "
            "torchrun or the SLURM script in training_recipes/accelerate."
        )
    rank = int(os.environ["RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun's agent runs a store on this port already; without one, rank 0 starts it.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not agent,
        timeout=_TIMEOUT,
        multi_tenant=True,
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore(_attempt(store, rank, size), store),
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
    return size


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name for this attempt that all of its processes know and those of no other.

    A launcher's store outlives the processes, and the agents of several nodes may count restarts from different starts.
    So every process writes down a name of its own, and rank 0 answers to each name that it finds: what earlier attempts
    have left there is answered too, and nobody reads it.

    Raises:
        RuntimeError: some processes did not come.
    """
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"name of {rank}", own)
        attempt = store.get(f"answer to {own}").decode()
        store.set(f"{rank} is in {attempt}", "")
        return attempt
    missing = list(range(1, size))
    deadline = time.monotonic() + _TIMEOUT.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"name of {other}"]):
                store.set(f"answer to {store.get(f'name of {other}').decode()}", own)
        time.sleep(0.02)
        missing = [other for other in missing if not store.check([f"{other} is in {own}"])]
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{len(missing)} of {size} processes have not come within {_TIMEOUT}: {missing[:8]}."
            )
    return own


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank; pickled between processes of one run only."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class StopSignal:
    """Remembers SIGTERM and SIGINT, which schedulers send before they kill; `agreed` asks whether any rank got one."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._at = 0.0

    def agreed(self, device: torch.device) -> bool:
        """Whether some process was told to stop; collective."""
        if world_size() == 1:
            return self.received is not None
        flag = torch.tensor(int(self.received is not None), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A launcher and a scheduler may both send SIGTERM; SIGKILL comes by itself. A second Ctrl-C is a person's.
        again = self.received is not None and time.monotonic() - self._at > 1
        if number == signal.SIGINT and again:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.received is None:
            self.received, self._at = signal.Signals(number).name, time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Handle the signals inside the block; signal handlers exist in the main thread only."""
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._handle) for number in kinds}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
