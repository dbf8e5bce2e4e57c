"""Where the numbers of a chunk are in a file of torch.distributed.checkpoint: in a zip of torch.save, or in safetensors.

Zips are looked into when a chunk is first read: their directory, the small pickle that tells strides, and no more; the data
entry is never compressed, so its numbers are a range of the file's bytes. Checksums of zips are not looked at.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import MAX_HEADER_BYTES, CheckpointError, TensorInfo
from ..lazy_tensors import NAMES, LazyTensor, OpenFiles, Region, Stored
from .torch_pickles import DTYPE_NAMES, STORAGES, unpickled


class Saved(LazyTensor):
    """What torch.save wrote of a tensor, as bytes of a longer file; its numbers are found when they are first read."""

    def __init__(
        self,
        name: str,
        path: Path,
        start: int,
        length: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        files: OpenFiles,
    ) -> None:
        self.name, self.path, self.start, self.length, self.files = name, path, start, length, files
        self.shape, self.dtype = shape, dtype
        self._found: tuple[Stored, list[int]] | None = None

    def fill(self, place: Tensor, region: Region) -> None:
        if self._found is None:
            self._found = self._look()
        stored, order = self._found
        stored.fill(place.permute(order), tuple(region[dim] for dim in order))

    def _look(self) -> tuple[Stored, list[int]]:
        """The numbers in the order of the file, and which dimension each of theirs is."""
        what = f"{self.path}, {self.name} at byte {self.start}"
        view = _Range(self.path, self.start, self.length, self.files)
        try:
            with zipfile.ZipFile(view) as archive:
                entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            tensor = unpickled(_content(view, entries["data.pkl"]), what)
            if "byteorder" in entries and _content(view, entries["byteorder"]) != b"little":
                raise CheckpointError(f"{what} has big-endian numbers: expected little-endian ones.")
        except (
            zipfile.BadZipFile,
            KeyError,
            EOFError,
            NotImplementedError,
            UnicodeDecodeError,
            struct.error,
        ) as error:
            raise CheckpointError(f"{what} is damaged ({error}): expected what torch.save writes.") from None
        try:
            (_, storage, key, *_), first, shape, strides, *rest = tensor.args
            dtype = STORAGES[storage.kind] if tensor.kind == "_rebuild_tensor_v2" else DTYPE_NAMES[rest[2]]
            data = entries[f"data/{key}"]
            begin = _begin(view, data)
        except (
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            ValueError,
            zipfile.BadZipFile,
            struct.error,
        ):
            raise CheckpointError(f"{what} is no plain tensor: expected what DCP saves.") from None
        if shape != self.shape or dtype != self.dtype:
            raise CheckpointError(
                f"{what} is {dtype} {list(shape)}: expected {self.dtype} {list(self.shape)}, as .metadata has it."
            )
        order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], -shape[dim]))
        inner = tuple(shape[dim] for dim in order)
        dense = [prod(inner[number + 1 :]) for number in range(len(inner))]
        if any(strides[dim] != step for dim, step in zip(order, dense, strict=True) if shape[dim] > 1):
            raise CheckpointError(f"{what} has strides {list(strides)}: expected numbers without gaps.")
        begin, num_bytes = begin + first * dtype.itemsize, prod(shape) * dtype.itemsize
        if first * dtype.itemsize + num_bytes > data.file_size or begin + num_bytes > self.length:
            raise CheckpointError(f"{what} is cut short: expected {num_bytes:,} bytes of numbers.")
        begin += self.start
        return Stored(
            TensorInfo(self.name, NAMES[dtype], inner, self.path, begin, begin + num_bytes), self.files
        ), order


def _begin(view: _Range, entry: zipfile.ZipInfo) -> int:
    """Where the data of an entry of a zip is: behind a local header of 30 bytes, a name, and what pads it."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{entry.filename} is compressed")
    view.seek(entry.header_offset + 26)
    return entry.header_offset + 30 + sum(struct.unpack("<HH", view.read(4)))


def _content(view: _Range, entry: zipfile.ZipInfo) -> bytes:
    """The data of an entry; checksums are not looked at, since torch.save can be told to write none."""
    view.seek(_begin(view, entry))
    return view.read(entry.file_size)


class Blob(NamedTuple):
    """The header of safetensors that begin inside a file.

    Attributes:
        begin: where their data does.
        tensors: the header's entries.
        offsets: by name, which chunk of the tensor is there.
    """

    begin: int
    tensors: Mapping[str, Any]
    offsets: Mapping[str, Any]

    def info(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype, path: Path
    ) -> TensorInfo:
        """Where a chunk is, proven to be that one."""
        entry = self.tensors.get(name)
        found = self.offsets.get(name, {}).get("saved_offsets", list(offsets))
        if entry is None or tuple(found) != offsets:
            raise CheckpointError(
                f"{path} does not hold {name} at {list(offsets)}: with several chunks of a tensor in a file, DCP keeps but "
                "the last in its safetensors format; save it again in the other."
            )
        start, stop = entry["data_offsets"]
        if (entry["dtype"], tuple(entry["shape"])) != (NAMES[dtype], sizes) or stop - start != prod(
            sizes
        ) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: {name} is {entry['dtype']} {entry['shape']}: expected {NAMES[dtype]} {list(sizes)}, as .metadata "
                "has it."
            )
        return TensorInfo(name, NAMES[dtype], sizes, path, self.begin + start, self.begin + stop)


def read_blob(path: Path, start: int, size: int, files: OpenFiles) -> Blob | None:
    """The safetensors that begin at a byte; None if a zip does."""
    wrong = CheckpointError(
        f"{path} has neither a zip of torch.save nor safetensors at byte {start}: expected one, as DCP writes them."
    )
    view = _Range(path, start, size - start, files)
    head = view.read(8)
    if head[:4] == b"PK\3\4":
        return None
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - start - 8):
        raise wrong
    try:
        tensors = json.loads(view.read(length))
        about = json.loads(tensors.pop("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
        end = start + 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise wrong from None
    if end > size:
        raise CheckpointError(
            f"{path} has {size:,} bytes: expected {end:,}, as its header says; copy it again."
        )
    return Blob(start + 8 + length, tensors, about)


class _Range(io.RawIOBase):
    """Bytes of a file as a file of their own."""

    def __init__(self, path: Path, start: int, length: int, files: OpenFiles) -> None:
        self.path, self.start, self.length, self.files, self.at = path, start, length, files, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        num = max(0, min(len(buffer), self.length - self.at))
        if num:
            place = torch.empty(num, dtype=torch.uint8)
            self.files.read(self.path, place, self.start + self.at)
            buffer[:num] = place.numpy().tobytes()
            self.at += num
        return num
