"""Whether a checkpoint is whole, and whether two hold the same weights, read a few megabytes at a time.

Alone, every tensor that config.json promises must be there in its shape, every number finite, and every checksum that the
conversion left (conversion.json) that of the bytes. Two are compared tensor by tensor under canonical names, whatever their
layouts: quantised weights by what they decode to. Where one side is of a coarser form, the other is brought there and
compared again, so a quantised copy is told from a damaged one.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import TensorInfo, read_header, read_json
from ..lazy_tensors import DTYPES, LazyTensor, OpenFiles, Stored
from ..quantization import int4
from ..quantization.codecs import fp8_block
from .adapters import open_adapter
from .crc32 import combine
from .crew import is_finite, tensor_bytes
from .dcp import is_dcp
from .engine import MEMORY, RECORD, one_thread_each, progress
from .lora import check_fit, merged
from .opened import Model, open_model
from .weights import Weight

_PIECE = 1 << 22  # numbers looked at a time, of one tensor
_THREAD_BYTES = 128 << 20  # what a thread may need
_COARSE = ("affine", "int4", "fp8", "bf16")  # the coarser first


class Fault(NamedTuple):
    """A tensor that is not what it should be, and why."""

    name: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        about: what was looked at, in a line.
        num_tensors: looked at.
        num_bytes: read.
        num_checked: tensors whose checksum was compared (of one checkpoint).
        num_rounded: weights that agree after rounding to the coarser form of the two (of two checkpoints).
        faults: tensors that differ, are damaged or have no counterpart.
    """

    about: str
    num_tensors: int
    num_bytes: int
    num_checked: int = 0
    num_rounded: int = 0
    rounding: str = ""
    faults: tuple[Fault, ...] = ()

    @property
    def ok(self) -> bool:
        """No fault."""
        return not self.faults

    def lines(self) -> list[str]:
        """For people."""
        told = [self.about]
        told += [f"{fault.name}: {fault.text}" for fault in self.faults[:20]]
        if self.faults[20:]:
            told.append(f"... and {len(self.faults) - 20:,} more")
        if not self.ok:
            return [*told, f"{len(self.faults):,} of {self.num_tensors:,} tensors are at fault"]
        rounded = f", {self.num_rounded:,} of them after {self.rounding}" if self.num_rounded else ""
        checked = f", {self.num_checked:,} checksums right" if self.num_checked else ""
        what = "the same" if self.rounding or " and " in self.about else "finite"
        return [
            *told,
            f"{self.num_tensors:,} tensors, {self.num_bytes:,} bytes: all {what}{rounded}{checked}",
        ]


def verify(
    a: str | Path,
    b: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    config: str | Path | None = None,
    memory: int = MEMORY,
    quiet: bool = False,
) -> Verdict:
    """Look at every number of a checkpoint, or compare it with another of any layout.

    Args:
        a, b: folders or .safetensors files with a config.json beside them.
        adapter: a LoRA that was merged into `b` to give `a`: `a` is compared with the sum. In bf16 it must be PEFT's to the
            bit; in a quantised form, that sum, rounded.
        config: of the model, for a checkpoint that has none beside its weights.
        memory: bytes that the work may take beside Python and its libraries.
        quiet: no progress bar.

    Raises:
        ValueError: a checkpoint that cannot be opened: broken, incomplete, or with tensors that nothing claims.
    """
    with OpenFiles() as files:
        first = open_model(a, files, config=config)
        threads = max(1, min(os.cpu_count() or 1, memory // _THREAD_BYTES))
        if b is None:
            if adapter is not None:
                raise ValueError(
                    f"adapter is {adapter}, but there is one checkpoint: expected also the one it was merged into."
                )
            alone = _alone_dcp if is_dcp(first.folder) else _alone
            return alone(first, files, threads, quiet)
        second = open_model(b, files, config=config)
        if adapter is not None:
            opened = open_adapter(adapter)
            check_fit(opened, second, Path(b))
            second = merged(second, opened)
        return _compared(first, second, threads, quiet)


def _alone(model: Model, files: OpenFiles, threads: int, quiet: bool) -> Verdict:
    infos = [info for path in model.files for info in read_header(path)[0].values()]
    sums = _sums(model.folder)
    faults = [
        Fault(name, f"conversion.json has its checksum, but {file} does not hold it")
        for file, entries in sums.items()
        for name in sorted(entries.keys() - {info.name for info in infos if info.shard.name == file})
    ]
    total = sum(info.end - info.start for info in infos)
    num_checked = 0

    def look(info: TensorInfo, advance: Callable[[int], None]) -> tuple[Fault | None, bool]:
        wanted = sums.get(info.shard.name, {}).get(info.name)
        crc, num_bad, flat = 0, 0, _flat(info, files)
        for start, stop in _pieces(flat.shape[0]):
            piece = flat[start:stop]
            data = tensor_bytes(piece)
            if wanted is not None:
                crc = combine(crc, zlib.crc32(data), data.nbytes)
            num_bad += _num_not_finite(piece)
            advance(data.nbytes)
        if wanted is not None and f"{crc:08x}" != wanted:
            return Fault(
                info.name, f"its checksum is {crc:08x} in {info.shard.name}, expected {wanted}"
            ), True
        if num_bad:
            return Fault(
                info.name, f"{num_bad:,} numbers are not finite in {info.shard.name}"
            ), wanted is not None
        return None, wanted is not None

    for fault, checked in _mapped(look, infos, threads, total, quiet):
        num_checked += checked
        if fault is not None:
            faults.append(fault)
    about = f"{model.folder}: {model.layout} ({model.codec})"
    if not sums:
        about += f", no checksums ({RECORD} is not there)"
    return Verdict(about, len(infos), total, num_checked, faults=tuple(faults))


def _alone_dcp(model: Model, files: OpenFiles, threads: int, quiet: bool) -> Verdict:
    """As `_alone`, of a folder whose tensors lie in chunks: by the model's names, without checksums."""

    def look(name: str, advance: Callable[[int], None]) -> Fault | None:
        num_bad = 0
        for part in model.read(name).parts.values():
            step = max(1, _PIECE // max(1, prod(part.shape[1:])))
            for start in range(0, part.shape[0] if part.shape else 1, step):
                piece = part[start : start + step] if part.shape else part[...]
                num_bad += _num_not_finite(piece)
                advance(piece.nbytes)
        return Fault(name, f"{num_bad:,} numbers are not finite") if num_bad else None

    parts = [part for name in model.names for part in model.read(name).parts.values()]
    total = sum(prod(part.shape) * part.dtype.itemsize for part in parts)
    faults = [fault for fault in _mapped(look, list(model.names), threads, total, quiet) if fault is not None]
    about = f"{model.folder}: {model.layout} ({model.codec}) of torch.distributed.checkpoint, which keeps no checksums"
    return Verdict(about, len(model.names), total, faults=tuple(faults))


def _compared(a: Model, b: Model, threads: int, quiet: bool) -> Verdict:
    faults = [Fault(name, f"only {a.folder} has it") for name in a.names if name not in b.names]
    faults += [Fault(name, f"only {b.folder} has it") for name in b.names if name not in a.names]
    names = [name for name in a.names if name in b.names]
    total = 2 * sum(prod(a.names[name]) for name in names)
    num_rounded, roundings = 0, set()

    def look(name: str, advance: Callable[[int], None]) -> tuple[Fault | None, str | None]:
        fault, rounding = _difference(a.read(name), b.read(name))
        advance(2 * prod(a.names[name]))
        return fault, rounding

    for fault, rounding in _mapped(look, names, threads, total, quiet):
        if fault is not None:
            faults.append(fault)
        elif rounding is not None:
            num_rounded += 1
            roundings.add(rounding)
    about = f"{a.folder}: {a.layout} ({a.codec}) and {b.folder}: {b.layout} ({b.codec})"
    told = ", ".join(sorted(roundings))
    return Verdict(about, len(names), total, num_rounded=num_rounded, rounding=told, faults=tuple(faults))


def _difference(a: Weight, b: Weight) -> tuple[Fault | None, str | None]:
    """What tells two weights apart: a fault, or the rounding that makes them equal, or nothing."""
    shapes = [tuple(weight.values().shape) for weight in (a, b)]
    if shapes[0] != shapes[1]:
        return Fault(a.name, f"its shape is {list(shapes[0])} and {list(shapes[1])}"), None
    if a.codec == b.codec != "bf16" or {a.codec, b.codec} == {"int4", "affine"}:
        left, right = a.values("F32"), b.values("F32")
    else:
        dtypes = {weight.dtype for weight in (a, b) if weight.codec == "bf16"} or {"BF16"}
        common = min(dtypes, key=lambda one: DTYPES[one].itemsize)
        left, right = a.values(common), b.values(common)
    num, largest, first = distance(left, right)
    if not num:
        plain = a.codec == b.codec == "bf16" and a.dtype != b.dtype
        return None, f"rounding to {min(a.dtype, b.dtype)}" if plain and _narrower(a, b) else None
    for coarse, fine in sorted(((a, b), (b, a)), key=lambda pair: _COARSE.index(pair[0].codec)):
        if (rounding := _rounded(coarse, fine)) is not None:
            return None, rounding
    told = f"{num:,} of {prod(shapes[0]):,} numbers differ, by {largest:.3g} at most, first at {list(first)}"
    return Fault(a.name, told), None


def _narrower(a: Weight, b: Weight) -> bool:
    return distance(a.values("F32"), b.values("F32"))[0] > 0


def _rounded(coarse: Weight, fine: Weight) -> str | None:
    """The rule by which `fine` becomes `coarse`; None if there is none."""
    if coarse.codec in ("int4", "affine") and fine.codec not in ("int4", "affine"):
        wanted = coarse.parts_in("int4")
        assert wanted is not None
        for convention in int4.CONVENTIONS:

            def encode(rows: Tensor, convention: str = convention) -> Sequence[Tensor]:
                codes, scale = int4.quantize(rows, coarse.group_size, convention)
                return int4.pack(codes), scale

            if _encodes(fine.values(), encode, (wanted["weight_packed"], wanted["weight_scale"]), 1):
                return f"rounding to INT4 ({convention})"
    if coarse.codec == "fp8" and fine.codec == "bf16":
        parts = (coarse.parts["weight"], coarse.parts["weight_scale_inv"])
        if _encodes(fine.values(), lambda rows: fp8_block.encode(rows, coarse.block), parts, coarse.block[0]):
            return "rounding to FP8"
    return None


def _encodes(
    values: LazyTensor,
    encode: Callable[[Tensor], Sequence[Tensor]],
    parts: Sequence[LazyTensor],
    multiple: int,
) -> bool:
    num_rows, num_columns = values.shape
    step = max(1, _PIECE // num_columns // multiple) * multiple
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        for part, made in zip(parts, encode(values[start:stop]), strict=True):
            first = start if part.shape[0] == num_rows else start // multiple
            if not torch.equal(
                part[first : first + made.shape[0]].view(torch.uint8), made.contiguous().view(torch.uint8)
            ):
                return False
    return True


def distance(a: LazyTensor, b: LazyTensor) -> tuple[int, float, tuple[int, ...]]:
    """How many numbers differ, by how much at most, and where the first does; NaN equals NaN, and 0 is -0."""
    num, largest, first = 0, 0.0, ()
    num_rows = a.shape[0] if a.shape else 1
    step = max(1, _PIECE // max(1, prod(a.shape[1:])))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        left, right = (one[rows] if one.shape else one[...] for one in (a, b))
        if torch.equal(left, right):
            continue
        differ = (left != right) & ~(left.isnan() & right.isnan())
        if count := int(differ.sum()):
            if not num:
                place = differ.nonzero()[0].tolist()
                first = (place[0] + start, *place[1:]) if place else ()
            gap = (left.double() - right.double()).abs()[differ]
            largest = max(largest, float(gap.nan_to_num(torch.inf).max()))
            num += count
    return num, largest, first


def _mapped(
    look: Callable[[Any, Callable[[int], None]], Any],
    entries: Sequence[Any],
    threads: int,
    total: int,
    quiet: bool,
) -> Iterator[Any]:
    """`look` of each entry, in order, on several threads."""
    with one_thread_each(), progress(total, quiet) as advance, ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(lambda entry: look(entry, advance), entries)
        finally:
            pool.shutdown(cancel_futures=True)


def _flat(info: TensorInfo, files: OpenFiles) -> LazyTensor:
    """A tensor as one row of numbers, or of bytes where torch does not know the type."""
    dtype = info.dtype if info.dtype in DTYPES else "U8"
    return Stored(
        info._replace(dtype=dtype, shape=((info.end - info.start) // DTYPES[dtype].itemsize,)), files
    )


def _pieces(size: int) -> Iterable[tuple[int, int]]:
    return ((start, min(start + _PIECE, size)) for start in range(0, size, _PIECE))


def _num_not_finite(piece: Tensor) -> int:
    if piece.dtype == torch.float8_e4m3fn:  # it has no infinity, and two NaN
        return int((piece.view(torch.uint8).bitwise_and(0x7F) == 0x7F).sum())
    if not piece.dtype.is_floating_point or is_finite(piece):
        return 0
    return int((~piece.isfinite()).sum())


def _sums(folder: Path) -> dict[str, dict[str, str]]:
    """Checksums by file and tensor, as the conversion left them."""
    if not (folder / RECORD).is_file():
        return {}
    found = read_json(folder / RECORD).get("crc32")
    if not isinstance(found, dict) or not all(isinstance(entries, dict) for entries in found.values()):
        raise ValueError(f"{folder / RECORD} has no crc32 by file and tensor: {json.dumps(found)[:60]}.")
    return found
