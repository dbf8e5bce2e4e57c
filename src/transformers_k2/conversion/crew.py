"""Threads that make tensors a few megabytes at a time and write each piece to its place, several files at once.

torch and the file system release Python's lock, so threads share the work. While files grow they are flushed to the disk,
so that little is left to do at the end. The checksum of a tensor is the CRC-32 of its bytes, as zlib and `cksum -a crc32b`
compute it; pieces that several threads made are combined.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from ..files import put_in_place, temporary_name, write_text
from .crc32 import combine
from .tasks import File, Spec, Task, header

_UNIT = 1 << 21  # weights made at a time: 4 MB of bfloat16, and a few times that in copies
_COPIED = 8 << 20  # bytes copied at a time
_MAX_OPEN = 4  # files, those being flushed among them
_FLUSHED = 256 << 20  # bytes of a file after which the disk is asked to take them
_POLL = 0.2  # seconds between looks for errors

# A piece of work, with memory of the thread; the number of bytes it wrote.
Unit = Callable[[threading.local], int]


def write_at(descriptor: int, data: Any, position: int) -> None:
    """All of `data` (bytes, or a contiguous tensor's) at a position of a file."""
    view = memoryview(data).cast("B")
    while view:
        num = os.pwrite(descriptor, view, position)
        view, position = view[num:], position + num


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's elements in order as a buffer, without a copy if it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def sums_name(name: str) -> str:
    """The file beside a finished one that has its checksums."""
    return f"{name}.crc32.json"


class Writing:
    """A file that is being written by several threads."""

    def __init__(self, path: Path, file: File) -> None:
        self.path, self.file = path, file
        self.start, self.positions = header(file.specs, {"format": "pt"})
        self.sums: dict[str, list[tuple[int, int, int]]] = {spec.name: [] for spec in file.specs}
        self.lock, self.turn = threading.Lock(), threading.Lock()
        self.num_left, self.all_known, self.num_unflushed = 0, False, 0
        self.temporary = temporary_name(path)
        self.descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_at(self.descriptor, self.start, 0)
            os.ftruncate(self.descriptor, len(self.start) + file.num_bytes)
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, data: Any, offset: int) -> int:
        """Bytes of a tensor from `offset` on; their number."""
        num_bytes = memoryview(data).nbytes
        entry = offset, num_bytes, zlib.crc32(data)
        with self.turn:  # the file system would let them in one by one, too, but spinning
            write_at(self.descriptor, data, self.positions[name] + offset)
        with self.lock:
            self.sums[name].append(entry)
        return num_bytes

    def due(self, num_bytes: int) -> bool:
        """Whether so much was written that the disk should have it soon, and not all at the end."""
        with self.lock:
            self.num_unflushed += num_bytes
            if self.num_unflushed < _FLUSHED:
                return False
            self.num_unflushed = 0
            return True

    def finish(self) -> None:
        """Flush it and give it its name, its checksums before it."""
        self._close()
        sums = {}
        for spec in self.file.specs:
            crc, end = 0, 0
            for offset, num_bytes, part in sorted(self.sums[spec.name]):
                assert offset == end, (spec, offset, end)
                crc, end = combine(crc, part, num_bytes), end + num_bytes
            assert end == spec.num_bytes, (spec, end)
            sums[spec.name] = f"{crc:08x}"
        write_text(self.path.parent / sums_name(self.file.name), json.dumps(sums))
        put_in_place(self.temporary, self.path)

    def discard(self) -> None:
        """Remove what was written."""
        self._close()
        self.temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        """Once: the number may be another file's afterwards."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Crew:
    """Threads that carry out units of work, and one that flushes files to the disk meanwhile.

    A context manager: at its end all files are in place, or, after an error, those that were not finished are removed.
    """

    def __init__(
        self, num_threads: int, advance: Callable[[int], None], finished: Callable[[str], None] | None
    ) -> None:
        self.workers, self.flusher = ThreadPoolExecutor(num_threads), ThreadPoolExecutor(1)
        self.advance, self.finished = advance, finished
        self.waiting = threading.BoundedSemaphore(2 * num_threads)
        self.failed, self.scratch = threading.Event(), threading.local()
        self.opened: list[Writing] = []
        self.running: set[Future[None]] = set()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            while kind is None and self.running:
                wait(list(self.running), return_when=FIRST_EXCEPTION)
                self._raise_errors()
        except BaseException:
            self.failed.set()
            raise
        finally:
            if kind is not None:
                self.failed.set()
            # An error or an interrupt waits for what runs, not for the rest.
            self.workers.shutdown(cancel_futures=True)
            self.flusher.shutdown(cancel_futures=True)
            for writing in self.opened:
                writing.discard()

    def open(self, path: Path, file: File) -> Writing:
        """Begin a file; waits while several are still being flushed."""
        while len(self.opened) >= _MAX_OPEN:
            wait(list(self.running), timeout=_POLL, return_when=FIRST_EXCEPTION)
            self._raise_errors()
        writing = Writing(path, file)
        self.opened.append(writing)
        return writing

    def submit(self, unit: Unit, writing: Writing) -> None:
        """Hand out a unit of work; waits while many are."""
        self.waiting.acquire()
        if self.failed.is_set():
            self._raise_errors()
        self._count(writing, 1)
        self.running.add(self.workers.submit(self._work, unit, writing))

    def complete(self, writing: Writing) -> None:
        """All units of a file were handed out."""
        self._count(writing, 0, all_known=True)
        self._raise_errors()

    def _work(self, unit: Unit, writing: Writing) -> None:
        try:
            if not self.failed.is_set():
                num_bytes = unit(self.scratch)
                self.advance(num_bytes)
                if writing.due(num_bytes):
                    self.running.add(self.flusher.submit(os.fsync, writing.descriptor))
        except BaseException:
            self.failed.set()
            raise
        finally:
            self.waiting.release()
        self._count(writing, -1)

    def _count(self, writing: Writing, change: int, all_known: bool = False) -> None:
        with writing.lock:
            writing.num_left += change
            writing.all_known |= all_known
            complete = writing.all_known and not writing.num_left
        if complete and not self.failed.is_set():
            self.running.add(self.flusher.submit(self._finish, writing))

    def _finish(self, writing: Writing) -> None:
        writing.finish()
        self.opened.remove(writing)
        if self.finished is not None:
            self.finished(writing.file.name)

    def _raise_errors(self) -> None:
        for future in [one for one in list(self.running) if one.done()]:
            self.running.discard(future)
            future.result()


def units(task: Task, writing: Writing) -> Iterator[Unit]:
    """The pieces of work of a task; each returns the number of bytes it wrote."""
    fixed = task.fixed or {}
    made = [spec for spec in task.outputs if spec.name not in fixed]
    if fixed:
        yield lambda scratch: sum(writing.write(name, data, 0) for name, data in fixed.items())
    for region, first in _regions(task):
        yield lambda scratch, region=region, first=first: _make(task, made, region, first, writing, scratch)


def _regions(task: Task) -> Iterator[tuple[tuple[slice, ...], tuple[int, int, int]]]:
    """Regions of a task's value, and (number of the first matrix, its first row, last row) of each."""
    shape, dtype = task.value.shape, task.value.dtype
    if not shape or not prod(shape):
        yield tuple(slice(0, size) for size in shape), (0, 0, 0)
        return
    if len(shape) == 1:
        step = (_COPIED if not task.changed else 2 * _UNIT) // dtype.itemsize
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            yield (slice(start, stop),), (0, start, stop)
        return
    num_rows, num_columns = shape[-2:]
    step = max(1, _UNIT // num_columns)
    step = -(-step // task.multiple) * task.multiple
    if task.value.by_matrix or step > num_rows:
        step = num_rows
    for matrix in range(prod(shape[:-2])):
        lead, rest = [], matrix
        for size in reversed(shape[:-2]):
            rest, number = divmod(rest, size)
            lead.insert(0, slice(number, number + 1))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            yield (*lead, slice(start, stop), slice(0, num_columns)), (matrix, start, stop)


def _make(
    task: Task,
    made: Sequence[Spec],
    region: tuple[slice, ...],
    first: tuple[int, int, int],
    writing: Writing,
    scratch: threading.local,
) -> int:
    matrix, start, stop = first
    place = _place(scratch, [part.stop - part.start for part in region], task.value.dtype)
    try:
        task.value.fill(place, region)
        rows = task.encode(place.view(place.shape[-2:])) if task.encode else (place,)
        if task.changed and task.encode is None and not is_finite(place):
            raise ValueError(f"expected weights that are finite in {made[0].dtype}.")
    except CheckpointError:  # it names the file
        raise
    except ValueError as error:
        if not task.about:
            raise
        raise ValueError(f"{task.about}, rows {start} to {max(start, stop - 1)}: {error}") from None
    written = 0
    for spec, data in zip(made, rows, strict=True):
        written += writing.write(spec.name, tensor_bytes(data), _offset(task, spec, matrix, start))
    return written


def is_finite(values: Tensor) -> bool:
    """Ten times as fast as torch.isfinite on bfloat16: NaN passes through the extremes."""
    lowest, highest = torch.aminmax(values) if values.numel() else (values.new_zeros(()),) * 2
    return bool(lowest.isfinite() & highest.isfinite())


def _offset(task: Task, spec: Spec, matrix: int, start: int) -> int:
    """Where, in an output, the rows from `start` on of one matrix of the task's value begin."""
    shape, itemsize = task.value.shape, task.value.dtype.itemsize
    if len(shape) < 2:
        return start * itemsize
    if task.encode is None:
        return (matrix * shape[-2] + start) * shape[-1] * itemsize
    num_rows = spec.shape[-2]
    first = start if num_rows == shape[-2] else start // task.multiple
    return (matrix * num_rows + first) * (spec.num_bytes // prod(spec.shape[:-1]))


def _place(scratch: threading.local, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of this thread, used again and again: fresh pages cost as much as the work."""
    num_bytes = prod(shape) * dtype.itemsize
    buffer = getattr(scratch, "buffer", None)
    if buffer is None or len(buffer) < num_bytes:
        scratch.buffer = buffer = torch.empty(max(num_bytes, _COPIED), dtype=torch.uint8)
    return buffer[:num_bytes].view(dtype).view(shape)
