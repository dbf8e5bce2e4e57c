"""FP8 e4m3 weights with one float32 scale per 128x128 block: DeepSeek-V3's and Kimi-K2-Instruct's form.

`weight` float8_e4m3fn [out, in] and `weight_scale_inv` float32 [ceil(out/128), ceil(in/128)]; w = weight * scale of its
block. The last block of a side may be partial (`kv_a_proj_with_mqa` has 576 = 4.5 x 128 rows): the grid is anchored at
the first row and column, never stretched. Source: DeepSeek-V3's README_WEIGHTS.md.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

NAMES = ("weight", "weight_scale_inv")
_FLOAT32_BITS = 0x87F00000 - (1 << 32)  # the sign, four bits of exponent and three of mantissa, as an int32
_LARGEST = 448.0


def decode(
    weight: Shaped[Tensor, "out in"],
    scale_inv: Float[Tensor, "blocks_out blocks_in"],
    dtype: torch.dtype,
    block: tuple[int, int] = (128, 128),
) -> Float[Tensor, "out in"]:
    """The weight in `dtype` [out, in]: multiplied in float32, rounded once.

    Raises:
        ValueError: the scale grid is not ceil(out/block) x ceil(in/block).
    """
    rows, cols = weight.shape
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    if tuple(scale_inv.shape) != grid:
        raise ValueError(
            f"FP8 scale grid of a [{rows}, {cols}] weight must be {list(grid)} for {block[0]}x{block[1]} blocks, "
            f"got {list(scale_inv.shape)}."
        )
    out = torch.empty(rows, cols, dtype=dtype, device=weight.device)
    bytes_ = weight.view(torch.int8)
    column_scale = scale_inv.float().repeat_interleave(block[1], dim=1)[:, :cols]  # (blocks_out, in)
    buffer = torch.empty(min(block[0], rows), cols, dtype=torch.int32, device=weight.device)
    for index in range(grid[0]):  # one band of rows at a time: the float32 copy stays in cache
        band = slice(index * block[0], min((index + 1) * block[0], rows))
        bits = buffer[: band.stop - band.start].copy_(bytes_[band])
        # e4m3's exponent and mantissa in float32's places are the value times 2^-120: eight times faster than a cast.
        bits.bitwise_left_shift_(20).bitwise_and_(_FLOAT32_BITS)
        values = bits.view(torch.float32).mul_(2.0**120)
        if values.abs().amax() > _LARGEST:  # e4m3fn has no infinity; its two NaN bytes would read as 480
            values.masked_fill_(values.abs() > _LARGEST, torch.nan)
        out[band] = values.mul_(column_scale[index])
    return out
