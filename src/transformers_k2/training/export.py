"""A run's weights in the hub's layout: one tensor per expert and projection, packed to INT4 where they were trained for it.

`export_hub` writes a model that no process holds whole, from a checkpoint's shards; `export_int4` one in memory. Every
process writes some of the files, one file's tensors at a time; rank 0 adds the configuration and, last, the index, so that
an interrupted export is a folder that does not load. What it gives up: a second reading of what was just written.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..files import replacing, write_text
from ..parallel.shards import Shards
from ..quantization import int4
from ..quantization.qat import Int4Weight, settings
from ..quantization.targets import STACKS, hub_config
from . import machine

_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_FILE_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"


class _Source(Protocol):
    """Weights by the model's names."""

    shapes: dict[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype: ...
    def rows(self, name: str, shape: Sequence[int], rows: Tensor) -> Tensor: ...


class _InMemory:
    """Of a model that this process holds whole."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tensors: dict[str, Tensor] = model.state_dict()
        if sharded := [name for name, tensor in self.tensors.items() if isinstance(tensor, DTensor)]:
            raise ValueError(
                f"{sharded[0]} is split over ranks: expected a whole model; export_hub writes one from a checkpoint."
            )
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def rows(self, name: str, shape: Sequence[int], rows: Tensor) -> Tensor:
        return self.tensors[name][rows.to(self.tensors[name].device)].cpu()


class _Entry(NamedTuple):
    """One weight of the hub's: the rows of one in the source, the first dimension dropped for an expert."""

    name: str
    source: str
    expert: int | None
    half: int | None  # of gate_up_proj: 0 gate, 1 up
    tensors: tuple[str, ...]  # what it is in a file
    num_bytes: int


def export_int4(model: PreTrainedModel, folder: str | os.PathLike, file_bytes: int = _FILE_BYTES) -> None:
    """Write a model that `prepare_qat` has prepared as a hub checkpoint whose quantised weights are packed (pack-quantized).

    Codes and scales are those that its forward passes compute with, so loaded and dequantised in the dtype of the model it
    computes the same, to the bit. Scales are bfloat16, whatever the dtype of the other weights. The model stays as it is; no
    tokenizer is written.

    Args:
        folder: without weights; made if it is not there.

    Raises:
        ValueError: the model is not prepared, or split over ranks; the folder has weights; a weight is not finite.
    """
    folder = Path(folder)
    if not settings(model):
        raise ValueError(
            f"{type(model).__name__} has no weights that train for INT4: expected a model after `prepare_qat`."
        )
    if old := sorted(folder.glob("*.safetensors*")):
        raise ValueError(f"{folder} has {old[0].name} already: expected a folder without weights.")
    folder.mkdir(parents=True, exist_ok=True)
    _export(_InMemory(model), settings(model), model, folder, "", file_bytes, 0, 1)


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
        model: gives the configuration, and which weights are INT4: this rank's part of a model after `prepare_qat`.
        prefix: of the weights' names in the shards.
    """
    parts: list[Any] = [settings(model)]
    if dist.is_initialized():  # stages of a pipeline have other weights
        parts = [None] * machine.world_size()
        dist.all_gather_object(parts, settings(model))
    int4_weights = {name: how for part in parts for name, how in part.items()}
    _export(
        Shards(checkpoint),
        int4_weights,
        model,
        folder,
        prefix,
        file_bytes,
        machine.rank(),
        machine.world_size(),
    )
    machine.barrier()


def _export(
    source: _Source,
    int4_weights: Mapping[str, Int4Weight],
    model: PreTrainedModel,
    folder: Path,
    prefix: str,
    file_bytes: int,
    rank: int,
    world_size: int,
) -> None:
    files = list(_files(source, prefix, int4_weights, file_bytes))
    total = sum(entry.num_bytes for file in files for entry in file)
    width = max(5, len(str(len(files))))
    names = [
        f"model-{number:0{width}d}-of-{len(files):0{width}d}.safetensors"
        for number in range(1, len(files) + 1)
    ]
    for name, entries in list(zip(names, files, strict=True))[rank::world_size]:
        tensors: dict[str, Tensor] = {}
        for entry in entries:
            found = _encode(source, entry, int4_weights.get(entry.source.removeprefix(prefix)))
            tensors |= dict(zip(entry.tensors, found, strict=True))
        with replacing(folder / name) as temporary:
            save_file(tensors, temporary, {"format": "pt"})
    if world_size > 1:
        machine.barrier()
    if rank == 0:
        config = copy.copy(model.config)
        config.__dict__.pop("distributed_config", None)
        if int4_weights:
            shapes = {
                name.removeprefix(prefix): shape
                for name, shape in source.shapes.items()
                if name.startswith(prefix)
            }
            (group_size,) = {how.group_size for how in int4_weights.values()}
            config.quantization_config = hub_config(shapes, int4_weights, group_size)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        weight_map = {
            tensor: name
            for name, entries in zip(names, files, strict=True)
            for entry in entries
            for tensor in entry.tensors
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / _INDEX, json.dumps(index, indent=2) + "\n")


def _files(
    source: _Source, prefix: str, int4_weights: Mapping[str, Int4Weight], file_bytes: int
) -> Iterator[list[_Entry]]:
    current: list[_Entry] = []
    size = 0
    for entry in _entries(source, prefix, int4_weights):
        if current and size + entry.num_bytes > file_bytes:
            yield current
            current, size = [], 0
        current.append(entry)
        size += entry.num_bytes
    if current:
        yield current


def _entries(source: _Source, prefix: str, int4_weights: Mapping[str, Int4Weight]) -> Iterator[_Entry]:
    for key in sorted(name for name in source.shapes if name.startswith(prefix)):
        shape, itemsize = source.shapes[key], source.dtype(key).itemsize
        name = key.removeprefix(prefix)
        match = _STACKED.fullmatch(name)
        parts = (None,) if match is None else STACKS[match[2]]
        experts = (None,) if match is None else range(shape[0])
        numel = torch.Size(shape).numel() // (len(parts) * len(experts))
        for expert in experts:
            for half, part in enumerate(parts):
                hub = name if match is None else f"{match[1]}.{expert}.{part}.weight"
                where = half if len(parts) == 2 else None
                if (how := int4_weights.get(name)) is None:
                    yield _Entry(hub, key, expert, where, (hub,), numel * itemsize)
                    continue
                rows = numel // shape[-1]
                words = rows * -(-shape[-1] // 8)
                num_bytes = 4 * words + 2 * numel // how.group_size + 8
                packed = tuple(f"{hub}_{suffix}" for suffix in ("packed", "scale", "shape"))
                yield _Entry(hub, key, expert, where, packed, num_bytes)


def _encode(source: _Source, entry: _Entry, how: Int4Weight | None) -> tuple[Tensor, ...]:
    weight = _read(source, entry)
    if how is None:
        return (weight,)
    codes, scale = int4.quantize(weight.to(how.dtype), how.group_size, how.convention)
    shape = torch.tensor(weight.shape, dtype=torch.int32)
    return int4.pack(codes), scale, shape


def _read(source: _Source, entry: _Entry) -> Tensor:
    shape = source.shapes[entry.source]
    if entry.expert is None:
        return source.rows(entry.source, shape, torch.arange(shape[0]))
    matrix = source.rows(entry.source, shape, torch.tensor([entry.expert]))[0]
    return (matrix if entry.half is None else matrix.chunk(2)[entry.half]).contiguous()
