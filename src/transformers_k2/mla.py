"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1) over a cache of latents, two ways.

A token's keys and values are linear in its latent c: k = W_UK c, v = W_UV c, beside a rotated key that all heads share.
So attention can expand all T latents into keys and values once, or leave them and move the two matrices to the other
side ("absorbed"): q . (W_UK c) = (W_UK^T q) . c, and sum of p W_UV c = W_UV (sum of p c). Expanding costs work for each
latent, absorbing costs wider products for each pair of query and latent; `absorbs` says which is less.

Both go over the latents block by block and combine what they find by its log-sum-exp, so that neither keys and values of
the whole context nor the scores of all pairs are ever held. What this gives up: dropout, gradients that save memory (they
exist, but autograd keeps every block), and the last bits: sums are in another order than in one softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .optim.sdpa import attend_with_lse

# (start, stop) -> latents [b, stop - start, rank], shared rotated keys [b, stop - start, rotary dim].
Latents = Callable[[int, int], tuple[Tensor, Tensor]]
# Latents expanded at a time, and queries that meet them at a time: 100 MB of keys and values with 64 heads in bfloat16.
BLOCK = 1024
_VANISHING = -1e30  # beside such a number scores are lost
_SCORES = 1 << 24  # absorbed scores held at a time: 64 MB in float32


def absorbs(
    num_queries: int, num_keys: int, rank: int, nope_dim: int, value_dim: int, num_unfolded: int = 0
) -> bool:
    """Whether absorbing takes fewer multiply-adds than expanding; both are proportional to the number of heads.

    Expanding: rank * (nope + value) for each latent. Absorbing: the same for each query, and 2 rank - nope - value more
    for each pair of a query and a latent (scores and outputs have `rank` dimensions). At K2's sizes (512, 128, 128)
    absorbing wins below 170 queries over a long cache. `num_unfolded` is further work for absorbing, in latents expanded.
    """
    expansion = rank * (nope_dim + value_dim)
    absorbing = num_queries * (num_keys * (2 * rank - nope_dim - value_dim) + expansion)
    return absorbing + num_unfolded * expansion < num_keys * expansion


def absorbed(
    q_nope: Tensor,
    q_rot: Tensor,
    latents: Latents,
    num_keys: int,
    kv_b: Tensor,
    scaling: float,
    mask: Tensor | None,
    value_dim: int,
) -> Tensor:
    """Attention in the space of latents.

    Args:
        q_nope: queries without position [b, heads, q, nope].
        q_rot: rotated queries [b, heads, q, rotary].
        latents: reads the cache, which holds `num_keys` of them.
        kv_b: weight of kv_b_proj [heads * (nope + value), rank], of each head W_UK's rows first.
        scaling: of the scores.
        mask: [b or 1, 1, q, num_keys], boolean (True is seen) or additive; None: query i sees num_keys - q + i + 1 keys.
        value_dim: of a head.

    Returns:
        [b, q, heads, value] in the dtype of `q_nope`. A row that sees nothing is zero.
    """
    batch, num_heads, num_queries, nope_dim = q_nope.shape
    dtype = _sums_dtype(q_nope)
    up = kv_b.view(num_heads, nope_dim + value_dim, -1)
    q_latent = torch.matmul(q_nope.to(dtype), up[:, :nope_dim].to(dtype)) * scaling
    q_rot = q_rot.to(dtype) * scaling
    num_rows = num_heads * num_queries
    q_latent, q_rot = q_latent.reshape(batch, num_rows, -1), q_rot.reshape(batch, num_rows, -1)
    output = q_latent.new_zeros(batch, num_rows, up.shape[-1])
    largest = q_latent.new_full((batch, num_rows, 1), -math.inf)
    total = q_latent.new_zeros(batch, num_rows, 1)
    size = max(1, _SCORES // (batch * num_rows))
    for start in range(0, num_keys, size):
        stop = min(start + size, num_keys)
        c, rotary = (part.to(dtype) for part in latents(start, stop))
        scores = torch.baddbmm(q_latent @ c.mT, q_rot, rotary.mT)
        scores = _masked(scores.view(batch, num_heads, num_queries, -1), mask, start, stop, num_keys)
        scores = scores.view(batch, num_rows, -1)
        new = torch.maximum(largest, scores.amax(-1, keepdim=True))
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        shift = new.masked_fill(new == -math.inf, 0.0)
        probs = (scores - shift).exp_()
        old = (largest - shift).exp_()
        total = total * old + probs.sum(-1, keepdim=True)
        output = torch.baddbmm(output * old, probs, c)
        largest = new
    output = output / total.masked_fill(total == 0, 1.0)
    output = output.view(batch, num_heads, num_queries, -1) @ up[:, nope_dim:].to(dtype).mT
    return output.to(q_nope.dtype).transpose(1, 2)


def expanded(
    query: Tensor,
    latents: Latents,
    num_keys: int,
    expand: Callable[[Tensor], Tensor],
    scaling: float,
    mask: Tensor | None,
    value_dim: int,
) -> Tensor:
    """Attention over keys and values that are expanded `BLOCK` latents at a time.

    Args:
        query: [b, heads, q, nope + rotary].
        latents: reads the cache, which holds `num_keys` of them.
        expand: kv_b_proj: [b, n, rank] -> [b, n, heads * (nope + value)].
        scaling: of the scores.
        mask: as in `absorbed`.
        value_dim: of a head.

    Returns:
        [b, q, heads, value] in the dtype of `query`. A row that sees nothing is zero.
    """
    batch, num_heads, num_queries, key_dim = query.shape
    if mask is not None and mask.is_floating_point():
        query, mask = _without_blind_rows(query, mask)
    sums = query.new_zeros(batch, num_heads, num_queries, value_dim, dtype=_sums_dtype(query))
    lse = sums.new_full((batch, num_heads, num_queries), -math.inf)
    padding = max(0, key_dim - value_dim) if query.device.type == "cpu" else 0
    first_new = num_keys - num_queries if mask is None else num_keys
    for start, stop in _blocks(num_keys, first_new):
        c, rotary = latents(start, stop)
        kv = expand(c).view(batch, stop - start, num_heads, -1).transpose(1, 2)
        nope_dim = kv.shape[-1] - value_dim
        key = torch.cat((kv[..., :nope_dim], rotary[:, None].expand(-1, num_heads, -1, -1)), dim=-1)
        # torch's fused CPU kernel wants one width.
        value = F.pad(kv[..., nope_dim:], (0, padding))
        for begin, end in _blocks(num_queries, 0):
            if mask is None:
                is_causal = start >= first_new
                if is_causal and end <= start - first_new:
                    continue  # these keys are in their future
                # Blocks of new keys are those of the queries: one of each pair is on the diagonal.
                is_causal = is_causal and begin == start - first_new
                part = None
            else:
                is_causal, part = False, mask[..., begin:end, start:stop]
                if (
                    part.device.type == "cpu"
                    and part.dtype == torch.bool
                    and not torch.compiler.is_compiling()
                ):
                    if not part.any():
                        continue
                    part = None if part.all() else part
            output, new = _attend(query[:, :, begin:end], key, value, part, is_causal, scaling)
            _merge(sums[:, :, begin:end], lse[:, :, begin:end], output[..., :value_dim], new)
    return sums.to(query.dtype).transpose(1, 2)


def _without_blind_rows(query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same for rows that a finite mask hides all keys of: such a row is the mean of all values.

    Next to a mask of -3e38 scores vanish, and the log of their number too, by which blocks are weighted.
    """
    most = mask.amax(-1, keepdim=True)
    blind = (most < _VANISHING) & (most > -math.inf)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not blind.any():
        return query, mask
    return query.masked_fill(blind, 0.0), mask.masked_fill(blind, 0.0)


def _sums_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _blocks(num: int, boundary: int) -> Iterator[tuple[int, int]]:
    """Slices of at most BLOCK, one of which begins at the boundary."""
    for first, last in ((0, boundary), (boundary, num)):
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


def _masked(scores: Tensor, mask: Tensor | None, start: int, stop: int, num_keys: int) -> Tensor:
    """Scores [b, heads, q, stop - start] of the keys from `start` on, those that are not seen at -inf."""
    if mask is None:
        num_queries = scores.shape[2]
        first_new = num_keys - num_queries
        if num_queries == 1 or stop <= first_new + 1:
            return scores
        last = torch.arange(first_new, num_keys, device=scores.device)
        mask = torch.arange(start, stop, device=scores.device) <= last[:, None]
    else:
        mask = mask[..., start:stop]
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by the device's fused kernel if it has one."""
    output, lse = attend_with_lse(query, key, value, mask, 0.0, is_causal, scaling, False)
    if lse is not None:
        if mask is not None:
            # torch's CPU kernel says 0 for a row that sees nothing.
            seen = mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1) > -math.inf
            lse = lse.masked_fill(~seen, -math.inf)
        return output, lse
    scores = (query @ key.mT).to(_sums_dtype(query)) * scaling
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return output, scores.logsumexp(-1)


def _merge(sums: Tensor, lse: Tensor, output: Tensor, new: Tensor) -> None:
    """Into `sums` and `lse`, in place: what attention over the keys of both would give."""
    both = torch.logaddexp(lse, new.to(lse.dtype))
    shift = both.masked_fill(both == -math.inf, 0.0)
    weight = (new - shift).exp()[..., None]
    # What a kernel answers for a row that sees nothing may be NaN.
    output = torch.where(weight > 0, output.to(sums.dtype) * weight, 0.0)
    sums.mul_((lse - shift).exp()[..., None]).add_(output)
    lse.copy_(both)
