"""A weight of a checkpoint as it is stored, whatever its codec, and what it becomes in another.

Parts that a codec shares with another are passed on as they are (FP8 to FP8, INT4 to INT4, INT4 to MLX's affine groups and
back, which hold the same bits under other names). Everything else goes through the numbers: decoded as the model's loader
decodes them, then rounded once onto the other grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from ..lazy_tensors import DTYPES, NAMES, Cast, Constant, Decoded, Fp8, Int4, LazyTensor
from ..quantization import int4
from ..quantization.codecs import fp8_block, int4_pack

BIAS = ".e_score_correction_bias"  # of a router: float32 in every layout, never rounded
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Weight:
    """A tensor of the model by its canonical name.

    Attributes:
        name: the hub's, without K2.5's prefix.
        codec: "bf16" (plain, of any dtype), "fp8", "int4" or "affine".
        parts: local name -> tensor (see layout.PARTS); "weight" alone if plain.
        block: rows and columns of an FP8 scale.
        base: the dtype that a quantised weight is decoded to, as safetensors spells it.
    """

    name: str
    codec: str
    parts: Mapping[str, LazyTensor]
    block: tuple[int, int] = (128, 128)
    base: str = "BF16"

    @property
    def module(self) -> str:
        """The linear module's name."""
        return self.name.removesuffix(".weight")

    @property
    def dtype(self) -> str:
        """Of `values()`."""
        return NAMES[self.parts["weight"].dtype] if self.codec == "bf16" else self.base

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, of an INT4 weight."""
        scale = self.parts["weight_scale" if self.codec == "int4" else "scales"]
        return self.in_features // scale.shape[1]

    @property
    def in_features(self) -> int:
        """Of a packed weight."""
        if (shape := self.parts.get("weight_shape")) is not None and isinstance(shape, Constant):
            return int(shape.value[1])
        packed = self.parts["weight_packed" if self.codec == "int4" else "weight"]
        return packed.shape[1] * int4_pack.PER_INT32

    def values(self, dtype: str | None = None) -> LazyTensor:
        """The numbers, in `dtype` (safetensors' spelling) if that is given: decoded in float32 and rounded once."""
        wanted = DTYPES[dtype or self.dtype]
        if self.codec == "bf16":
            stored = self.parts["weight"]
            return stored if stored.dtype == wanted else Cast(stored, wanted)
        if self.codec == "fp8":
            return Fp8(self.name, self.parts, wanted, self.block)
        if self.codec == "int4":
            return Int4(self.name, self.parts, wanted, self.in_features)
        return _Affine(self.name, self.parts, wanted)

    def parts_in(self, codec: str) -> Mapping[str, LazyTensor] | None:
        """The same bits as another codec's parts; None if it cannot hold them."""
        if codec == self.codec:
            return self.parts
        if (self.codec, codec) == ("int4", "affine"):
            scale = self.parts["weight_scale"]
            return {
                "weight": _Viewed(self.parts["weight_packed"], torch.uint32),
                "scales": scale,
                "biases": _Mapped(scale, _biases),
            }
        if (self.codec, codec) == ("affine", "int4"):
            out_features = self.parts["weight"].shape[0]
            shape = torch.tensor([out_features, self.in_features], dtype=torch.int32)
            return {
                "weight_packed": _Viewed(self.parts["weight"], torch.int32),
                "weight_scale": _Symmetric(self.name, self.parts["scales"], self.parts["biases"]),
                "weight_shape": Constant(shape),
            }
        return None


class Encoder(NamedTuple):
    """A codec as what writes it.

    Attributes:
        codec: of layout.CODECS.
        parts: out, in -> local name -> (dtype as safetensors spells it, shape), of one matrix.
        encode: rows of a matrix -> the same rows of each part that is not in `fixed`, in order.
        multiple: rows that must be encoded together.
        fixed: out, in -> local name -> bytes that do not depend on the weights.
    """

    codec: str
    parts: Callable[[int, int], dict[str, tuple[str, tuple[int, ...]]]]
    encode: Callable[[Tensor], Sequence[Tensor]]
    multiple: int = 1
    fixed: Callable[[int, int], dict[str, bytes]] = lambda out_features, in_features: {}


def int4_encoder(group_size: int, convention: str, recover: bool) -> Encoder:
    """The hub's INT4 form; `recover` takes weights that lie on a grid back to it and refuses others."""

    def encode(rows: Tensor) -> Sequence[Tensor]:
        codes, scale = (
            int4.recover(rows, group_size) if recover else int4.quantize(rows, group_size, convention)
        )
        return int4.pack(codes), scale

    def fixed(out_features: int, in_features: int) -> dict[str, bytes]:
        return {
            "weight_shape": torch.tensor([out_features, in_features], dtype=torch.int32).numpy().tobytes()
        }

    def parts(out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return int4_pack.layout(out_features, in_features, group_size)

    return Encoder("int4", parts, encode, fixed=fixed)


def affine_encoder(group_size: int, convention: str, recover: bool) -> Encoder:
    """The same codes and scales in MLX's form: value = code * scale + bias with codes 0..15, so bias = -8 * scale."""
    packed = int4_encoder(group_size, convention, recover)

    def encode(rows: Tensor) -> Sequence[Tensor]:
        words, scale = packed.encode(rows)
        return words.view(torch.uint32), scale, _biases(scale)

    def parts(out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        (_, words), (_, groups), _ = packed.parts(out_features, in_features).values()
        return {"weight": ("U32", words), "scales": ("BF16", groups), "biases": ("BF16", groups)}

    return Encoder("affine", parts, encode)


def fp8_encoder(block: tuple[int, int], recover: bool) -> Encoder:
    """FP8 with a scale per block; `recover` takes weights that were decoded from FP8 back to it and refuses others."""

    def encode(rows: Tensor) -> Sequence[Tensor]:
        return fp8_block.recover(rows, block) if recover else fp8_block.encode(rows, block)

    def parts(out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return fp8_block.layout(out_features, in_features, block)

    return Encoder("fp8", parts, encode, multiple=block[0])


def _biases(scale: Tensor) -> Tensor:
    return scale * -8


class _Viewed(LazyTensor):
    """The same bytes as another type of the same size."""

    def __init__(self, source: LazyTensor, dtype: torch.dtype) -> None:
        self.source, self.shape, self.dtype = source, source.shape, dtype

    def fill(self, place: Tensor, region: tuple[slice, ...]) -> None:
        self.source.fill(place.view(self.source.dtype), region)


class _Mapped(LazyTensor):
    """A function of each entry."""

    def __init__(self, source: LazyTensor, function: Callable[[Tensor], Tensor]) -> None:
        self.source, self.function, self.shape, self.dtype = source, function, source.shape, source.dtype

    def fill(self, place: Tensor, region: tuple[slice, ...]) -> None:
        place.copy_(self.function(self.source[region]))


class _Symmetric(LazyTensor):
    """Scales of MLX's groups, whose biases must be those of a grid around zero."""

    def __init__(self, name: str, scales: LazyTensor, biases: LazyTensor) -> None:
        self.name, self.scales, self.biases = name, scales, biases
        self.shape, self.dtype = scales.shape, torch.bfloat16
        if scales.dtype != torch.bfloat16:
            raise CheckpointError(
                f"{name} has {scales.dtype} scales: expected torch.bfloat16, as INT4 has; --codec bf16 decodes them."
            )

    def fill(self, place: Tensor, region: tuple[slice, ...]) -> None:
        self.scales.fill(place, region)
        if not torch.equal(self.biases[region], _biases(place)):
            raise CheckpointError(
                f"{self.name} has groups whose biases are not -8 times their scales: expected weights that came from INT4; "
                "--codec bf16 decodes others."
            )


class _Affine(Decoded):
    """MLX's groups of 4-bit codes 0..15: code * scale + bias in float32, rounded once. Parts weight, scales, biases."""

    def __init__(self, name: str, parts: Mapping[str, LazyTensor], dtype: torch.dtype) -> None:
        out_features, words = parts["weight"].shape
        super().__init__(name, parts, (out_features, words * int4_pack.PER_INT32), dtype)

    def decode(self, start: int, stop: int, place: Tensor) -> None:
        words = self.parts["weight"][start:stop].view(torch.int32)
        scales, biases = (self.parts[part][start:stop].float().unsqueeze(-1) for part in ("scales", "biases"))
        codes = int4_pack.unpack(words, self.shape[1]).float().add_(8).unflatten(1, (scales.shape[1], -1))
        place.copy_(codes.mul_(scales).add_(biases).flatten(1))
