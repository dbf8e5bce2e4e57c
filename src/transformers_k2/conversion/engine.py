"""Write files of tensors of any size in little memory: planned whole, then streamed, and resumed if it is cut short.

Each file has a temporary name until it is on the disk; a run that was killed goes on with the first file that is missing, if
source and options are still the same (staging.py). What is written is in tasks.py, how threads write it in crew.py.

Many machines: each process of `accelerate launch` writes every n-th file, and the first of them publishes when all are
there. They speak through the file system alone.

Given up: a file that was begun is begun anew; its tensors are not resumed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import staging
from .crew import Crew, Unit, Writing, sums_name, units
from .tasks import File

RECORD = "conversion.json"  # what a conversion leaves beside its weights: where they came from, and their checksums
MEMORY = 512 << 20
_THREAD_BYTES = 64 << 20  # what a thread may need
_MAX_THREADS = 16
_POLL = 0.2  # seconds between looks for what other processes write


class Share(NamedTuple):
    """Which of the processes that write one checkpoint this is."""

    rank: int = 0
    num_ranks: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """As `accelerate launch` and torchrun say it; a process of its own where they did not start it."""
        rank, num_ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and num_ranks.isdecimal() and int(rank) < int(num_ranks)):
            raise ValueError(
                f"RANK is {rank!r} and WORLD_SIZE {num_ranks!r}: expected a number below the second, or neither."
            )
        return cls(int(rank), int(num_ranks))


def write_files(
    files: Sequence[File],
    destination: Path,
    *,
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    beside: Mapping[str, bytes | Path],
    record: Mapping[str, Any],
    index: bool = True,
    memory: int = MEMORY,
    overwrite: bool = False,
    quiet: bool = False,
    finished: Callable[[str], None] | None = None,
) -> int:
    """Carry out a plan: `destination` becomes a checkpoint, or stays none.

    Args:
        source: what tells whether the source is still the same (staging.fingerprint); if not, no run is resumed.
        options: what the plan depends on besides, as JSON types; an unfinished run must have had the same.
        beside: name -> content or path of what stands beside the weights, config.json among them.
        record: what conversion.json says beside the checksums.
        index: write one where there are several files.
        memory: bytes that reading and computing may take beside Python itself.
        finished: called with a file's name when it is on the disk.

    Returns:
        How many files an earlier run had written.

    Raises:
        ValueError: an unfinished run of another kind, another process at the same work, too little space, or what a task
            raises.
    """
    share = Share.of_environment()
    folder = destination / staging.STAGING
    run = json.loads(json.dumps({"source": source, "options": options}))
    staging.open_staging(folder, run, overwrite, share.rank)
    num_resumed = 0
    with staging.locked(folder, share.rank), staging.full_disk(destination):
        if not staging.is_complete(folder):
            left = [file for file in files if not (folder / file.name).exists()]
            num_resumed = len(files) - len(left)
            own = [file for file in files[share.rank :: share.num_ranks] if file in left]
            for file in own:  # of a run that was killed
                for path in folder.glob(f".{file.name}.*"):
                    path.unlink()
            names = [file.name for file in files]
            with (
                staging.nothing_left_of_nothing(folder, names, share.num_ranks),
                one_thread_each(),
                progress(sum(file.num_bytes for file in own), quiet) as advance,
            ):
                staging.check_space(folder, sum(file.num_bytes for file in left))
                _write(own, folder, memory, advance, finished)
        if share.rank == 0:
            _wait_for_others(folder, files)
            sums = {file.name: json.loads((folder / sums_name(file.name)).read_text()) for file in files}
            content = json.dumps({**record, "crc32": sums}, indent=1) + "\n"
            text = _index(files) if index and len(files) > 1 else None
            staging.publish(
                folder, destination, [file.name for file in files], text, {**beside, RECORD: content.encode()}
            )
    return num_resumed


def _write(
    files: Sequence[File],
    folder: Path,
    memory: int,
    advance: Callable[[int], None],
    finished: Callable[[str], None] | None,
) -> None:
    num_threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) + 1, memory // _THREAD_BYTES))
    # Two files at a time, because the file system lets one thread at a time write to one; but where each is waited for
    # (its source is deleted then), one.
    num_files = 1 if finished is not None else 2
    with Crew(num_threads, advance, finished) as crew:
        left = iter(files)
        begun: list[tuple[Writing, Iterator[Unit]]] = []
        while True:
            while len(begun) < num_files and (file := next(left, None)) is not None:
                writing = crew.open(folder / file.name, file)
                begun.append((writing, (unit for task in file.tasks() for unit in units(task, writing))))
            if not begun:
                return
            for entry in list(begun):
                writing, pieces = entry
                if (unit := next(pieces, None)) is not None:
                    crew.submit(unit, writing)
                else:
                    crew.complete(writing)
                    begun.remove(entry)


def _wait_for_others(folder: Path, files: Sequence[File]) -> None:
    """Until all files are there."""
    while not staging.is_complete(folder) and any(not (folder / file.name).exists() for file in files):
        time.sleep(_POLL)


def _index(files: Sequence[File]) -> str:
    """The text of the index."""
    weight_map = {spec.name: file.name for file in files for spec in file.specs}
    index = {
        "metadata": {"total_size": sum(file.num_bytes for file in files)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(index, indent=2) + "\n"


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Operations of torch stay on the thread that calls them: the units of work are what runs side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, bytes per second and the time left, on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        running = bar.add_task("", total=total)
        yield lambda num_bytes: bar.advance(running, num_bytes)
