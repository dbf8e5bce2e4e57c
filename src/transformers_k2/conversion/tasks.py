"""What will be written: files of tensors, known by name, dtype and shape, and the tasks that make them.

Every header can be made before the first number is known, so each tensor has its place from the start. Tasks are made when
their file's turn comes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoint import DTYPE_BITS, TensorInfo
from ..lazy_tensors import LazyTensor, OpenFiles, Stored
from .staging import SINGLE

SHARD_BYTES = 5 * 10**9


class Spec(NamedTuple):
    """A tensor that will be written; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Task:
    """Tensors that are made together, from one lazy tensor.

    Attributes:
        outputs: what is written.
        value: what is read; without `encode`, the only output.
        encode: rows of a matrix of `value` -> the same share of rows of each output that is not in `fixed`, in order.
        multiple: of rows, that `encode` must get at once.
        fixed: name -> bytes of outputs that are known already.
        changed: the output is computed, and must be finite.
        about: what the numbers are, for messages.
    """

    outputs: tuple[Spec, ...]
    value: LazyTensor
    encode: Callable[[Tensor], Sequence[Tensor]] | None = None
    multiple: int = 1
    fixed: Mapping[str, bytes] | None = None
    changed: bool = False
    about: str = ""


def copied(info: TensorInfo, files: OpenFiles, name: str | None = None) -> Task:
    """The task that writes a tensor of a file as it is, whatever its type."""
    flat = info._replace(dtype="U8", shape=(info.end - info.start,))
    return Task((Spec(name or info.name, info.dtype, info.shape),), Stored(flat, files))


class Entry(NamedTuple):
    """Tensors that are written to one file, and the tasks that make them when their turn comes."""

    specs: tuple[Spec, ...]
    tasks: Callable[[], Iterable[Task]]


@dataclass(frozen=True)
class File:
    """A file that will be written: its tensors, and the tasks that make them when their turn comes."""

    name: str
    specs: tuple[Spec, ...]
    tasks: Callable[[], Iterable[Task]]

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(spec.num_bytes for spec in self.specs)


def in_shards(entries: Iterable[Entry], shard_bytes: int = SHARD_BYTES) -> list[File]:
    """Files of at most `shard_bytes`, unless a single task has more, as the hub numbers them.

    Args:
        entries: what is written to the same file.
    """
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes is {shard_bytes}: expected a positive number of bytes, as 5000000000.")
    parts: list[list[Entry]] = []
    size = 0
    for entry in entries:
        num_bytes = sum(spec.num_bytes for spec in entry.specs)
        if not parts or size + num_bytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += num_bytes
    width = max(5, len(str(len(parts))))
    return [
        one_file(
            SINGLE if len(parts) == 1 else f"model-{number:0{width}d}-of-{len(parts):0{width}d}.safetensors",
            part,
        )
        for number, part in enumerate(parts, start=1)
    ]


def one_file(name: str, entries: Sequence[Entry]) -> File:
    """A file with all of these."""
    specs = tuple(spec for entry in entries for spec in entry.specs)
    return File(name, specs, lambda: (task for entry in entries for task in entry.tasks()))


def header(specs: Iterable[Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header with its length before it, and each tensor's position in the file."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    positions, position = {}, 0
    # Wide types first, as the safetensors library does: every tensor starts at a multiple of its element's size.
    for spec in sorted(specs, key=lambda spec: -DTYPE_BITS[spec.dtype]):
        assert spec.name not in entries, spec.name
        end = position + spec.num_bytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        positions[spec.name], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + at for name, at in positions.items()}
