"""A model with a LoRA added to its weights, as lazy tensors: nothing is summed before it is read.

The sums are PEFT's `merge_and_unload`, bit for bit: B A times the scaling in float32; on linear modules the weight is added
in float32 and rounded once, on parameters (experts, router) the update is rounded to the weight's dtype before it is added,
and the sum again.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..lazy_tensors import LazyTensor, Region
from .adapters import Adapter, Lora
from .opened import Model
from .weights import Weight

_AT_ONCE = 1 << 24  # entries of a product: 64 MB
_KEPT = 2  # products of one matrix that are held


def merged(model: Model, adapter: Adapter) -> Model:
    """The model with the adapter's products added."""

    def read(name: str) -> Weight:
        weight = model.read(name)
        lora = adapter.loras.get(weight.module) if name.endswith(".weight") else None
        if lora is None:
            return weight
        return Weight(name, "bf16", {"weight": _Merged(weight.values(), lora)})

    return replace(model, read=read)


class _Merged(LazyTensor):
    """Rows of the sum, in the dtype of the weight."""

    def __init__(self, weight: LazyTensor, lora: Lora) -> None:
        self.weight, self.lora, self.product = weight, lora, _Product(lora)
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

    def __init__(self, lora: Lora) -> None:
        self.lora = lora
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
                self.blocks[number] = (b @ self.lora.a.float()).mul_(self.lora.scaling)
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
