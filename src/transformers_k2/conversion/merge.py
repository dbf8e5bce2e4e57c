"""Add a LoRA to a checkpoint, file to file: no model is built, and what the adapter does not touch keeps its bytes.

The sums are PEFT's `merge_and_unload` of the model in bfloat16, bit for bit: B A times the scaling in float32; on linear
modules the weight is added in float32 and rounded once, on parameters (experts, router) the update is rounded to the
weight's dtype before it is added, and the sum again.

Packed experts that are touched are decoded to bfloat16, merged, and quantised from that sum: the result equals merging to
bfloat16 and quantising then. Rounding to the grid takes most of a small update away again; with `to="bf16"` nothing is lost.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..manifest import base_dtype, split_config
from ..quantization import int4
from .adapters import CONFIG, WEIGHTS, Adapter, Lora, open_adapter
from .quantize import dense_task, packed_task, reader
from .staging import check_destination
from .stored import Weight, new_config, open_model, side_files, weights_of
from .stream import (
    SHARD_BYTES,
    Source,
    Summary,
    Task,
    copy,
    plan_summary,
    write_checkpoint,
)

TARGETS = ("bf16", "int4")
_AT_ONCE = 1 << 24  # entries of a product: 64 MB


def merge_adapter(
    src: str | Path,
    adapter: str | Path,
    dst: str | Path,
    *,
    to: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write `src` with a LoRA merged into it to `dst`.

    Args:
        src: a hub checkpoint in bf16 (or fp32), FP8 blocks or INT4, or with transformers' fused experts.
        adapter: a PEFT LoRA folder, with fused or per-expert matrices (see adapters.py).
        to: "bf16", "int4" (only from INT4, on Kimi's grid), or None: as the source, and bf16 from FP8.

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
    checkpoint, config = open_model(src)
    with Source(checkpoint) as source:
        weights, others = weights_of(checkpoint, config)
        _check_fit(opened, weights, src)
        forms = {weight.form for weight in weights.values()}
        if to == "int4" and "int4" not in forms:
            raise ValueError(f"{src} is not INT4: expected to='bf16'; `k2 quantize` packs the result.")
        text, _ = split_config(config)
        if to == "bf16" and (dtype := base_dtype(text)) != "BF16":
            raise ValueError(f"{src} is {dtype}: expected to=None, which keeps that.")
        keep = to != "bf16" and "int4" in forms
        tasks = [
            task
            for weight in weights.values()
            for task in _tasks(source, weight, opened.loras.get(weight.module), keep)
        ]
        tasks += map(copy, others)
        if dry_run:
            return plan_summary(tasks, shard_bytes)
        quantization = text.get("quantization_config") if keep else None
        changed = {"fp8", "int4"} & forms and not keep
        dtype = "bfloat16" if changed else str(text.get("dtype") or text.get("torch_dtype") or "bfloat16")
        content = json.dumps(new_config(config, quantization, dtype), indent=2) + "\n"
        return write_checkpoint(
            tasks,
            source,
            dst,
            options={"command": "merge", "to": to, "adapter": _identity(opened)},
            files={**side_files(src), "config.json": content.encode()},
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            quiet=quiet,
        )


def _tasks(source: Source, weight: Weight, lora: Lora | None, keep: bool) -> list[Task]:
    read = reader(source, weight)
    if lora is None:
        if weight.form == "plain" or (weight.form == "int4" and keep):
            return [copy(info) for info in weight.parts.values()]
        return [dense_task(weight, read, weight.dtype)]
    merged = _merged(read, lora)
    if weight.form == "int4" and keep:
        group_size = weight.shape[1] // weight.parts["weight_scale"].shape[1]
        return [packed_task(weight, merged, group_size, int4.quantize)]
    return [dense_task(weight, merged, weight.dtype)]


def _merged(read: Callable[[int, int], Tensor], lora: Lora) -> Callable[[int, int], Tensor]:
    """(start, stop) -> rows of the sum, in the dtype of the weight."""
    product = _Product(lora)

    def rows(start: int, stop: int) -> Tensor:
        weight = read(start, stop)
        update = product.rows(start, stop)
        if lora.on_parameter:
            return weight + update.to(weight.dtype)
        return (weight + update).to(weight.dtype)

    return rows


class _Product:
    """B A times the scaling, in float32, to which PEFT raises adapters; made a block of rows at a time.

    Whole if it is no larger than an expert of K2's, otherwise in blocks of even size: libraries sum the products of a
    few rows in another order than those of many, and the bits are to be PEFT's.
    """

    def __init__(self, lora: Lora) -> None:
        self.lora = lora
        num_rows = len(lora.b)
        num_blocks = max(1, min(num_rows, -(-num_rows * lora.a.shape[1] // _AT_ONCE)))
        self.ends = [number * num_rows // num_blocks for number in range(1, num_blocks + 1)]
        self.start, self.block = 0, torch.empty(0)

    def rows(self, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            if not self.start <= start < self.start + len(self.block):
                number = bisect_right(self.ends, start)
                self.start = self.ends[number - 1] if number else 0
                b = self.lora.b[self.start : self.ends[number]].float()
                self.block = (b @ self.lora.a.float()).mul_(self.lora.scaling)
            last = min(stop, self.start + len(self.block))
            parts.append(self.block[start - self.start : last - self.start])
            start = last
        if stop == self.ends[-1]:
            self.block = torch.empty(0)  # the plan outlives its tasks
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check_fit(adapter: Adapter, weights: Mapping[str, Weight], src: Path) -> None:
    """Every pair has its matrix, of its shape, and the matrix no second one."""
    modules = {weight.module: weight for weight in weights.values()}
    if lost := [module for module in adapter.loras if module not in modules]:
        raise ValueError(
            f"{adapter.folder} adapts {lost[0]}, which {src} lacks ({len(lost)} of {len(adapter.loras)} modules): expected "
            "an adapter of this model."
        )
    for module, lora in adapter.loras.items():
        shape = (lora.b.shape[0], lora.a.shape[1])
        if modules[module].shape != shape:
            raise ValueError(
                f"{module} is {list(modules[module].shape)} in {src}, but the adapter's product is {list(shape)}: expected "
                "an adapter of this model."
            )
        if modules[module].name.endswith("embed_tokens.weight"):
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
