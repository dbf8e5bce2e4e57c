"""Tensors that are read when they are asked for, region by region, and rearranged or decoded on the way.

A checkpoint in one layout, seen as another, is a tree of these: bytes of a file at the leaves, rows put beside or above
each other, matrices stacked, FP8 blocks and INT4 groups multiplied out. transformers' loader takes them for safetensors
slices and reads each straight into its place in the model; the converters write them to files band by band. So one
description serves both, and neither holds more than the region it asked for.

Files are read, not mapped: the pages of a mapped file count as memory of the process while it is open, and a file that
shrinks is an error here and a signal there.

Given up: decoding on a device. It is done where the file is read, on the CPU.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .checkpoint import CheckpointError, TensorInfo
from .quantization.codecs import fp8_block, int4_pack

# As safetensors spells them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U32": torch.uint32, "U16": torch.uint16, "U64": torch.uint64,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Region = tuple[slice, ...]
_BAND = 1 << 21  # weights decoded at a time, and bytes read in vain where columns are picked


class OpenFiles(ExitStack):
    """Files that are opened once and read by several threads, until the context ends."""

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self.callback(self._close_all)

    def read(self, path: Path, place: Tensor, offset: int) -> None:
        """Fill a contiguous tensor with the bytes from `offset` on.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        descriptor = self._descriptor(path)
        buffer = memoryview(cast(Any, place.view(-1).view(torch.uint8).numpy()))
        while buffer:
            try:
                num_bytes = os.preadv(descriptor, [buffer[: 1 << 30]], offset)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read at byte {offset}: {error.strerror}.") from error
            if num_bytes == 0:
                raise CheckpointError(f"{path} ends at byte {offset}: it was cut short while it was read.")
            buffer, offset = buffer[num_bytes:], offset + num_bytes

    def close_file(self, path: Path) -> None:
        """Close a file that nothing will read soon."""
        with self._lock:
            if (descriptor := self._descriptors.pop(path, None)) is not None:
                os.close(descriptor)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def _close_all(self) -> None:
        for path in list(self._descriptors):
            self.close_file(path)


class LazyTensor(ABC):
    """What transformers' loader asks of a safetensors slice; `fill` is what a kind of tensor adds.

    Attributes:
        shape: sizes.
        dtype: of what `fill` writes.
        by_matrix: rows of it are only to be had by reading the whole matrix, so ask for all of them at once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    by_matrix: bool = False

    def get_shape(self) -> list[int]:
        """Sizes."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As safetensors spells it."""
        return NAMES[self.dtype]

    def __getitem__(self, index: Any) -> Tensor:
        region = self._region(index)
        place = torch.empty([part.stop - part.start for part in region], dtype=self.dtype, device="cpu")
        self.fill(place, region)
        return place

    @abstractmethod
    def fill(self, place: Tensor, region: Region) -> None:
        """Write a region, start and stop known in every dimension, into a CPU tensor of that shape and this dtype."""

    def sources(self) -> Iterator[TensorInfo]:
        """The tensors of files that it is made of."""
        for value in vars(self).values():
            values = (
                value.values()
                if isinstance(value, dict)
                else value
                if isinstance(value, list | tuple)
                else (value,)
            )
            for one in values:
                if isinstance(one, LazyTensor):
                    yield from one.sources()

    def _region(self, index: Any) -> Region:
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in parts:
            assert parts == (Ellipsis,), f"no index of transformers' loader: {index}"
            parts = ()
        parts += (slice(None),) * (len(self.shape) - len(parts))
        bounds = [part.indices(size) for part, size in zip(parts, self.shape, strict=True)]
        assert all(step == 1 for _, _, step in bounds), index
        return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)


class Stored(LazyTensor):
    """A tensor as the file has it."""

    def __init__(self, info: TensorInfo, files: OpenFiles) -> None:
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.shard}: {info.name} is {info.dtype}: expected one of {', '.join(DTYPES)}."
            )
        self.info, self.files = info, files
        self.shape, self.dtype = info.shape, DTYPES[info.dtype]

    def sources(self) -> Iterator[TensorInfo]:
        """Itself."""
        yield self.info

    def fill(self, place: Tensor, region: Region) -> None:
        if not place.numel():
            return
        if not self.shape:
            self._read(place, 0)
            return
        # Down to the dimension whose entries are whole: there, a range of them is one run of bytes.
        if len(region) > 1 and region[0].stop - region[0].start == 1:
            self._fill_inside(place[0], region[1:], self.shape[1:], region[0].start)
        else:
            self._fill_inside(place, region, self.shape, 0)

    def _fill_inside(self, place: Tensor, region: Region, shape: Sequence[int], first: int) -> None:
        """The region of the entry `first` of dimension 0, whose shape is `shape`; or of the tensor itself."""
        rows, rest, row = region[0], region[1:], shape[1:]
        row_bytes = torch.Size(row).numel() * self.dtype.itemsize
        base = first * shape[0] * row_bytes
        if place.is_contiguous() and all(
            part == slice(0, size) for part, size in zip(rest, row, strict=True)
        ):
            self._read(place, base + rows.start * row_bytes)
            return
        step = max(1, 8 * _BAND // max(1, row_bytes))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            band = torch.empty(stop - start, *row, dtype=self.dtype, device="cpu")
            self._read(band, base + start * row_bytes)
            place[start - rows.start : stop - rows.start] = band[:, *rest]

    def _read(self, place: Tensor, offset: int) -> None:
        self.files.read(self.info.shard, place, self.info.start + offset)


class Constant(LazyTensor):
    """A tensor in memory."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.shape, self.dtype = value, tuple(value.shape), value.dtype

    def fill(self, place: Tensor, region: Region) -> None:
        place.copy_(self.value[region])


class Narrow(LazyTensor):
    """Entries start to stop of one dimension."""

    def __init__(self, source: LazyTensor, dim: int, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= source.shape[dim], (source.shape, dim, start, stop)
        self.source, self.dim, self.start = source, dim, start
        self.shape = (*source.shape[:dim], stop - start, *source.shape[dim + 1 :])
        self.dtype, self.by_matrix = source.dtype, source.by_matrix

    def fill(self, place: Tensor, region: Region) -> None:
        part = region[self.dim]
        moved = slice(part.start + self.start, part.stop + self.start)
        self.source.fill(place, (*region[: self.dim], moved, *region[self.dim + 1 :]))


class Entry(LazyTensor):
    """One entry of the first dimension, which is dropped."""

    def __init__(self, source: LazyTensor, number: int) -> None:
        assert 0 <= number < source.shape[0], (source.shape, number)
        self.source, self.number = source, number
        self.shape, self.dtype, self.by_matrix = source.shape[1:], source.dtype, source.by_matrix

    def fill(self, place: Tensor, region: Region) -> None:
        self.source.fill(place.unsqueeze(0), (slice(self.number, self.number + 1), *region))


class Cat(LazyTensor):
    """Tensors one after the other along a dimension."""

    def __init__(self, parts: Sequence[LazyTensor], dim: int = 0) -> None:
        self.parts, self.dim = tuple(parts), dim
        first = self.parts[0]
        self.shape = (
            *first.shape[:dim],
            sum(part.shape[dim] for part in self.parts),
            *first.shape[dim + 1 :],
        )
        self.dtype, self.by_matrix = first.dtype, any(part.by_matrix for part in self.parts)
        for part in self.parts:
            if (*part.shape[:dim], 0, *part.shape[dim + 1 :]) != (
                *self.shape[:dim],
                0,
                *self.shape[dim + 1 :],
            ) or (part.dtype != self.dtype):
                raise CheckpointError(
                    f"a part is {part.dtype} {list(part.shape)}, expected {self.dtype} {list(first.shape)}, as the first"
                )

    def fill(self, place: Tensor, region: Region) -> None:
        wanted, offset = region[self.dim], 0
        for part in self.parts:
            size = part.shape[self.dim]
            start, stop = max(wanted.start - offset, 0), min(wanted.stop - offset, size)
            if start < stop:
                there = place.narrow(self.dim, start + offset - wanted.start, stop - start)
                part.fill(there, (*region[: self.dim], slice(start, stop), *region[self.dim + 1 :]))
            offset += size


class Stack(LazyTensor):
    """Tensors of one shape under a new first dimension."""

    def __init__(self, name: str, parts: Sequence[LazyTensor]) -> None:
        self.parts, first = tuple(parts), parts[0]
        self.shape, self.dtype = (len(self.parts), *first.shape), first.dtype
        self.by_matrix = any(part.by_matrix for part in self.parts)
        for part in self.parts:
            if part.shape != first.shape or part.dtype != self.dtype:
                raise CheckpointError(
                    f"{name}: an expert has {part.dtype} {list(part.shape)}, expected {self.dtype} "
                    f"{list(first.shape)}, as the first."
                )

    def fill(self, place: Tensor, region: Region) -> None:
        for entry, part in zip(place, self.parts[region[0]], strict=True):
            part.fill(entry, region[1:])


class Transposed(LazyTensor):
    """A matrix, rows and columns exchanged."""

    by_matrix = True

    def __init__(self, source: LazyTensor) -> None:
        self.source, self.dtype = source, source.dtype
        num_rows, num_columns = source.shape
        self.shape = (num_columns, num_rows)

    def fill(self, place: Tensor, region: Region) -> None:
        self.source.fill(place.mT, (region[1], region[0]))


class Cast(LazyTensor):
    """The same in another dtype: rounded once."""

    def __init__(self, source: LazyTensor, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self.shape, self.by_matrix = source.shape, source.by_matrix

    def fill(self, place: Tensor, region: Region) -> None:
        place.copy_(self.source[region])


class Decoded(LazyTensor):
    """A matrix that is stored in parts, multiplied out a band of rows at a time."""

    multiple = 1  # rows of a band

    def __init__(
        self, name: str, parts: Mapping[str, LazyTensor], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.name, self.parts, self.shape, self.dtype = name, parts, tuple(shape), dtype

    def fill(self, place: Tensor, region: Region) -> None:
        rows, columns = region
        whole = columns == slice(0, self.shape[1]) and place.is_contiguous()
        num = max(1, _BAND // max(1, self.shape[1]) // self.multiple) * self.multiple
        start = rows.start
        while start < rows.stop:
            first = start // self.multiple * self.multiple  # where the parts can be cut
            stop = min(first + num, rows.stop)
            there = place[start - rows.start : stop - rows.start]
            if whole and first == start:
                self.decode(first, stop, there)
            else:
                band = torch.empty(stop - first, self.shape[1], dtype=self.dtype)
                self.decode(first, stop, band)
                there.copy_(band[start - first :, columns])
            start = stop

    @abstractmethod
    def decode(self, start: int, stop: int, place: Tensor) -> None:
        """Rows start (a multiple of `multiple`) to stop into a contiguous place."""


class Fp8(Decoded):
    """An FP8 matrix [out, in] with a scale for each block; parts "weight" and "weight_scale_inv"."""

    def __init__(
        self, name: str, parts: Mapping[str, LazyTensor], dtype: torch.dtype, block: tuple[int, int]
    ) -> None:
        super().__init__(name, parts, parts["weight"].shape, dtype)
        grid = [-(-size // side) for size, side in zip(self.shape, block, strict=True)]
        if list(parts["weight_scale_inv"].shape) != grid:
            raise CheckpointError(
                f"{name}: FP8 scale grid of a {list(self.shape)} weight must be {grid} for {block[0]}x{block[1]} blocks, "
                f"got {list(parts['weight_scale_inv'].shape)}."
            )
        self.block, self.multiple = block, block[0]

    def decode(self, start: int, stop: int, place: Tensor) -> None:
        scale = self.parts["weight_scale_inv"][start // self.block[0] : -(-stop // self.block[0])]
        fp8_block.decode(self.parts["weight"][start:stop], scale, self.dtype, self.block, place)


class Int4(Decoded):
    """An INT4 matrix [out, in] of compressed-tensors' `pack-quantized`; parts "weight_packed" and "weight_scale".

    `in_features` says how many codes of a row's last int32 count.
    """

    def __init__(
        self, name: str, parts: Mapping[str, LazyTensor], dtype: torch.dtype, in_features: int
    ) -> None:
        super().__init__(name, parts, (parts["weight_packed"].shape[0], in_features), dtype)
        scale = parts["weight_scale"].shape
        if len(scale) != 2 or scale[0] != self.shape[0] or not scale[1] or in_features % scale[1]:
            raise CheckpointError(
                f"{name}: INT4 weight_scale {list(scale)} does not divide a {list(self.shape)} weight into groups."
            )

    def decode(self, start: int, stop: int, place: Tensor) -> None:
        scale = self.parts["weight_scale"][start:stop]
        check_scale(self.name, scale)
        packed = self.parts["weight_packed"][start:stop]
        shape = torch.tensor([stop - start, self.shape[1]])
        int4_pack.decode(packed, scale, self.dtype, shape, place)


def check_scale(name: str, scale: Tensor) -> None:
    """Raises: CheckpointError: INT4 scales are not finite."""
    if not scale.isfinite().all():
        raise CheckpointError(
            f"{name}_scale is not finite in {int((~scale.isfinite()).sum())} of {scale.numel()} groups: the checkpoint is "
            "damaged; expected finite scales."
        )
