"""Attention with padded values against transformers' `sdpa`, and what QK-Clip sees of it against the logits themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_k2 import KimiK2ForCausalLM, padded_sdpa
from transformers_k2.optim.observe import LogitObserver
from transformers_k2.padded_sdpa import padded_sdpa_forward

HEADS, LENGTH, WIDTH, VALUES, SCALING = 4, 7, 12, 8, 0.7
FIRST = 3  # the rows before it see no key
VISIBLE = torch.ones(LENGTH, LENGTH).tril().bool() & (torch.arange(LENGTH) >= FIRST)
MASKS: dict[str, Tensor | None] = {
    "causal": None,
    "bool": VISIBLE,
    "infinite": torch.zeros(LENGTH, LENGTH).masked_fill(~VISIBLE, -math.inf),
    "finite": torch.zeros(LENGTH, LENGTH).masked_fill(~VISIBLE, torch.finfo(torch.float32).min),
}


class Attention(nn.Module):
    """What transformers' attention functions ask of their module."""

    is_causal = True

    def __init__(self, attend: Callable[..., tuple[Tensor, None]]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask = mask.expand(query.shape[0], 1, LENGTH, LENGTH)
        return self.attend(self, query, key, value, mask, scaling=SCALING)[0]


def inputs() -> list[Tensor]:
    query, key = torch.randn(2, 3, HEADS, LENGTH, WIDTH)
    return [tensor.requires_grad_() for tensor in (query, key, torch.randn(3, HEADS, LENGTH, VALUES))]


@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_those_of_sdpa(name: str) -> None:
    """Rows that see no key included, however the mask says so."""
    args = inputs()
    upstream = torch.randn(3, LENGTH, HEADS, VALUES)
    seen = []
    for attend in (padded_sdpa_forward, sdpa_attention_forward):
        output = Attention(attend)(*args, MASKS[name])
        seen.append([output, *torch.autograd.grad(output, args, upstream)])
    for got, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau", [-100.0, 100.0], ids=["exact", "bracket"])
@pytest.mark.parametrize("name", MASKS)
def test_the_largest_logits_are_those_of_the_visible_keys(name: str, tau: float) -> None:
    """Exact above tau, bracketed below; the log-sum-exp is that of queries and keys, which the padding does not touch."""
    query, key, value = inputs()
    visible = VISIBLE if MASKS[name] is not None else torch.ones(LENGTH, LENGTH).tril().bool()
    logits = (query.double() @ key.double().mT * SCALING).masked_fill(~visible, -math.inf)
    wanted = logits.amax((0, 2, 3)).float()
    module = Attention(padded_sdpa_forward)
    observer = LogitObserver(tau)
    observer.watch("attention", module, HEADS)
    module(query, key, value, MASKS[name])
    exact, upper, lower = observer.packed("cpu")
    if tau < 0 or name == "finite":  # where the composed form runs, which has no log-sum-exp
        torch.testing.assert_close(exact, wanted, rtol=1e-6, atol=0)
    else:
        assert exact.isneginf().all()
        torch.testing.assert_close(upper, logits.logsumexp(-1).amax((0, 2)).float(), rtol=1e-5, atol=1e-5)
        assert (lower <= wanted).all()
        assert (upper - lower <= math.log(LENGTH) + 1e-5).all()


def test_a_model_shows_what_eager_attention_shows(tiny_model: KimiK2ForCausalLM) -> None:
    """Left padding included; and watching costs no product of its own below tau."""
    padded_sdpa.register()
    ids = torch.randint(3, 331, (3, 13))
    mask = (torch.arange(13) >= torch.tensor([0, 4, 9])[:, None]).long()
    tiny_model.train()
    seen, products = [], []
    for name, tau in (
        ("eager", -100.0),
        ("padded_sdpa", -100.0),
        ("padded_sdpa", 1e4),
        ("padded_sdpa", None),
    ):
        tiny_model.set_attn_implementation(name)
        observer = LogitObserver(tau or 0.0)
        for layer in tiny_model.model.layers if tau is not None else ():
            observer.watch("attention", layer.self_attn, 4)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            tiny_model(ids, attention_mask=mask, use_cache=False)
        seen.append(observer.packed("cpu"))
        kinds = ("aten::mm", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu")
        calls = {event.key: event.count for event in profiler.key_averages()}
        products.append([calls.get(kind, 0) for kind in kinds])
        observer.close()
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=1e-4, atol=1e-5)
    assert (seen[2][2] <= seen[0][0] + 1e-4).all()
    assert (seen[0][0] <= seen[2][1] + 1e-4).all()
    assert products[2] == products[3]
    assert products[3][2] == 3
