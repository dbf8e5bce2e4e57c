"""Products of a few rows with INT4 weights in the hub's form, by a C kernel of our own that is compiled at first use.

With one row, time goes by memory, and a weight in four bits should take a quarter of the time of one in bfloat16. ATen's
kernel is far from that where the CPU has no AVX-512, and it wants the weights in an order of its own. This one (see
cpu_kernel.c) reads the checkpoint's bytes as they are, multiplies in integers, takes a whole layer's experts in one call,
and gives the same bits for any number of threads and whatever other rows are in the batch.

The library goes to `transformers_k2` in $XDG_CACHE_HOME or ~/.cache, once for each version, compiler and CPU. It needs
a C compiler ($CC, else cc). Without, or with TRANSFORMERS_K2_CPU_KERNEL=0, `available` is False, a log message says why,
and the caller keeps another way. It shares torch's threads where torch has GNU OpenMP, as on Linux, and has one elsewhere.

What it gives up: gradients; memory during a call, 2.5 bytes for each bfloat16 input and 5 for float32; the sign of
infinite inputs (a row that has one, or NaN, gives NaN); inputs above 1e35, whose products may overflow before they are
scaled; groups that are no multiple of 32. Only AVX2 has code of its own: elsewhere plain C has to do.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
import threading
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from jaxtyping import BFloat16, Float, Int32, Int64
from torch import Tensor

from .codecs.int4_pack import PER_INT32
from .packed_linear import has_bfloat16_instructions

SWITCH = "TRANSFORMERS_K2_CPU_KERNEL"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
GROUP = 32  # of the C source

_SOURCE = Path(__file__).with_suffix(".c")
_DTYPES = (torch.bfloat16, torch.float32)
_COMPILING = threading.Lock()

logger = logging.getLogger(__name__)


def available() -> bool:
    """Whether the kernel can be used. The first call compiles it if no process has done so before: about a second."""
    return _library() is not None


def takes(x: Tensor, packed: Tensor, scale: Tensor) -> bool:
    """Whether `linear`, or `grouped_linear`, multiplies these here."""
    return (
        packed.dtype == torch.int32
        and packed.device.type == "cpu"
        and x.dtype in _DTYPES
        and scale.dtype == torch.bfloat16
        and scale.is_contiguous()
        and packed.is_contiguous()
        and packed.shape[-1] * PER_INT32 % (GROUP * max(1, scale.shape[-1])) == 0
        and available()
    )


def threshold(dtype: torch.dtype) -> int:
    """From how many rows of an expert on dequantising bands of its matrix is faster, for rows of this dtype.

    `OMP_NUM_THREADS=1 python benchmarks/int4_linear.py --threshold --native` with AVX2 and without bfloat16 instructions:
    256 and 512 rows of bfloat16 take as long either way, between 32 and 64 of float32. With such instructions, by the
    figures of bfloat16 products there, earlier.
    """
    if dtype == torch.float32:
        return 32
    return 64 if has_bfloat16_instructions() else 256


def linear(
    x: Float[Tensor, "*rows in"],
    packed: Int32[Tensor, "out packed_in"],
    scale: BFloat16[Tensor, "out groups"],
    out: Float[Tensor, "*rows out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """x @ W.T.

    Args:
        x: [..., in], bfloat16 or float32, which the result has too.
        packed: int32 [out, in / 8], contiguous.
        scale: bfloat16 [out, in / group size], contiguous.
        out: where to write, contiguous.

    Returns:
        [..., out], rounded once, from sums in float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
        RuntimeError: the kernel is not `available`.
    """
    rows = x.reshape(-1, x.shape[-1])
    place = None if out is None else out.view(-1, packed.shape[0])
    result = grouped_linear(rows, [len(rows)], packed[None], scale[None], place)
    return result.view(*x.shape[:-1], packed.shape[0])


def grouped_linear(
    x: Float[Tensor, "pairs in"],
    ends: Sequence[int] | Int64[Tensor, " experts"],
    packed: Int32[Tensor, "experts out packed_in"],
    scale: BFloat16[Tensor, "experts out groups"],
    out: Float[Tensor, "pairs out"] | None = None,
) -> Float[Tensor, "pairs out"]:
    """Each row times the matrix of its expert, on `torch.get_num_threads` threads.

    Args:
        x: [pairs, in], bfloat16 or float32, sorted by expert.
        ends: [experts], where each expert's rows end and the next one's begin; it may have none.
        packed: int32 [experts, out, in / 8], contiguous.
        scale: bfloat16 [experts, out, in / group size], contiguous.
        out: where to write, contiguous.

    Returns:
        [pairs, out] in the dtype of `x`; rows behind the last expert's are zero.

    Raises:
        ValueError: shapes, dtypes, strides, devices or `ends` do not fit.
        RuntimeError: the kernel is not `available`.
    """
    num_experts, num_out, num_in, num_groups = _sizes(packed, scale)
    if x.dtype not in _DTYPES or x.device.type != "cpu" or x.shape[-1] != num_in:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}: expected bfloat16 or float32 [pairs, {num_in}] on cpu."
        )
    if out is None:
        out = x.new_empty(x.shape[0], num_out)
    _check("out", out, x.dtype, (x.shape[0], num_out))
    limits = array("q", ends.tolist() if isinstance(ends, Tensor) else ends)
    if len(limits) != num_experts:
        raise ValueError(f"ends has {len(limits)} numbers: expected {num_experts}, one for each expert.")
    library = _library()
    if library is None:
        raise RuntimeError("the CPU kernel is not available here: the log says why; ask `available` first.")
    x, wide = x.contiguous(), x.dtype == torch.float32
    scratch = x.new_empty(library.int4_scratch(x.shape[0], num_in, num_experts, wide), dtype=torch.uint8)
    addresses = x.data_ptr(), limits.buffer_info()[0], packed.data_ptr(), scale.data_ptr()
    sizes = x.shape[0], num_experts, num_in, num_out, num_groups
    if library.int4_grouped(
        *addresses, out.data_ptr(), scratch.data_ptr(), *sizes, wide, torch.get_num_threads()
    ):
        raise ValueError(f"ends is {list(limits)}: expected ascending numbers from 0 to {x.shape[0]}.")
    end = limits[-1] if limits else 0
    if end < len(out):
        out[end:] = 0
    return out


def _sizes(packed: Tensor, scale: Tensor) -> tuple[int, int, int, int]:
    """experts, out, in, groups."""
    num_experts, num_out, num_in = *packed.shape[:-1], packed.shape[-1] * PER_INT32
    num_groups = scale.shape[-1]
    if num_groups == 0 or num_in % (GROUP * num_groups):
        raise ValueError(
            f"INT4 weights have {num_in} inputs and {num_groups} scales a row: expected groups of a multiple of {GROUP}."
        )
    _check("packed", packed, torch.int32, (num_experts, num_out, num_in // PER_INT32))
    _check("scale", scale, torch.bfloat16, (num_experts, num_out, num_groups))
    return num_experts, num_out, num_in, num_groups


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: expected {dtype} {list(shape)} on cpu."
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}: expected it contiguous.")


def _library() -> ctypes.CDLL | None:
    with _COMPILING:
        return _load()


@cache
def _load() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0":
        logger.info("INT4 products go without the CPU kernel: %s=0.", SWITCH)
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        logger.warning(
            "INT4 products on the CPU are slower than they could be, without their kernel: %s", error
        )
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.int4_scratch.argtypes, library.int4_scratch.restype = [size] * 3 + [number], size
    library.int4_grouped.argtypes = [pointer] * 6 + [size] * 5 + [number] * 2
    return library


def _compiled() -> Path:
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
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), version, *compiler, *flags, _cpu()]).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformers_k2"
    path = folder / f"cpu_kernel-{key.hexdigest()[:32]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    if not path.exists():
        # Processes that do the same meanwhile write elsewhere; the last one's file stays, and all are alike.
        with tempfile.TemporaryDirectory(prefix="cpu_kernel-", dir=folder) as scratch:
            library = Path(scratch) / path.name
            _output([*compiler, *flags, str(_SOURCE), "-o", str(library)])
            library.chmod(0o700)
            library.replace(path)
    _check_owner(path)
    return path


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
