"""Write a checkpoint of any size in little memory: planned whole, then streamed, and resumed if it is cut short.

A plan is a list of tasks whose tensors are known by name, dtype and shape before a byte is written. Each shard has a
temporary name until it is on the disk; a run that was killed goes on with the first shard that is missing, if source and
options are still the same (see staging.py).

Threads share the tasks of a shard, each with one band of rows at a time: torch and the file system release Python's lock.
Reads and writes carry their positions (no file is mapped), so a source that shrinks is an error and no crash.

Given up: two processes writing one destination are not told of each other, and bands of a tensor are not resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import DTYPE_BITS, Checkpoint, TensorInfo
from ..files import replacing
from .staging import (
    SINGLE,
    STAGING,
    check_destination,
    check_space,
    fingerprint,
    full_disk,
    is_complete,
    nothing_left_of_nothing,
    open_staging,
    publish,
)

SHARD_BYTES = 5 * 10**9
_CHUNK = 8 << 20  # bytes copied at a time
_MAX_THREADS = 8


class Spec(NamedTuple):
    """A tensor that will be written; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Task:
    """Tensors that are made together.

    Attributes:
        outputs: what is written.
        source: the tensor whose bytes are the only output, unchanged; or None.
        convert: (start, stop) -> rows start to stop of each output that is not in `fixed`.
        num_rows: of the outputs that `convert` makes.
        band_rows: rows converted at a time.
        fixed: name -> bytes of outputs that are known already.
    """

    outputs: tuple[Spec, ...]
    source: TensorInfo | None = None
    convert: Callable[[int, int], Sequence[Tensor]] | None = None
    num_rows: int = 0
    band_rows: int = 1
    fixed: Mapping[str, bytes] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.outputs)


def copy(info: TensorInfo, name: str | None = None) -> Task:
    """The task that writes a tensor as it is."""
    return Task((Spec(name or info.name, info.dtype, info.shape),), source=info)


class Source:
    """Bytes of a checkpoint's tensors by position; a context manager that closes its files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files = {path: os.open(path, os.O_RDONLY) for path in checkpoint.shards}

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: Any) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, info: TensorInfo, start: int, stop: int) -> bytearray:
        """Bytes start to stop of a tensor.

        Raises:
            ValueError: the file has become shorter than its header promised.
        """
        buffer = bytearray(stop - start)
        view, position = memoryview(buffer), info.start + start
        while view:
            num = os.preadv(self._files[info.shard], [view], position)
            if num == 0:
                raise ValueError(f"{info.shard} ends inside {info.name}: it was cut short while it was read.")
            view, position = view[num:], position + num
        return buffer


class Summary(NamedTuple):
    """What a run writes, or would write."""

    num_tensors: int
    num_bytes: int
    num_changed: int  # tensors that are no copies
    num_shards: int
    num_resumed: int  # shards that an earlier run had finished

    def text(self, destination: Path, dry_run: bool) -> str:
        """One line for people."""
        resumed = f" ({self.num_resumed} by an earlier run)" if self.num_resumed else ""
        return (
            f"{destination}{' would hold' if dry_run else ':'} {self.num_tensors:,} tensors, {self.num_changed:,} of them "
            f"converted, {self.num_bytes:,} bytes in {self.num_shards:,} files{resumed}"
        )


def write_checkpoint(
    tasks: Sequence[Task],
    source: Source,
    destination: Path,
    *,
    options: Mapping[str, Any],
    files: Mapping[str, bytes | Path],
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Carry out a plan: `destination` becomes a checkpoint, or stays none.

    Args:
        options: what the plan depends on besides the source, as JSON types; an unfinished run must have had the same.
        files: name -> content or path of what stands beside the weights, config.json among them.
        shard_bytes: that a shard may have, unless a single task has more.
        quiet: no progress bar; there is none either when stderr is no terminal.

    Raises:
        ValueError: an overlap with the source, an unfinished run of another kind, too little space, or what a task raises.
    """
    check_destination(source.checkpoint.folder, destination, overwrite)
    shards = _shards(tasks, shard_bytes)
    summary = _summary(tasks, len(shards), 0)
    staging = destination / STAGING
    run = {"source": fingerprint(source.checkpoint), "options": {**options, "shard_bytes": shard_bytes}}
    open_staging(staging, json.loads(json.dumps(run)), overwrite)
    if not is_complete(staging):
        left = {name: part for name, part in shards.items() if not (staging / name).exists()}
        summary = summary._replace(num_resumed=len(shards) - len(left))
        with nothing_left_of_nothing(staging, shards), _one_thread_each(), _progress(left, quiet) as advance:
            check_space(staging, sum(task.num_bytes for part in left.values() for task in part))
            for name, part in left.items():
                with full_disk(destination), replacing(staging / name) as temporary:
                    _write_shard(temporary, part, source, advance)
    with full_disk(destination):
        publish(staging, destination, list(shards), _index(shards), files)
    return summary


def plan_summary(tasks: Sequence[Task], shard_bytes: int = SHARD_BYTES) -> Summary:
    """What `write_checkpoint` would write."""
    return _summary(tasks, len(_shards(tasks, shard_bytes)), 0)


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


def write_at(descriptor: int, data: Any, position: int) -> None:
    """All of `data` (bytes, or a contiguous tensor's) at a position of a file."""
    view = memoryview(data).cast("B")
    while view:
        num = os.pwrite(descriptor, view, position)
        view, position = view[num:], position + num


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's elements in order as a buffer, without a copy if it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _shards(tasks: Sequence[Task], shard_bytes: int) -> dict[str, list[Task]]:
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes is {shard_bytes}: expected a positive number of bytes, as 5000000000.")
    parts: list[list[Task]] = []
    size = 0
    for task in tasks:
        if not parts or size + task.num_bytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(task)
        size += task.num_bytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    width = max(5, len(str(len(parts))))
    return {
        f"model-{number:0{width}d}-of-{len(parts):0{width}d}.safetensors": part
        for number, part in enumerate(parts, start=1)
    }


def _index(shards: Mapping[str, Sequence[Task]]) -> str | None:
    """The text of the index; a single shard needs none."""
    if len(shards) == 1:
        return None
    weight_map = {spec.name: name for name, part in shards.items() for task in part for spec in task.outputs}
    total = sum(task.num_bytes for part in shards.values() for task in part)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _summary(tasks: Sequence[Task], num_shards: int, num_resumed: int) -> Summary:
    num_changed = sum(len(task.outputs) for task in tasks if task.source is None)
    num_tensors = sum(len(task.outputs) for task in tasks)
    return Summary(num_tensors, sum(task.num_bytes for task in tasks), num_changed, num_shards, num_resumed)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Operations of torch stay on the thread that calls them: the tasks are what runs side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_shard(path: Path, tasks: Sequence[Task], source: Source, advance: Callable[[int], None]) -> None:
    start, positions = header((spec for task in tasks for spec in task.outputs), {"format": "pt"})
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_at(descriptor, start, 0)
        os.ftruncate(descriptor, len(start) + sum(task.num_bytes for task in tasks))
        pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))
        try:
            running = [
                pool.submit(_carry_out, task, source, descriptor, positions, advance) for task in tasks
            ]
            for future in wait(running, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:  # an error or an interrupt waits for the tasks that run, not for the rest of the shard
            pool.shutdown(cancel_futures=True)
    finally:
        os.close(descriptor)


def _carry_out(
    task: Task, source: Source, descriptor: int, positions: Mapping[str, int], advance: Callable[[int], None]
) -> None:
    if (info := task.source) is not None:
        position, num_bytes = positions[task.outputs[0].name], info.end - info.start
        for start in range(0, num_bytes, _CHUNK):
            stop = min(start + _CHUNK, num_bytes)
            write_at(descriptor, source.read(info, start, stop), position + start)
            advance(stop - start)
        return
    fixed = task.fixed or {}
    for name, data in fixed.items():
        write_at(descriptor, data, positions[name])
        advance(len(data))
    banded = [spec for spec in task.outputs if spec.name not in fixed]
    assert task.convert is not None
    for start in range(0, task.num_rows, task.band_rows):
        stop = min(start + task.band_rows, task.num_rows)
        for spec, rows in zip(banded, task.convert(start, stop), strict=True):
            data, row_bytes = tensor_bytes(rows), spec.num_bytes // task.num_rows
            assert len(data) == row_bytes * (stop - start), spec
            write_at(descriptor, data, positions[spec.name] + start * row_bytes)
            advance(len(data))


@contextmanager
def _progress(shards: Mapping[str, Sequence[Task]], quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, bytes per second and the time left, on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        total = sum(task.num_bytes for part in shards.values() for task in part)
        running = bar.add_task("", total=total)
        yield lambda num_bytes: bar.advance(running, num_bytes)
