"""Runs of `train` in processes of their own, for tests that kill them, start them again, or start several at once.

The processes are forked from one that has done the imports, so that a run costs a second and not ten. A process can be
told to kill itself (SIGKILL, as a power cut would) at a chosen operation on the run's files, or with a chosen one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

RECIPE = "debug_pretrain"
ADAMW = "optimizer={name: adamw, lr: 3e-3, betas: [0.9, 0.95], weight_decay: 0.1, eps: 1e-8}"
SMALL = (
    "tokenizer.vocab_size=640",
    "model.overrides={vocab_size: 640, num_hidden_layers: 3, hidden_size: 32, intermediate_size: 48,"
    " n_routed_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, q_lora_rank: 24, kv_lora_rank: 16}",
    "data.sequence_length=33",
    "training.batch_size=8",
    "training.steps=6",
    "training.eval_every=3",
    "training.eval_sequences=9",  # no multiple of two or four processes
    "optimizer.qk_clip_tau=0.5",  # low enough that heads are clipped
    "router.bias_update_speed=0.01",
    "checkpoint.every=2",
    "generation.max_new_tokens=2",
)
TIMED = ("seconds", "tokens_per_second", "mfu")
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
_PRELOAD = ["transformers_k2.training.loop", "transformers.trainer", "matplotlib.backends.backend_agg"]


def compute_in_float32() -> None:
    """Newton-Schulz in bfloat16, where the CPU multiplies it, tells layouts apart by its rounding. For `Run.before`."""
    from transformers_k2.optim import muon

    muon.choose_dtype = lambda device: torch.float32


def text_file(folder: Path) -> Path:
    """One real text file in `folder`."""
    path = folder / "text.txt"
    path.write_bytes((Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py").read_bytes())
    return path


@dataclass
class Run:
    """The command of a run: the same one starts it and continues it.

    Args:
        text: what it trains on; the token cache is kept beside it.
        output: its folder.
        overrides: beside those of SMALL.
        num_processes: how many share it.
        before: called in each process first; a function of a module, or a partial of one.
    """

    text: Path
    output: Path
    overrides: Sequence[str] = ()
    num_processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None

    @property
    def arguments(self) -> list[str]:
        """What follows the recipe's name on the command line."""
        places = [
            f"data.source={self.text}",
            f"output_dir={self.output}",
            f"data.cache_dir={self.text.parent}/cache",
        ]
        return [*SMALL, *places, *self.overrides]

    @property
    def unfinished(self) -> Path:
        """The folder while it runs."""
        return self.output.with_name(f"{self.output.name}.unfinished")

    def start(self) -> list[BaseProcess]:
        """The processes, started."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        environment = {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            **self.environment,
        }
        if self.num_processes > 1:
            environment |= {"WORLD_SIZE": str(self.num_processes), "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = str(free_port())
        processes = []
        for rank in range(self.num_processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.num_processes > 1 else {}
            log = self.output.with_name(f"{self.output.name}.{rank}.log")
            process = context.Process(
                target=_main, args=(self.arguments, environment | ranks, log, self.before)
            )
            process.start()
            processes.append(process)
        return processes

    def wait(self, processes: list[BaseProcess], timeout: float = 300) -> list[int | None]:
        """The exit statuses; once a process has failed, those that wait for it are killed, as launchers do."""
        pending = list(processes)
        while pending:
            pending[0].join(0.05)
            pending = [process for process in pending if process.is_alive()]
            timeout -= 0.05 * bool(pending)
            if timeout < 0 or any(process.exitcode not in (None, 0, 143) for process in processes):
                for process in pending:
                    process.kill()
        return [process.exitcode for process in processes]

    def __call__(self) -> list[int | None]:
        """Run; the exit statuses."""
        return self.wait(self.start())

    def finish(self) -> Path:
        """Run to the end; the output folder."""
        codes = self()
        assert set(codes) == {0}, f"{codes}\n{self.log()}"
        return self.output

    def log(self) -> str:
        """What the processes printed last."""
        logs = sorted(self.output.parent.glob(f"{self.output.name}.*.log"))
        return "\n".join(f"{path.name}: {path.read_text(encoding='utf-8')[-30_000:]}" for path in logs)


def _main(
    arguments: list[str], environment: dict[str, str], log: Path, before: Callable[[], None] | None
) -> None:
    os.environ |= environment
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from rich.console import Console

    from transformers_k2.training import machine, train

    torch.set_num_threads(1)
    if before is not None:
        before()
    try:
        train(RECIPE, arguments, Console(width=160))
    finally:
        machine.leave()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def watch_files(root: str, kill_at: int | str | None = None, count_to: str | None = None) -> None:
    """Count this process's operations on files under `root`, and kill it before one of them.

    Args:
        kill_at: the number of the operation, from 1, or a pattern that "<event> <path>" matches.
        count_to: a file that gets how many there were, whenever the process ends by itself.
    """
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        place = os.fspath(arguments[0])
        if not place.startswith(root) and event not in ("os.remove", "os.rmdir"):  # rmtree names files alone
            return
        count += 1
        hit = count == kill_at if not isinstance(kill_at, str) else re.search(kill_at, f"{event} {place}")
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if count_to is not None:
        # Processes of multiprocessing skip atexit.
        Finalize(None, lambda: Path(count_to).write_text(str(count)), exitpriority=0)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run, without what depends on the clock."""
    parsed = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in parsed]


def curve(folder: Path) -> list[list[float]]:
    """Step, loss, gradient norm and held-out loss of every line; 0 where the line has none."""
    keys = ("step", "loss", "grad_norm", "held_out_loss")
    return [[line.get(key, 0.0) for key in keys] for line in lines(folder)]


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a hub folder."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def same_weights(first: Path, second: Path) -> bool:
    """Whether two hub folders hold the same tensors, to the bit."""
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
