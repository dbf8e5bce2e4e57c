"""The weights of a checkpoint as a model wants them, read when they are asked for and straight into their place.

transformers' loader takes objects like these wherever it takes a safetensors slice, and asks each for the whole tensor or,
under tensor and expert parallelism, for a rank's region. What a file holds otherwise is put right on the way (see
lazy_tensors.py): the hub's one tensor per expert and projection is read into its place in a stack, FP8 blocks and INT4
groups are multiplied out, or a float weight is put on the INT4 grid and packed. So a stack never exists twice: beside the
model there is one band a thread.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import CheckpointError, TensorInfo, read_header
from .lazy_tensors import Cat, Fp8, Int4, LazyTensor, OpenFiles, Region, Stack, Stored, check_scale
from .quantization import int4
from .quantization.codecs import int4_pack

_EXPERT = re.compile(r"(.*\.mlp\.experts|mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r".*\.mlp\.experts\.(gate_up|down)_proj")
_SUFFIXES = ("_packed", "_scale", "_shape", "_scale_inv")
# A stack, and the projections whose rows follow each other in it.
_STACKS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class Packing(NamedTuple):
    """Routed experts in INT4: consecutive inputs that share a scale, and the convention (int4.py) for float weights."""

    group_size: int = int4.GROUP_SIZE
    convention: str = "kimi"


class _Scale(LazyTensor):
    """Stored scales of INT4 groups, which must be finite."""

    def __init__(self, name: str, stored: Stored) -> None:
        self.name, self.stored, self.shape, self.dtype = name, stored, stored.shape, stored.dtype

    def fill(self, place: Tensor, region: Region) -> None:
        self.stored.fill(place, region)
        check_scale(self.name, place)


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
            found[name] = _stack(
                name, [[_matrix(key, weights[key], dtype, block) for key in keys] for keys in experts]
            )
            continue
        pairs = [[_pair(key, weights[key], packing, block) for key in keys] for keys in experts]
        for number, suffix in enumerate(("_packed", "_scale")):
            found[name + suffix] = _stack(name + suffix, [[pair[number] for pair in row] for row in pairs])
    return found


def is_coded(tensors: Iterable[str]) -> bool:
    """Whether some weight among these names is stored in FP8 or INT4."""
    return any(name.endswith((".weight_packed", ".weight_scale_inv")) for name in tensors)


def _stack(name: str, experts: Sequence[Sequence[LazyTensor]]) -> Stack:
    """Matrices, or pairs of matrices one above the other, of all experts: [experts, out, in]."""
    try:
        return Stack(name, [Cat(parts) for parts in experts])
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(error).startswith(name) else f"{name}: {error}.") from None


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
        return Int4(
            name,
            {f"weight{part}": parts[part] for part in ("_packed", "_scale")},
            dtype,
            _packed_shape(name, parts)[1],
        )
    if "" not in parts:
        raise CheckpointError(f"The checkpoint has {name}{next(iter(parts))}, but {name} is missing.")
    if "_scale_inv" in parts:
        return Fp8(name, {"weight": parts[""], "weight_scale_inv": parts["_scale_inv"]}, dtype, block)
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
