"""C files of this package as loaded libraries: compiled at first use for the CPU at hand, kept for the next process.

Wheels with compiled code would have to be built for each platform, and for the oldest CPU there; a compiler that knows
the CPU takes a second, once. A library goes to `transformers_k2` in $XDG_CACHE_HOME or ~/.cache, one for each version of
the source, compiler and CPU. It needs a C compiler ($CC, else cc). Without, or with TRANSFORMERS_K2_CPU_KERNEL=0, `load`
gives None, a log message says why, and callers keep another way. Libraries share torch's threads where torch has GNU
OpenMP, as on Linux, and have one elsewhere.

What it gives up: Windows and big-endian systems; noticing that a source was edited while the process runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

SWITCH = "TRANSFORMERS_K2_CPU_KERNEL"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
POINTER, SIZE, NUMBER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

_LOADED: dict[Path, ctypes.CDLL | None] = {}
_LOADING = threading.Lock()

logger = logging.getLogger(__name__)


def load(source: Path, signatures: Mapping[str, tuple[Sequence[Any], Any]], what: str) -> ctypes.CDLL | None:
    """The library of a C file, compiled if no process has done so before, which takes about a second.

    Args:
        source: the C file; headers that it includes with quotes count as parts of it.
        signatures: for each function the ctypes of its arguments and that of its result.
        what: is slower without it, for the log: a plural that begins a sentence.

    Returns:
        None where the library is switched off or cannot be made; the first call logs why. Later calls have the same
        result.
    """
    with _LOADING:
        if source not in _LOADED:
            _LOADED[source] = _load(source, signatures, what)
        return _LOADED[source]


def compiled(source: Path) -> Path:
    """The library's file, which is made if it is not there.

    Raises:
        OSError, RuntimeError, ValueError, subprocess.SubprocessError: there is no compiler, it fails, or the folder is
            of no use.
    """
    if os.name != "posix" or sys.byteorder != "little":
        raise RuntimeError(
            f"it is for little-endian Unix systems: this is {platform.system()}, {sys.byteorder}-endian"
        )
    flags = [*FLAGS, "-fopenmp"] if _torch_has_gnu_openmp() else list(FLAGS)
    compiler = shlex.split(os.environ.get("CC") or "cc")
    version = _output([*compiler, "--version"])
    text = [path.read_text() for path in _with_headers(source)]
    key = hashlib.sha256("\0".join([*text, version, *compiler, *flags, _cpu()]).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformers_k2"
    path = folder / f"{source.stem}-{key.hexdigest()[:32]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    if not path.exists():
        # Processes that do the same meanwhile write elsewhere; the last one's file stays, and all are alike.
        with tempfile.TemporaryDirectory(prefix=f"{source.stem}-", dir=folder) as scratch:
            library = Path(scratch) / path.name
            _output([*compiler, *flags, str(source), "-o", str(library), "-lm"])
            library.chmod(0o700)
            library.replace(path)
    _check_owner(path)
    return path


@cache
def has_bfloat16_instructions() -> bool:
    """Whether the CPU multiplies bfloat16 itself: AVX512-BF16, AMX, or ARM's BF16."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _load(source: Path, signatures: Mapping[str, tuple[Sequence[Any], Any]], what: str) -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0":
        logger.info("%s go without the CPU kernel: %s=0.", what, SWITCH)
        return None
    try:
        library = ctypes.CDLL(str(compiled(source)))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        logger.warning("%s on the CPU are slower than they could be, without their kernel: %s", what, error)
        return None
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = list(arguments), result
    return library


def _with_headers(source: Path) -> list[Path]:
    found = [source]
    for path in found:  # which grows
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            header = (path.parent / name).resolve()
            if header not in found:
                found.append(header)
    return found


def _torch_has_gnu_openmp() -> bool:
    """Then a library that is linked with it gets the one that is loaded, by its name, and its threads."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "/libgomp.so.1" in maps.read_text()


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {(result.stderr or result.stdout).strip()[:1000]}")
    return result.stdout


def _check_owner(path: Path) -> None:
    """Code that others could have put there is not loaded."""
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or path.is_symlink():
        raise RuntimeError(f"{path} is not this user's own, or others may write to it")


def _cpu() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in info.read_text().splitlines() if line.startswith(names)}))
