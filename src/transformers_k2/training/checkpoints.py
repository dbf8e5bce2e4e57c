"""Checkpoints of a run: complete or not there, whatever kills it; readable in any layout and on any number of ranks.

A checkpoint is a folder of safetensors (weights and optimizer state by parameter name, parallel/shards.py) and two JSON
files. It is written under a hidden name, synced, then renamed. What is a function of the step needs no file: the rows
(steps.py), the learning rate, and the random numbers, which are seeded anew for every micro-batch.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..files import sync, write_text
from ..parallel import Layout, fill
from ..parallel.shards import Shards, save_shards

_NAME = re.compile(r"step-(\d{8})")
_MODEL, _OPTIMIZER = "model.", "optimizer."
STATE, META = "trainer_state.json", "checkpoint.json"


class Checkpoints:
    """The checkpoints in a folder, the newest `keep` of them.

    Args:
        folder: one for the run, on a disk that all nodes share.
        keep: how many stay.
        layout: who holds what.
    """

    def __init__(self, folder: Path, keep: int, layout: Layout) -> None:
        self.folder, self.keep, self.layout = folder, keep, layout

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = self._all()
        return found[-1] if found else None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step goes."""
        return self.folder / f"step-{step:08d}"

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, state: str, extra: dict[str, Any]
    ) -> Path:
        """Write a checkpoint; collective. Frozen weights are left out: they are where they came from.

        Args:
            state: the Trainer's, as JSON.
            extra: what else a resumed run needs, JSON values; rank 0's counts.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        path = self.path(step)
        partial = path.with_name(f".{path.name}.partial")
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _barrier()
        weights = {
            _MODEL + name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        }
        # After state_dict, which shards again what FSDP2 has left whole after an evaluation.
        tensors, scalars = _optimizer_state(model, optimizer)
        save_shards(partial, weights | tensors, writes_plain=self.layout.data_rank(rank) == 0)
        gathered: list[dict[str, Any]] = [scalars]
        if dist.is_initialized() and self.layout.pipeline > 1:
            gathered = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, scalars)
        _barrier()
        if rank == 0:
            scalars = {name: value for part in gathered for name, value in part.items()}
            write_text(partial / STATE, state)
            write_text(
                partial / META, json.dumps({"step": step, "scalars": scalars, **extra}, indent=2) + "\n"
            )
            sync(partial)
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            sync(self.folder)
            for old in self._all()[: -self.keep]:
                shutil.rmtree(old)
        _barrier()
        return path

    def read_meta(self, path: Path) -> dict[str, Any]:
        """The step, and the `extra` that was saved."""
        return json.loads((path / META).read_text(encoding="utf-8"))

    def load_model(self, path: Path, model: nn.Module) -> None:
        """Weights and buffers, this rank's rows.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        fill(model, _Prefixed(Shards(path), _MODEL, model))

    def load_optimizer(self, path: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """The state of every parameter that has some; call it before the first step."""
        shards, scalars = Shards(path), self.read_meta(path)["scalars"]
        names = {parameter: name for name, parameter in model.named_parameters()}
        by_name: dict[str, dict[str, str]] = {}
        for key in shards.shapes:
            if key.startswith(_OPTIMIZER):
                name, _, leaf = key.removeprefix(_OPTIMIZER).rpartition("/")
                by_name.setdefault(name, {})[leaf] = key
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                state: dict[str, Any] = dict(scalars.get(name, {}))
                for leaf, key in by_name.get(name, {}).items():
                    state[leaf] = shards.like(key, parameter.detach(), shards.shapes[key])
                if state:
                    optimizer.state[parameter] = state

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(
            path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and (path / META).is_file()
        )


class _Prefixed:
    """A model's part of a checkpoint; frozen weights, which it does not hold, keep the model's values."""

    def __init__(self, shards: Shards, prefix: str, model: nn.Module) -> None:
        self.shards, self.prefix = shards, prefix
        self.current = model.state_dict(keep_vars=True)

    def rows(self, name: str, shape: Any, rows: Tensor) -> Tensor:
        tensor = self.current[name]
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if frozen and self.prefix + name not in self.shards.shapes:
            return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        return self.shards.rows(self.prefix + name, shape, rows)


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by "optimizer.<parameter>/<entry>", and what is no tensor by parameter."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    parameters = dict(model.named_parameters())
    assert optimizer.state.keys() <= set(parameters.values())
    for name, parameter in parameters.items():
        for leaf, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}/{leaf}"] = value
            else:
                scalars.setdefault(name, {})[leaf] = value
    return tensors, scalars


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
