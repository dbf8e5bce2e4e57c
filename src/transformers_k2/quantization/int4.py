"""The INT4 grid of Kimi's routed experts: quantise, dequantise, pack, unpack and fake-quantise, each in one place.

A weight is code * scale with one bfloat16 scale for each group of consecutive inputs. Two conventions exist, and one read
as the other changes weights:

  kimi                scale = bf16(amax / 7), codes -7..7: what the published K2 checkpoints hold. Weights in bfloat16 that
                      lie on this grid are quantised to themselves.
  compressed_tensors  scale = bf16(amax / 7.5), codes -8..7, the quotient rounded in the dtype of the weights: what that
                      library's own quantiser computes.

Codes are rounded against the stored scale, not against the one before its rounding, so training, file and serving agree.
Given up: asymmetric grids, other widths, and a floor under scales: a group of zeros has scale 0 and codes 0. A compiled
`fake_quantize` equals this one only with `torch._inductor.config.emulate_precision_casts = True`.
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


def quantize(
    w: Float[Tensor, "*stack out in"], group_size: int = GROUP_SIZE, convention: str = "kimi"
) -> tuple[Int8[Tensor, "*stack out in"], BFloat16[Tensor, "*stack out groups"]]:
    """Codes and scales of weights.

    Args:
        w: [..., out, in], any floating dtype.
        group_size: consecutive inputs that share a scale.
        convention: of CONVENTIONS.

    Returns:
        Codes int8 [..., out, in] and scales bfloat16 [..., out, in / group_size]. Weights that are not finite give scales
        that are not.

    Raises:
        ValueError: the groups do not divide the inputs, or no such convention.
    """
    rule = _rule(convention)
    num_groups = count_groups(w.shape[-1], group_size)
    rows = w.detach().reshape(-1, w.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8, device=w.device)
    scale = torch.empty(rows.shape[0], num_groups, dtype=torch.bfloat16, device=w.device)
    for band in _bands(rows):
        groups = rows[band].unflatten(1, (num_groups, group_size))
        scale[band] = _scales(groups, rule)
        codes[band] = _codes(groups, scale[band], rule).flatten(1)
    return codes.view(w.shape), scale.view(*w.shape[:-1], num_groups)


def dequantize(
    codes: Int8[Tensor, "*stack out in"], scale: Float[Tensor, "*stack out groups"], dtype: torch.dtype
) -> Float[Tensor, "*stack out in"]:
    """code * scale in float32 (float64 if `dtype` is), rounded once to `dtype`; for bfloat16 that is its own multiply.

    Raises:
        ValueError: the number of groups does not divide the inputs.
    """
    in_features, num_groups = codes.shape[-1], scale.shape[-1]
    if num_groups == 0 or in_features % num_groups:
        raise ValueError(
            f"INT4 scales {list(scale.shape)} do not cut {in_features} inputs into equal groups: expected a last size "
            f"that divides {in_features}."
        )
    rows, scales = codes.reshape(-1, in_features), scale.reshape(-1, num_groups)
    out = torch.empty(rows.shape, dtype=dtype, device=codes.device)
    for band in _bands(rows):
        out[band] = _products(rows[band].unflatten(1, (num_groups, -1)), scales[band], dtype).flatten(1)
    return out.view(codes.shape)


def pack(codes: Int8[Tensor, "*stack out in"]) -> Int32[Tensor, "*stack out packed"]:
    """Eight codes an int32, offset by 8, the first in the lowest bits; the last int32 of a row is filled up with zero bits.

    Raises:
        ValueError: a code outside -8..7.
    """
    if codes.numel() and not -8 <= (lowest := int(codes.amin())) <= (highest := int(codes.amax())) <= 7:
        raise ValueError(f"INT4 codes run from {lowest} to {highest}: expected -8 to 7.")
    offset = (codes + 8).view(torch.uint8)
    offset = F.pad(offset, (0, -codes.shape[-1] % int4_pack.PER_INT32)).contiguous()
    pairs = offset.view(torch.int16)  # two codes, the first in the low byte
    return pairs.bitwise_right_shift(4).bitwise_or_(pairs).to(torch.uint8).view(torch.int32)


def unpack(packed: Int32[Tensor, "*stack out packed"], in_features: int) -> Int8[Tensor, "*stack out in"]:
    """The codes -8..7 that `pack` packed: int8 [..., out, in_features].

    Raises:
        ValueError: `in_features` codes do not take that many int32.
    """
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
    under `compressed_tensors` those at amax, if positive.

    Raises:
        ValueError: as `quantize`.
    """
    return _StraightThrough.apply(w, group_size, convention)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, group_size: int, convention: str) -> Tensor:
        rule = _rule(convention)
        num_groups = count_groups(w.shape[-1], group_size)
        ctx.rule, ctx.group_size = rule, group_size
        if rule.lowest != -HIGHEST:
            ctx.save_for_backward(w)
        rows = w.reshape(-1, w.shape[-1])
        out = torch.empty(rows.shape, dtype=w.dtype, device=w.device)
        for band in _bands(rows):
            groups = rows[band].unflatten(1, (num_groups, group_size))
            scale = _scales(groups, rule)
            out[band] = _products(_codes(groups, scale, rule), scale, w.dtype).flatten(1)
        return out.view(w.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rule: Convention = ctx.rule
        if rule.lowest == -HIGHEST:
            return grads[0], None, None
        (w,) = ctx.saved_tensors
        groups = w.unflatten(-1, (-1, ctx.group_size))
        codes = _quotients(groups, _scales(groups, rule), rule).round_()
        inside = (codes >= rule.lowest) & (codes <= HIGHEST)
        return grads[0] * inside.flatten(-2), None, None


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


def _scales(groups: Tensor, rule: Convention) -> Tensor:
    """[..., groups, group size] -> bfloat16 [..., groups]."""
    return _widened(groups.abs().amax(-1)).div_(rule.divisor).to(torch.bfloat16)


def _quotients(groups: Tensor, scale: Tensor, rule: Convention) -> Tensor:
    """Weights in units of their scale. Where that is 0, so are the weights, or next to it: they count in units of 1."""
    divisor = scale.masked_fill(scale == 0, 1).unsqueeze(-1)
    return (_widened(groups) if rule.wide else groups) / divisor


def _codes(groups: Tensor, scale: Tensor, rule: Convention) -> Tensor:
    """[..., groups, group size], whole numbers in a floating dtype; ties go to the even code."""
    return _quotients(groups, scale, rule).clamp_(rule.lowest, HIGHEST).round_()


def _products(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scale.to(wide).unsqueeze(-1)).to(dtype)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _bands(rows: Tensor) -> Iterator[slice]:
    """Rows a few at a time: on a CPU the copies between two operations stay in its cache, elsewhere they stay small."""
    size = 1 << (16 if rows.device.type == "cpu" else 26)
    num_rows = max(1, size // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], num_rows):
        yield slice(start, start + num_rows)
