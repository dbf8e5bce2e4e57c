"""Products with INT4 weights that stay packed, by torch's own operations: ATen's CPU kernel for few rows, bands for many.

Few rows are cpu_kernel.py's where a C compiler is; `linear` is for the machines without: it reads four bits a weight, so
with a row or a few it is still faster than a product with bfloat16 weights.
`linear_dequantized` dequantises a band of weights at a time into a buffer that stays in the cache, and multiplies it by
all rows; it takes the hub's form and the kernel's, and neither is ever dequantised whole. `linear_transposed` is the same
for gradients. `threshold` says from how many rows on the second way is faster.

A CPU without bfloat16 instructions emulates their products, many times slower than float32's. There the bands are float32
and results are rounded once, at the end: faster, and nearer to the exact product, because the weights are not rounded to
bfloat16 either; only then do both ways compute with the same weights.

Given up: gradients (these are the parts of an autograd function: ATen's kernel has no derivative, and torch would keep
every band), and kernels for other devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from ..cpu.library import has_bfloat16_instructions
from .codecs import int4_pack
from .kernel_layout import known_layout

_BAND = 1 << 20  # weights dequantised at a time: smaller bands cost more in calls than they save in cache


def threshold(dtype: torch.dtype) -> int:
    """From how many rows on `linear_dequantized` is faster than `linear`, for rows of this dtype.

    Measured with AVX2 and without bfloat16 instructions, by `OMP_NUM_THREADS=1 python benchmarks/int4_linear.py
    --threshold --rows 1 16 32 40 48 64`: in bfloat16 the two ways meet near 40 rows on one thread, near 70 on two.
    For other dtypes ATen has no vector code on x86, or none at all: from the first row on.
    """
    return 48 if dtype == torch.bfloat16 else 1


def linear(
    x: Float[Tensor, "*rows in"],
    kernel: UInt8[Tensor, "out half_in"],
    scales_and_zeros: Float[Tensor, "groups out 2"],
) -> Float[Tensor, "*rows out"]:
    """x @ W.T by ATen's kernel.

    Args:
        x: [..., in], bfloat16 or float32; on x86 ATen has vector code for bfloat16 only.
        kernel: uint8 [out, in / 2] of `kernel_layout.to_kernel`.
        scales_and_zeros: [in / group size, out, 2] of the same. Another dtype than that of `x` is converted at each
            call: 0.2 ms for 2048 x 7168, a tenth of the product with one row.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: the shapes do not fit.
    """
    group_size = _group_size(2 * kernel.shape[1], scales_and_zeros.shape[0])
    rows = _rows(x, 2 * kernel.shape[1]).contiguous()
    scales = scales_and_zeros.to(x.dtype).contiguous()
    out = x.new_empty(0, kernel.shape[0])
    if rows.shape[0]:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, kernel, group_size, scales)
    return out.view(*x.shape[:-1], kernel.shape[0])


def linear_dequantized(
    x: Float[Tensor, "*rows in"],
    weight: Int32[Tensor, "out packed_in"] | UInt8[Tensor, "out packed_in"],
    scale: Float[Tensor, ...],
    out: Float[Tensor, "*rows out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """x @ W.T, a band of W's rows at a time.

    Args:
        x: [..., in], any floating dtype.
        weight: the hub's form, int32 [out, in / 8], or the kernel's, uint8 [out, in / 2].
        scale: [out, in / group size] or [in / group size, out, 2] to match.
        out: where to write, contiguous, in the dtype of `x`.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: the shapes do not fit.
    """
    num_out, num_in, group_size = _sizes(weight, scale)
    rows, out = _rows(x, num_in), _place(x, num_out, out)
    rows = rows.to(_working(x))
    for band in _bands(num_out, num_in, _row_step(weight)):
        product = rows @ _tile(weight, scale, band, slice(0, num_in), group_size, rows.dtype).T
        out.view(-1, num_out)[:, band] = product
    return out


def linear_transposed(
    x: Float[Tensor, "*rows out"],
    weight: Int32[Tensor, "out packed_in"] | UInt8[Tensor, "out packed_in"],
    scale: Float[Tensor, ...],
    out: Float[Tensor, "*rows in"] | None = None,
) -> Float[Tensor, "*rows in"]:
    """x @ W, the gradient of a linear layer's input, a band of W's columns at a time.

    A band of columns makes columns of the result that are final: they are summed within one product and rounded once.

    Args:
        x: [..., out], any floating dtype.
        weight, scale: as for `linear_dequantized`.
        out: where to write, contiguous, in the dtype of `x`.

    Returns:
        [..., in] in the dtype of `x`.

    Raises:
        ValueError: the shapes do not fit.
    """
    num_out, num_in, group_size = _sizes(weight, scale)
    rows, out = _rows(x, num_out), _place(x, num_in, out)
    rows = rows.to(_working(x))
    for band in _bands(num_in, num_out, math.lcm(group_size, int4_pack.PER_INT32)):
        product = rows @ _tile(weight, scale, slice(0, num_out), band, group_size, rows.dtype)
        out.view(-1, num_in)[:, band] = product
    return out


def _working(x: Tensor) -> torch.dtype:
    """The dtype of bands and products."""
    if x.device.type == "cpu" and not (x.dtype == torch.bfloat16 and has_bfloat16_instructions()):
        return torch.promote_types(x.dtype, torch.float32)
    return x.dtype


def _tile(
    weight: Tensor, scale: Tensor, rows: slice, inputs: slice, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Dequantised weights [rows, inputs] of a whole number of blocks and groups.

    float32 holds the product of a code and a bfloat16 scale exactly, and takes less time to convert to than bfloat16.
    """
    wide = torch.promote_types(dtype, torch.float32)
    groups = slice(inputs.start // group_size, inputs.stop // group_size)
    num_inputs = inputs.stop - inputs.start
    if weight.dtype == torch.int32:
        per = int4_pack.PER_INT32
        tile = int4_pack.unpack(weight[rows, inputs.start // per : inputs.stop // per], num_inputs).to(wide)
        scale = scale[rows, groups].to(wide)
    else:
        layout = known_layout()
        tile = torch.empty(rows.stop - rows.start, num_inputs, dtype=wide, device=weight.device)
        for span, width in layout.spans(rows.start, rows.stop):
            place = tile[span.start - rows.start : span.stop - rows.start].view(-1, width, num_inputs)
            pairs = weight[span].view(-1, 2 * weight.shape[1], width // 2)[:, inputs]
            pairs = pairs.transpose(1, 2).contiguous()  # (blocks, width / 2, inputs)
            low, high = layout.halves[width]
            place[:, low] = (pairs & 15).view(torch.int8).sub_(8)
            place[:, high] = (pairs >> 4).view(torch.int8).sub_(8)
        scale = scale[groups, rows, 0].to(wide).T
    return tile.unflatten(1, (-1, group_size)).mul_(scale.unsqueeze(-1)).flatten(1).to(dtype)


def _bands(length: int, other: int, step: int) -> Iterator[slice]:
    """`length` in bands of `_BAND` weights, of a multiple of `step`, where the other side is `other` long."""
    size = max(1, _BAND // max(1, other * step)) * step
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _row_step(weight: Tensor) -> int:
    return 1 if weight.dtype == torch.int32 else known_layout().block


def _sizes(weight: Tensor, scale: Tensor) -> tuple[int, int, int]:
    """out, in, group size."""
    num_out, per = weight.shape[0], int4_pack.PER_INT32 if weight.dtype == torch.int32 else 2
    num_in, hub = weight.shape[1] * per, weight.dtype == torch.int32
    fits = scale.dim() == 2 and scale.shape[0] == num_out
    if not hub:
        fits = scale.dim() == 3 and scale.shape[1:] == (num_out, 2)
    if not fits:
        expected = f"[{num_out}, groups]" if hub else f"[groups, {num_out}, 2]"
        raise ValueError(
            f"INT4 scales are {list(scale.shape)}, but the weights {weight.dtype} {list(weight.shape)} have {num_out} "
            f"rows: expected {expected}."
        )
    return num_out, num_in, _group_size(num_in, scale.shape[1 if hub else 0])


def _group_size(num_in: int, num_groups: int) -> int:
    if num_groups == 0 or num_in % num_groups:
        raise ValueError(
            f"{num_groups} INT4 groups do not divide {num_in} inputs: expected a divisor of {num_in}."
        )
    return num_in // num_groups


def _rows(x: Tensor, features: int) -> Tensor:
    if x.shape[-1] != features:
        raise ValueError(
            f"Rows have {x.shape[-1]} features, but the INT4 weights take {features}: expected {features}."
        )
    return x.reshape(-1, features)


def _place(x: Tensor, features: int, out: Tensor | None) -> Tensor:
    shape = (*x.shape[:-1], features)
    if out is None:
        return x.new_empty(shape)
    if out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, contiguous: {out.is_contiguous()}: expected a contiguous {x.dtype} "
            f"{list(shape)}."
        )
    return out
