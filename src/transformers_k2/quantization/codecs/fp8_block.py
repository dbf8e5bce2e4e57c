"""FP8 e4m3 weights with one float32 scale per 128x128 block: DeepSeek-V3's and Kimi-K2-Instruct's form.

`weight` float8_e4m3fn [out, in] and `weight_scale_inv` float32 [ceil(out/128), ceil(in/128)]; w = weight * scale of its
block. The last block of a side may be partial (`kv_a_proj_with_mqa` has 576 = 4.5 x 128 rows): the grid is anchored at
the first row and column, never stretched. Sources: DeepSeek-V3's README_WEIGHTS.md; arXiv 2412.19437, section 3.3.

One band of rows, as high as a block, is worked on at a time: its float32 copy (3.7 MB for 7168 columns) stays in cache,
which makes torch's own cast to e4m3 fast enough. Given up: scales rounded to powers of two (ue8m0), and FP8 activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

NAMES = ("weight", "weight_scale_inv")
_FLOAT32_BITS = 0x87F00000 - (1 << 32)  # the sign, four bits of exponent and three of mantissa, as an int32
_LARGEST = 448.0
_NAN = 0x7F  # of either sign
_BAND = 1 << 17  # numbers decoded at a time
_SMALLEST = 2.0**-9  # the first subnormal
_NUM_MAGNITUDES = 127  # of finite codes, zero among them
# Whatever the codes of a block, they can be doubled until the largest is one of these (240 no further: 480 is no code).
_UPPER_CODES = (448, 416, 384, 352, 320, 288, 256, 240)
_NUM_ROWS_ASKED = 16
# Half the distance between neighbours of a dtype, as a difference of float32 bit patterns; float32's is rounded up.
_HALF_STEP = {torch.bfloat16: 0x8000, torch.float32: 1}


def decode(
    weight: Shaped[Tensor, "out in"],
    scale_inv: Float[Tensor, "blocks_out blocks_in"],
    dtype: torch.dtype,
    block: tuple[int, int] = (128, 128),
    out: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """The weight in `dtype` [out, in], written to `out` if that is given: multiplied in float32, rounded once.

    Raises:
        ValueError: the scale grid is not ceil(out/block) x ceil(in/block).
    """
    rows, cols = weight.shape
    grid = _grid(rows, cols, block)
    if tuple(scale_inv.shape) != grid:
        raise ValueError(
            f"FP8 scale grid of a [{rows}, {cols}] weight must be {list(grid)} for {block[0]}x{block[1]} blocks, "
            f"got {list(scale_inv.shape)}."
        )
    if out is None:
        out = torch.empty(rows, cols, dtype=dtype, device=weight.device)
    bytes_ = weight.view(torch.int8)
    # e4m3's exponent and mantissa in float32's places are the value times 2^-120: eight times faster than a cast. The
    # factor goes into the scale, unless that would overflow; the products are exact but for one rounding.
    scale, late = scale_inv.float(), 2.0**120
    if not scale.numel() or float(scale.abs().amax()) < 2.0**7:
        scale, late = scale * late, 1.0
    column_scale = scale.repeat_interleave(block[1], dim=1)[:, :cols]  # (blocks_out, in)
    num_rows = max(1, min(_BAND // max(1, cols), block[0], rows))
    buffer = torch.empty(num_rows, cols, dtype=torch.int32, device=weight.device)
    for start in range(0, rows, block[0]):
        stop = min(start + block[0], rows)
        for first in range(start, stop, num_rows):  # a few rows at a time: the float32 copy stays in cache
            band = slice(first, min(first + num_rows, stop))
            bits = buffer[: band.stop - band.start].copy_(bytes_[band])
            values = bits.bitwise_left_shift_(20).bitwise_and_(_FLOAT32_BITS).view(torch.float32)
            if late != 1.0:
                values.mul_(late)
            out[band] = values.mul_(column_scale[start // block[0]])
    if (
        weight.numel() and int(bytes_.bitwise_and(_NAN).amax()) == _NAN
    ):  # no infinity, but two NaN, read as 480 so far
        out.masked_fill_(bytes_.bitwise_and(_NAN) == _NAN, torch.nan)
    return out


def layout(
    out_features: int, in_features: int, block: tuple[int, int] = (128, 128)
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Local name -> (dtype as safetensors spells it, shape) of the tensors that store a weight, as on the hub."""
    shapes = ((out_features, in_features), _grid(out_features, in_features, block))
    return dict(zip(NAMES, zip(("F8_E4M3", "F32"), shapes, strict=True), strict=True))


def encode(
    weight: Float[Tensor, "out in"],
    block: tuple[int, int] = (128, 128),
    out: Shaped[Tensor, "out in"] | None = None,
) -> tuple[Shaped[Tensor, "out in"], Float[Tensor, "blocks_out blocks_in"]]:
    """The weight as float8_e4m3fn [out, in], written to `out` if that is given, and its float32 scales.

    `weight_scale_inv` is amax / 448 of a block's weights, a code w / scale_inv rounded to nearest even, both in float32.
    A block of zeros gets 1, as transformers' Fp8Quantize has it, and no scale is below float32's normal numbers, where a
    division by 448 loses so many digits that codes would overflow. `weight` may be a band of a larger matrix that
    starts at a multiple of block[0] rows: the result is that band of the larger result.

    Raises:
        ValueError: a weight is not finite in float32; the first such row and column is named.
    """
    rows, cols = weight.shape
    if out is None:
        out = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=weight.device)
    scale_inv = torch.empty(_grid(rows, cols, block), dtype=torch.float32, device=weight.device)
    buffer = torch.empty(min(block[0], rows), cols, dtype=torch.float32, device=weight.device)
    for index, start in enumerate(range(0, rows, block[0])):
        band = slice(start, min(start + block[0], rows))
        values = buffer[: band.stop - start]
        amax = _by_block(_load(weight[band], values), block[1], 0.0).amax(1)
        if not amax.isfinite().all():
            row, col = values.isfinite().logical_not_().nonzero()[0].tolist()
            raise ValueError(
                f"FP8 weights must be finite in float32, got {weight[start + row, col].item()} at row {start + row}, "
                f"column {col}."
            )
        scale_inv[index] = (amax.where(amax > 0, _LARGEST) / _LARGEST).clamp_min_(
            torch.finfo(torch.float32).tiny
        )
        out[band] = values.div_(scale_inv[index].repeat_interleave(block[1])[:cols])
    return out, scale_inv


def recover(
    weight: Float[Tensor, "out in"], block: tuple[int, int] = (128, 128)
) -> tuple[Shaped[Tensor, "out in"], Float[Tensor, "blocks_out blocks_in"]]:
    """The FP8 form of a weight that was decoded from one: float8_e4m3fn [out, in] and float32 scales.

    `weight` is bfloat16 or float32 [out, in]; decode(codes, scales, weight.dtype) equals it bit for bit, but for the sign
    of zeros. The scales need not be the lost ones: after rounding to bfloat16 many reproduce the weight. amax / 448 is
    taken where it does, else the middle of those that do. A block whose largest code is not 448 is found too,
    with its codes doubled until the largest is 240 or more.

    Raises:
        ValueError: another dtype; a weight is not finite; or blocks lie on no grid (how many, and the first).
    """
    if weight.dtype not in _HALF_STEP:
        raise ValueError(
            f"FP8 blocks are recovered from torch.bfloat16 or torch.float32, got {weight.dtype}."
        )
    rows, cols = weight.shape
    codes, scale_inv = encode(weight, block)
    buffer = torch.empty(min(block[0], rows), cols, dtype=weight.dtype, device=weight.device)
    lost: list[tuple[int, int]] = []
    for index, start in enumerate(range(0, rows, block[0])):
        band = slice(start, min(start + block[0], rows))
        if (
            weight.dtype is torch.bfloat16
        ):  # its amax is off by up to 1/256, a float32 one by nothing that matters
            # Codes of one mantissa ask the same of the scale, and there are eight: a few rows have them all.
            few = slice(start, min(start + _NUM_ROWS_ASKED, band.stop))
            lower, upper = _scale_bounds(weight[few], codes[few], block[1])
            guess = scale_inv[index]
            scale_inv[index] = guess.where((lower < guess) & (guess < upper), (lower + upper) / 2)
        decoded = decode(
            codes[band], scale_inv[index : index + 1], weight.dtype, block, buffer[: band.stop - start]
        )
        if torch.equal(decoded, weight[band]):
            continue
        for column in range(scale_inv.shape[1]):
            part = slice(column * block[1], min((column + 1) * block[1], cols))
            if torch.equal(decoded[:, part], weight[band, part]):
                continue
            found = _search(weight[band, part])
            if found is None:
                lost.append((index, column))
            else:
                codes[band, part], scale_inv[index, column] = found
    if lost:
        raise ValueError(
            f"{len(lost)} of {scale_inv.numel()} blocks of a [{rows}, {cols}] weight are on no FP8 grid, the first is block "
            f"{list(lost[0])}: expected weights that were decoded from {block[0]}x{block[1]} blocks; encode() rounds others."
        )
    return codes, scale_inv


def _grid(rows: int, cols: int, block: tuple[int, int]) -> tuple[int, int]:
    return -(-rows // block[0]), -(-cols // block[1])


def _by_block(columns: Float[Tensor, " in"], width: int, fill: float) -> Float[Tensor, "blocks_in width"]:
    """One number per column, as one row per block; the last row is filled up."""
    return pad(columns, (0, -len(columns) % width), value=fill).view(-1, width)


def _load(weight: Float[Tensor, "rows in"], values: Float[Tensor, "rows in"]) -> Float[Tensor, " in"]:
    """Fill `values` with the weight in float32; the largest magnitude of each column, not finite if the column is not."""
    if (
        weight.element_size() == 2
    ):  # without the sign, bit patterns order as magnitudes do, infinity and NaN last
        bits = values.view(torch.int16)[:, : weight.shape[1]]
        torch.bitwise_and(weight.view(torch.int16), 0x7FFF, out=bits)
        amax = bits.amax(0).view(weight.dtype).float()
        values.copy_(weight)
        return amax
    values.copy_(weight)
    return torch.maximum(values.amax(0), -values.amin(0))


def _scale_bounds(
    weight: Float[Tensor, "rows in"], codes: Shaped[Tensor, "rows in"], width: int
) -> tuple[Float[Tensor, " blocks_in"], Float[Tensor, " blocks_in"]]:
    """The least and the greatest scale with which the codes of one row of blocks may decode to the weight.

    Each element allows an interval: from halfway to the weight's neighbour below to halfway to the one above, over its
    code. Wide by the quotient's rounding and by a tie at either end. A code of zero allows any scale.
    """
    ones = torch.ones(1, -(-weight.shape[1] // width), device=weight.device)
    values = decode(codes, ones, torch.float32, (max(1, weight.shape[0]), width)).abs_()
    bits, half = weight.float().abs().view(torch.int32), _HALF_STEP[weight.dtype]
    upper = (bits + half).view(torch.float32).div_(values)
    lower = (bits - half).clamp_min_(0).view(torch.float32).div_(values.clamp_min_(_SMALLEST))
    return _by_block(lower.amax(0), width, 0.0).amax(1), _by_block(upper.amin(0), width, torch.inf).amin(1)


def _search(
    weight: Float[Tensor, "rows cols"],
) -> tuple[Shaped[Tensor, "rows cols"], Float[Tensor, ""]] | None:
    """Codes and scale of one block that is not zero, or None if it lies on no grid: every largest code is tried.

    The roundings of a weight and of the largest one move their quotient by less than 1/64, neighbouring codes are 1/16
    apart: given the largest code, the nearest codes are the only ones to try. Equal weights have equal codes, so that 127
    magnitudes stand for the block.
    """
    if (
        len(weight[:_NUM_ROWS_ASKED].float().abs().unique()) > _NUM_MAGNITUDES
    ):  # spares sorting the whole block
        return None
    magnitudes, place = weight.float().abs().unique(return_inverse=True)
    if len(magnitudes) > _NUM_MAGNITUDES:
        return None
    distinct = magnitudes.to(weight.dtype).unsqueeze(0)  # sorted
    shape = (1, len(magnitudes))
    for largest in _UPPER_CODES:
        codes = (magnitudes / (magnitudes[-1] / largest)).to(torch.float8_e4m3fn).unsqueeze(0)
        for scale in _candidates(*_scale_bounds(distinct, codes, shape[1])):
            if torch.equal(decode(codes, scale, weight.dtype, shape), distinct):
                signed = torch.copysign(codes[0].float()[place], weight.float())
                return signed.to(torch.float8_e4m3fn), scale[0, 0]
    return None


def _candidates(lower: Float[Tensor, " 1"], upper: Float[Tensor, " 1"]) -> Iterator[Float[Tensor, "1 1"]]:
    """The middle of a wide interval, which is sure to do; every float32 of a narrow one and the two beyond each end."""
    first, last = int(lower.view(torch.int32)), int(upper.view(torch.int32))
    if last - first >= 8:
        yield ((lower + upper) / 2).view(1, 1)
    else:
        for bits in range(first - 2, last + 3):
            yield torch.tensor([[bits]], dtype=torch.int32, device=lower.device).view(torch.float32)
