"""A run's weights in the hub's layout, from a checkpoint's shards: one tensor per expert and projection.

For models that no process holds whole. Every process writes some of the files, one tensor at a time; rank 0 adds the
configuration and, last, the index. What it gives up: a second reading of what was just written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..files import sync, write_text
from ..parallel.shards import Shards
from . import machine

_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_FILE_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"


class _Entry(NamedTuple):
    """One hub tensor: the rows of one in the shards, the first dimension dropped for an expert."""

    name: str
    source: str
    expert: int | None
    half: int | None  # of gate_up_proj: 0 gate, 1 up
    num_bytes: int


def export_hub(
    checkpoint: Path,
    model: PreTrainedModel,
    folder: Path,
    prefix: str = "model.",
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Write the weights in `checkpoint` to `folder` as a hub checkpoint; collective.

    Args:
        checkpoint: a folder that `Checkpoints.save` wrote.
        model: gives the configuration.
        prefix: of the weights' names in the shards.
    """
    shards = Shards(checkpoint)
    files = list(_files(shards, prefix, file_bytes))
    total = sum(entry.num_bytes for file in files for entry in file)
    width = max(5, len(str(len(files))))
    names = [
        f"model-{number:0{width}d}-of-{len(files):0{width}d}.safetensors"
        for number in range(1, len(files) + 1)
    ]
    for number, (name, entries) in enumerate(zip(names, files, strict=True)):
        if number % machine.world_size() == machine.rank():
            save_file(
                {entry.name: _read(shards, entry) for entry in entries}, folder / name, {"format": "pt"}
            )
            sync(folder / name)
    machine.barrier()
    if machine.rank() == 0:
        config = model.config
        held = config.__dict__.pop("distributed_config", None)
        config.save_pretrained(folder)
        if held is not None:
            config.distributed_config = held
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        weight_map = {
            entry.name: name for name, entries in zip(names, files, strict=True) for entry in entries
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / _INDEX, json.dumps(index, indent=2) + "\n")
    machine.barrier()


def _files(shards: Shards, prefix: str, file_bytes: int) -> Iterator[list[_Entry]]:
    current: list[_Entry] = []
    size = 0
    for entry in _entries(shards, prefix):
        if current and size + entry.num_bytes > file_bytes:
            yield current
            current, size = [], 0
        current.append(entry)
        size += entry.num_bytes
    if current:
        yield current


def _entries(shards: Shards, prefix: str) -> Iterator[_Entry]:
    for source in sorted(name for name in shards.shapes if name.startswith(prefix)):
        shape, itemsize = shards.shapes[source], shards.dtype(source).itemsize
        name = source.removeprefix(prefix)
        size = torch.Size(shape).numel() * itemsize
        match = _STACKED.fullmatch(name)
        if match is None:
            yield _Entry(name, source, None, None, size)
            continue
        parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        for expert in range(shape[0]):
            for half, part in enumerate(parts):
                where = half if len(parts) == 2 else None
                yield _Entry(
                    f"{match[1]}.{expert}.{part}.weight",
                    source,
                    expert,
                    where,
                    size // shape[0] // len(parts),
                )


def _read(shards: Shards, entry: _Entry) -> Tensor:
    shape = shards.shapes[entry.source]
    if entry.expert is None:
        return shards.rows(entry.source, shape, torch.arange(shape[0]))
    matrix = shards.rows(entry.source, shape, torch.tensor([entry.expert]))[0]
    return (matrix if entry.half is None else matrix.chunk(2)[entry.half]).contiguous()
