"""K2's attention over cached latents against transformers' DeepseekV3Attention, with K2's own head sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, LatentCache, attention, mla
from transformers_k2.attention import KimiK2Attention

HIDDEN, BATCH = 96, 2


def config(**changes: Any) -> KimiK2Config:
    """Two heads of K2's size, 128 + 64 and 128 over latents of 512."""
    shape = {"hidden_size": HIDDEN, "num_attention_heads": 2, "q_lora_rank": 80, "num_hidden_layers": 1}
    made = KimiK2Config(**(shape | changes))
    made._attn_implementation = "sdpa"
    return made


def pair(dtype: torch.dtype, **changes: Any) -> tuple[KimiK2Attention, DeepseekV3Attention, nn.Module]:
    """Ours, upstream's with the same weights, and the rotary embedding."""
    made = config(**changes)
    stock = DeepseekV3Attention(made, 0).eval()
    for name, weight in stock.named_parameters():
        nn.init.normal_(
            weight, 1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else weight.shape[-1] ** -0.5
        )
    ours = copy.deepcopy(stock)
    ours.__class__ = KimiK2Attention
    return ours.to(dtype), stock.to(dtype), DeepseekV3RotaryEmbedding(made)


def causal(num_queries: int, num_keys: int) -> Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)[None, None]


def mask_of(kind: str, num_queries: int, num_keys: int) -> Tensor | None:
    """What transformers makes for SDPA: boolean, or None where it can say is_causal."""
    seen = causal(num_queries, num_keys)
    if kind == "causal":
        return None if num_queries in (1, num_keys) else seen
    if kind == "left padding":
        return seen & (torch.arange(num_keys) >= torch.tensor([num_keys // 3, 0])[:, None, None, None])
    rows = torch.arange(num_keys) // 50
    return (seen & (rows[-num_queries:, None] == rows)).expand(BATCH, -1, -1, -1)


@torch.no_grad()
def run(
    module: nn.Module, rotary: nn.Module, hidden: Tensor, cache: Any, num_before: int, mask: Tensor | None
) -> Tensor:
    positions = torch.arange(num_before, num_before + hidden.shape[1])[None]
    return module(hidden, rotary(hidden, positions), mask, past_key_values=cache)[0]


def visible(mask: Tensor | None, output: Tensor) -> Tensor:
    """Rows that see a key; upstream's answer for the others is anything."""
    if mask is None:
        return torch.ones(output.shape[:2], dtype=torch.bool)
    return mask[:, 0].any(-1).expand(output.shape[:2])


@pytest.mark.parametrize("kind", ["causal", "left padding", "packed"])
@pytest.mark.parametrize("num_before", [0, 1, 40, 700])
def test_equals_upstream_in_float64_on_both_sides_of_the_switch(
    num_before: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_FEW_SCORES", 0)
    monkeypatch.setattr(mla, "BLOCK", 128)
    ours, stock, rotary = pair(torch.float64)
    ways = set()
    for name in ("absorbed", "expanded"):
        function = getattr(mla, name)
        monkeypatch.setattr(mla, name, lambda *a, f=function, n=name: (ways.add(n), f(*a))[1])
    before = torch.randn(BATCH, num_before, HIDDEN, dtype=torch.float64)
    for num_queries in (1, 2, 3, 16, 17, 128, 129, 168, 169, 170, 171, 172, 300):
        caches = DynamicCache(), DynamicCache()
        hidden = torch.randn(BATCH, num_queries, HIDDEN, dtype=torch.float64)
        if num_before:
            for module, cache in zip((stock, ours), caches, strict=True):
                run(module, rotary, before, cache, 0, None)
        mask = mask_of(kind, num_queries, num_before + num_queries)
        expected = run(stock, rotary, hidden, caches[0], num_before, mask)
        got = run(ours, rotary, hidden, caches[1], num_before, mask)
        rows = visible(mask, got)
        torch.testing.assert_close(got[rows], expected[rows], rtol=1e-10, atol=1e-10)
        assert torch.equal(caches[1].layers[0].keys, caches[0].layers[0].keys)
        assert torch.equal(caches[1].layers[0].values, caches[0].layers[0].values)
    assert ways == (
        {"absorbed", "expanded"} if num_before == 700 else {"expanded"} if num_before == 0 else ways
    )


@pytest.mark.parametrize("num_queries", [1, 5, 100, 200])
def test_bfloat16_is_as_near_to_float64_as_upstream(num_queries: int) -> None:
    ours, stock, rotary = pair(torch.bfloat16)
    exact = copy.deepcopy(stock).double()
    batch = 8  # single tokens' errors are noisy
    before, hidden = (
        torch.randn(batch, 400, HIDDEN).bfloat16(),
        torch.randn(batch, num_queries, HIDDEN).bfloat16(),
    )
    mask = mask_of("causal", num_queries, 400 + num_queries)
    errors, outputs = {}, {}
    for name, module in {"exact": exact, "stock": stock, "ours": ours}.items():
        cache, dtype = DynamicCache(), next(module.parameters()).dtype
        run(module, rotary, before.to(dtype), cache, 0, None)
        outputs[name] = run(module, rotary, hidden.to(dtype), cache, 400, mask).double()
    for name in ("stock", "ours"):
        errors[name] = (outputs[name] - outputs["exact"]).norm() / outputs["exact"].norm()
    assert errors["ours"] <= 1.02 * errors["stock"] < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cropped_cache_goes_on(dtype: torch.dtype) -> None:
    """As assisted decoding does: some tokens are taken back, others follow."""
    ours, stock, rotary = pair(dtype)
    caches = DynamicCache(), DynamicCache()
    for module, cache in zip((stock, ours), caches, strict=True):
        torch.manual_seed(1)
        num_before, outputs = 0, []
        for num_queries, num_back in ((50, 7), (5, 4), (1, 0), (6, 6), (180, 100), (3, 0)):
            hidden = torch.randn(BATCH, num_queries, HIDDEN, dtype=dtype)
            mask = mask_of("causal", num_queries, num_before + num_queries)
            outputs.append(run(module, rotary, hidden, cache, num_before, mask))
            cache.crop(-num_back)
            num_before += num_queries - num_back
        if module is stock:
            expected = outputs
    for got, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_static_caches_with_their_empty_places(dtype: torch.dtype) -> None:
    ours, stock, rotary = pair(dtype)
    caches = StaticCache(config(), max_cache_len=90), StaticCache(config(), max_cache_len=90)
    num_before = 0
    for num_queries in (40, 1, 1, 5):
        hidden = torch.randn(BATCH, num_queries, HIDDEN, dtype=dtype)
        mask = torch.zeros(1, 1, num_queries, 90, dtype=torch.bool)
        mask[..., : num_before + num_queries] = causal(num_queries, num_before + num_queries)
        # For a first prefill upstream gives no mask: the empty places are those behind.
        mask = None if num_before == 0 else mask
        expected, got = (
            run(module, rotary, hidden, cache, num_before, mask)
            for module, cache in zip((stock, ours), caches, strict=True)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        num_before += num_queries


def test_8_bit_latents_change_little() -> None:
    ours, _, rotary = pair(torch.float32)
    exact, coarse = LatentCache(), LatentCache(dtype="int8")
    before = torch.randn(BATCH, 300, HIDDEN)
    for cache in (exact, coarse):
        run(ours, rotary, before, cache, 0, None)
    num_before = 300
    for num_queries in (1, 3, 30, 250):
        hidden = torch.randn(BATCH, num_queries, HIDDEN)
        mask = mask_of("causal", num_queries, num_before + num_queries)
        expected, got = (run(ours, rotary, hidden, cache, num_before, mask) for cache in (exact, coarse))
        error = (got - expected).norm() / expected.norm()
        assert 0 < error < 0.01
        num_before += num_queries


class _Beside(nn.Module):
    """A linear layer with a low-rank product beside it, as an adapter has; no plain matrix."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(4, base.in_features, dtype=base.weight.dtype) / 20)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, dtype=base.weight.dtype) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class _ByRow(nn.Module):
    """As PEFT's layers are when a batch has `adapter_names`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor, factors: list[float]) -> Tensor:
        assert len(factors) == len(x)
        return self.base(x) * x.new_tensor(factors).view(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("num_before", [20, 700])
@pytest.mark.parametrize("form", ["adapter", "forward hook", "own forward", "bias", "adapter by row"])
def test_a_kv_b_that_is_no_plain_matrix_counts_whole(form: str, num_before: int) -> None:
    ours, stock, rotary = pair(torch.float64)
    for module in (ours, stock):
        torch.manual_seed(2)
        if form == "adapter":
            module.kv_b_proj = _Beside(module.kv_b_proj)
        elif form == "forward hook":
            module.kv_b_proj.register_forward_hook(lambda module, args, output: output * 1.5)
        elif form == "bias":
            module.kv_b_proj.bias = nn.Parameter(torch.randn(module.kv_b_proj.out_features).double())
        elif form == "adapter by row":
            module.kv_b_proj = _ByRow(module.kv_b_proj)
            module.kv_b_proj.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {"factors": [0.5, 2.0]}), with_kwargs=True
            )
        else:
            forward = module.kv_b_proj.forward
            module.kv_b_proj.forward = lambda x, f=forward: f(x) * 0.5  # as accelerate's hooks do it
    before = torch.randn(BATCH, num_before, HIDDEN, dtype=torch.float64)
    caches = DynamicCache(), DynamicCache()
    outputs = []
    for module, cache in zip((stock, ours), caches, strict=True):
        run(module, rotary, before, cache, 0, None)
        torch.manual_seed(3)
        hidden = torch.randn(BATCH, 1, HIDDEN, dtype=torch.float64)
        outputs.append(run(module, rotary, hidden, cache, num_before, None))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)


def test_gradients_are_upstreams() -> None:
    """Training goes upstream's way, with a cache too; kv_b is one parameter and has its gradient."""
    ours, stock, rotary = pair(torch.float32)
    hidden = torch.randn(BATCH, 30, HIDDEN)
    for module in (ours, stock):
        cache = DynamicCache()
        first, second = hidden.split((25, 5), dim=1)
        output = module(first, rotary(first, torch.arange(25)[None]), None, past_key_values=cache)[0].sum()
        mask = causal(5, 30)
        output = (
            output + module(second, rotary(second, torch.arange(25, 30)[None]), mask, cache)[0].pow(2).sum()
        )
        output.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert mine.grad is not None, name
        assert torch.equal(mine.grad, theirs.grad), name


@pytest.mark.parametrize(
    "implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow), "padded_sdpa"]
)
def test_other_implementations(implementation: str) -> None:
    torch.manual_seed(4)
    shape = {"vocab_size": 99, "num_hidden_layers": 2, "first_k_dense_replace": 2, "intermediate_size": 64}
    model = KimiK2ForCausalLM(config(**shape, initializer_range=0.2)).eval()
    ids = torch.randint(3, 99, (2, 40))
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation(implementation)
        cache = DynamicCache()
        first = model(ids[:, :39], past_key_values=cache, output_attentions=implementation == "eager")
        last = model(ids[:, 39:], past_key_values=cache, output_attentions=implementation == "eager")
    logits = torch.cat((first.logits, last.logits), 1)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    if implementation == "eager":
        assert first.attentions[1].shape == (2, 2, 39, 39)
        assert last.attentions[1].shape == (2, 2, 1, 40)
        torch.testing.assert_close(last.attentions[1].sum(-1), torch.ones(2, 2, 1))


def test_a_long_first_prompt_goes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache and with one; upstream's single call is kept for short ones, bit for bit."""
    ours, stock, rotary = pair(torch.float32)
    hidden = torch.randn(1, 700, HIDDEN)
    calls: list[int] = []
    function = mla.expanded
    monkeypatch.setattr(mla, "expanded", lambda *a: (calls.append(a[2]), function(*a))[1])
    monkeypatch.setattr(mla, "BLOCK", 256)
    expected = run(stock, rotary, hidden, None, 0, None)
    assert torch.equal(run(ours, rotary, hidden, None, 0, None), expected)
    assert not calls
    monkeypatch.setattr(attention, "_FEW_SCORES", 1 << 16)
    for cache in (None, DynamicCache()):
        torch.testing.assert_close(run(ours, rotary, hidden, cache, 0, None), expected, rtol=1e-4, atol=1e-5)
    assert calls == [700, 700]


def test_no_mask_is_made_where_causality_says_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk behind others would have one of queries times keys. Padding, gradients and packed rows keep theirs."""
    torch.manual_seed(4)
    shape = {"vocab_size": 99, "num_hidden_layers": 2, "first_k_dense_replace": 2, "intermediate_size": 64}
    model = KimiK2ForCausalLM(config(**shape)).eval()
    masks: list[Any] = []
    forward = KimiK2Attention.forward
    monkeypatch.setattr(
        KimiK2Attention,
        "forward",
        lambda s, *a, **k: (masks.append(k["attention_mask"]), forward(s, *a, **k))[1],
    )
    ids = torch.randint(3, 99, (2, 40))
    padding = torch.ones(2, 40, dtype=torch.int64)
    padding[0, :3] = 0

    def last_mask(num_before: int, mask: Tensor | None, grad: bool = False, **options: Any) -> Tensor:
        cache = DynamicCache()
        with torch.set_grad_enabled(grad):
            before = None if mask is None else mask[:, :num_before]
            model(ids[:, :num_before], attention_mask=before, past_key_values=cache)
            logits = model(ids[:, num_before:], attention_mask=mask, past_key_values=cache, **options).logits
            whole = model(ids, attention_mask=mask, use_cache=False, **options).logits[:, num_before:]
        torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-4)
        return masks[-3]  # two layers, three forwards

    assert last_mask(20, None).shape == attention.CAUSAL.shape
    assert last_mask(20, torch.ones_like(padding)).shape == attention.CAUSAL.shape
    assert last_mask(39, None) is None
    assert last_mask(20, padding).shape[-2:] == (20, 40)
    assert last_mask(20, None, grad=True).shape[-2:] == (20, 40)
    model.set_attn_implementation("eager")
    assert last_mask(20, None).shape[-2:] == (20, 40)
