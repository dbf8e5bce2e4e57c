"""Add a LoRA to a checkpoint, file to file: no model is built, and what the adapter does not touch keeps its bytes.

The sums are PEFT's `merge_and_unload` of the model in bfloat16, bit for bit: B A times the scaling in float32; on linear
modules the weight is added in float32 and rounded once, on parameters (experts, router) the update is rounded to the
weight's dtype before it is added, and the sum again.

Quantised weights that are touched are decoded to bfloat16, merged, and quantised from that sum: the result equals merging
to bfloat16 and quantising then. Rounding to a grid takes most of a small update away again; with `to="bf16"` nothing is
lost.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..lazy_tensors import OpenFiles
from ..manifest import base_dtype
from ..quantization import int4
from . import layout as layouts
from .adapters import CONFIG, WEIGHTS, Adapter, open_adapter
from .convert import Coding, Output, Summary, write_model
from .engine import MEMORY
from .lora import check_fit, merged
from .opened import open_model
from .staging import check_destination
from .tasks import SHARD_BYTES

TARGETS = ("bf16", "fp8", "int4")


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


def _identity(adapter: Adapter) -> list[Any]:
    """What tells an adapter from another, for runs that are resumed."""
    states = [(adapter.folder / name).stat() for name in (CONFIG, WEIGHTS)]
    return [str(adapter.folder.resolve()), *([state.st_size, state.st_mtime_ns] for state in states)]
