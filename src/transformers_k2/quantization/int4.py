"""The INT4 grid of Kimi's routed experts: quantise, dequantise, pack, unpack and fake-quantise, each in one place.

A weight is code * scale with one bfloat16 scale for each group of consecutive inputs. Two conventions exist, and one read
as the other changes weights:

  kimi                scale = bf16(amax / 7), codes -7..7: what the published K2 checkpoints hold. Weights in bfloat16 that
                      lie on this grid are quantised to themselves.
  compressed_tensors  scale = bf16(amax / 7.5), codes -8..7, the quotient rounded in the dtype of the weights: what that
                      library's own quantiser computes.

Codes are rounded against the stored scale, not against the one before its rounding, so training, file and serving agree.
A compiler that fuses these operations rounds elsewhere, or less often, and changes 7% of bfloat16 weights; so
`fake_quantize` is an operation of its own, which torch.compile calls as it is.

Given up: asymmetric grids, other widths, and a floor under scales: a group of zeros has scale 0 and codes 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int8, Int32
from torch import Tensor

from .codecs import int4_pack


@dataclass(frozen=True)
class Convention:
    """How a group's scale and codes follow from its weights.

    Attributes:
        divisor: of the largest magnitude.
        lowest: code; the highest is 7.
        wide: divide weights by scales in float32 at least, whatever the dtype of the weights.
    """

    divisor: float
    lowest: int
    wide: bool


CONVENTIONS: Mapping[str, Convention] = {
    "kimi": Convention(7.0, -7, wide=True),
    "compressed_tensors": Convention(7.5, -8, wide=False),
}
HIGHEST = 7
GROUP_SIZE = 32

# Where `recover` looks for a group's scale: the largest magnitude over the code it may stand for, as so many steps of
# bfloat16 to either side. Over a power of two the quotient is exact, and 7 without a step is what `quantize` tries.
_CANDIDATES = (
    (7, 1),
    (7, -1),
    (8, 0),
    *((code, step) for code in (6, 5, 3) for step in (0, 1, -1)),
    (4, 0),
    (2, 0),
    (1, 0),
)
_RECOVERED = 1 << 19  # weights compared at a time: 6 MB with the copies between two operations


def quantize(
    w: Float[Tensor, "*stack out in"], group_size: int = GROUP_SIZE, convention: str = "kimi"
) -> tuple[Int8[Tensor, "*stack out in"], BFloat16[Tensor, "*stack out groups"]]:
    """Codes and scales of weights.

    Args:
        w: [..., out, in], any floating dtype.
        group_size: consecutive inputs that share a scale.
        convention: of CONVENTIONS.

    Returns:
        Codes int8 [..., out, in] and scales bfloat16 [..., out, in / group_size].

    Raises:
        ValueError: weights that are not finite, groups that do not divide the inputs, or no such convention.
    """
    rule = _rule(convention)
    num_groups = count_groups(w.shape[-1], group_size)
    rows = w.detach().reshape(-1, w.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8, device=w.device)
    scale = torch.empty(rows.shape[0], num_groups, dtype=torch.bfloat16, device=w.device)
    for band in _bands(rows):
        groups = _grouped(rows[band], group_size, rule)
        scale[band] = band_scale = _scales(groups, rule)
        # No quotient is larger than 15, also where the scale is the least number there is: an int8 holds all.
        codes[band] = _quotients(groups, band_scale).round_().flatten(1)
        codes[band].clamp_(rule.lowest, HIGHEST)
    if not scale.isfinite().all():
        _check_finite(w)
    return codes.view(w.shape), scale.view(*w.shape[:-1], num_groups)


def scales(
    w: Float[Tensor, "*stack out in"], group_size: int = GROUP_SIZE, convention: str = "kimi"
) -> BFloat16[Tensor, "*stack out groups"]:
    """The scales of `quantize`, without the codes.

    Raises:
        ValueError: as `quantize`.
    """
    rule = _rule(convention)
    num_groups = count_groups(w.shape[-1], group_size)
    rows = w.detach().reshape(-1, w.shape[-1])
    scale = torch.empty(rows.shape[0], num_groups, dtype=torch.bfloat16, device=w.device)
    for band in _bands(rows):
        scale[band] = _scales(_grouped(rows[band], group_size, rule), rule)
    if not scale.isfinite().all():
        _check_finite(w)
    return scale.view(*w.shape[:-1], num_groups)


def recover(
    w: Float[Tensor, "*stack out in"], group_size: int = GROUP_SIZE
) -> tuple[Int8[Tensor, "*stack out in"], BFloat16[Tensor, "*stack out groups"]]:
    """Codes and scales of weights that were dequantised, whichever the rule of their scales: nothing is rounded.

    `quantize` finds the grid of a bfloat16 checkpoint whose scales are bf16(amax / 7); those from float32 masters often
    lie one step of bfloat16 beside, and a group need not use the code 7. Each group gets the scale that `quantize` chooses
    if that reproduces it, else another that does: `dequantize(codes, scale, w.dtype)` equals `w`, but for the sign of zeros.

    Args:
        w: [..., out, in], bfloat16 or wider.
        group_size: consecutive inputs that share a scale.

    Returns:
        Codes int8 [..., out, in], -8..7, and scales bfloat16 [..., out, in / group_size].

    Raises:
        ValueError: groups on no grid, weights that are not finite, float16, or groups that do not divide the inputs.
    """
    if w.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"INT4 weights to recover are {w.dtype}: expected torch.bfloat16, torch.float32 or torch.float64."
        )
    codes, scale = quantize(w, group_size)
    rows = w.detach().reshape(-1, w.shape[-1])
    num_missed = torch.zeros(rows.shape[0], dtype=torch.int64, device=w.device)
    for band in _bands(rows, _RECOVERED):
        groups = rows[band].reshape(-1, group_size)
        missed = _recover(
            groups, codes.view(rows.shape)[band].view(groups.shape), scale.view(len(rows), -1)[band].view(-1)
        )
        num_missed[band] = missed.div(scale.shape[-1], rounding_mode="floor").bincount(
            minlength=len(rows[band])
        )
    if num_missed.any():
        bad = num_missed.nonzero().squeeze(1)
        raise ValueError(
            f"{list(w.shape)} has {int(num_missed.sum())} groups of {group_size} weights on no INT4 grid with bfloat16 "
            f"scales, in {len(bad)} of {len(rows)} rows ({_indices(bad, w.shape[:-1])}): expected dequantised weights in "
            "the dtype they were dequantised to; `quantize` rounds others."
        )
    return codes, scale


def dequantize(
    codes: Int8[Tensor, "*stack out in"], scale: Float[Tensor, "*stack out groups"], dtype: torch.dtype
) -> Float[Tensor, "*stack out in"]:
    """code * scale in float32 (float64 if `dtype` is), rounded once to `dtype`; for bfloat16 that is its own multiply.

    Raises:
        ValueError: scales of other rows, or the number of groups does not divide the inputs.
    """
    in_features, num_groups = codes.shape[-1], scale.shape[-1]
    if num_groups == 0 or in_features % num_groups:
        raise ValueError(
            f"INT4 scales {list(scale.shape)} do not cut {in_features} inputs into equal groups: expected a last size "
            f"that divides {in_features}."
        )
    if scale.shape[:-1] != codes.shape[:-1]:
        raise ValueError(
            f"INT4 scales {list(scale.shape)} are not those of codes {list(codes.shape)}: expected "
            f"{[*codes.shape[:-1], num_groups]}."
        )
    rows, scales = codes.reshape(-1, in_features), scale.reshape(-1, num_groups)
    out = torch.empty(rows.shape, dtype=dtype, device=codes.device)
    for band in _bands(rows):
        out[band] = _products(rows[band].unflatten(1, (num_groups, -1)), scales[band], dtype).flatten(1)
    return out.view(codes.shape)


def pack(codes: Int8[Tensor, "*stack out in"]) -> Int32[Tensor, "*stack out packed"]:
    """Eight codes an int32, offset by 8, the first in the lowest bits; the last int32 of a row is filled up with zero bits.

    Raises:
        ValueError: a code outside -8..7, or another type than int8.
    """
    if codes.dtype is not torch.int8:
        raise ValueError(f"INT4 codes are {codes.dtype}: expected torch.int8, as `quantize` returns them.")
    if codes.numel() and not -8 <= (lowest := int(codes.amin())) <= (highest := int(codes.amax())) <= 7:
        raise ValueError(f"INT4 codes run from {lowest} to {highest}: expected -8 to 7.")
    offset = (codes + 8).view(torch.uint8)
    offset = F.pad(offset, (0, -codes.shape[-1] % int4_pack.PER_INT32)).contiguous()
    pairs = offset.view(torch.int16)  # two codes, the first in the low byte
    return pairs.bitwise_right_shift(4).bitwise_or_(pairs).to(torch.uint8).view(torch.int32)


def unpack(packed: Int32[Tensor, "*stack out packed"], in_features: int) -> Int8[Tensor, "*stack out in"]:
    """The codes -8..7 that `pack` packed: int8 [..., out, in_features].

    Raises:
        ValueError: `in_features` codes do not take that many int32, or another type than int32.
    """
    if packed.dtype is not torch.int32:
        raise ValueError(
            f"packed INT4 codes are {packed.dtype}: expected torch.int32, as `pack` returns them."
        )
    if packed.shape[-1] != -(-in_features // int4_pack.PER_INT32):
        raise ValueError(
            f"{in_features} INT4 codes take {-(-in_features // int4_pack.PER_INT32)} int32, but rows have "
            f"{packed.shape[-1]}: expected in_features from {packed.shape[-1] * 8 - 7} to {packed.shape[-1] * 8}."
        )
    rows = packed.reshape(-1, packed.shape[-1])
    return int4_pack.unpack(rows, in_features).reshape(*packed.shape[:-1], in_features)


def fake_quantize(
    w: Float[Tensor, "*stack out in"], group_size: int = GROUP_SIZE, convention: str = "kimi"
) -> Float[Tensor, "*stack out in"]:
    """dequantize(quantize(w)) in the dtype of `w`, with a straight-through gradient.

    The gradient passes unchanged, except for weights whose code was clipped: none under `kimi` (amax / 7 is in range),
    under `compressed_tensors` those at amax, if positive. Weights that are not finite make their group NaN: to look for
    them would stop a GPU at each forward. Compiled, it is the same operation, without a graph break.

    Raises:
        ValueError: the groups do not divide the inputs, or no such convention.
    """
    _rule(convention)
    count_groups(w.shape[-1], group_size)
    return _fake_quantize(w, group_size, convention)


@torch.library.custom_op(
    "transformers_k2::int4_fake_quantize",
    mutates_args=(),
    schema="(Tensor w, int group_size, str convention) -> Tensor",
)
def _fake_quantize(w: Tensor, group_size: int, convention: str) -> Tensor:
    rule = _rule(convention)
    rows = w.reshape(-1, w.shape[-1])
    out = torch.empty(rows.shape, dtype=w.dtype, device=w.device)
    for band in _bands(rows):
        groups = _grouped(rows[band], group_size, rule)
        scale = _scales(groups, rule)
        codes = _codes(groups, scale, rule).add_(0)  # an int8 has no -0
        out[band] = codes.mul_(scale.to(codes.dtype).unsqueeze(-1)).flatten(1)
    return out.view(w.shape)


@torch.library.custom_op(
    "transformers_k2::int4_clip_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor w, int group_size, str convention) -> Tensor",
)
def _clip_gradient(grad: Tensor, w: Tensor, group_size: int, convention: str) -> Tensor:
    """The gradient, but 0 for weights whose code was clipped."""
    rule = _rule(convention)
    rows, upstream = w.reshape(-1, w.shape[-1]), grad.reshape(-1, w.shape[-1])
    out = torch.empty(rows.shape, dtype=grad.dtype, device=w.device)
    for band in _bands(rows):
        groups = _grouped(rows[band], group_size, rule)
        codes = _quotients(groups, _scales(groups, rule)).round_()
        inside = (codes >= rule.lowest) & (codes <= HIGHEST)
        out[band] = upstream[band] * inside.flatten(1)
    return out.view(w.shape)


@_fake_quantize.register_fake
@_clip_gradient.register_fake
def _like(values: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    w, *ctx.settings = inputs
    ctx.clips = _rule(inputs[2]).lowest != -HIGHEST
    if ctx.clips:
        ctx.save_for_backward(w)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _clip_gradient(grad, *ctx.saved_tensors, *ctx.settings) if ctx.clips else grad, None, None


_fake_quantize.register_autograd(_straight_through, setup_context=_save)


def count_groups(in_features: int, group_size: int) -> int:
    """How many groups a row has.

    Raises:
        ValueError: the groups do not divide it.
    """
    if group_size < 1 or in_features % group_size:
        raise ValueError(
            f"INT4 group_size is {group_size}, but rows have {in_features} weights: expected a divisor of {in_features}."
        )
    return in_features // group_size


def _rule(convention: str) -> Convention:
    if convention not in CONVENTIONS:
        raise ValueError(f"INT4 convention is {convention!r}: expected one of {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[convention]


def _grouped(rows: Tensor, group_size: int, rule: Convention) -> Tensor:
    """[rows, in] -> [rows, groups, group size], in the dtype of the division."""
    return (_widened(rows) if rule.wide else rows).unflatten(1, (-1, group_size))


def _scales(groups: Tensor, rule: Convention) -> Tensor:
    """[..., groups, group size] -> bfloat16 [..., groups]."""
    return _widened(groups).abs().amax(-1).div_(rule.divisor).to(torch.bfloat16)


def _quotients(groups: Tensor, scale: Tensor) -> Tensor:
    """Weights in units of their scale. Where that is 0, so are the weights, or next to it: they count in units of 1."""
    divisor = scale.masked_fill(scale == 0, 1)
    return groups / divisor.to(torch.promote_types(groups.dtype, scale.dtype)).unsqueeze(-1)


def _codes(groups: Tensor, scale: Tensor, rule: Convention) -> Tensor:
    """[..., groups, group size], whole numbers in a floating dtype; ties go to the even code."""
    return _quotients(groups, scale).clamp_(rule.lowest, HIGHEST).round_()


def _recover(groups: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Exchange codes [groups, group size] and scales [groups] that do not give `groups`; the indices of those on no grid."""
    rule = Convention(7.0, -8, wide=True)
    # On a CPU both the comparison of bfloat16 and any() of short rows take several times as long as these.
    differ = _widened(_products(codes, scale, groups.dtype)) != _widened(groups)
    left = differ.view(torch.uint8).amax(-1).nonzero().squeeze(1)
    values = groups[left]
    largest = _widened(values.abs().amax(-1))
    for code, step in _CANDIDATES:
        if not len(left):
            break
        bits = (largest / code).to(torch.bfloat16).view(torch.int16)
        scales = bits.add_(step).view(torch.bfloat16)  # one below 0 is NaN and fits nothing
        found = torch.arange(len(left), device=left.device)
        for width in (4, values.shape[1]):  # four weights refute most scales
            part = values[:, :width][found]
            numbers = _codes(_widened(part), scales[found], rule)
            exact = (_products(numbers, scales[found], part.dtype) == part).all(-1)
            numbers, found = numbers[exact], found[exact]
        if not len(found):
            continue
        codes[left[found]], scale[left[found]] = numbers.to(torch.int8), scales[found]
        others = torch.ones_like(left, dtype=torch.bool).index_fill_(0, found, False)
        left, values, largest = left[others], values[others], largest[others]
    return left


def _check_finite(w: Tensor) -> None:
    """Raises: ValueError: it has weights that are NaN or infinite, or too large for a bfloat16 scale."""
    rows = w.detach().reshape(-1, w.shape[-1])
    counts = torch.cat([rows[band].float().isfinite().logical_not_().sum(-1) for band in _bands(rows)])
    if counts.any():
        raise ValueError(
            f"{list(w.shape)} has {int(counts.sum())} weights that are not finite, in rows "
            f"{_indices(counts.nonzero().squeeze(1), w.shape[:-1])}: expected finite float32 values."
        )


def _indices(rows: Tensor, shape: torch.Size) -> str:
    """The first few rows of a stack, counted as in [stack, out]."""
    shown = torch.stack(torch.unravel_index(rows[:4], shape), dim=1).tolist()
    return ", ".join(map(str, shown)) + (", ..." if len(rows) > len(shown) else "")


def _products(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scale.to(wide).unsqueeze(-1)).to(dtype)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _bands(rows: Tensor, size: int | None = None) -> Iterator[slice]:
    """Rows a few at a time: on a CPU the copies between two operations stay in its cache, elsewhere they stay small."""
    size = size or 1 << (18 if rows.device.type == "cpu" else 26)
    num_rows = max(1, size // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], num_rows):
        yield slice(start, start + num_rows)
