"""Folders of torch.distributed.checkpoint (DCP), as FSDP, accelerate and torchtitan save them, read without running them.

`.metadata` is a pickle: it names every tensor, the chunks that the ranks held, and the file and bytes of each. A chunk is
what torch.save writes (a zip, whose data entry is not compressed) or, with DCP's other format, a tensor of the safetensors
blob that its file ends with (dcp_chunks.py). Pickles are read without running them (torch_pickles.py), and numbers come
from byte ranges when they are asked for; before, names, shapes and the sizes of the files are checked.

Given up: streams that an extension transformed (compressed ones), checkpoints whose ranks wrote a metadata file each,
torch.save's format of before 2020.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, file_inside
from ..lazy_tensors import Constant, LazyTensor, OpenFiles, Region, Stored
from .dcp_chunks import Blob, Saved, read_blob
from .staging import METADATA
from .torch_pickles import DTYPE_NAMES, unpickled

SUFFIX = ".distcp"
# What stands beside the model's part of a training state, as the first words of a name.
STATES = frozenset({
    "optim", "optimizer", "optimizers", "optim_state", "optimizer_state", "lr_scheduler", "lr_schedulers", "scheduler",
    "dataloader", "train_state", "rng_state", "step",
})  # fmt: skip
_MAX_CELLS = 1 << 24


class Contents(NamedTuple):
    """What a DCP folder holds.

    Attributes:
        tensors: by their names there.
        objects: the names of what is no tensor: pickled Python objects, which are never opened.
        files: all that were used.
    """

    tensors: dict[str, LazyTensor]
    objects: tuple[str, ...]
    files: tuple[Path, ...]


def is_dcp(folder: Path) -> bool:
    """Whether torch.distributed.checkpoint wrote the folder."""
    return (folder / METADATA).is_file()


def open_dcp(folder: Path, files: OpenFiles) -> Contents:
    """The tensors of a DCP folder, whole, whatever ranks wrote them.

    Raises:
        CheckpointError: no metadata of DCP's, or one that names anything but DCP's own classes; a file that is missing or
            too short; chunks that do not make up their tensor, were transformed, or have a type safetensors does not know.
    """
    path = file_inside(folder, METADATA)
    metadata = unpickled(path.read_bytes(), str(path))
    try:
        entries = metadata.state["state_dict_metadata"]
        stored = [(key.state, info.state) for key, info in metadata.state["storage_data"].items()]
        where = {(key["fqn"], key.get("offset")): info for key, info in stored}
        opening = _Opening(folder, files)
        tensors = {
            str(name): opening.tensor(str(name), entry, where)
            for name, entry in entries.items()
            if entry.kind == "TensorStorageMetadata"
        }
        objects = tuple(str(name) for name, entry in entries.items() if entry.kind == "BytesStorageMetadata")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} has no {error}: expected the metadata of a torch.distributed.checkpoint."
        ) from None
    return Contents(tensors, objects, (path, *opening.sizes))


def model_names(
    contents: Contents, score: Callable[[Mapping[str, int]], int]
) -> tuple[dict[str, LazyTensor], tuple[tuple[str, str, int], ...]]:
    """The model's tensors without the prefix that wraps them (`model.` in accelerate's), and what else is there.

    Args:
        score: how many of these names, numbers replaced by # and counted, some layout claims; the prefix without which
            that is most wins, and of equals the shortest.

    Returns:
        Name -> tensor, and (what, why, how many) of optimizer states and pickled objects. Other names stay as they are.
    """
    dropped: Counter[tuple[str, str]] = Counter()
    names = []
    for name in contents.tensors:
        if (state := _state(name)) is not None:
            dropped[f"{state}.*", "training state, no part of the model"] += 1
        else:
            names.append(name)
    for name in contents.objects:
        state = _state(name)
        what = re.sub(r"\d+", "#", name) if state in (None, name) else f"{state}.*"
        dropped[what, "no tensor, but a pickled object, which is never opened"] += 1
    kinds = Counter(re.sub(r"\d+", "#", name) for name in names)
    words = (kind.split(".")[:-1] for kind in kinds)
    heads = {".".join((*head[:num], "")) for head in words for num in range(min(4, len(head) + 1))}
    scores = {
        head: score({kind.removeprefix(head): num for kind, num in kinds.items() if kind.startswith(head)})
        for head in sorted(heads, key=lambda head: (len(head), head))
    }
    prefix = max(scores, key=lambda head: scores[head], default="")
    found = {name.removeprefix(prefix): contents.tensors[name] for name in names}
    if len(found) < len(names):
        twice = next(
            name for name in names if not name.startswith(prefix) and prefix + name in contents.tensors
        )
        raise CheckpointError(f"{twice} and {prefix}{twice} are both there: expected one model.")
    return found, tuple((what, why, num) for (what, why), num in dropped.items())


def _state(name: str) -> str | None:
    """The first words of a name, down to one that says it is no part of the model."""
    words = name.split(".")
    number = next((number for number, word in enumerate(words[:3]) if word in STATES), None)
    return None if number is None else ".".join(words[: number + 1])


class _Opening:
    """Chunks of one folder, proven to lie inside its files."""

    def __init__(self, folder: Path, files: OpenFiles) -> None:
        self.folder, self.files = folder, files
        self.paths: dict[str, Path] = {}
        self.sizes: dict[Path, int] = {}
        self.blobs: dict[tuple[Path, int], Blob | None] = {}

    def tensor(self, name: str, entry: Any, where: Mapping[Any, Any]) -> LazyTensor:
        """A tensor, of one chunk or several."""
        shape, told = entry.state["size"], entry.state["properties"].state[0]
        if (dtype := DTYPE_NAMES.get(told)) is None:
            raise CheckpointError(
                f"{self.folder}: {name} is {told}: expected one of {', '.join(DTYPE_NAMES)}."
            )
        chunks = {
            one.state["offsets"]: one.state["sizes"]
            for one in entry.state["chunks"]
            if prod(one.state["sizes"])
        }
        if any(size < 0 for size in shape):
            raise CheckpointError(f"{self.folder}: {name} has shape {list(shape)}: expected sizes from 0 on.")
        if not prod(shape):
            return Constant(torch.empty(shape, dtype=dtype))
        parts = []
        for offsets, sizes in chunks.items():
            if (info := where.get((name, offsets))) is None:
                raise CheckpointError(
                    f"{self.folder}: {METADATA} does not say where {name} at {list(offsets)} is."
                )
            parts.append((offsets, self._chunk(name, offsets, sizes, dtype, info)))
        if len(parts) == 1 and parts[0][1].shape == shape:
            return parts[0][1]
        return Tiled(f"{self.folder}: {name}", shape, dtype, parts)

    def _chunk(
        self,
        name: str,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        info: Mapping[str, Any],
    ) -> LazyTensor:
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{self.folder}: {name} went through {', '.join(info['transform_descriptors'])}: expected a checkpoint that "
                "was saved without extensions; load it with torch and save it again."
            )
        file, start = info["relative_path"], info["offset"]
        if (path := self.paths.get(file)) is None:
            path = self.paths[file] = self._file(file, name)
        if (path, start) not in self.blobs and (path, -1) not in self.blobs:
            self.blobs[path, start] = read_blob(path, start, self.sizes[path], self.files)
            if self.blobs[path, start] is None:  # a zip; so are the others of this file
                self.blobs[path, -1] = None
        if (blob := self.blobs.get((path, start))) is not None:
            return Stored(blob.info(name, offsets, sizes, dtype, path), self.files)
        if start + info["length"] > self.sizes[path]:
            raise CheckpointError(
                f"{path} has {self.sizes[path]:,} bytes: expected {start + info['length']:,} at least, where {name} ends; "
                "copy it again."
            )
        return Saved(name, path, start, info["length"], sizes, dtype, self.files)

    def _file(self, file: str, name: str) -> Path:
        try:
            path = file_inside(self.folder, file)
        except CheckpointError:
            if (self.folder / file).exists():
                raise
            raise CheckpointError(
                f"{self.folder / file} is missing, which holds a part of {name}: expected the files of all ranks."
            ) from None
        self.sizes[path] = path.stat().st_size
        return path


class Tiled(LazyTensor):
    """A tensor of chunks that lie beside each other in any dimensions."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        parts: Sequence[tuple[tuple[int, ...], LazyTensor]],
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._check(name, parts)
        # Along the dimension that is cut most: where chunks begin, and how far those so far reach.
        self.dim = max(range(len(shape)), key=lambda dim: len({offsets[dim] for offsets, _ in parts}))
        self.parts = sorted(parts, key=lambda part: part[0][self.dim])
        self.starts = [offsets[self.dim] for offsets, _ in self.parts]
        self.stops = list(
            accumulate((offsets[self.dim] + part.shape[self.dim] for offsets, part in self.parts), max)
        )

    def _check(self, name: str, parts: Sequence[tuple[tuple[int, ...], LazyTensor]]) -> None:
        """Raises: CheckpointError: the chunks overlap or leave something out."""
        wrong = CheckpointError(
            f"{name} is in {len(parts)} chunks that do not make up {list(self.shape)}: expected each number once."
        )
        edges: list[set[int]] = [{0, size} for size in self.shape]
        for offsets, part in parts:
            if len(offsets) != len(self.shape) or len(part.shape) != len(self.shape):
                raise wrong
            for dim, start in enumerate(offsets):
                edges[dim] |= {start, start + part.shape[dim]}
                if start < 0 or start + part.shape[dim] > self.shape[dim]:
                    raise wrong
        if prod(len(one) - 1 for one in edges) > _MAX_CELLS:
            raise CheckpointError(
                f"{name} is in {len(parts)} chunks in disorder: expected those of a mesh of ranks."
            )
        at = [{edge: number for number, edge in enumerate(sorted(one))} for one in edges]
        times = torch.zeros([len(one) - 1 for one in edges], dtype=torch.int32)
        for offsets, part in parts:
            times[
                tuple(
                    slice(cells[start], cells[start + size])
                    for cells, start, size in zip(at, offsets, part.shape, strict=True)
                )
            ] += 1
        if not (times == 1).all():
            raise wrong

    def fill(self, place: Tensor, region: Region) -> None:
        if not place.numel():
            return
        wanted = region[self.dim]
        first, last = bisect_right(self.stops, wanted.start), bisect_left(self.starts, wanted.stop)
        for offsets, part in self.parts[first:last]:
            bounds = [
                (max(want.start, start), min(want.stop, start + size))
                for want, start, size in zip(region, offsets, part.shape, strict=True)
            ]
            if any(start >= stop for start, stop in bounds):
                continue
            there = tuple(
                slice(start - want.start, stop - want.start)
                for (start, stop), want in zip(bounds, region, strict=True)
            )
            inside = tuple(
                slice(start - offset, stop - offset)
                for (start, stop), offset in zip(bounds, offsets, strict=True)
            )
            part.fill(place[there], inside)
