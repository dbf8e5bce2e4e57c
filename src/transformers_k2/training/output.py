"""An output folder that changes only when everything in it is finished.

A run writes into a hidden folder beside `output_dir`; when all is done the two are exchanged by renaming. Until then,
and if the run fails, whatever `output_dir` held is untouched. What it gives up: room for two results on the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import sync

MARKER = "recipe.yaml"  # what tells a run's folder from any other
KEPT = "metrics.jsonl"  # what makes the folder of a failed run worth keeping


def check_output(output_dir: str | Path, overwrite: bool) -> Path:
    """The resolved output folder, after checking that a run may replace it.

    Raises:
        ValueError: it is a file, is not empty and `overwrite` is false, or does not come from a run.
    """
    path = Path(output_dir).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir {path} is a file: expected a folder or a new name.")
    if path == Path.cwd() or path in Path.cwd().parents:
        raise ValueError(
            f"output_dir {path} holds the current folder: expected a folder of its own, such as runs/debug."
        )
    if not path.is_dir() or not any(path.iterdir()):
        return path
    if not overwrite:
        raise ValueError(
            f"output_dir {path} is not empty: choose another output_dir, or set overwrite=true to replace it."
        )
    if not (path / MARKER).is_file():
        raise ValueError(
            f"output_dir {path} is not empty and has no {MARKER}, so it is no earlier run: expected a folder that may "
            "be replaced; choose another output_dir."
        )
    return path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `path` when the block ends well.

    If the block fails, `path` keeps its content, and the unfinished folder stays if it holds metrics.

    Raises:
        ValueError: another process is writing the same output.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "old"))
    with _lock(path.with_name(f".{path.name}.lock"), path):
        if old.exists() and not path.exists():  # killed between the two renames
            os.rename(old, path)
        for leftover in (partial, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        try:
            yield partial
        except BaseException:
            if not (partial / KEPT).is_file():
                shutil.rmtree(partial)
            raise
        for file in partial.rglob("*"):
            sync(file)
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        sync(path.parent)
        if old.exists():
            shutil.rmtree(old)


@contextmanager
def _lock(lock: Path, path: Path) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output_dir {path} is being written by another run: wait for it, or choose another."
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
