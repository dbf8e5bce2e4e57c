"""INT4 weights in the order that ATen's CPU product reads, and back: the same bytes in another place.

ATen packs rows in blocks. In a block the bytes of one input stand together, and a byte holds two rows' codes, where the
hub's byte holds two inputs of one row. Which rows share a byte, and how many make a block, depends on the vector
instructions that this process uses, so it is found by packing small tiles whose codes number their own places, once a
process; a layout made of anything but blocks, inputs and evenly spaced rows is an error. For the same reason kernel form
is for memory only: what is written to a file goes back to the hub's form first.

A block takes the same bytes in both forms, so both directions work in place, one band of blocks after the other. Given
up: rows that are no multiple of 16, and groups other than ATen's; `kernel_available` says so beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import BFloat16, Float, Int32, UInt8
from torch import Tensor

from .codecs import int4_pack

GROUP_SIZES = (32, 64, 128, 256)  # of ATen's kernel
MULTIPLE = 16  # of rows, likewise
DTYPES = (torch.bfloat16, torch.float32)
_BAND = 1 << 20  # weights moved at a time: 2 MB with the intermediate copies
_WIDEST = 128  # rows of a block that are looked for; AVX-512 has 64
_INPUTS = 32  # of a tile


@dataclass(frozen=True)
class Layout:
    """ATen's packing.

    Attributes:
        block: rows that are packed together; the last block of a matrix may have fewer.
        halves: for each number of rows in a block, those in the low halves of its bytes and those in the high halves.
    """

    block: int
    halves: Mapping[int, tuple[slice, slice]]

    def spans(self, start: int, stop: int) -> Iterator[tuple[slice, int]]:
        """Rows start to stop, as (rows, rows per block): whole blocks, and the shorter last one."""
        whole = stop - (stop - start) % self.block
        if start < whole:
            yield slice(start, whole), self.block
        if whole < stop:
            yield slice(whole, stop), stop - whole


def kernel_available(out_features: int, in_features: int, group_size: int, dtype: torch.dtype) -> bool:
    """Whether a matrix of this shape has a kernel form here, and ATen multiplies it with rows of this dtype."""
    fits = out_features > 0 and out_features % MULTIPLE == 0 and group_size in GROUP_SIZES
    return fits and in_features % group_size == 0 and dtype in DTYPES and find_layout() is not None


def to_kernel(
    packed: Int32[Tensor, "*stack out packed_in"], scale: BFloat16[Tensor, "*stack out groups"]
) -> tuple[UInt8[Tensor, "*stack out half_in"], BFloat16[Tensor, "*stack groups out 2"]]:
    """The hub's form in ATen's order.

    Args:
        packed: int32 [..., out, in / 8] on the CPU.
        scale: bfloat16 [..., out, in / group size].

    Returns:
        uint8 [..., out, in / 2], and scales with zero points (0) bfloat16 [..., in / group size, out, 2].

    Raises:
        ValueError: `out` is no multiple of 16, or this process packs in an unknown way.
    """
    return _reorder(packed.contiguous(), torch.empty_like(packed), True), kernel_scales(scale)


def from_kernel(
    kernel: UInt8[Tensor, "*stack out half_in"], scales_and_zeros: Float[Tensor, "*stack groups out 2"]
) -> tuple[Int32[Tensor, "*stack out packed_in"], BFloat16[Tensor, "*stack out groups"]]:
    """What `to_kernel` was given, byte for byte.

    Raises:
        ValueError: as `to_kernel`.
    """
    hub = _reorder(kernel.contiguous(), torch.empty_like(kernel), False)
    return hub, hub_scales(scales_and_zeros)


def to_kernel_(packed: Int32[Tensor, "*stack out packed_in"]) -> UInt8[Tensor, "*stack out half_in"]:
    """`to_kernel` in the memory of `packed`, which holds nothing of use afterwards; scratch of a few MB.

    Raises:
        ValueError: as `to_kernel`, or `packed` is not contiguous.
    """
    return _reorder(_contiguous(packed), packed, True)


def from_kernel_(kernel: UInt8[Tensor, "*stack out half_in"]) -> Int32[Tensor, "*stack out packed_in"]:
    """`from_kernel` in the memory of `kernel`.

    Raises:
        ValueError: as `to_kernel_`.
    """
    return _reorder(_contiguous(kernel), kernel, False)


def kernel_scales(
    scale: Float[Tensor, "*stack out groups"], dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "*stack groups out 2"]:
    """Scales as the kernel takes them, with zero points of 0: [..., out, groups] -> [..., groups, out, 2]."""
    *stack, out_features, num_groups = scale.shape
    pairs = torch.zeros(*stack, num_groups, out_features, 2, dtype=dtype, device=scale.device)
    pairs[..., 0] = scale.transpose(-1, -2)
    return pairs


def hub_scales(
    scales_and_zeros: Float[Tensor, "*stack groups out 2"],
) -> BFloat16[Tensor, "*stack out groups"]:
    """Undo `kernel_scales`."""
    return scales_and_zeros[..., 0].transpose(-1, -2).to(torch.bfloat16).contiguous()


def known_layout() -> Layout:
    """This process's layout.

    Raises:
        ValueError: it is none that is known here.
    """
    layout = find_layout()
    if layout is None:
        raise ValueError(
            f"ATen packs INT4 weights for {torch.backends.cpu.get_cpu_capability()} in an unknown order: expected rows "
            "in blocks with the bytes of one input together; keep the hub's form and dequantise."
        )
    return layout


@cache
def find_layout() -> Layout | None:
    """ATen's packing in this process; None if it has another structure. It stays the same while the process runs."""
    for block in (16, 32, 64, _WIDEST):
        widths = range(MULTIPLE, block, MULTIPLE)
        found = {block: _probe(_WIDEST, block), **{width: _probe(width, width) for width in widths}}
        halves = {width: sides for width, sides in found.items() if sides is not None}
        if len(halves) == len(found):
            layout = Layout(block, halves)
            return layout if _agrees(layout) else None
    return None


def _probe(num_rows: int, width: int) -> tuple[slice, slice] | None:
    """The rows in low and in high halves, if ATen packs `num_rows` in blocks of `width`."""
    number = torch.arange(num_rows * _INPUTS, device="cpu")  # of each weight: below 16**3
    source = torch.zeros(num_rows // width, _INPUTS, width // 2, 2, dtype=torch.int64, device="cpu")
    for shift in (0, 4, 8):
        bytes_ = _aten_pack((number >> shift & 15).view(num_rows, _INPUTS))
        source |= torch.stack((bytes_ & 15, bytes_ >> 4), -1).view(source.shape).long() << shift
    rows = source // _INPUTS - torch.arange(num_rows // width, device="cpu").view(-1, 1, 1, 1) * width
    inputs = source % _INPUTS
    if not (
        torch.equal(rows, rows[:1, :1].expand_as(rows))
        and torch.equal(inputs, torch.arange(_INPUTS, device="cpu").view(1, -1, 1, 1).expand_as(inputs))
    ):
        return None
    low, high = (_evenly_spaced(side) for side in rows[0, 0].T.tolist())
    return None if low is None or high is None else (low, high)


def _evenly_spaced(values: list[int]) -> slice | None:
    step = values[1] - values[0]
    if step < 1 or values != list(range(values[0], values[-1] + 1, step)):
        return None
    return slice(values[0], values[-1] + 1, step)


def _agrees(layout: Layout) -> bool:
    """Whether a matrix of several blocks, a shorter one and many inputs is packed as its small tiles are."""
    num_rows, num_inputs = 2 * layout.block + MULTIPLE, 10 * _INPUTS
    codes = torch.arange(num_rows * num_inputs, device="cpu").mul_(40503).bitwise_right_shift_(7)
    codes = codes.bitwise_and_(15).view(num_rows, num_inputs)
    hub = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    kernel = torch.empty_like(hub)
    for rows, width in layout.spans(0, num_rows):
        _to_kernel_band(hub[rows], kernel[rows], width, layout)
    return torch.equal(kernel, _aten_pack(codes))


def _aten_pack(codes: Tensor) -> Tensor:
    """Codes 0..15 [out, in] -> uint8 [out, in / 2]. The 2 has no meaning on a CPU."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)


def _reorder(source: Tensor, target: Tensor, forward: bool) -> Tensor:
    """A stack from one form to the other; `target` may be `source`. The result is `target` in the dtype of its form."""
    layout = known_layout()
    matrices, places = (_bytes(part) for part in (source, target))
    num_rows, half_in = matrices.shape[1:]
    if num_rows % MULTIPLE or half_in % (int4_pack.PER_INT32 // 2):
        raise ValueError(
            f"INT4 matrices have {num_rows} rows of {2 * half_in} inputs: expected multiples of {MULTIPLE} and "
            f"{int4_pack.PER_INT32} for the kernel's form; keep the hub's and dequantise."
        )
    move = _to_kernel_band if forward else _from_kernel_band
    step = max(1, _BAND // max(1, 2 * half_in * layout.block)) * layout.block
    for matrix, place in zip(matrices, places, strict=True):
        for start in range(0, num_rows, step):
            for rows, width in layout.spans(start, min(start + step, num_rows)):
                move(matrix[rows], place[rows], width, layout)
    return target.view(torch.uint8 if forward else torch.int32)


def _to_kernel_band(hub: Tensor, kernel: Tensor, width: int, layout: Layout) -> None:
    """[rows, in / 2] bytes, whole blocks."""
    low, high = layout.halves[width]
    rows = hub.view(-1, width, hub.shape[1])
    first, second = rows[:, low], rows[:, high]  # (blocks, width / 2, in / 2)
    even = (first & 15).bitwise_or_(second << 4)
    odd = (first >> 4).bitwise_or_(second & 240)
    columns = kernel.view(-1, hub.shape[1], 2, width // 2)
    columns[:, :, 0] = even.transpose(1, 2)
    columns[:, :, 1] = odd.transpose(1, 2)


def _from_kernel_band(kernel: Tensor, hub: Tensor, width: int, layout: Layout) -> None:
    low, high = layout.halves[width]
    columns = kernel.view(-1, hub.shape[1], 2, width // 2).permute(2, 0, 3, 1).contiguous()
    even, odd = columns  # (blocks, width / 2, in / 2)
    rows = hub.view(-1, width, hub.shape[1])
    rows[:, low] = (even & 15).bitwise_or_(odd << 4)
    rows[:, high] = (even >> 4).bitwise_or_(odd & 240)


def _bytes(stack: Tensor) -> Tensor:
    """[..., out, n] -> uint8 [matrices, out, bytes]."""
    return stack.view(torch.uint8).flatten(0, -3) if stack.dim() > 2 else stack.view(torch.uint8)[None]


def _contiguous(stack: Tensor) -> Tensor:
    if not stack.is_contiguous():
        raise ValueError(
            f"INT4 weights {list(stack.shape)} have strides {list(stack.stride())}: expected contiguous ones to "
            "reorder them in place."
        )
    return stack
