"""MLA for few queries and a long cache, on the CPU: the latents stay compressed (see mla.c).

The textbook's way expands every cached latent to the keys and values of all heads, at each step. Here W_UK goes into
the queries and W_UV behind the sum, so that a step reads a token's 576 numbers once and does 2 * 1088 operations with
them for each head. From four heads on the CPU's float32 arithmetic is what bounds it, below that memory. Latents in 8
bits are multiplied in integers: at about the same speed, from half as much memory.

Results have the same bits for any number of threads and whatever else is in the batch. Sums are float32, of the inputs
as they are: no intermediate result is rounded to bfloat16.

What it gives up: gradients, dropout, the weights and their largest logit; a block of tokens that no query of a batch
row sees is not looked at, NaN or not; with 8 bits, queries and weights are rounded to 2^-16 of the largest of their row.
"""

from __future__ import annotations

from array import array
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .library import FLOAT, NUMBER, POINTER, SIZE, load

_GROUP = 64  # of the C source: values that share a scale
_DTYPES = (torch.bfloat16, torch.float32)
_SIGNATURES: Any = {
    "mla_scratch": ([POINTER] * 2, SIZE),
    "mla_decode": ([POINTER] * 10 + [FLOAT, NUMBER], None),
}


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel can be used. The first call compiles it if no process has done so before: seconds."""
    return _library() is not None


def takes(q_nope: Tensor, latents: Tensor, kv_b: Tensor) -> bool:
    """Whether `decode`, or `decode_int8` for int8 codes, computes this: on the CPU, without gradients."""
    dtype = q_nope.dtype
    return (
        dtype in _DTYPES
        and kv_b.dtype == dtype
        and (latents.dtype == dtype or latents.dtype == torch.int8)
        and q_nope.is_cpu
        and latents.is_cpu
        and kv_b.is_cpu
        and q_nope.stride(-1) == latents.stride(-1) == 1
        and kv_b.is_contiguous()
        and not (
            torch.is_grad_enabled() and (q_nope.requires_grad or latents.requires_grad or kv_b.requires_grad)
        )
        and available()
    )


def decode(
    q_nope: Tensor,
    q_rot: Tensor,
    latents: Tensor,
    rotary: Tensor,
    kv_b: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    *,
    v_head_dim: int,
) -> Tensor:
    """softmax(scaling * (q_nope W_UK c + q_rot r)) c W_UV over the cached tokens (c, r), for every head.

    Args:
        q_nope: [b, q, heads, d_nope], bfloat16 or float32, which all others have too; any strides but the last.
        q_rot: [b, q, heads, d_rot], rotated; any strides but the last.
        latents: [b, T, d_latent], normalised; any strides but the last. T is at least 1.
        rotary: [b, T, d_rot], rotated; any strides but the last.
        kv_b: [heads * (d_nope + v_head_dim), d_latent], contiguous: kv_b_proj's weight, for each head W_UK, then W_UV.
        scaling: of the scores.
        mask: [b or 1, heads or 1, q or 1, T], bool (True is seen) or float (added to scaled scores). Without one, query
            i sees tokens 0 to T - q + i. A query that sees nothing, by False or -inf, gives zeros.

    Returns:
        [b, q, heads, v_head_dim], contiguous, rounded once.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
        RuntimeError: the kernel is not `available`.
    """
    if torch.compiler.is_compiling():
        return _decode_op(q_nope, q_rot, latents, rotary, kv_b, scaling, mask, v_head_dim)
    return _decode(q_nope, q_rot, latents, rotary, None, kv_b, scaling, mask, v_head_dim)


def decode_int8(
    q_nope: Tensor,
    q_rot: Tensor,
    codes: Tensor,
    scales: Tensor,
    kv_b: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    *,
    v_head_dim: int,
) -> Tensor:
    """`decode` of latents and rotary parts that are codes times scales, as `latent_cache.Int8LatentLayer` has them.

    Args:
        q_nope, q_rot, kv_b, scaling, mask, v_head_dim: as for `decode`.
        codes: int8 [b, T, d_latent + d_rot]; any strides but the last.
        scales: float32 [b, T, groups]: one for each 64 latent values, then for each 64 rotary ones; a part's last
            group may be smaller. Any strides but the last.

    Returns:
        [b, q, heads, v_head_dim] in the dtype of the queries.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
        RuntimeError: the kernel is not `available`.
    """
    if torch.compiler.is_compiling():
        return _decode_int8_op(q_nope, q_rot, codes, scales, kv_b, scaling, mask, v_head_dim)
    return _decode_int8(q_nope, q_rot, codes, scales, kv_b, scaling, mask, v_head_dim)


def _decode_int8(
    q_nope: Tensor,
    q_rot: Tensor,
    codes: Tensor,
    scales: Tensor,
    kv_b: Tensor,
    scaling: float,
    mask: Tensor | None,
    v_head_dim: int,
) -> Tensor:
    width = kv_b.shape[-1]
    return _decode(
        q_nope, q_rot, codes[..., :width], codes[..., width:], scales, kv_b, scaling, mask, v_head_dim
    )


def _decode(
    q_nope: Tensor,
    q_rot: Tensor,
    latents: Tensor,
    rotary: Tensor,
    scales: Tensor | None,
    kv_b: Tensor,
    scaling: float,
    mask: Tensor | None,
    v_head_dim: int,
) -> Tensor:
    batch, num_queries, num_heads, d_nope = q_nope.shape
    num_tokens, d_latent, d_rot = latents.shape[1], kv_b.shape[-1], q_rot.shape[-1]
    dtype = q_nope.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"q_nope is {dtype}: expected bfloat16 or float32.")
    if num_tokens == 0:
        raise ValueError(f"The latents are {list(latents.shape)}: expected one token at least.")
    cached = dtype if scales is None else torch.int8
    _check("q_nope", q_nope, dtype, (batch, num_queries, num_heads, d_nope))
    _check("q_rot", q_rot, dtype, (batch, num_queries, num_heads, d_rot))
    _check("The latent part", latents, cached, (batch, num_tokens, d_latent))
    _check("The rotary part", rotary, cached, (batch, num_tokens, d_rot))
    _check("kv_b", kv_b, dtype, (num_heads * (d_nope + v_head_dim), d_latent))
    if not kv_b.is_contiguous():
        raise ValueError(f"kv_b has strides {list(kv_b.stride())}: expected it contiguous.")
    scale_steps = (0, 0)
    if scales is not None:
        num_groups = -(-d_latent // _GROUP) - (-d_rot // _GROUP)
        _check("scales", scales, torch.float32, (batch, num_tokens, num_groups))
        scale_steps = scales.stride()[:2]
    mask, kind, mask_steps = _readable(mask, (batch, num_heads, num_queries, num_tokens))
    library = _library()
    if library is None:
        raise RuntimeError("the CPU kernel is not available here: the log says why; ask `available` first.")
    out = q_nope.new_empty(batch, num_queries, num_heads, v_head_dim)
    shape = batch, num_queries, num_heads, num_tokens, d_nope, d_rot, d_latent, v_head_dim
    steps = (
        *q_nope.stride()[:3],
        *q_rot.stride()[:3],
        *latents.stride()[:2],
        *rotary.stride()[:2],
        *scale_steps,
    )
    sizes = array("q", (*shape, *steps, *mask_steps, kind, dtype == torch.float32))
    sizes_at, scales_at = sizes.buffer_info()[0], None if scales is None else scales.data_ptr()
    scratch = torch.empty(library.mla_scratch(sizes_at, scales_at), dtype=torch.float32)
    library.mla_decode(
        q_nope.data_ptr(),
        q_rot.data_ptr(),
        latents.data_ptr(),
        rotary.data_ptr(),
        scales_at,
        kv_b.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
        sizes_at,
        scaling,
        torch.get_num_threads(),
    )
    return out


def _readable(
    mask: Tensor | None, full: tuple[int, int, int, int]
) -> tuple[Tensor | None, int, tuple[int, ...]]:
    """The mask as the kernel reads it, its kind there, and its steps along batch, heads and queries."""
    if mask is None:
        return None, 0, (0, 0, 0)
    fits = mask.dim() == 4 and mask.shape[3] == full[3] and mask.is_cpu
    if not fits or any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
        raise ValueError(
            f"mask is {list(mask.shape)} on {mask.device}: expected {list(full)} on cpu (the first three may be 1)."
        )
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise ValueError(
                f"mask is {mask.dtype}: expected bool, or a float dtype for what is added to scores."
            )
        mask = mask.float()
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    steps = tuple(
        0 if size == 1 else step for size, step in zip(mask.shape[:3], mask.stride()[:3], strict=True)
    )
    return mask, 1 if mask.dtype == torch.bool else 2, steps


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: expected {dtype} {list(shape)} on cpu."
        )
    if tensor.stride()[-1] != 1 and shape[-1] > 1:
        raise ValueError(f"{name} has strides {list(tensor.stride())}: expected the last to be 1.")


@cache
def _library() -> Any:
    return load(Path(__file__).with_suffix(".c"), _SIGNATURES, "Attention layers with cached latents")


@torch.library.custom_op("transformers_k2::mla_decode", mutates_args=())
def _decode_op(
    q_nope: Tensor,
    q_rot: Tensor,
    latents: Tensor,
    rotary: Tensor,
    kv_b: Tensor,
    scaling: float,
    mask: Tensor | None,
    v_head_dim: int,
) -> Tensor:
    return _decode(q_nope, q_rot, latents, rotary, None, kv_b, scaling, mask, v_head_dim)


@torch.library.custom_op("transformers_k2::mla_decode_int8", mutates_args=())
def _decode_int8_op(
    q_nope: Tensor,
    q_rot: Tensor,
    codes: Tensor,
    scales: Tensor,
    kv_b: Tensor,
    scaling: float,
    mask: Tensor | None,
    v_head_dim: int,
) -> Tensor:
    return _decode_int8(q_nope, q_rot, codes, scales, kv_b, scaling, mask, v_head_dim)


@_decode_op.register_fake
@_decode_int8_op.register_fake
def _(q_nope: Tensor, *others: Any) -> Tensor:
    return q_nope.new_empty(*q_nope.shape[:-1], others[-1])
