"""F.scaled_dot_product_attention that hands out the log-sum-exp its kernel computes anyway.

On the CPU the fused kernel wants equal head dims, so multi-head latent attention (values narrower than keys) falls back
to the slow composed form in plain PyTorch; here the narrower side is padded with zeros, which is exact and faster. What
this gives up: the composed form and dropout on the CPU have no log-sum-exp to give.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

SDPA = F.scaled_dot_product_attention


def autocast(query: Tensor, *others: Tensor | None) -> list[Any]:
    """What autocast does to the arguments of F.scaled_dot_product_attention, but not to those of the kernels."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return [query, *others]
    dtype = torch.get_autocast_dtype(device)
    return [
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (query, *others)
    ]


def attend_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor | None]:
    """F.scaled_dot_product_attention of query [b, heads, q, d] over key and value [b, kv heads, k, d or another].

    Returns:
        The output, and the log-sum-exp [b, heads, q]: None where only a form runs that does not have it.
    """
    kernel = on_cpu if query.device.type == "cpu" else on_cuda
    answer = kernel(query, key, value, mask, dropout, is_causal, scale, enable_gqa)
    if answer is None:
        return SDPA(query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa), None
    return answer


def on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor] | None:
    """The fused CPU kernel on zero-padded head dims; None where it cannot run."""
    missing = query.shape[-1] - value.shape[-1]
    q, k = (F.pad(x, (0, max(-missing, 0))) if missing < 0 else x for x in (query, key))
    v = F.pad(value, (0, missing)) if missing > 0 else value
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa)
    if choice != SDPBackend.FLASH_ATTENTION.value or (missing and _has_blind_rows(mask)):
        return None
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout, is_causal, attn_mask=_additive(mask, q.dtype), scale=scale
    )
    return output[..., : value.shape[-1]], lse


def on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor] | None:
    """The kernel that F.scaled_dot_product_attention would choose, prepared as it does, with its log-sum-exp.

    Written from PyTorch's sources and operator schemas; not yet run on a GPU.
    """
    choice = torch._fused_sdp_choice(
        query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if choice == SDPBackend.FLASH_ATTENTION.value:
        # The kernel takes head dims that are multiples of 8, and no mask.
        q, k, v = (F.pad(x, (0, -x.shape[-1] % 8)) for x in (query, key, value))
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout, is_causal, False, scale=scale
        )[:2]
        return output[..., : value.shape[-1]], lse
    if choice == SDPBackend.EFFICIENT_ATTENTION.value:
        bias = _additive(mask, query.dtype)
        if bias is not None:
            # Rows of the bias have to start at multiples of 16 elements.
            num_keys = bias.shape[-1]
            if num_keys % 16:
                bias = F.pad(bias, (0, -num_keys % 16))[..., :num_keys]
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout, is_causal, scale=scale
        )[:2]
        return output, lse[..., : query.shape[2]]  # padded to a multiple of 32 rows
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, _additive(mask, query.dtype), True, dropout, is_causal, False, scale=scale
        )[:2]
        return output, lse.reshape(query.shape[:3])
    return None


def _has_blind_rows(mask: Tensor | None) -> bool:
    """Does an additive mask hide all keys of a row by a finite value?

    Such a row averages all values. The composed form derives that correctly; the fused kernel's gradient does not: its
    log-sum-exp has lost log(n).
    """
    if mask is None or mask.dtype == torch.bool:
        return False
    best = mask.amax(-1)
    return bool(((best <= torch.finfo(mask.dtype).min / 2) & (best > -math.inf)).any())


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
