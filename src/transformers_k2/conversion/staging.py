"""Where an unfinished checkpoint lives, and how it becomes a finished one.

Shards are collected in a hidden folder inside the destination, beside a record of the source and the options. A later run
with the same record goes on with them; with another, it is refused. When all are there they are moved into place, and what
makes a folder a checkpoint comes last.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import INDEX_SUFFIX, CheckpointError
from ..files import replacing, sync, write_text

INDEX = f"model{INDEX_SUFFIX}"
SINGLE = "model.safetensors"
METADATA = ".metadata"  # of torch.distributed.checkpoint
STAGING = ".unfinished"
_RUN, _PUBLISHING, _OLD_REMOVED, _LOCK = "run.json", "publishing", "old_removed", "lock"
_PATIENCE = 600  # seconds that a process waits for the first


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuse a destination that would endanger the source or weights that are there.

    Raises:
        ValueError: the destination is the source, inside it or around it, a file, or holds weights without `overwrite`.
    """
    here, there = source.resolve(), destination.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"The destination {destination} and the source {source} overlap: expected a folder of its own."
        )
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"The destination {destination} is a file: expected a folder, or a new name.")
    if not (destination / STAGING / _PUBLISHING).exists():
        _check_no_weights(destination, overwrite)


def _check_no_weights(destination: Path, overwrite: bool) -> None:
    if not overwrite and _holds_weights(destination):
        raise ValueError(
            f"{destination} holds weights already: expected another folder, or overwrite (--overwrite)."
        )


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (INDEX, METADATA)) or any(folder.glob("*.safetensors"))


def open_staging(staging: Path, run: dict[str, Any], overwrite: bool, rank: int) -> None:
    """The folder of unfinished shards, new or of an earlier run of the same source and options.

    The first of several processes makes it; the others wait for that.

    Raises:
        ValueError: a run of another source or with other options, or one that is still at work; weights that came to the
            destination meanwhile; or the first process did not come.
    """
    record = staging / _RUN
    if rank:
        limit = time.monotonic() + _PATIENCE
        while not record.exists() or json.loads(record.read_text(encoding="utf-8")) != run:
            if time.monotonic() > limit:
                raise ValueError(
                    f"{staging} was not opened by process 0 within {_PATIENCE} seconds: expected all processes to be "
                    "started with the same arguments on a file system that they share."
                )
            time.sleep(0.1)
        return
    if not staging.exists():
        _check_no_weights(staging.parent, overwrite)  # of another process, that finished meanwhile
    with full_disk(staging.parent):
        staging.mkdir(parents=True, exist_ok=True)
        with locked(staging, rank):  # of two that come at once, one decides
            _claim(staging, run, overwrite)


def _claim(staging: Path, run: dict[str, Any], overwrite: bool) -> None:
    """Go on with what is there, or drop it and begin anew."""
    if not is_complete(staging):
        _check_no_weights(staging.parent, overwrite)
    record, own = staging / _RUN, f"{_LOCK}.0"
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before == run:
            return
        if not overwrite:
            told = [f"{one['options']} of {one['source']['folder']}" for one in (before, run)]
            changed = " (whose files have changed since)" if told[0] == told[1] else ""
            raise ValueError(
                f"{staging.parent} holds an unfinished run with {told[0]}{changed}, but this one has {told[1]}: repeat "
                f"that one to finish it, or overwrite (--overwrite) to drop it."
            )
    with ExitStack() as others:
        for lock in staging.glob(f"{_LOCK}.*"):
            if lock.name != own:  # what is dropped is nobody's work
                others.enter_context(locked(staging, int(lock.suffix[1:])))
        for path in [one for one in staging.iterdir() if one.name != own]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_text(record, json.dumps(run))


@contextmanager
def locked(staging: Path, rank: int) -> Iterator[None]:
    """No second process does the same work.

    Raises:
        ValueError: one does.
    """
    path = staging / f"{_LOCK}.{rank}"
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.stat().st_ino == os.fstat(file.fileno()).st_ino  # not of a folder that was removed
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
                raise
            ours = False
        if not ours:
            raise ValueError(
                f"{staging.parent} is being written by another process: expected to be the only one."
            )
        yield


def is_complete(staging: Path) -> bool:
    """Whether all shards were finished, and the run was interrupted while they were moved."""
    return (staging / _PUBLISHING).exists()


def fingerprint(folder: Path, files: Iterable[Path]) -> dict[str, Any]:
    """What tells whether the source is still the same: its config.json counts as its weights do."""
    paths = [*sorted(files), *folder.glob("config.json")]
    sizes = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return {"folder": str(folder.resolve()), "files": sizes}


def check_finished(folder: Path) -> None:
    """Raises: CheckpointError: a conversion into this folder was cut short."""
    staging = folder / STAGING
    if staging.exists() and (is_complete(staging) or not _holds_weights(folder)):
        raise CheckpointError(
            f"{folder} holds an unfinished conversion: expected a checkpoint; repeat its command to finish it."
        )


def check_space(folder: Path, needed: int) -> None:
    """Raises: ValueError: the disk cannot hold what is to be written."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder.parent} has {free:,} bytes free: expected {needed:,} for what is to be written."
        )


@contextmanager
def nothing_left_of_nothing(staging: Path, shards: Iterable[str], num_processes: int = 1) -> Iterator[None]:
    """A run that fails before its first shard is finished leaves no folder: there is nothing to go on with."""
    try:
        yield
    except BaseException:
        if num_processes == 1 and not any((staging / name).exists() for name in shards):
            shutil.rmtree(staging)
            if not any(staging.parent.iterdir()):
                staging.parent.rmdir()
        raise


@contextmanager
def full_disk(destination: Path) -> Iterator[None]:
    """Say what to do when the disk is full, or fails."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"{destination} cannot be finished ({error}): mend that and repeat the command."
            ) from error
        raise ValueError(
            f"{destination} is full ({error.strerror}): free some space and repeat the command."
        ) from error


def publish(
    staging: Path,
    destination: Path,
    shards: Sequence[str],
    index: str | None,
    files: Mapping[str, bytes | Path],
) -> None:
    """Move the finished shards into place, last what makes them a checkpoint: the index, or the only shard.

    Whoever looks meanwhile finds no index; after a crash it is repeated.
    """
    (staging / _PUBLISHING).touch()
    sync(staging)
    if not (staging / _OLD_REMOVED).exists():
        (destination / INDEX).unlink(missing_ok=True)  # from here on the old checkpoint is none
        for path in destination.glob("model*.safetensors"):
            path.unlink()
        (staging / _OLD_REMOVED).touch()
        sync(staging)
    for name in (*files, INDEX):  # what a run that was killed here had half-written
        for path in destination.glob(f".{glob.escape(name)}.*.tmp"):
            path.unlink()
    for name, content in files.items():
        with replacing(destination / name) as temporary:
            if isinstance(content, Path):
                shutil.copyfile(content, temporary)
            else:
                temporary.write_bytes(content)
    for name in shards:
        if (staging / name).exists():
            os.replace(staging / name, destination / name)
    sync(destination)
    if index is not None:
        write_text(destination / INDEX, index)
    (staging / _PUBLISHING).unlink()  # complete: what is left of the folder means nothing
    shutil.rmtree(staging, ignore_errors=True)  # another process may be looking for its lock there
