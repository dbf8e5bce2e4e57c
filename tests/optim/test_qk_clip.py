"""QK-Clip: rows by textbook loops, and the property itself: a second forward gives min(S, tau) per head."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.optim import HeadRows, MuonClip, find_attention

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def largest_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[heads] of the first layer, from transformers' eager attention in fp64: softmax's input, read off by a hook."""
    seen: list[torch.Tensor] = []
    original = nn.functional.softmax

    def softmax(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if scores.ndim == 4:
            seen.append(scores)
        return original(scores, *args, **kwargs)

    twin = type(model)(model.config).double().train()
    twin.load_state_dict(model.state_dict())
    twin.config._attn_implementation = "eager"
    twin.set_attn_implementation("eager")
    nn.functional.softmax = softmax
    try:
        with torch.no_grad():
            twin(ids, attention_mask=mask, use_cache=False)
    finally:
        nn.functional.softmax = original
    scores = seen[0]
    return scores.masked_fill(scores < -1e30, -math.inf).amax((0, 2, 3))


def forward_and_step(
    model: nn.Module, optimizer: MuonClip, ids: torch.Tensor, **kwargs: Any
) -> dict[str, torch.Tensor]:
    model(ids, labels=ids, use_cache=False, **kwargs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return next(iter(optimizer.qk_clip_stats().values()))


def k2(**changes: Any) -> Callable[[Callable[..., KimiK2Config]], nn.Module]:
    return lambda tiny: KimiK2ForCausalLM(tiny(num_hidden_layers=1, initializer_range=0.3, **changes))


MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "mla": k2(),
    "mla, queries not compressed": k2(q_lora_rank=None),
    "mla, no yarn": k2(rope_scaling=None),
    "mha": lambda _: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=4)),
    "gqa": lambda _: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "mqa with biases": lambda _: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=1)),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_second_forward_gives_the_smaller_of_logit_and_tau(
    tiny_config: Any, name: str, attention: str
) -> None:
    model = MODELS[name](tiny_config).train()
    model.set_attn_implementation(attention)
    if "biases" in name:
        nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
        nn.init.normal_(model.model.layers[0].self_attn.k_proj.bias)
    ids = torch.randint(3, 50, (3, 23))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # left padding
    truth = largest_logits(model, ids, mask)
    tau = float(truth.sort().values[1:3].mean())  # two heads above, two below
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = MuonClip.for_model(model, lr=0.0, qk_clip_tau=tau)
    stats = forward_and_step(model, optimizer, ids, attention_mask=mask)
    assert stats["exact"][truth > tau].all()
    torch.testing.assert_close(
        stats["max_logit"][stats["exact"]].double(), truth[stats["exact"]], rtol=1e-5, atol=1e-5
    )
    assert (stats["max_logit"].double() >= truth - 1e-4).all()
    assert (stats["lower_bound"].double() <= truth + 1e-4).all()
    torch.testing.assert_close(largest_logits(model, ids, mask), truth.clamp(max=tau), rtol=1e-5, atol=1e-5)
    # Heads at or below tau, and everything that is no query or key, keep their bits.
    rows = next(iter(find_attention(model).values())).rows
    for key, value in model.state_dict().items():
        kept = value == before[key]
        runs = dict(rows.projections).get(key.split("self_attn.")[-1].rsplit(".", 1)[0])
        if runs is None:
            assert kept.all(), key
            continue
        start = 0
        for head in range(rows.num_heads):
            for size, power in runs:
                if truth[head] <= tau or power == 0:
                    assert kept[start : start + size].all(), (key, head)
                else:
                    assert not kept[start : start + size].all(), (key, head)
                start += size


@pytest.mark.parametrize("name", ["mla", "mla, queries not compressed", "mha", "gqa"])
@pytest.mark.parametrize("gamma", [0.25, 0.0625])
def test_powers_of_four_are_exact(tiny_config: Any, name: str, gamma: float) -> None:
    model = MODELS[name](tiny_config).train()
    ids = torch.randint(3, 50, (2, 19))
    probe = MuonClip.for_model(model, lr=0.0, qk_clip_tau=1e-6)  # everything exact, but not stepped
    model(ids, use_cache=False)
    value = probe._observer.packed("cpu")[0]
    probe.close()
    head = int(value.argmax())
    tau = float(value[head]) * gamma
    optimizer = MuonClip.for_model(model, lr=0.0, qk_clip_tau=tau)
    first = forward_and_step(model, optimizer, ids)
    assert first["gamma"][head] == gamma
    second = forward_and_step(model, optimizer, ids)
    assert second["max_logit"][head] == torch.tensor(tau)
    assert second["gamma"][head] == 1


def test_rows_by_a_textbook_loop(tiny_config: Any) -> None:
    model = k2()(tiny_config).train()
    attention = model.model.layers[0].self_attn
    q, kv, kv_a = (
        getattr(attention, name).weight.detach().clone()
        for name in ("q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa")
    )
    optimizer = MuonClip.for_model(model, lr=0.0, qk_clip_tau=1.0)
    ids = torch.randint(3, 50, (2, 11))
    stats = forward_and_step(model, optimizer, ids)
    assert (stats["max_logit"] > 1).all()
    nope, rope, value = 20, 12, 28
    for head, logit in enumerate(stats["max_logit"].tolist()):
        gamma = 1.0 / logit
        for row in range(nope):
            q[head * (nope + rope) + row] *= math.sqrt(gamma)
            kv[head * (nope + value) + row] *= math.sqrt(gamma)
        for row in range(nope, nope + rope):
            q[head * (nope + rope) + row] *= gamma
    torch.testing.assert_close(attention.q_b_proj.weight, q, rtol=1e-6, atol=0)
    torch.testing.assert_close(attention.kv_b_proj.weight, kv, rtol=1e-6, atol=0)
    assert torch.equal(attention.kv_a_proj_with_mqa.weight, kv_a)


def test_micro_batches_count_together(tiny_config: Any) -> None:
    model = k2()(tiny_config).train()
    ids = torch.randint(3, 50, (4, 13))
    optimizer = MuonClip.for_model(model, lr=0.0, qk_clip_tau=1e3)
    whole = forward_and_step(model, optimizer, ids)
    model.activation_checkpointing_enable()
    for part in (ids[2:], ids[:2]):
        model(part, labels=part, use_cache=False).loss.backward()
    optimizer.step()
    parts = next(iter(optimizer.qk_clip_stats().values()))
    torch.testing.assert_close(parts["max_logit"], whole["max_logit"])
    optimizer.step()
    assert (next(iter(optimizer.qk_clip_stats().values()))["max_logit"] == -math.inf).all()


def test_bfloat16_and_masters_stay_in_step(tiny_config: Any) -> None:
    model = k2()(tiny_config).bfloat16().train()
    optimizer = MuonClip.for_model(model, lr=1e-3, qk_clip_tau=2.0, master_weights=True)
    ids = torch.randint(3, 50, (2, 17))
    for _ in range(3):
        stats = forward_and_step(model, optimizer, ids)
    assert (stats["gamma"] < 1).any()
    for param in model.parameters():
        master = optimizer.state[param]["master"]
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), param)
    weight = model.model.layers[0].self_attn.q_b_proj.weight
    assert not torch.equal(optimizer.state[weight]["master"], weight.float())


def test_non_finite_logits_raise_before_anything_changes(tiny_config: Any) -> None:
    model = k2()(tiny_config).train()
    optimizer = MuonClip.for_model(model, lr=1e-2)
    ids = torch.randint(3, 50, (2, 9))
    model(ids, labels=ids, use_cache=False).loss.backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        saved = model.model.layers[0].self_attn.q_b_proj.weight[5].clone()
        model.model.layers[0].self_attn.q_b_proj.weight[5] = math.nan
        model(ids, use_cache=False)
        model.model.layers[0].self_attn.q_b_proj.weight[5] = saved
    with pytest.raises(FloatingPointError, match=r"model\.layers\.0\.self_attn: .* heads \[0\]"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not optimizer.state


def test_declarations() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wq, self.wk = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.wq, self.wk))
            return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)

    model = nn.ModuleDict({"mixer": Plain()}).train()
    rows = HeadRows(2, "wq", ((4, 0.5),), "wk", ((4, 0.5),))
    found = find_attention(model, {"mixer": rows})
    assert found["mixer"].rows is rows
    optimizer = MuonClip(model.parameters(), lr=0.0, qk_clip_tau=1e-3, attention=found)
    x = torch.randn(2, 5, 6)
    model["mixer"](x).sum().backward()
    optimizer.step()
    q, k = (
        layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (model["mixer"].wq, model["mixer"].wk)
    )
    scores = (q @ k.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    torch.testing.assert_close(scores.amax((0, 2, 3)), torch.full((2,), 1e-3), rtol=1e-4, atol=1e-8)

    with pytest.raises(ValueError, match="no module looks like one"):
        find_attention(model)
    with pytest.raises(ValueError, match="no module matches"):
        find_attention(model, {"other": "mla"})
    with pytest.raises(ValueError, match="expected one of"):
        find_attention(model, {"mixer": "mqa"})
    with pytest.raises(ValueError, match=r"mixer\.wq has 8 rows: expected 12, 3 heads of 4 rows"):
        find_attention(model, {"mixer": HeadRows(3, "wq", ((4, 1.0),))})


def test_normalised_queries_are_refused() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=12))
    with pytest.raises(ValueError, match=r"k_norm, q_norm.*set qk_clip_tau=None"):
        MuonClip.for_model(model, 1e-3)
    MuonClip.for_model(model, 1e-3, qk_clip_tau=None)


def test_an_optimizers_hooks_go_with_it(tiny_config: Any) -> None:
    model = k2()(tiny_config).train()
    module = model.model.layers[0].self_attn
    first = MuonClip.for_model(model, lr=0.0)
    second = MuonClip.for_model(model, lr=0.0)
    stats = forward_and_step(model, second, torch.randint(3, 50, (2, 9)))
    first.step()
    assert torch.equal(next(iter(first.qk_clip_stats().values()))["max_logit"], stats["max_logit"])
    assert len(module._forward_hooks) == 2
    del first
    gc.collect()
    assert len(module._forward_hooks) == 1
    second.close()
    assert not module._forward_hooks
