"""Attention on a CPU in blocks: `attn_implementation="padded_sdpa"`.

torch's fused CPU kernel wants queries, keys and values of one width; MLA's values are narrower, so that `sdpa` falls back
to products that hold a score for every pair of tokens, and keep it for the backward pass. Here the values are padded with
zeros, which the output drops. Other devices have kernels for two widths: there this is `sdpa` itself, and so it is under
an additive mask (transformers makes boolean ones): where that hides all keys of a row by a finite value, the fused
kernel's gradients are wrong. Given up: the padding's share of the product of probabilities and values, and equality of
the last bit with `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "padded_sdpa"


def register() -> None:
    """Make the name known to transformers. Idempotent."""
    function: Any = padded_sdpa_forward
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def padded_sdpa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [b, heads, q, d] over key [b, heads, k, d] and value [b, heads, k, e], as transformers' `sdpa`.

    Returns:
        The output [b, q, heads, e], and None for the weights.
    """
    width = value.shape[-1]
    missing = query.shape[-1] - width
    additive = attention_mask is not None and attention_mask.dtype != torch.bool
    if query.device.type == "cpu" and missing > 0 and not additive:
        # Not F.pad, which copies into a slice: recompute.py notes operations that make a new tensor.
        value = torch.cat((value, value.new_zeros(()).expand(*value.shape[:-1], missing)), dim=-1)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output[..., :width], None
