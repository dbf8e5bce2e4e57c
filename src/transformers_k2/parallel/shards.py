"""Tensors of a run on the disk, one safetensors file per rank, readable on any number of ranks.

Each rank writes the rows (entries of dimension 0) that it holds, and which they are; replicas are written once. Reading
asks for rows by number, so a checkpoint of 256 ranks loads on 32 or on one, in any layout, and nothing is gathered. No
pickle is involved. What it gives up: one file per rank, so a reader on another layout opens several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..files import sync
from .model import local_rows

_FILE = re.compile(r"rank-\d{5}\.safetensors")
_INDEX = "rows"


def save_shards(folder: Path, tensors: Mapping[str, Tensor], writes_plain: bool) -> None:
    """Write this rank's share into `folder`, synced. Every rank calls it; no communication.

    Args:
        tensors: by name; DTensors sharded along dimension 0, or plain tensors.
        writes_plain: whether this rank is the one, of those with the same plain tensors, that writes them.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    kept: dict[str, Tensor] = {}
    pointers: set[int] = set()
    index: dict[str, dict[str, list]] = {}
    for name, tensor in tensors.items():
        if not (_writes(tensor) if isinstance(tensor, DTensor) else writes_plain):
            continue
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if local.numel():
            held = local.contiguous().cpu()
            kept[name] = held.clone() if held.data_ptr() in pointers else held  # tied weights share one
            pointers.add(held.data_ptr())
            rows = _runs(local_rows(tensor)) if tensor.ndim else []
            index[name] = {"shape": list(tensor.shape), "rows": rows}
    path = folder / f"rank-{rank:05d}.safetensors"
    save_file(kept, path, metadata={"format": "pt", _INDEX: json.dumps(index)})
    sync(path)


class Shards:
    """What `save_shards` wrote, by name and row; serves as `Weights` of a model.

    Raises:
        ValueError: the folder holds no such files, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[Path, list[list[int]]]]] = {}
        self._files: dict[Path, safe_open] = {}
        for path in sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name)):
            try:
                self._files[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is damaged ({error}): expected a whole file; without the folder {folder.name} a run continues "
                    "at the checkpoint before it."
                ) from None
            for name, entry in json.loads(self._files[path].metadata()[_INDEX]).items():
                self.shapes[name] = tuple(entry["shape"])
                self._pieces.setdefault(name, []).append((path, entry["rows"]))
        if not self._files:
            raise ValueError(f"{folder} holds no rank-*.safetensors: expected a checkpoint of a run.")

    def rows(self, name: str, shape: Sequence[int], rows: Tensor) -> Tensor:
        """Rows of `name`, whose whole shape is `shape`.

        Raises:
            ValueError: it is missing, incomplete or of another shape.
        """
        if self.shapes.get(name) != tuple(shape):
            found = self.shapes.get(name, "missing")
            raise ValueError(f"{self.folder}: {name} is {found}, expected shape {tuple(shape)}.")
        if not shape:
            return self._files[self._pieces[name][0][0]].get_tensor(name)
        position = torch.full((shape[0],), -1)
        position[rows] = torch.arange(len(rows))
        result: Any = None
        found = 0
        for path, runs in self._pieces[name]:
            view = self._files[path].get_slice(name)
            offset = 0
            for start, stop in runs:
                wanted = position[start:stop]
                here = torch.where(wanted >= 0)[0]
                if len(here):
                    first, last = int(here[0]), int(here[-1]) + 1
                    values = view[offset + first : offset + last][here - first]
                    if result is None:
                        result = values.new_empty(len(rows), *shape[1:])
                    result[wanted[here]] = values
                    found += len(here)
                offset += stop - start
        if result is None or found != len(rows):
            raise ValueError(f"{self.folder}: {name} has {found} of the {len(rows)} rows asked for.")
        return result

    def like(self, name: str, tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """`name` placed as `tensor` is (a DTensor on its mesh, or plain on its device), in the dtype it was saved in.

        Args:
            shape: of the saved tensor if it is not `tensor`'s; then the result is plain.
        """
        if shape is not None and tuple(shape) != tuple(tensor.shape):
            return self.rows(name, shape, torch.arange(shape[0] if len(shape) else 0)).to(tensor.device)
        if not isinstance(tensor, DTensor):
            return self.rows(name, tensor.shape, local_rows(tensor)).to(tensor.device)
        rows = local_rows(tensor)
        local = tensor.to_local()
        if len(rows):
            values = self.rows(name, tensor.shape, rows).to(local.device)
        else:
            values = torch.empty(local.shape, dtype=self.dtype(name), device=local.device)
        return DTensor.from_local(
            values, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor as it was saved."""
        view = self._files[self._pieces[name][0][0]].get_slice(name)
        return view[:0].dtype if self.shapes[name] else view[...].dtype


def _writes(tensor: DTensor) -> bool:
    """Of the ranks that hold the same rows, the first."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        place == 0
        for place, placement in zip(coordinate, tensor.placements, strict=True)
        if placement.is_replicate()
    )


def _runs(rows: Tensor) -> list[list[int]]:
    """Ascending runs [start, stop) that the rows consist of."""
    breaks = (torch.where(rows[1:] != rows[:-1] + 1)[0] + 1).tolist()
    starts = [0, *breaks]
    ends = [*breaks, len(rows)]
    return [[int(rows[start]), int(rows[end - 1]) + 1] for start, end in zip(starts, ends, strict=True)]
