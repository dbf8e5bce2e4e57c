"""INT4 weights in compressed-tensors' `pack-quantized` form: K2-Thinking's and K2.5's routed experts.

`weight_packed` int32 [out, ceil(in/8)], `weight_scale` bf16 [out, in/group], `weight_shape` int [2]. Codes -8..7 are stored
offset-binary (code + 8), eight per int32, the first in the low nibble; w = code * scale. Oracle: compressed_tensors'
`pack_to_int32` and `unpack_from_int32`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

NAMES = ("weight_packed", "weight_scale", "weight_shape")
PER_INT32 = 8


def unpack(packed: Int[Tensor, "out packed_in"], in_features: int) -> Int8[Tensor, "out in"]:
    """The codes -8..7 as int8 [out, in_features]; `packed` is int32 [out, ceil(in_features/8)]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15  # (out, packed_in, 8); the sign bits are masked off
    return (nibbles - 8).to(torch.int8).flatten(1)[:, :in_features]


def decode(
    packed: Int[Tensor, "out packed_in"],
    scale: Float[Tensor, "out groups"],
    dtype: torch.dtype,
    shape: Int[Tensor, "2"] | None = None,
) -> Float[Tensor, "out in"]:
    """The weight in `dtype` [out, in]: code * scale in float32, rounded once (equal to a bf16 multiply for bf16).

    Raises:
        ValueError: `shape` does not fit `packed`, or the groups do not divide the input width.
    """
    rows, packed_cols = packed.shape
    out_features, in_features = (rows, packed_cols * PER_INT32) if shape is None else (int(n) for n in shape)
    if out_features != rows or -(-in_features // PER_INT32) != packed_cols:
        raise ValueError(
            f"INT4 weight_shape [{out_features}, {in_features}] does not fit weight_packed [{rows}, {packed_cols}]: "
            f"expected [{out_features}, {-(-in_features // PER_INT32)}]."
        )
    groups = scale.shape[1]
    if scale.shape[0] != rows or in_features % groups:
        raise ValueError(
            f"INT4 weight_scale {list(scale.shape)} does not divide a [{out_features}, {in_features}] weight into groups."
        )
    out = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    for start in range(0, rows, 256):  # one band of rows at a time: the int32 and float32 copies stay small
        band = slice(start, start + 256)
        codes = unpack(packed[band], in_features).float().unflatten(1, (groups, -1))
        out[band] = (codes * scale[band].float().unsqueeze(-1)).flatten(1).to(dtype)
    return out
