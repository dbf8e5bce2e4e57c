"""An output folder that changes only when everything in it is finished, and an unfinished one that a run can continue.

A run writes into `<output_dir>.unfinished`; when all is done the two are exchanged by renaming. Until then, and if the
run fails, whatever `output_dir` held is untouched. What it gives up: room for two results on the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import sync, write_text
from . import machine

MARKER = "recipe.yaml"  # what tells a run's folder from any other
CHECKPOINTS = "checkpoints"
KEPT = ("metrics.jsonl", CHECKPOINTS)  # what makes the folder of a failed run worth keeping
UNFINISHED = ".unfinished"


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
def staged(path: Path, recipe: str, resume: bool, differences: Callable[[str], list[str]]) -> Iterator[Path]:
    """The unfinished folder of a run, which takes the place of `path` when the block ends well.

    Collective: rank 0 does the work. If the block fails, `path` keeps its content, and the unfinished folder stays if it
    holds metrics or checkpoints.

    Args:
        recipe: its text, kept in the folder from the start.
        resume: continue an unfinished run; else its folder is emptied.
        differences: what tells another run's recipe text from this one; none: the same run.

    Raises:
        ValueError: another process is writing the same output, or the unfinished run there has another recipe.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    if machine.rank() != 0:
        _agree(None)
        yield unfinished
        machine.barrier()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".{path.name}.old")
    with _lock(path.with_name(f".{path.name}.lock"), path):
        try:
            _open(path, unfinished, old, recipe, resume, differences)
        except ValueError as error:
            _agree(str(error))
            raise
        _agree(None)
        try:
            yield unfinished
        except BaseException:
            if not any((unfinished / name).exists() for name in KEPT):
                shutil.rmtree(unfinished)
            raise
        for file in unfinished.rglob("*"):
            sync(file)
        if path.exists():
            os.rename(path, old)
        os.rename(unfinished, path)
        sync(path.parent)
        if old.exists():
            shutil.rmtree(old)
        machine.barrier()


def _open(
    path: Path,
    unfinished: Path,
    old: Path,
    recipe: str,
    resume: bool,
    differences: Callable[[str], list[str]],
) -> None:
    if old.exists() and not path.exists():  # killed between the two renames
        os.rename(old, path)
    if old.exists():
        shutil.rmtree(old)
    marker = unfinished / MARKER
    if unfinished.exists() and not (resume and marker.is_file()):
        shutil.rmtree(unfinished)
    if marker.is_file() and (changed := differences(marker.read_text(encoding="utf-8"))):
        checkpoints = unfinished / CHECKPOINTS
        if checkpoints.is_dir() and any(checkpoints.iterdir()):
            raise ValueError(
                f"{unfinished} holds an unfinished run of another recipe ({'; '.join(changed[:3])}): expected the same "
                "recipe to continue it, checkpoint.resume=false to throw it away, or another output_dir."
            )
        shutil.rmtree(unfinished)
    unfinished.mkdir(exist_ok=True)
    write_text(marker, recipe)


def _agree(problem: str | None) -> None:
    """Rank 0's refusal is every rank's."""
    agreed = machine.from_rank_0(problem)
    if agreed is not None and machine.rank() != 0:
        raise ValueError(agreed)


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
