"""The weights of a checkpoint as a model wants them, read when they are asked for and straight into their place.

transformers' loader takes objects like these wherever it takes a safetensors slice, and asks each for the whole tensor or,
under tensor and expert parallelism, for a rank's region. What a file holds otherwise is put right on the way: the hub's
one tensor per expert and projection is read into its place in a stack, FP8 blocks and INT4 groups are multiplied out, or
a float weight is put on the INT4 grid and packed. So a stack never exists twice: beside the model there is one matrix a
thread. Files are read, not mapped, because the pages of a mapped file count as memory of the process while it is open.

Given up: decoding on the device that a weight goes to. It is done where the file is read, on the CPU.
"""

from __future__ import annotations

import os
import re
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .checkpoint import CheckpointError, TensorInfo, read_header
from .quantization import int4
from .quantization.codecs import fp8_block, int4_pack

# As safetensors spells them.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_EXPERT = re.compile(r"(.*\.mlp\.experts|mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r".*\.mlp\.experts\.(gate_up|down)_proj")
_SUFFIXES = ("_packed", "_scale", "_shape", "_scale_inv")
# A stack, and the projections whose rows follow each other in it.
_STACKS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}

Region = tuple[slice, ...]


class Packing(NamedTuple):
    """Routed experts in INT4: consecutive inputs that share a scale, and the convention (int4.py) for float weights."""

    group_size: int = int4.GROUP_SIZE
    convention: str = "kimi"


class OpenFiles(ExitStack):
    """Files that are opened once and read by several threads, until the context ends."""

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, place: Tensor, offset: int) -> None:
        """Fill a contiguous tensor with the bytes from `offset` on.

        Raises:
            CheckpointError: the file ends before.
        """
        with self._lock:
            if (descriptor := self._descriptors.get(path)) is None:
                descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY)
                self.callback(os.close, descriptor)
        buffer = memoryview(cast(Any, place.view(-1).view(torch.uint8).numpy()))
        while buffer:
            num_bytes = os.preadv(descriptor, [buffer[: 1 << 30]], offset)
            if num_bytes == 0:
                raise CheckpointError(f"{path} ends at byte {offset}: it was cut short while it was read.")
            buffer, offset = buffer[num_bytes:], offset + num_bytes


class LazyTensor(ABC):
    """What transformers' loader asks of a safetensors slice; `fill` is what a kind of weight adds."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """Sizes."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As safetensors spells it."""
        return _NAMES[self.dtype]

    def __getitem__(self, index: Any) -> Tensor:
        region = self._region(index)
        place = torch.empty([part.stop - part.start for part in region], dtype=self.dtype, device="cpu")
        self.fill(place, region)
        return place

    @abstractmethod
    def fill(self, place: Tensor, region: Region) -> None:
        """Write a region, start and stop known in every dimension, into a CPU tensor of that shape and this dtype."""

    def _region(self, index: Any) -> Region:
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in parts:
            assert parts == (Ellipsis,), f"no index of transformers' loader: {index}"
            parts = ()
        parts += (slice(None),) * (len(self.shape) - len(parts))
        bounds = [part.indices(size) for part, size in zip(parts, self.shape, strict=True)]
        assert all(step == 1 for _, _, step in bounds), index
        return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)


class Stored(LazyTensor):
    """A tensor as the file has it."""

    def __init__(self, info: TensorInfo, files: OpenFiles) -> None:
        if info.dtype not in _DTYPES:
            raise CheckpointError(
                f"{info.shard}: {info.name} is {info.dtype}: expected one of {', '.join(_DTYPES)}."
            )
        self.info, self.files = info, files
        self.shape, self.dtype = info.shape, _DTYPES[info.dtype]

    def fill(self, place: Tensor, region: Region) -> None:
        if not place.numel():
            return
        if not self.shape:
            self._read(place, 0)
            return
        rows, rest = region[0], region[1:]
        row = self.shape[1:]
        row_bytes = torch.Size(row).numel() * self.dtype.itemsize
        if place.is_contiguous() and all(
            part == slice(0, size) for part, size in zip(rest, row, strict=True)
        ):
            self._read(place, rows.start * row_bytes)
            return
        step = max(1, (1 << 24) // max(1, row_bytes))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            band = torch.empty(stop - start, *row, dtype=self.dtype, device="cpu")
            self._read(band, start * row_bytes)
            place[start - rows.start : stop - rows.start] = band[:, *rest]

    def _read(self, place: Tensor, offset: int) -> None:
        self.files.read(self.info.shard, place, self.info.start + offset)


class _Decoded(LazyTensor):
    """A matrix that is stored in parts and multiplied out whole, whatever region of it is asked for."""

    def __init__(
        self, name: str, parts: Mapping[str, Stored], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.name, self.parts, self.shape, self.dtype = name, parts, tuple(shape), dtype

    def fill(self, place: Tensor, region: Region) -> None:
        place.copy_(self.decode({part: stored[...] for part, stored in self.parts.items()})[region])

    @abstractmethod
    def decode(self, parts: dict[str, Tensor]) -> Tensor: ...


class Fp8(_Decoded):
    """An FP8 matrix [out, in] with a scale for each block."""

    def __init__(
        self, name: str, parts: Mapping[str, Stored], dtype: torch.dtype, block: tuple[int, int]
    ) -> None:
        super().__init__(name, parts, parts[""].shape, dtype)
        self.block = block

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        return fp8_block.decode(parts[""], parts["_scale_inv"], self.dtype, self.block)


class Int4(_Decoded):
    """An INT4 matrix [out, in] of compressed-tensors' `pack-quantized`."""

    def __init__(self, name: str, parts: Mapping[str, Stored], dtype: torch.dtype) -> None:
        super().__init__(name, parts, _packed_shape(name, parts), dtype)

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        _check_scale(self.name, parts["_scale"])
        return int4_pack.decode(parts["_packed"], parts["_scale"], self.dtype, parts.get("_shape"))


class _Scale(LazyTensor):
    """Stored scales of INT4 groups, which must be finite."""

    def __init__(self, name: str, stored: Stored) -> None:
        self.name, self.stored, self.shape, self.dtype = name, stored, stored.shape, stored.dtype

    def fill(self, place: Tensor, region: Region) -> None:
        self.stored.fill(place, region)
        _check_scale(self.name, place)


class _OnGrid(LazyTensor):
    """The codes or the scales of a float matrix [..., out, in]."""

    def __init__(self, name: str, source: LazyTensor, packing: Packing) -> None:
        self.name, self.source, self.packing = name, source, packing
        try:
            self.num_groups = int4.count_groups(source.shape[-1], packing.group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def fill(self, place: Tensor, region: Region) -> None:
        if len(region) == 3:  # a stack as it is: one matrix at a time
            for matrix, index in zip(place, range(region[0].start, region[0].stop), strict=True):
                self._fill(matrix, region[1:], (slice(index, index + 1),))
        else:
            self._fill(place, region, ())

    def _fill(self, place: Tensor, region: Region, expert: Region) -> None:
        weight = self.source[*expert, region[0], slice(None)].view(-1, self.source.shape[-1])
        try:
            place.copy_(self.convert(weight)[:, region[1]])
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    @abstractmethod
    def convert(self, weight: Tensor) -> Tensor: ...


class _Packed(_OnGrid):
    def __init__(self, name: str, source: LazyTensor, packing: Packing) -> None:
        super().__init__(name, source, packing)
        self.shape = (*source.shape[:-1], -(-source.shape[-1] // int4_pack.PER_INT32))
        self.dtype = torch.int32

    def convert(self, weight: Tensor) -> Tensor:
        return int4.pack(int4.quantize(weight, *self.packing)[0])


class _NewScale(_OnGrid):
    def __init__(self, name: str, source: LazyTensor, packing: Packing) -> None:
        super().__init__(name, source, packing)
        self.shape, self.dtype = (*source.shape[:-1], self.num_groups), torch.bfloat16

    def convert(self, weight: Tensor) -> Tensor:
        return int4.scales(weight, *self.packing)


class Stack(LazyTensor):
    """Matrices, or pairs of matrices one above the other, of all experts: [experts, out, in]."""

    def __init__(self, name: str, experts: Sequence[Sequence[LazyTensor]]) -> None:
        self.experts, first = experts, experts[0]
        self.dtype = first[0].dtype
        for parts in experts:
            for part, like in zip(parts, first, strict=True):
                if part.shape != like.shape or part.dtype != self.dtype:
                    raise CheckpointError(
                        f"{name}: an expert has {part.dtype} {list(part.shape)}, expected {self.dtype} "
                        f"{list(like.shape)}, as the first."
                    )
        self.shape = (len(experts), sum(part.shape[0] for part in first), first[0].shape[1])

    def fill(self, place: Tensor, region: Region) -> None:
        for matrix, parts in zip(place, self.experts[region[0]], strict=True):
            start = 0
            for part in parts:
                rows = slice(max(region[1].start - start, 0), min(region[1].stop - start, part.shape[0]))
                if rows.start < rows.stop:
                    offset = start - region[1].start
                    part.fill(matrix[rows.start + offset : rows.stop + offset], (rows, region[2]))
                start += part.shape[0]


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """The tensors of safetensors files, by name.

    Raises:
        CheckpointError: a damaged file.
    """
    return {name: info for file in files for name, info in read_header(Path(file))[0].items()}


def lazy_weights(
    tensors: Mapping[str, TensorInfo],
    files: OpenFiles,
    dtype: torch.dtype,
    packing: Packing | None = None,
    block: tuple[int, int] = (128, 128),
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint under the names that transformers' stacked experts have; no weight is read yet.

    Args:
        tensors: of `read_headers`; the hub's layout, experts stacked or not.
        files: open while the weights are read.
        dtype: of weights that are stored in FP8 or INT4 and multiplied out.
        packing: keep routed experts in INT4, or bring them there: a stack `X` becomes `X_packed` int32 [experts, out,
            in / 8] and `X_scale` bfloat16 [experts, out, in / group size].
        block: rows and columns of an FP8 block.

    Raises:
        ValueError: parts of a weight are missing, experts differ in shape, or groups do not divide their inputs.
    """
    weights: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, info in tensors.items():
        suffix = next((s for s in _SUFFIXES if name.endswith(f".weight{s}")), "")
        weights[name.removesuffix(suffix)][suffix] = Stored(info, files)
    found: dict[str, LazyTensor] = {}
    stacks: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for name, parts in weights.items():
        if match := _EXPERT.fullmatch(name):
            stacks[match[1], "down_proj" if match[3] == "down" else "gate_up_proj"][name] = None
        elif packing is not None and _FUSED.fullmatch(name):
            found[f"{name}_packed"], found[f"{name}_scale"] = _pair(name, parts, packing, block)
        else:
            found[name] = _matrix(name, parts, dtype, block)
    for (prefix, stack), members in stacks.items():
        experts, name = _in_order(prefix, stack, members), f"{prefix}.{stack}"
        if packing is None:
            found[name] = Stack(
                name, [[_matrix(key, weights[key], dtype, block) for key in keys] for keys in experts]
            )
            continue
        pairs = [[_pair(key, weights[key], packing, block) for key in keys] for keys in experts]
        for number, suffix in enumerate(("_packed", "_scale")):
            found[name + suffix] = Stack(name + suffix, [[pair[number] for pair in row] for row in pairs])
    return found


def is_coded(tensors: Iterable[str]) -> bool:
    """Whether some weight among these names is stored in FP8 or INT4."""
    return any(name.endswith((".weight_packed", ".weight_scale_inv")) for name in tensors)


def _in_order(prefix: str, stack: str, members: Mapping[str, None]) -> list[list[str]]:
    """The names of a stack's matrices, expert by expert."""
    last = max(int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name in members)
    wanted = [
        [f"{prefix}.{expert}.{part}_proj.weight" for part in _STACKS[stack]] for expert in range(last + 1)
    ]
    if missing := [name for names in wanted for name in names if name not in members]:
        raise CheckpointError(f"The checkpoint lacks {missing[0]}, where it has experts up to number {last}.")
    return wanted


def _matrix(name: str, parts: Mapping[str, Stored], dtype: torch.dtype, block: tuple[int, int]) -> LazyTensor:
    """A weight, multiplied out."""
    if "_packed" in parts:
        _demand(name, parts, "_scale")
        return Int4(name, parts, dtype)
    if "" not in parts:
        raise CheckpointError(f"The checkpoint has {name}{next(iter(parts))}, but {name} is missing.")
    if "_scale_inv" in parts:
        return Fp8(name, parts, dtype, block)
    if parts[""].dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        _demand(name, parts, "_scale_inv")
    return parts[""]


def _pair(
    name: str, parts: Mapping[str, Stored], packing: Packing, block: tuple[int, int]
) -> tuple[LazyTensor, LazyTensor]:
    """Packed codes, and scales."""
    if "_packed" not in parts:
        source = _matrix(name, parts, torch.bfloat16, block)  # whatever the model computes in
        return _Packed(name, source, packing), _NewScale(name, source, packing)
    _demand(name, parts, "_scale")
    packed, scale = parts["_packed"], parts["_scale"]
    num_out, num_in = _packed_shape(name, parts)
    wanted = (num_out, num_in // packing.group_size)
    if scale.shape != wanted or num_in % packing.group_size:
        raise CheckpointError(
            f"{name}_scale is {list(scale.shape)}: expected {list(wanted)}, one for each group of {packing.group_size} "
            f"of the {num_in} inputs, as quantization_config says."
        )
    if packed.dtype != torch.int32 or scale.dtype != torch.bfloat16:
        raise CheckpointError(
            f"{name} has {packed.dtype} codes and {scale.dtype} scales: expected torch.int32 and torch.bfloat16; "
            "dequantize=True takes other scales."
        )
    return packed, _Scale(name, scale)


def _packed_shape(name: str, parts: Mapping[str, Stored]) -> tuple[int, int]:
    """Sizes of an INT4 matrix; `weight_shape` says how many codes of a row's last int32 count."""
    num_out, num_packed = parts["_packed"].shape
    num_in = num_packed * int4_pack.PER_INT32
    if "_shape" not in parts:
        return num_out, num_in
    shape = parts["_shape"][...].tolist()
    if shape[0] != num_out or not num_in - int4_pack.PER_INT32 < shape[1] <= num_in:
        raise CheckpointError(
            f"{name}_shape is {shape}, but {name}_packed {list(parts['_packed'].shape)} holds {num_out} rows of {num_in} "
            f"codes: expected {[num_out, num_in]}."
        )
    return shape[0], shape[1]


def _demand(name: str, parts: Mapping[str, Stored], suffix: str) -> None:
    if suffix not in parts:
        raise CheckpointError(f"The checkpoint has {name}, but {name}{suffix} is missing.")


def _check_scale(name: str, scale: Tensor) -> None:
    if not scale.isfinite().all():
        raise CheckpointError(
            f"{name}_scale is not finite in {int((~scale.isfinite()).sum())} of {scale.numel()} groups: the checkpoint is "
            "damaged; expected finite scales."
        )
