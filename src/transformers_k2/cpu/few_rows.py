"""What a decoder layer multiplies for a few tokens, by C of our own: linear layers, gated layers, experts.

A token's time goes by memory: every weight that it uses is read once. torch's products of one bfloat16 row reach two
thirds of the memory's speed, those of two rows take twice as long, and of many rows, on a CPU without bfloat16
instructions, a seventh of float32's speed. Here (few_rows.c) a few rows take about as long as one, each expert's matrices
are read once for all tokens that chose it, and more rows are multiplied in float32 by bands of the weight. A gated
layer and all experts are a call each; the small operations between them are those of small.py.

Sums are float32 and rounded once. For few rows a result's bits depend neither on the other rows nor on the number of
threads. Under torch.compile the functions are custom operations, which fullgraph=True takes.

What it gives up: gradients, autocast, biases, activations other than SiLU; callers ask `takes` first. Processes that were
forked after the first call have to set one thread, as for torch's own operations (a DataLoader's worker does).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from . import library
from .library import NUMBER, POINTER, SIZE, has_bfloat16_instructions

SOURCE = Path(__file__).with_suffix(".c")

_BAND = 1 << 20  # weights cast to float32 at a time
_ROWS_BAND = 1 << 22  # inputs cast to float32 at a time
_TOKENS_BAND = 1 << 12  # tokens that an expert multiplies at a time
WIDE = {torch.float32: 1, torch.bfloat16: 0}  # what the kernels read, and what they call it
_TENSORS = (Tensor, Parameter)  # neither distributed nor fake ones, which have no data here
_SIGNATURES = {
    "few_rows_linear": ([POINTER] * 3 + [SIZE] * 5 + [NUMBER] * 4, NUMBER),
    "few_rows_gated": ([POINTER] * 7 + [SIZE] * 8 + [NUMBER] * 4, NUMBER),
}


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernels can be used. The first call compiles them if no process has done so before: a second or two."""
    return _library() is not None


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether `linear` or `gated_mlp` multiplies these here, whatever the number of rows.

    On the CPU, bfloat16 or float32, without gradients, inputs of a weight next to each other. It does not look at
    autocast, which casts what linear layers multiply: callers do.
    """
    if type(x) not in _TENSORS or not x.is_cpu or x.dtype not in WIDE:
        return False
    has_gradients = torch.is_grad_enabled()
    if has_gradients and x.requires_grad:
        return False
    for weight in weights:
        if (
            type(weight) not in _TENSORS
            or weight.dtype not in WIDE
            or not weight.is_cpu
            or weight.stride()[-1] != 1
            or (has_gradients and weight.requires_grad)
        ):
            return False
    return available()


def takes_experts(hidden: Tensor, gate_up: Tensor, down: Tensor, *weights: Tensor) -> bool:
    """Whether `experts` computes these here, whatever the number of tokens; the routing weights may need gradients too."""
    return (
        takes(hidden, gate_up, down, *weights)
        and gate_up.dtype == down.dtype
        and gate_up.is_contiguous()
        and down.is_contiguous()
    )


def threshold(dtype: torch.dtype) -> int:
    """Up to how many rows the kernel multiplies, of an expert on average, for weights of this dtype.

    Measured with one thread of a CPU with AVX2, matrices from 1024 x 512 to 2048 x 7168: bands are as fast from 48 to 96
    rows on for bfloat16, and float32 products from 24 to 48. A CPU with bfloat16 instructions has more use for them.
    """
    if dtype == torch.float32:
        return 24
    return 16 if has_bfloat16_instructions() else 48


def linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x @ weight.T.

    Args:
        x: [..., in], bfloat16 or float32.
        weight: [out, in], bfloat16 or float32, whatever `x` is; a row's weights are next to each other.
        out_dtype: bfloat16 or float32; that of `x` unless given.

    Returns:
        [..., out], rounded once, from sums in float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
        RuntimeError: the kernel is not `available`.
    """
    if torch.compiler.is_compiling():
        return _linear_op(x, weight, out_dtype)
    return _linear(x, weight, out_dtype)


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)), with float32 between the products of a few rows.

    Args:
        x: [..., in], bfloat16 or float32.
        gate, up: [middle, in], bfloat16 or float32; copied at each call unless contiguous, as `down`.
        down: [in, middle], in the dtype of the others.

    Returns:
        [..., in] in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: the kernel is not `available`.
    """
    if torch.compiler.is_compiling():
        return _gated_mlp_op(x, gate, up, down)
    return _gated_mlp(x, gate, up, down)


def experts(hidden: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What the chosen experts make of each token, weighted and summed in float32, and rounded once.

    Few tokens, up to `threshold` for each expert, take float32 memory [tokens, 2 * H] and [tokens * k, middle] during the
    call. More are multiplied expert by expert, summed in float32 [tokens, H].

    Args:
        hidden: [tokens, H], bfloat16 or float32.
        index: [tokens, k], int64; ids that are not below the number of experts are skipped.
        weights: [tokens, k], bfloat16 or float32.
        gate_up: [experts, 2 * middle, H], contiguous, bfloat16 or float32: gates first.
        down: [experts, H, middle], contiguous, in the same dtype.

    Returns:
        [tokens, H] in the dtype of `hidden`.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, or an id is negative.
        RuntimeError: the kernel is not `available`.
    """
    if torch.compiler.is_compiling():
        return _experts_op(hidden, index, weights, gate_up, down)
    return _experts(hidden, index, weights, gate_up, down)


def _linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    out_dtype = out_dtype or x.dtype
    wide, weight_wide, out_wide = WIDE.get(x.dtype), WIDE.get(weight.dtype), WIDE.get(out_dtype)
    shape, weight_shape = x.shape, weight.shape
    if out_wide is None and wide is not None:
        raise ValueError(f"out_dtype is {out_dtype}: expected torch.bfloat16 or torch.float32.")
    if (
        wide is None
        or weight_wide is None
        or len(weight_shape) != 2
        or shape[-1] != weight_shape[1]
        or not x.is_cpu
        or not weight.is_cpu
    ):
        raise unfit("bfloat16 or float32 [..., in] and [out, in] on cpu", x=x, weight=weight)
    num_out, num_in = weight_shape
    x, num_rows, x_stride = as_rows(x, num_in)
    if num_rows > threshold(weight.dtype):
        return _many_rows(x.view(num_rows, num_in), weight, out_dtype).view(*shape[:-1], num_out)
    stride = weight.stride()
    if stride[1] != 1:
        raise ValueError(f"weight has strides {list(stride)}: expected a row's weights next to each other.")
    out = torch.empty((*shape[:-1], num_out), dtype=out_dtype)
    status = _kernel().few_rows_linear(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), num_rows, num_in, num_out,
        x_stride, stride[0], wide, weight_wide, out_wide, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise _failed(status)
    return out


def _many_rows(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """[rows, in] -> [rows, out]: in float32 where bfloat16 is slow, and for operands of two dtypes."""
    if x.dtype == weight.dtype == out_dtype and (x.dtype == torch.float32 or has_bfloat16_instructions()):
        return F.linear(x, weight)
    num_out, num_in = weight.shape
    out = x.new_empty(len(x), num_out, dtype=out_dtype)
    num_rows = min(len(x), max(1, _ROWS_BAND // max(1, num_in)))
    band = min(num_out, max(1, _BAND // max(1, num_in)))
    buffer = weight.new_empty(band, num_in, dtype=torch.float32)
    product = x.new_empty(num_rows * band, dtype=torch.float32)
    for rows, place in zip(x.split(num_rows), out.split(num_rows), strict=True):
        rows = rows.float()
        for part, columns in zip(weight.split(band), place.split(band, 1), strict=True):
            if part.dtype != torch.float32:
                part = buffer[: len(part)].copy_(part)
            columns.copy_(torch.mm(rows, part.T, out=product[: columns.numel()].view(columns.shape)))
    return out


def _gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    wide, weight_wide = WIDE.get(x.dtype), WIDE.get(gate.dtype)
    shape, gate_shape = x.shape, gate.shape
    if (
        wide is None
        or weight_wide is None
        or len(gate_shape) != 2
        or gate_shape[1] != shape[-1]
        or up.shape != gate_shape
        or down.shape != gate_shape[::-1]
        or not up.dtype == down.dtype == gate.dtype
        or not (x.is_cpu and gate.is_cpu and up.is_cpu and down.is_cpu)
    ):
        expected = (
            "bfloat16 or float32 [..., in], and [middle, in] twice and [in, middle] in one dtype, on cpu"
        )
        raise unfit(expected, x=x, gate=gate, up=up, down=down)
    num_middle, num_in = gate_shape
    x, num_rows, x_stride = as_rows(x, num_in)
    if num_rows > threshold(gate.dtype):
        return _linear(F.silu(_linear(x, gate)).mul_(_linear(x, up)), down).view(shape)
    gate, up, down = gate.contiguous(), up.contiguous(), down.contiguous()
    out = torch.empty(shape, dtype=x.dtype)
    status = _kernel().few_rows_gated(
        x.data_ptr(), None, None, gate.data_ptr(), up.data_ptr(), down.data_ptr(), out.data_ptr(),
        num_rows, 1, 1, num_in, num_middle, x_stride, 0, 0, wide, weight_wide, 0, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise _failed(status)
    return out


def _experts(hidden: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    wide, weights_wide, weight_wide = (WIDE.get(tensor.dtype) for tensor in (hidden, weights, gate_up))
    num_tokens, num_in = hidden.shape
    num_experts, _, num_middle = down.shape
    num_choices = index.shape[-1]
    if (
        wide is None
        or weights_wide is None
        or weight_wide is None
        or gate_up.shape != (num_experts, 2 * num_middle, num_in)
        or down.shape[1] != num_in
        or down.dtype != gate_up.dtype
        or index.shape != (num_tokens, num_choices)
        or index.dtype != torch.int64
        or weights.shape != index.shape
        or not (hidden.is_cpu and index.is_cpu and weights.is_cpu and gate_up.is_cpu and down.is_cpu)
        or not (gate_up.is_contiguous() and down.is_contiguous())
    ):
        expected = (
            "bfloat16 or float32 on cpu: [tokens, H], int64 [tokens, k], [tokens, k], and, contiguous and in one dtype, "
            "[experts, 2 * middle, H] and [experts, H, middle]"
        )
        raise unfit(expected, hidden=hidden, index=index, weights=weights, gate_up=gate_up, down=down)
    hidden, _, stride = as_rows(hidden, num_in)
    index, weights = index.contiguous(), weights.contiguous()
    few = threshold(gate_up.dtype)
    if num_tokens > few and num_tokens * num_choices > num_experts * few:
        return _many_tokens(hidden, index, weights, gate_up, down)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    gate = gate_up.data_ptr()
    status = _kernel().few_rows_gated(
        hidden.data_ptr(), index.data_ptr(), weights.data_ptr(), gate, gate + num_middle * num_in * gate_up.itemsize,
        down.data_ptr(), out.data_ptr(), num_tokens, num_choices, num_experts, num_in, num_middle, stride,
        2 * num_middle * num_in, num_in * num_middle, wide, weight_wide, weights_wide, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise _failed(status)
    return out


def _many_tokens(hidden: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Expert by expert, each in float32 where bfloat16 is slow."""
    num_experts, num_choices = gate_up.shape[0], index.shape[1]
    ids, order = index.flatten().sort(stable=True)
    if len(ids) and ids[0] < 0:
        raise _failed(-2)
    counts = torch.bincount(ids.clamp(max=num_experts), minlength=num_experts + 1)[:num_experts].tolist()
    wide = torch.float32 if not has_bfloat16_instructions() else gate_up.dtype
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    factors = weights.flatten().float()
    start = 0
    for expert, count in enumerate(counts):
        for pairs in order[start : start + count].split(_TOKENS_BAND):
            tokens = pairs // num_choices
            gate, up = _linear(hidden[tokens].to(wide), gate_up[expert]).chunk(2, -1)
            result = _linear(F.silu(gate).mul_(up), down[expert])
            total.index_add_(0, tokens, result.float().mul_(factors[pairs, None]))
        start += count
    return total.to(hidden.dtype)


def as_rows(x: Tensor, size: int) -> tuple[Tensor, int, int]:
    """`x`, or the same as [rows, size], with inputs of a row next to each other; how many rows; from one to the next."""
    if x.is_contiguous():
        return x, x.numel() // size if size else x.shape[:-1].numel(), size
    x = x.reshape(-1, size)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.shape[0], x.stride(0)


def unfit(expected: str, **tensors: Tensor) -> ValueError:
    given = ", ".join(f"{name} {x.dtype} {list(x.shape)} on {x.device}" for name, x in tensors.items())
    return ValueError(f"{given}: expected {expected}.")


def _failed(status: int) -> Exception:
    if status == -2:
        return ValueError("index has negative numbers: expected experts from 0 on.")
    return MemoryError("no memory for the inputs of a product of a few rows")


def _kernel() -> ctypes.CDLL:
    kernel = _library()
    if kernel is None:
        raise RuntimeError("the CPU kernel is not available here: the log says why; ask `available` first.")
    return kernel


@cache
def _library() -> ctypes.CDLL | None:
    return library.load(SOURCE, _SIGNATURES, "Layers of few tokens")


_linear_op = torch.library.custom_op("transformers_k2::few_rows_linear", _linear, mutates_args=())
_gated_mlp_op = torch.library.custom_op("transformers_k2::few_rows_gated_mlp", _gated_mlp, mutates_args=())
_experts_op = torch.library.custom_op("transformers_k2::few_rows_experts", _experts, mutates_args=())


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or x.dtype)


@_gated_mlp_op.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_experts_op.register_fake
def _(hidden: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape)
