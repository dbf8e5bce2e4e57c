"""Results kept in a folder that several processes may ask for at once: one makes it, the others wait and read it.

The folder appears under its name only when everything in it is on the disk, so a killed process leaves nothing that
looks finished. The lock is the kernel's and dies with its holder. What it gives up: file systems without `flock`
(some cluster ones need a mount option for it).
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..files import sync

T = TypeVar("T")

logger = logging.getLogger(__name__)


def build_once(folder: Path, read: Callable[[Path], T], build: Callable[[Path], None]) -> T:
    """`read(folder)`, after `build` has filled it if it is not there or not what it should be.

    Args:
        read: raises ValueError for a folder that is damaged; it is then built anew, which is logged.
        build: fills a new empty folder that takes the name `folder` afterwards; if it fails, nothing is left.
    """
    if folder.is_dir():
        try:
            return read(folder)  # needs no lock: a folder of this name is finished
        except ValueError as error:
            logger.warning("%s It is made anew.", error)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Never unlinked: a process that waits on a removed file would lock a file of its own.
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s is being made by another process; waiting.", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            try:
                return read(folder)  # made while this process waited
            except ValueError:
                shutil.rmtree(folder)
        partial = folder.with_name(f".{folder.name}.partial")
        if partial.exists():  # its maker was killed
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            build(partial)
        except BaseException:
            shutil.rmtree(partial)
            raise
        for path in (*partial.rglob("*"), partial):
            sync(path)
        os.rename(partial, folder)
        sync(folder.parent)
        return read(folder)
