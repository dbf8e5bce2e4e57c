"""Write a plan as a folder that torch.distributed.checkpoint loads: torch's own writer, fed one chunk at a time.

torch's planner decides what `.metadata` says and torch's writer what the files look like; ours name the chunks, rows of 64
MB at most, and make each from the plan's lazy tensors when its turn comes. torch holds on to every tensor until
its file is finished, so all chunks use the same memory, one after the other.

Given up: a run that was cut short begins anew (only one whose files were all written goes on); several processes; several
threads (torch loses the errors of all but the first); quantised weights; checksums in conversion.json.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    ChunkStorageMetadata,
    DefaultSavePlanner,
    FileSystemWriter,
    SavePlan,
    SavePlanner,
    save,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..lazy_tensors import DTYPES, Region
from . import staging
from .crew import is_finite
from .dcp import SUFFIX
from .engine import RECORD, Share, progress
from .staging import METADATA
from .tasks import File, Spec, Task

_CHUNK_BYTES = 64 << 20


def write_dcp(
    files: Sequence[File],
    destination: Path,
    *,
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    beside: Mapping[str, bytes | Path],
    record: Mapping[str, Any],
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Carry out a plan of unquantised tensors: `destination` becomes a DCP folder, or stays none.

    Args:
        files: planned ones; each becomes one of torch's.
        source, options, beside, record, overwrite, quiet: as of engine.write_files.

    Raises:
        ValueError: an unfinished run of another kind, another process at the same work, several processes, too little
            space, or what a task raises.
    """
    share = Share.of_environment()
    if share.num_ranks > 1:
        raise ValueError(
            f"{share.num_ranks} processes were started: expected one, which writes a DCP folder alone."
        )
    folder = destination / staging.STAGING
    run = json.loads(json.dumps({"source": source, "options": options}))
    staging.open_staging(folder, run, overwrite, 0)
    with staging.locked(folder, 0), staging.full_disk(destination):
        if not staging.is_complete(folder):
            with (
                staging.nothing_left_of_nothing(folder, ()),
                progress(sum(file.num_bytes for file in files), quiet) as advance,
            ):
                for path in (
                    *folder.glob(f"*{SUFFIX}"),
                    *folder.glob(f"{METADATA}*"),
                ):  # of a run that was killed
                    path.unlink()
                staging.check_space(folder, sum(file.num_bytes for file in files))
                _save(files, folder, advance)
            for path in (destination / METADATA, *destination.glob(f"*{SUFFIX}")):
                path.unlink(missing_ok=True)
        written = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
        content = json.dumps({**record, "crc32": {}}, indent=1) + "\n"
        staging.publish(folder, destination, [*written, METADATA], None, {**beside, RECORD: content.encode()})


def _save(files: Sequence[File], folder: Path, advance: Callable[[int], None]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save({}, storage_writer=_Writer(folder, files), planner=_Planner(files, advance), no_dist=True)
    except CheckpointException as error:
        cause = next(cause for cause, _ in error.failures.values())
        # torch.save stumbles over a write that failed, and reports where it fell.
        raise (cause.__context__ if isinstance(cause.__context__, OSError) else cause) from None


class _Planner(DefaultSavePlanner):
    """Names the chunks of the planned tensors, and makes one when the writer asks for it."""

    def __init__(self, files: Sequence[File], advance: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.files, self.advance = files, advance
        self.file_of = {spec.name: number for number, file in enumerate(files) for spec in file.specs}
        self.specs = {spec.name: spec for file in files for spec in file.specs}
        self.number, self.tasks = -1, {}
        chunks = (item.tensor_data for item in self._all() if item.tensor_data is not None)
        largest = max(
            (data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in chunks), default=0
        )
        self.buffer = memoryview(cast(Any, torch.empty(largest, dtype=torch.uint8).numpy()))

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(self._all()))
        return self.plan

    def _all(self) -> Iterator[WriteItem]:
        return (item for spec in self.specs.values() for item in _items(spec))

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name, written = write_item.index.fqn, write_item.tensor_data
        assert written is not None
        if (number := self.file_of[name]) != self.number:
            self.number = number
            self.tasks = {spec.name: task for task in self.files[number].tasks() for spec in task.outputs}
        region = tuple(
            slice(start, start + size)
            for start, size in zip(written.chunk.offsets, written.chunk.sizes, strict=True)
        )
        dtype = written.properties.dtype
        if num := written.chunk.sizes.numel():  # a storage of just that many bytes: torch copies longer ones
            place = torch.frombuffer(self.buffer, dtype=dtype, count=num).view(written.chunk.sizes)
        else:
            place = torch.empty(written.chunk.sizes, dtype=dtype)
        _fill(place, self.tasks[name], self.specs[name], region)
        self.advance(place.nbytes)
        return place


class _Writer(FileSystemWriter):
    """torch's, but with a file for each of the plan's, and neither paths nor random ids in the metadata."""

    def __init__(self, folder: Path, files: Sequence[File]) -> None:
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0)
        self.files = files

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            items.setdefault(item.index.fqn, []).append(item)
        results: list[WriteResult] = []
        for number, file in enumerate(self.files):
            part = replace(
                plan,
                items=[item for spec in file.specs for item in items[spec.name]],
                storage_data=replace(plan.storage_data, prefix=f"__0_{number}_"),
            )
            results += super().write_data(part, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _items(spec: Spec) -> Iterator[WriteItem]:
    """The chunks of a tensor."""
    dtype, size = DTYPES[spec.dtype], torch.Size(spec.shape)
    for region in _regions(spec.shape, dtype.itemsize):
        offsets = torch.Size([part.start for part in region])
        sizes = torch.Size([part.stop - part.start for part in region])
        data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=dtype), size)
        yield WriteItem(MetadataIndex(spec.name, offsets), WriteItemType.SHARD, tensor_data=data)


def _regions(shape: Sequence[int], itemsize: int) -> Iterator[Region]:
    """Parts of a tensor of at most 64 MB, runs of the first dimension that can be cut so fine."""
    if not shape:
        yield ()
        return
    row_bytes = prod(shape[1:]) * itemsize
    if row_bytes > _CHUNK_BYTES and len(shape) > 1:
        for row in range(shape[0]):
            for rest in _regions(shape[1:], itemsize):
                yield (slice(row, row + 1), *rest)
        return
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, max(1, shape[0]), step):
        yield (slice(start, min(start + step, shape[0])), *(slice(0, size) for size in shape[1:]))


def _fill(place: Tensor, task: Task, spec: Spec, region: Region) -> None:
    """Write a region of the tensor that a task makes."""
    assert task.encode is None, spec
    assert task.outputs == (spec,), (task.outputs, spec)
    if task.value.shape == spec.shape:
        task.value.fill(place, region)
    else:  # a copy, known as bytes; a region is a run of them
        first, step = 0, place.itemsize
        for part, size in zip(reversed(region), reversed(spec.shape), strict=True):
            first, step = first + part.start * step, step * size
        task.value.fill(place.view(-1).view(torch.uint8), (slice(first, first + place.nbytes),))
    if task.changed and not is_finite(place):
        first_row, last_row = (region[0].start, region[0].stop - 1) if region else (0, 0)
        raise ValueError(
            f"{task.about}, rows {first_row} to {last_row}: expected weights that are finite in {spec.dtype}."
        )
