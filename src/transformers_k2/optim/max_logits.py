"""The largest attention logit of every head, exactly, from the log-sum-exp that attention kernels compute anyway.

QK-Clip needs, per head, S = max over batch, rows and visible keys of q·k * scaling (Kimi K2 report, arXiv 2507.20534,
Alg. 1). A fused kernel never writes those logits down, but for a row that sees n keys

    lse - log(n)  <=  max_j s_j  <=  lse,

so a head whose largest lse is below the threshold needs no clip and no further work; of any other head only those rows
are computed again whose lse reaches the head's lower bound. Values are exact: the fp32 products only find the few
(row, key) pairs that can be the largest, whose dot products are then summed in fp64 and rounded once to fp32. They do
not depend on how many rows were computed again, and scale exactly when queries and keys scale by powers of two.

Given up: the time of one Q·Kᵀ for heads above the threshold with attention so flat that most rows qualify.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Logits held at once: what stays in a CPU core's cache, and what a GPU needs to be busy.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 25
_FEWEST_ROWS = 64  # that a matmul should have
# What one fp32 matmul does to its inputs (unit roundoff), by torch.get_float32_matmul_precision().
_INPUT_ROUNDOFF = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}
# Kernels take exp and log from approximations good to about 2^-20; a wider margin only costs a few more rows.
_LSE_ROUNDOFF = 2.0**-14


@torch.no_grad()
def max_logits(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    lse: Float[Tensor, "batch heads rows"] | None,
    *,
    scaling: float,
    tau: float,
    is_causal: bool = False,
    mask: Tensor | MaskMod | None = None,
) -> Float[Tensor, "3 heads"]:
    """Per query head the largest signed logit q·k * scaling (+ mask) of any visible key, or its bracket; float32.

    Args:
        lse: log-sum-exp of each row's visible logits, natural logarithm, as the kernel returns it; rows that see no key
            may hold anything. None: every head is computed exactly.
        tau: heads whose largest lse is not above it keep the bracket.
        is_causal: row i sees keys 0..i (aligned at the upper left, as in F.scaled_dot_product_attention).
        mask: bool (True is visible) or additive (hidden at or below half the dtype's lowest value), broadcastable to
            [batch, heads, rows, keys]; or flex attention's `mask_mod(b, h, q_idx, kv_idx) -> bool`.

    Returns:
        Rows exact, upper, lower. Of a head, either `exact` or `upper` and `lower` are set and the rest is -inf; so
        results of several forwards merge by elementwise maximum. A NaN or infinite logit gives exact = +inf.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.detach(), key.detach()
        num_heads = query.shape[1]
        result = query.new_full((3, num_heads), -math.inf, dtype=torch.float32)
        visibility = _Visibility.of(mask, is_causal, query.shape[2], key.shape[2])
        if lse is None:
            heads = torch.arange(num_heads, device=query.device)
            result[0] = _exact(query, key, None, None, heads, scaling, visibility, 0.0)
            return result
        # transformers rounds flex attention's to the dtype of the values.
        roundoff = torch.finfo(lse.dtype).eps if lse.dtype.itemsize < 4 else _LSE_ROUNDOFF
        lse = lse.detach().float()
        seen = visibility.rows()
        if seen is not None:
            lse = lse.masked_fill(~seen, -math.inf)
        upper = lse.amax((0, 2))
        lower = (lse - visibility.log_num_keys(query.device)).amax((0, 2))
        if roundoff > _LSE_ROUNDOFF:
            upper, lower = (
                bound + sign * roundoff * bound.abs().nan_to_num(posinf=0.0)
                for bound, sign in ((upper, 1), (lower, -1))
            )
        # A row of NaN has lse 0 in the CPU kernel. Whatever the lse cannot be trusted for is computed from all rows.
        suspect = ~upper.isfinite() & (upper != -math.inf) | (lse == 0).any(2).any(0)
        over = suspect | (upper > tau)
        result[1:] = torch.stack((upper, lower)).masked_fill(over, -math.inf)
        if over.any():
            heads = over.nonzero().squeeze(1)
            lower = lower.masked_fill(suspect, -math.inf)
            result[0, heads] = _exact(query, key, lse, lower, heads, scaling, visibility, roundoff)
        return result


def max_of_logits(logits: Float[Tensor, "batch heads rows keys"]) -> Float[Tensor, "3 heads"]:
    """The same record from the logits themselves, mask added: entries at or below half the lowest value are hidden."""
    largest = logits.detach().amax((0, 2, 3))
    hidden = largest <= torch.finfo(logits.dtype).min / 2
    exact = largest.float().masked_fill(hidden, -math.inf).masked_fill(largest.isnan(), math.inf)
    return torch.stack((exact, *torch.full_like(exact, -math.inf).expand(2, -1)))


@dataclass(frozen=True)
class _Visibility:
    """Which keys a row sees, in the forms that callers of attention use."""

    num_rows: int
    num_keys: int
    is_causal: bool
    dense: Tensor | None  # [batch or 1, heads or 1, rows, keys]
    mod: MaskMod | None

    @classmethod
    def of(cls, mask: Tensor | MaskMod | None, is_causal: bool, num_rows: int, num_keys: int) -> _Visibility:
        if not isinstance(mask, Tensor):
            return cls(num_rows, num_keys, is_causal, None, mask)
        mask = mask.detach()
        mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, num_rows, num_keys)
        return cls(num_rows, num_keys, is_causal, mask, None)

    def rows(self) -> Bool[Tensor, "batch heads rows"] | None:
        """Rows that see a key; None where all do, or (a mask_mod) where the kernel gives -inf for those that do not."""
        mask = self.dense
        if mask is None:
            return None
        if self.is_causal:
            mask = mask if mask.dtype == torch.bool else ~(mask <= _hidden_at(mask))
            return mask.tril().any(-1)
        if mask.dtype == torch.bool:
            return mask.any(-1)
        return ~(mask.amax(-1) <= _hidden_at(mask))

    def log_num_keys(self, device: torch.device) -> Tensor:
        """An upper bound of log(number of visible keys), broadcastable to [batch, heads, rows]."""
        if self.is_causal:
            return torch.arange(1, self.num_rows + 1, device=device).clamp(max=self.num_keys).log()
        return torch.full((), math.log(self.num_keys), device=device)

    def apply_(self, logits: Tensor, b: Tensor, h: Tensor, q: Tensor, first: int = 0) -> Tensor:
        """Add the mask to logits [..., keys], in place; `b`, `h`, `q` are indices broadcastable to [...].

        The keys may be the first of all only: those that a causal block can see, whose rows start at `first`.
        """
        num_keys = logits.shape[-1]
        if self.is_causal:
            hidden = torch.arange(first, num_keys, device=logits.device) > q[..., None]
            logits[..., first:].masked_fill_(hidden, -math.inf)
        if self.dense is not None:
            mask = self.dense[..., :num_keys][self._broadcast(b, 0), self._broadcast(h, 1), q]
            if mask.dtype == torch.bool:
                logits.masked_fill_(~mask, -math.inf)
            else:
                logits.add_(mask).masked_fill_(mask <= _hidden_at(mask), -math.inf)
        if self.mod is not None:
            rows = torch.broadcast_tensors(b, h, q)
            over_keys: Any = torch.vmap(self.mod, in_dims=(None, None, None, 0))
            over_rows: Any = torch.vmap(over_keys, in_dims=(0, 0, 0, None))
            keys = torch.arange(num_keys, device=logits.device)
            visible = over_rows(*(i.flatten() for i in rows), keys)
            logits.masked_fill_(~visible.view(*rows[0].shape, num_keys), -math.inf)
        return logits

    def added(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor | float:
        """What the mask adds to the visible logits at these indices."""
        if self.dense is None or self.dense.dtype == torch.bool:
            return 0.0
        return self.dense[self._broadcast(b, 0), self._broadcast(h, 1), q, k].double()

    def _broadcast(self, index: Tensor, dim: int) -> Tensor:
        assert self.dense is not None
        return index if self.dense.shape[dim] > 1 else index.new_zeros(())


def _hidden_at(mask: Tensor) -> float:
    return torch.finfo(mask.dtype).min / 2


def _exact(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    lse: Float[Tensor, "batch heads rows"] | None,
    lower: Float[Tensor, " heads"] | None,
    heads: Int[Tensor, " some"],
    scaling: float,
    visibility: _Visibility,
    lse_roundoff: float,
) -> Float[Tensor, " some"]:
    """The largest logit of the given heads; with `lse`, of the rows that can hold it."""
    error = _product_error(query, key, heads, scaling)
    all_rows = torch.arange(query.shape[2], device=query.device).expand(1, 1, -1)
    largest = query.new_full((query.shape[0], *heads.shape, query.shape[2]), -math.inf, dtype=torch.float32)
    few = heads.new_zeros(heads.shape, dtype=torch.bool)
    if lse is not None and lower is not None:
        lse = lse[:, heads]
        floor = lower[heads]
        floor = floor - error - lse_roundoff * (1 + floor.abs())
        candidates = ~(lse < floor[:, None])
        num_candidates = candidates.sum(2).amax(0)
        few = (num_candidates * 4 <= query.shape[2]) & (lower[heads] != -math.inf)
        if few.any():
            some = few.nonzero().squeeze(1)
            num = int(num_candidates[some].max())
            rows = lse[:, some].topk(num, dim=2).indices
            found = _row_maxima(query, key, heads[some], rows, scaling, visibility)
            largest[:, some] = largest[:, some].scatter_(2, rows, found)
    if not few.all():
        some = (~few).nonzero().squeeze(1)
        largest[:, some] = _row_maxima(query, key, heads[some], all_rows, scaling, visibility)
    # NaN is the largest of all, here and in amax.
    top = largest.amax((0, 2))
    near = (largest >= (top - 2 * error)[:, None]) & top.isfinite()[:, None]
    result = _in_double(query, key, heads, near, top - 2 * error, scaling, visibility)
    return result.masked_fill(top.isnan() | (top == math.inf), math.inf)


def _product_error(query: Tensor, key: Tensor, heads: Tensor, scaling: float) -> Float[Tensor, " some"]:
    """Bound of the difference between an fp32 product q·k * scaling, blocked in any order, and the true one, per head."""
    dim, groups = query.shape[-1], query.shape[1] // key.shape[1]
    # Rows that are not finite are hidden or make the result infinite: they must not make the bound so.
    norms_q, norms_k = (
        torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).nan_to_num(0, 0).amax((0, 2))
        for x in (query, key)
    )
    roundoff = (dim + 8) * 2.0**-23 + 4 * _INPUT_ROUNDOFF[torch.get_float32_matmul_precision()]
    return norms_q[heads] * norms_k[heads // groups] * (abs(scaling) * roundoff)


def _row_maxima(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    heads: Int[Tensor, " some"],
    rows: Int[Tensor, "batch_or_1 some_or_1 num"],
    scaling: float,
    visibility: _Visibility,
) -> Float[Tensor, "batch some num"]:
    """The largest logit of each named row in fp32, a block of rows at a time; all rows when `rows` is [1, 1, num]."""
    every, groups = rows.shape[0] == 1 == rows.shape[1], query.shape[1] // key.shape[1]
    num_batch, num_rows, num_keys = query.shape[0], rows.shape[2], key.shape[2]
    block = _BLOCK.get(query.device.type, _BLOCK_ELSEWHERE)
    # As many heads as fit, then as many rows.
    heads_at_once = max(1, block // (num_rows * num_keys))
    rows_at_once = max(1, block // (heads_at_once * num_keys))
    ordered = every and visibility.is_causal
    if ordered:  # the first rows see few keys
        rows_at_once = min(rows_at_once, max(_FEWEST_ROWS, num_rows // 8))
    result = query.new_empty((num_batch, heads.shape[0], num_rows), dtype=torch.float32)
    starts = range(0, heads.shape[0], heads_at_once)
    for batch in range(num_batch):
        for start in starts:
            chosen = heads[start : start + heads_at_once]
            keys = key[batch].index_select(0, chosen // groups).float().mT
            b, h = chosen.new_full((1, 1), batch), chosen[:, None]
            queries = query[batch].index_select(0, chosen)
            for first in range(0, num_rows, rows_at_once):
                if every:
                    q = rows[0, :, first : first + rows_at_once]
                    part = queries[:, first : first + rows_at_once]
                else:
                    q = rows[batch, start : start + heads_at_once, first : first + rows_at_once]
                    part = queries.gather(1, q[..., None].expand(-1, -1, query.shape[-1]))
                seen = min(first + rows_at_once, num_keys) if ordered else num_keys
                logits = torch.bmm(part.float(), keys[..., :seen]).mul_(scaling)
                logits = visibility.apply_(logits, b, h, q, first if ordered else 0)
                result[batch, start : start + heads_at_once, first : first + rows_at_once] = logits.amax(-1)
    return result


def _in_double(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    heads: Int[Tensor, " some"],
    near: Bool[Tensor, "batch some rows"],
    floor: Float[Tensor, " some"],
    scaling: float,
    visibility: _Visibility,
) -> Float[Tensor, " some"]:
    """The largest logit of the rows marked `near`: pairs that reach `floor` in fp32 are summed in fp64."""
    groups, num_keys, dim = query.shape[1] // key.shape[1], key.shape[2], query.shape[-1]
    result = query.new_full(heads.shape, -math.inf, dtype=torch.float64)
    block = _BLOCK.get(query.device.type, _BLOCK_ELSEWHERE)
    places = near.nonzero(as_tuple=True)
    rows_at_once = max(1, 8 * block // (num_keys * dim))
    for b, s, q in zip(*(i.split(rows_at_once) for i in places), strict=True):
        h = heads[s]
        queries = query[b, h, q]
        logits = torch.bmm(key[b, h // groups].float(), queries.float()[..., None]).squeeze(-1).mul_(scaling)
        logits = visibility.apply_(logits, b, h, q)
        pairs = (logits >= floor[s][:, None]).nonzero(as_tuple=True)
        for r, k in zip(*(i.split(max(1, block // dim)) for i in pairs), strict=True):
            products = queries[r].double() * key[b[r], h[r] // groups, k].double()
            exact = products.sum(-1) * scaling + visibility.added(b[r], h[r], q[r], k)
            result.scatter_reduce_(0, s[r], exact, "amax")
    return result.float()
