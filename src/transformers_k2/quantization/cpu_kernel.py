"""Products of a few rows with INT4 weights in the hub's form, by a C kernel of our own that is compiled at first use.

With one row, time goes by memory, and a weight in four bits should take a quarter of the time of one in bfloat16. ATen's
kernel is far from that where the CPU has no AVX-512, and it wants the weights in an order of its own. This one (see
cpu_kernel.c) reads the checkpoint's bytes as they are, multiplies in integers, takes a whole layer's experts in one call,
and gives the same bits for any number of threads and whatever other rows are in the batch.

It is compiled at first use (cpu/library.py). Without a C compiler, or with TRANSFORMERS_K2_CPU_KERNEL=0, `available` is
False, a log message says why, and the caller keeps another way.

What it gives up: gradients; memory during a call, 2.5 bytes for each bfloat16 input and 5 for float32; the sign of
infinite inputs (a row that has one, or NaN, gives NaN); inputs above 1e35, whose products may overflow before they are
scaled; groups that are no multiple of 32. Only AVX2 has code of its own: elsewhere plain C has to do.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import BFloat16, Float, Int32, Int64
from torch import Tensor

from ..cpu import library
from ..cpu.library import NUMBER, POINTER, SIZE, has_bfloat16_instructions
from .codecs.int4_pack import PER_INT32

GROUP = 32  # of the C source
SOURCE = Path(__file__).with_suffix(".c")

_DTYPES = (torch.bfloat16, torch.float32)
_SIGNATURES = {
    "int4_scratch": ([SIZE] * 3 + [NUMBER], SIZE),
    "int4_grouped": ([POINTER] * 6 + [SIZE] * 5 + [NUMBER] * 2, NUMBER),
}


def available() -> bool:
    """Whether the kernel can be used. The first call compiles it if no process has done so before: about a second."""
    return _library() is not None


def takes(x: Tensor, packed: Tensor, scale: Tensor) -> bool:
    """Whether `linear`, or `grouped_linear`, multiplies these here."""
    return (
        packed.dtype == torch.int32
        and packed.device.type == "cpu"
        and x.dtype in _DTYPES
        and scale.dtype == torch.bfloat16
        and scale.is_contiguous()
        and packed.is_contiguous()
        and packed.shape[-1] * PER_INT32 % (GROUP * max(1, scale.shape[-1])) == 0
        and available()
    )


def threshold(dtype: torch.dtype) -> int:
    """From how many rows of an expert on dequantising bands of its matrix is faster, for rows of this dtype.

    `OMP_NUM_THREADS=1 python benchmarks/int4_linear.py --threshold --native` with AVX2 and without bfloat16 instructions:
    256 and 512 rows of bfloat16 take as long either way, between 32 and 64 of float32. With such instructions, by the
    figures of bfloat16 products there, earlier.
    """
    if dtype == torch.float32:
        return 32
    return 64 if has_bfloat16_instructions() else 256


def linear(
    x: Float[Tensor, "*rows in"],
    packed: Int32[Tensor, "out packed_in"],
    scale: BFloat16[Tensor, "out groups"],
    out: Float[Tensor, "*rows out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """x @ W.T.

    Args:
        x: [..., in], bfloat16 or float32, which the result has too.
        packed: int32 [out, in / 8], contiguous.
        scale: bfloat16 [out, in / group size], contiguous.
        out: where to write, contiguous.

    Returns:
        [..., out], rounded once, from sums in float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
        RuntimeError: the kernel is not `available`.
    """
    rows = x.reshape(-1, x.shape[-1])
    place = None if out is None else out.view(-1, packed.shape[0])
    result = grouped_linear(rows, [len(rows)], packed[None], scale[None], place)
    return result.view(*x.shape[:-1], packed.shape[0])


def grouped_linear(
    x: Float[Tensor, "pairs in"],
    ends: Sequence[int] | Int64[Tensor, " experts"],
    packed: Int32[Tensor, "experts out packed_in"],
    scale: BFloat16[Tensor, "experts out groups"],
    out: Float[Tensor, "pairs out"] | None = None,
) -> Float[Tensor, "pairs out"]:
    """Each row times the matrix of its expert, on `torch.get_num_threads` threads.

    Args:
        x: [pairs, in], bfloat16 or float32, sorted by expert.
        ends: [experts], where each expert's rows end and the next one's begin; it may have none.
        packed: int32 [experts, out, in / 8], contiguous.
        scale: bfloat16 [experts, out, in / group size], contiguous.
        out: where to write, contiguous.

    Returns:
        [pairs, out] in the dtype of `x`; rows behind the last expert's are zero.

    Raises:
        ValueError: shapes, dtypes, strides, devices or `ends` do not fit.
        RuntimeError: the kernel is not `available`.
    """
    num_experts, num_out, num_in, num_groups = _sizes(packed, scale)
    if x.dtype not in _DTYPES or x.device.type != "cpu" or x.shape[-1] != num_in:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}: expected bfloat16 or float32 [pairs, {num_in}] on cpu."
        )
    if out is None:
        out = x.new_empty(x.shape[0], num_out)
    _check("out", out, x.dtype, (x.shape[0], num_out))
    limits = array("q", ends.tolist() if isinstance(ends, Tensor) else ends)
    if len(limits) != num_experts:
        raise ValueError(f"ends has {len(limits)} numbers: expected {num_experts}, one for each expert.")
    kernel = _library()
    if kernel is None:
        raise RuntimeError("the CPU kernel is not available here: the log says why; ask `available` first.")
    x, wide = x.contiguous(), x.dtype == torch.float32
    scratch = x.new_empty(kernel.int4_scratch(x.shape[0], num_in, num_experts, wide), dtype=torch.uint8)
    addresses = x.data_ptr(), limits.buffer_info()[0], packed.data_ptr(), scale.data_ptr()
    sizes = x.shape[0], num_experts, num_in, num_out, num_groups
    if kernel.int4_grouped(
        *addresses, out.data_ptr(), scratch.data_ptr(), *sizes, wide, torch.get_num_threads()
    ):
        raise ValueError(f"ends is {list(limits)}: expected ascending numbers from 0 to {x.shape[0]}.")
    end = limits[-1] if limits else 0
    if end < len(out):
        out[end:] = 0
    return out


def _sizes(packed: Tensor, scale: Tensor) -> tuple[int, int, int, int]:
    """experts, out, in, groups."""
    num_experts, num_out, num_in = *packed.shape[:-1], packed.shape[-1] * PER_INT32
    num_groups = scale.shape[-1]
    if num_groups == 0 or num_in % (GROUP * num_groups):
        raise ValueError(
            f"INT4 weights have {num_in} inputs and {num_groups} scales a row: expected groups of a multiple of {GROUP}."
        )
    _check("packed", packed, torch.int32, (num_experts, num_out, num_in // PER_INT32))
    _check("scale", scale, torch.bfloat16, (num_experts, num_out, num_groups))
    return num_experts, num_out, num_in, num_groups


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: expected {dtype} {list(shape)} on cpu."
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}: expected it contiguous.")


def _library() -> ctypes.CDLL | None:
    return library.load(SOURCE, _SIGNATURES, "INT4 products")
