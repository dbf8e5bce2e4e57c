"""Flex attention that tells QK-Clip the largest logits: transformers' function, wrapped.

Flex attention is compiled as one piece, so that nothing inside it can be watched; but it returns its log-sum-exp, from
which the maxima follow. `sdpa` and `eager` need no wrapper (see optim/observe.py). While nothing is watched, upstream's
function is called and nothing else. Given up: soft-capped logits, position biases and sinks, which no K2 layout has.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

from .optim.observe import record, recording

NAME = "flex_attention"
# What upstream applies to logits or their normalisation out of our sight.
_OUTSIDE = ("softcap", "position_bias", "s_aux")


def observed_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of query [b, heads, q, d] over key and value [b, kv heads, k, d], as transformers computes it.

    Returns:
        The output [b, q, heads, d] and, on a GPU, the log-sum-exp [b, heads, q].

    Raises:
        ValueError: `softcap`, `position_bias` or `s_aux` in a watched module.
    """
    output, lse = flex_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs)
    if recording():
        for name in _OUTSIDE:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} is set in a watched module; the largest logit is known only without {_OUTSIDE}"
                )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask: Any = attention_mask
        if isinstance(mask, BlockMask):
            mask = mask.mask_mod
        elif mask is not None:
            mask = mask[:, :1, :, : key.shape[-2]]  # upstream reads the first head's
        record(query, key, lse, scaling=scale, mask=mask)
    return output, lse


def register() -> None:
    """Put the wrapper in the place of transformers' `flex_attention`. Idempotent."""
    function: Any = observed_flex_attention
    AttentionInterface.register(NAME, function)
