"""The largest logits against the textbook definition in float64: every form of mask, awkward sizes, and no lse at all."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transformers_k2.optim.max_logits import max_logits, max_of_logits

INF = math.inf
LOWEST = torch.finfo(torch.float32).min


def textbook(
    query: Tensor, key: Tensor, scaling: float, visible: Tensor, added: Tensor | None = None
) -> Tensor:
    """[heads], by loops over batch, heads and rows in float64."""
    groups = query.shape[1] // key.shape[1]
    best = torch.full((query.shape[1],), -INF, dtype=torch.float64)
    visible = visible.expand(*query.shape[:3], key.shape[2])
    added = torch.zeros(1) if added is None else added
    added = added.double().expand_as(visible)
    for b, h, i in product(*(range(n) for n in query.shape[:3])):
        logits = (key[b, h // groups].double() * query[b, h, i].double()).sum(-1) * scaling + added[b, h, i]
        if visible[b, h, i].any():
            best[h] = max(best[h], logits[visible[b, h, i]].max())
    return best.float()


def kernel_lse(query: Tensor, key: Tensor, scaling: float, is_causal: bool, mask: Tensor | None) -> Tensor:
    """What PyTorch's CPU kernel returns, in rows that see nothing too."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -INF)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, key, 0.0, is_causal, attn_mask=mask, scale=scaling)[1]


def case(name: str, num_batch: int, num_rows: int) -> tuple[Tensor, dict]:
    """Which keys are visible, and the same as arguments."""
    causal = torch.ones(num_rows, num_rows, dtype=torch.bool).tril()[None, None]
    if name == "causal":
        return causal, {"is_causal": True}
    if name == "full":
        return torch.ones_like(causal), {}
    # The first tokens of the second sequence are padding: these rows see nothing.
    real = torch.ones(num_batch, 1, 1, num_rows, dtype=torch.bool)
    real[1, ..., : num_rows // 3] = False
    padded = causal & real
    document = (torch.arange(num_rows) * 3) // num_rows
    packed = causal & (document[:, None] == document)
    additive = torch.zeros(padded.shape)
    mod_real = real[:, 0, 0]
    return {
        "padded bool": (padded, {"mask": padded}),
        "padded lowest": (padded, {"mask": additive.masked_fill(~padded, LOWEST)}),
        "padded -inf": (padded, {"mask": additive.masked_fill(~padded, -INF)}),
        "packed 2-D": (packed, {"mask": packed[0, 0]}),
        "packed mask_mod": (
            packed,
            {"mask": lambda b, h, q, k: (k <= q) & (document[q] == document[k])},
        ),
        "padded mask_mod": (padded, {"mask": lambda b, h, q, k: (k <= q) & mod_real[b, k]}),
        "padding beside causal": (padded, {"mask": real.expand(-1, 1, num_rows, -1), "is_causal": True}),
        "keys only": (real.expand(-1, 1, num_rows, -1), {"mask": real}),
    }[name]


CASES = [
    "causal", "full", "padded bool", "padded lowest", "padded -inf", "packed 2-D", "packed mask_mod",
    "padded mask_mod", "padding beside causal", "keys only",
]  # fmt: skip


def inputs(
    num_rows: int, spread: float, dtype: torch.dtype = torch.float32, kv_heads: int = 3
) -> tuple[Tensor, Tensor]:
    """Heads of unequal size, as [batch, rows, heads, dim] transposed, which is how models make them."""
    query = torch.randn(2, num_rows, 6, 20) * torch.tensor([0.3, 1.0, 3.0, 0.5, 2.0, 1.5])[:, None]
    key = torch.randn(2, num_rows, kv_heads, 20) * spread
    return query.transpose(1, 2).to(dtype), key.transpose(1, 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_every_mask_gives_the_textbook_maximum(name: str, dtype: torch.dtype) -> None:
    num_rows, scaling = 37, 0.31
    visible, arguments = case(name, 2, num_rows)
    query, key = inputs(num_rows, 2.0, dtype)
    expected = textbook(query, key, scaling, visible)
    bool_mask = None if name == "causal" else visible
    lse = kernel_lse(query, key, scaling, name == "causal", bool_mask)
    if callable(arguments.get("mask")):  # as flex attention has it on a GPU
        lse = lse.masked_fill(~visible.any(-1), -INF)
    for known in (lse, None):
        exact, upper, lower = max_logits(query, key, known, scaling=scaling, tau=-1e9, **arguments)
        assert torch.equal(exact, expected)
        assert upper.eq(-INF).all()
        assert lower.eq(-INF).all()
    # A threshold in the middle parts the heads; those below keep a bracket of the truth.
    tau = float(expected.median()) + 0.5
    exact, upper, lower = max_logits(query, key, lse, scaling=scaling, tau=tau, **arguments)
    computed = exact > -INF
    assert computed.any()
    assert not computed.all()
    assert computed[expected > tau].all()
    assert torch.equal(exact[computed], expected[computed])
    rounding = 1e-5 * (1 + expected.abs())
    assert (upper + rounding >= expected)[~computed].all()
    assert (lower - rounding <= expected)[~computed].all()
    assert (upper - lower <= math.log(num_rows) + rounding)[~computed].all()


@pytest.mark.parametrize("num_rows", [1, 2, 129, 700])
@pytest.mark.parametrize("spread", [0.02, 4.0])
def test_sizes_and_flat_or_peaky_attention(num_rows: int, spread: float) -> None:
    query, key = inputs(num_rows, spread)
    query, key = query[:1], key[:1]
    logits = (query.double() @ key.double().repeat_interleave(2, 1).mT) * 0.2
    visible = torch.ones(num_rows, num_rows, dtype=torch.bool).tril()
    expected = logits.masked_fill(~visible, -INF).amax((0, 2, 3)).float()
    lse = kernel_lse(query, key, 0.2, True, None)
    exact = max_logits(query, key, lse, scaling=0.2, tau=-1e9, is_causal=True)[0]
    assert torch.equal(exact, expected)


@pytest.mark.parametrize(("num_rows", "num_keys"), [(5, 9), (9, 5)])
def test_causal_is_aligned_at_the_upper_left(num_rows: int, num_keys: int) -> None:
    query, key = inputs(num_rows, 1.0)[0], inputs(num_keys, 1.0)[1]
    visible = torch.ones(num_rows, num_keys, dtype=torch.bool).tril()
    lse = kernel_lse(query, key, 1.0, True, None)
    for known in (lse, None):
        exact = max_logits(query, key, known, scaling=1.0, tau=-1e9, is_causal=True)[0]
        assert torch.equal(exact, textbook(query, key, 1.0, visible))


def test_other_values_of_an_additive_mask_are_part_of_the_logit() -> None:
    query, key = inputs(11, 0.5)
    bias = torch.randn(1, 6, 11, 11) * 3
    lse = kernel_lse(query, key, 1.0, False, bias)
    expected = textbook(query, key, 1.0, torch.ones(11, 11, dtype=torch.bool), bias)
    exact = max_logits(query, key, lse, scaling=1.0, tau=-1e9, mask=bias)[0]
    assert torch.equal(exact, expected)


@pytest.mark.parametrize("gamma", [4.0**-1, 4.0**-3, 2.0**-5])
def test_powers_of_two_scale_the_maximum_bit_for_bit(gamma: float) -> None:
    """QK-Clip scales one part of the head dim by sqrt(gamma) on both sides, the other by gamma on one."""
    query, key = inputs(150, 3.0, kv_heads=6)
    if gamma == 2.0**-5:
        sqrt_q, sqrt_k = gamma, 1.0
    else:
        sqrt_q = sqrt_k = math.sqrt(gamma)
    scaled_q = torch.cat((query[..., :12] * sqrt_q, query[..., 12:] * gamma), -1)
    scaled_k = torch.cat((key[..., :12] * sqrt_k, key[..., 12:]), -1)
    before, after = (
        max_logits(q, k, kernel_lse(q, k, 0.137, True, None), scaling=0.137, tau=-1e9, is_causal=True)[0]
        for q, k in ((query, key), (scaled_q, scaled_k))
    )
    assert torch.equal(after, before * gamma)


def test_ties_of_identical_tokens() -> None:
    query, key = (x[:, :, :1].expand(-1, -1, 90, -1) for x in inputs(1, 2.0))
    lse = kernel_lse(query.contiguous(), key.contiguous(), 1.0, True, None)
    exact = max_logits(query, key, lse, scaling=1.0, tau=-1e9, is_causal=True)[0]
    expected = textbook(query[:, :, :1], key[:, :, :1], 1.0, torch.ones(1, 1, dtype=torch.bool))
    assert torch.equal(exact, expected)


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_what_is_not_finite_is_reported_as_infinite(side: str, bad: float) -> None:
    query, key = (x.contiguous() for x in inputs(9, 1.0))
    (query if side == "query" else key)[1, 2, 4, 3] = bad
    affected = [2] if side == "query" else [4, 5]  # key head 2 serves query heads 4 and 5
    good = [h for h in range(6) if h not in affected]
    lse = kernel_lse(query, key, 1.0, True, None)
    for known in (lse, None):
        result = max_logits(query, key, known, scaling=1.0, tau=1e9, is_causal=True)
        assert result[0, affected].eq(INF).all()
        assert result.amax(0)[good].isfinite().all()


def test_what_is_not_finite_but_hidden_does_not_count() -> None:
    query, key = (x.contiguous() for x in inputs(9, 1.0))
    visible, arguments = case("padded bool", 2, 9)
    query[1, :, :3] = key[1, :, :3] = math.nan
    exact = max_logits(query, key, None, scaling=1.0, tau=0.0, **arguments)[0]
    assert torch.equal(exact, textbook(query, key, 1.0, visible))


def test_rows_that_see_nothing_at_all() -> None:
    query, key = inputs(5, 1.0)
    hidden = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    for lse in (None, kernel_lse(query, key, 1.0, False, hidden)):
        assert max_logits(query, key, lse, scaling=1.0, tau=-1e9, mask=hidden).eq(-INF).all()


def test_logits_of_eager_attention() -> None:
    logits = torch.randn(2, 3, 5, 5) - 4
    visible = torch.ones(5, 5, dtype=torch.bool).tril(-1)  # row 0 sees nothing
    masked = logits + torch.zeros(5, 5).masked_fill(~visible, LOWEST)
    masked[:, 2] = LOWEST
    exact = max_of_logits(masked)[0]
    expected = torch.stack([max(x for x in logits[:, h, visible].flatten()) for h in range(3)])
    expected[2] = -INF
    assert torch.equal(exact, expected)
    masked[0, 1, 3, 2] = math.nan
    assert max_of_logits(masked)[0].tolist() == [float(expected[0]), INF, -INF]


def test_autocast_does_not_reach_the_products() -> None:
    query, key = inputs(33, 3.0)
    lse = kernel_lse(query, key, 1.0, True, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = max_logits(query, key, lse, scaling=1.0, tau=-1e9, is_causal=True)[0]
    assert torch.equal(exact, max_logits(query, key, None, scaling=1.0, tau=0.0, is_causal=True)[0])


def test_the_kernel_used_here_is_the_one_of_pytorch() -> None:
    """The lse of these tests belongs to F.scaled_dot_product_attention's own output."""
    query, key = inputs(13, 1.0, kv_heads=6)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    ours = kernel(query, key, key, 0.0, True, scale=0.3)[0]
    assert torch.equal(ours, F.scaled_dot_product_attention(query, key, key, is_causal=True, scale=0.3))


def test_a_rounded_lse_only_widens_the_search() -> None:
    """transformers hands flex attention's log-sum-exp on in bf16: bounds stay bounds, the maximum stays exact."""
    query, key = torch.randn(2, 4, 37, 24) * 6, torch.randn(2, 4, 37, 24) * 6
    visible, arguments = case("causal", 2, 37)
    truth = textbook(query, key, 0.2, visible)
    rounded = kernel_lse(query, key, 0.2, True, None).bfloat16()
    exact = max_logits(query, key, rounded, scaling=0.2, tau=1.0, **arguments)[0]
    assert torch.equal(exact, truth)
    _, upper, lower = max_logits(query, key, rounded, scaling=0.2, tau=1e4, **arguments)
    assert (lower <= truth).all()
    assert (truth <= upper).all()
