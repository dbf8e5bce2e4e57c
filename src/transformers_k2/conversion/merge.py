"""Add a LoRA to a checkpoint, file to file: no model is built, and what the adapter does not touch keeps its bytes.

The sums are PEFT's `merge_and_unload` of the model in bfloat16, bit for bit: B A times the scaling in float32; on linear
modules the weight is added in float32 and rounded once, on parameters (experts, router) the update is rounded to the
weight's dtype before it is added, and the sum again.

Quantised weights that are touched are decoded to bfloat16, merged, and quantised from that sum: the result equals merging
to bfloat16 and quantising then. Rounding to a grid takes most of a small update away again; with `to="bf16"` nothing is
lost.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..lazy_tensors import LazyTensor, OpenFiles, Region
from ..manifest import base_dtype
from ..quantization import int4
from . import layout as layouts
from .adapters import CONFIG, WEIGHTS, Adapter, Lora, open_adapter
from .convert import Coding, Output, Summary, write_model
from .engine import MEMORY, SHARD_BYTES
from .opened import Model, open_model
from .staging import check_destination
from .weights import Weight

TARGETS = ("bf16", "fp8", "int4")
_AT_ONCE = 1 << 24  # entries of a product: 64 MB
_KEPT = 2  # products of one matrix that are held


def merge_adapter(
    src: str | Path,
    adapter: str | Path,
    dst: str | Path,
    *,
    to: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    memory: int = MEMORY,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write `src` with a LoRA merged into it to `dst`, in the hub's layout.

    Args:
        src: a checkpoint of any layout in bf16 (or fp32), FP8 blocks or INT4.
        adapter: a PEFT LoRA folder, with fused or per-expert matrices (see adapters.py).
        to: "bf16", "fp8" or "int4" (only from that form), or None: as the source, and bf16 from FP8.
        memory: bytes that the work may take beside Python and its libraries.

    Returns:
        Tensors, bytes and shards written, or to be written.

    Raises:
        ValueError: an adapter that is no plain LoRA, that names a matrix the checkpoint lacks, or of another shape; a
            result that is not finite; an unusable destination. All but the result are found before a byte is written.
    """
    src, dst = Path(src), Path(dst)
    if to not in (None, *TARGETS):
        raise ValueError(
            f"to is {to!r}: expected one of {', '.join(TARGETS)}, or None for the source's own format."
        )
    check_destination(src, dst, overwrite)
    opened = open_adapter(adapter)
    output = Output(shard_bytes, memory, 1, dry_run, overwrite, quiet)
    with OpenFiles() as files:
        model = open_model(src, files)
        check_fit(opened, model, src)
        form = "int4" if model.codec == "affine" else model.codec
        if to in ("int4", "fp8") and to != form:
            raise ValueError(
                f"{src} is not {to.upper()}: expected to='bf16'; `k2 convert` quantises the result."
            )
        if to == "bf16" and (dtype := base_dtype(model.text)) != "BF16":
            raise ValueError(f"{src} is {dtype}: expected to=None, which keeps that.")
        codec = to or ("int4" if form == "int4" else "bf16")
        coded = sorted(model.coded & opened.loras.keys())
        coding = Coding(codec, model.group_size or int4.GROUP_SIZE, modules=lambda linear: coded)
        layout = layouts.load(f"hub_{codec}")
        if model.layout.startswith("k25"):
            layout = replace(layouts.load("k25_int4"), codecs=layout.codecs)
        layout = replace(layout, dtype=None)
        options = {"command": "merge", "to": to, "adapter": _identity(opened)}
        return write_model(merged(model, opened), dst, layout, coding, output, files, options)


def merged(model: Model, adapter: Adapter, sign: float = 1.0) -> Model:
    """The model with the adapter's products added (`sign` 1) or taken away (-1)."""

    def read(name: str) -> Weight:
        weight = model.read(name)
        lora = adapter.loras.get(weight.module) if name.endswith(".weight") else None
        if lora is None:
            return weight
        return Weight(name, "bf16", {"weight": _Merged(weight.values(), lora, sign)})

    return replace(model, read=read)


class _Merged(LazyTensor):
    """Rows of the sum, in the dtype of the weight."""

    def __init__(self, weight: LazyTensor, lora: Lora, sign: float) -> None:
        self.weight, self.lora, self.product = weight, lora, _Product(lora, sign)
        self.shape, self.dtype = weight.shape, weight.dtype

    def fill(self, place: Tensor, region: Region) -> None:
        rows, columns = region
        self.weight.fill(place, region)
        update = self.product.rows(rows.start, rows.stop)[:, columns]
        if self.lora.on_parameter:
            place.add_(update.to(place.dtype))
        else:
            place.copy_(place + update)


class _Product:
    """B A times the scaling, in float32, to which PEFT raises adapters; made a block of rows at a time.

    Whole if it is no larger than an expert of K2's, otherwise in blocks of even size: libraries sum the products of a
    few rows in another order than those of many, and the bits are to be PEFT's.
    """

    def __init__(self, lora: Lora, sign: float = 1.0) -> None:
        self.lora, self.sign = lora, sign
        num_rows = len(lora.b)
        num_blocks = max(1, min(num_rows, -(-num_rows * lora.a.shape[1] // _AT_ONCE)))
        self.ends = [number * num_rows // num_blocks for number in range(1, num_blocks + 1)]
        self.lock = threading.Lock()  # several threads ask for rows of one matrix
        self.blocks: dict[int, Tensor] = {}

    def rows(self, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            number = bisect_right(self.ends, start)
            first = self.ends[number - 1] if number else 0
            last = min(stop, self.ends[number])
            parts.append(self._block(number, first)[start - first : last - first])
            start = last
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, number: int, first: int) -> Tensor:
        with self.lock:
            if number not in self.blocks:
                while len(self.blocks) >= _KEPT:
                    del self.blocks[min(self.blocks)]
                b = self.lora.b[first : self.ends[number]].float()
                self.blocks[number] = (b @ self.lora.a.float()).mul_(self.sign * self.lora.scaling)
            return self.blocks[number]


def check_fit(adapter: Adapter, model: Model, src: Path) -> None:
    """Every pair has its matrix, of its shape, and the matrix no second one."""
    modules = {
        name.removesuffix(".weight"): shape
        for name, shape in model.names.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    if lost := [module for module in adapter.loras if module not in modules]:
        raise ValueError(
            f"{adapter.folder} adapts {lost[0]}, which {src} lacks ({len(lost)} of {len(adapter.loras)} modules): expected "
            "an adapter of this model."
        )
    for module, lora in adapter.loras.items():
        shape = (lora.b.shape[0], lora.a.shape[1])
        if modules[module] != shape:
            raise ValueError(
                f"{module} is {list(modules[module])} in {src}, but the adapter's product is {list(shape)}: expected "
                "an adapter of this model."
            )
        if module.endswith("embed_tokens"):
            raise ValueError(f"{module} is an embedding: expected LoRA on linear modules and experts.")
    if adapter.form == "peft":  # one pair for all experts of a layer: as many as the layer has
        ours, theirs = (Counter(map(_projection, names)) for names in (adapter.loras, modules))
        for name, num in ours.items():
            if num != theirs[name]:
                raise ValueError(
                    f"{name} has {theirs[name]} experts in {src}, but {num} in the adapter: expected as many."
                )


def _projection(module: str) -> str:
    return re.sub(r"(\.mlp\.experts)\.\d+\.", r"\1.", module)


def _identity(adapter: Adapter) -> list[Any]:
    """What tells an adapter from another, for runs that are resumed."""
    states = [(adapter.folder / name).stat() for name in (CONFIG, WEIGHTS)]
    return [str(adapter.folder.resolve()), *([state.st_size, state.st_mtime_ns] for state in states)]
