"""A decoder layer's small operations for a few tokens, by C of our own: norms, rotary positions, the choice of experts.

In torch's operations the rotary positions of a layer are 22, the choice of experts ten and a norm six. For one token each
takes microseconds, whatever it computes. Here each of the three is a call, with torch's and transformers' own roundings:
rotary positions are bit for bit upstream's.

What it gives up: gradients and autocast; callers ask `takes_norm`, `takes_rotation` or `takes_routing` first. Under
torch.compile the last two say no: a compiler fuses these operations with what is around them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from . import library
from .few_rows import WIDE, as_rows, unfit
from .library import FLOAT, NUMBER, POINTER, SIZE

SOURCE = Path(__file__).with_suffix(".c")

_MOST_ROTARY = 512  # numbers of a row that is rotated, as in small.c
_TENSORS = (Tensor, Parameter)  # neither distributed nor fake ones, which have no data here
_SIGNATURES = {
    "small_rms_norm": ([POINTER] * 3 + [SIZE] * 3 + [FLOAT] + [NUMBER] * 3, None),
    "small_rotate": ([POINTER] * 4 + [SIZE] * 10 + [NUMBER] * 3, None),
    "small_route": ([POINTER] * 4 + [SIZE] * 3 + [NUMBER, FLOAT, NUMBER], None),
}


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernels can be used. The first call compiles them if no process has done so before: a second or two."""
    return _library() is not None


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` computes this here: bfloat16 or float32 on the CPU, without gradients."""
    return _is_readable(x, weight) and x.dtype in WIDE and weight.dtype in WIDE and available()


def takes_rotation(query: Tensor, k_rot: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate_` does this here: what it says of its arguments, on the CPU, eagerly and without gradients."""
    return (
        not torch.compiler.is_compiling()
        and _is_readable(query, k_rot, cos, sin)
        and _is_rotation(query, k_rot, cos, sin)
        and available()
    )


def takes_routing(logits: Tensor, bias: Tensor) -> bool:
    """Whether `route` computes this here: float32 on the CPU, eagerly and without gradients."""
    return (
        not torch.compiler.is_compiling()
        and _is_readable(logits, bias)
        and logits.dtype == bias.dtype == torch.float32
        and available()
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """transformers' DeepseekV3RMSNorm, with its roundings: normalised in float32, cast to the dtype of `x`, times weight.

    Args:
        x: [..., size], bfloat16 or float32; rows may be parts of longer ones.
        weight: [size], bfloat16 or float32.
        eps: added to the mean of squares.

    Returns:
        [..., size], bfloat16 if both are.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: the kernel is not `available`.
    """
    if torch.compiler.is_compiling():
        return _rms_norm_op(x, weight, eps)
    return _rms_norm(x, weight, eps)


def rotate_(query: Tensor, k_rot: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotary positions in place: transformers' apply_rotary_pos_emb_interleave, or apply_rotary_pos_emb, bit for bit.

    Interleaved rows are pairs of numbers that are next to each other, and are left as halves.

    Args:
        query: [b, q, heads, size], bfloat16 or float32, which all others have too; any strides but the last, so that it
            may be a part of each head.
        k_rot: [b, q, size]; any strides but the last.
        cos, sin: [b or 1, q, size], contiguous: transformers' position_embeddings.
        interleaved: whether pairs are neighbours rather than half a row apart.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
        RuntimeError: the kernel is not `available`.
    """
    on_cpu = query.is_cpu and k_rot.is_cpu and cos.is_cpu and sin.is_cpu
    if not (on_cpu and _is_rotation(query, k_rot, cos, sin)):
        expected = (
            f"one dtype, bfloat16 or float32, on cpu: [b, q, heads, size], [b, q, size] and, contiguous, twice "
            f"[b or 1, q, size], size even and at most {_MOST_ROTARY}, its numbers next to each other"
        )
        raise unfit(expected, query=query, k_rot=k_rot, cos=cos, sin=sin)
    batch, num_queries, num_heads, size = query.shape
    query_steps, key_steps = query.stride(), k_rot.stride()
    table_step = num_queries * size if len(cos) > 1 else 0
    _kernel().small_rotate(
        query.data_ptr(), k_rot.data_ptr(), cos.data_ptr(), sin.data_ptr(), batch, num_queries, num_heads, size,
        query_steps[0], query_steps[1], query_steps[2], key_steps[0], key_steps[1],
        table_step, WIDE[query.dtype], interleaved, torch.get_num_threads(),
    )  # fmt: skip


def route(logits: Tensor, bias: Tensor, top_k: int, normalise: bool, factor: float) -> tuple[Tensor, Tensor]:
    """The experts with the largest sigmoid(logits) + bias, and their weights: sigmoid(logits), scaled.

    Args:
        logits: [tokens, experts], float32.
        bias: [experts], float32.
        top_k: experts of a token.
        normalise: divide a token's weights by their sum (and 1e-20).
        factor: of the weights.

    Returns:
        Weights float32 [tokens, top_k] and indices int64 [tokens, top_k], in any order. NaN counts as the largest, as in
        torch.topk.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there are fewer experts than `top_k`.
        RuntimeError: the kernel is not `available`.
    """
    num_tokens, num_experts = logits.shape
    if (
        not logits.dtype == bias.dtype == torch.float32
        or bias.shape != (num_experts,)
        or not (logits.is_cpu and bias.is_cpu)
    ):
        raise unfit("float32 [tokens, experts] and [experts] on cpu", logits=logits, bias=bias)
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}: expected 1 to {num_experts}, the number of experts.")
    logits, bias = logits.contiguous(), bias.contiguous()
    weights = torch.empty((num_tokens, top_k))
    index = torch.empty((num_tokens, top_k), dtype=torch.int64)
    _kernel().small_route(
        logits.data_ptr(), bias.data_ptr(), weights.data_ptr(), index.data_ptr(), num_tokens, num_experts, top_k,
        normalise, factor, torch.get_num_threads(),
    )  # fmt: skip
    return weights, index


def _is_readable(*tensors: Tensor) -> bool:
    has_gradients = torch.is_grad_enabled()
    for x in tensors:  # noqa: SIM110 - a generator takes longer
        if type(x) not in _TENSORS or not x.is_cpu or (has_gradients and x.requires_grad):
            return False
    return True


def _is_rotation(query: Tensor, k_rot: Tensor, cos: Tensor, sin: Tensor) -> bool:
    dtype, shape, tables = query.dtype, query.shape, cos.shape
    return (
        len(shape) == 4
        and dtype in WIDE
        and k_rot.dtype == cos.dtype == sin.dtype == dtype
        and k_rot.shape == (shape[0], shape[1], shape[3])
        and tables == sin.shape
        and tables in ((shape[0], shape[1], shape[3]), (1, shape[1], shape[3]))
        and shape[3] % 2 == 0
        and shape[3] <= _MOST_ROTARY
        and query.stride()[3] == k_rot.stride()[2] == 1
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide, weight_wide = WIDE.get(x.dtype), WIDE.get(weight.dtype)
    shape = x.shape
    if wide is None or weight_wide is None or weight.shape != shape[-1:] or not x.is_cpu or not weight.is_cpu:
        raise unfit("bfloat16 or float32 [..., size] and [size] on cpu", x=x, weight=weight)
    size, dtype = shape[-1], x.dtype if wide else weight.dtype
    x, num_rows, stride = as_rows(x, size)
    out = torch.empty(shape, dtype=dtype)
    if not weight.is_contiguous():
        weight = weight.contiguous()
    _kernel().small_rms_norm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), num_rows, size, stride, eps,
        wide, weight_wide, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _kernel() -> ctypes.CDLL:
    kernel = _library()
    if kernel is None:
        raise RuntimeError("the CPU kernel is not available here: the log says why; ask `available` first.")
    return kernel


@cache
def _library() -> ctypes.CDLL | None:
    return library.load(SOURCE, _SIGNATURES, "Small operations of layers")


_rms_norm_op = torch.library.custom_op("transformers_k2::small_rms_norm", _rms_norm, mutates_args=())


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
