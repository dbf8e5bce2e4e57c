"""The loss without logits against torch's cross_entropy, and in the model against the stock class's loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.linear_cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 37, 24, 331


def inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, VOCABULARY, (tokens,))
    labels[::5] = -100
    hidden = torch.randn(tokens, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True), labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if num_items is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items


@pytest.mark.parametrize("num_items", [None, 50, torch.tensor(50)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_cross_entropy(dtype: torch.dtype, chunk: int, num_items: Any) -> None:
    args = inputs(dtype)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    got = linear_cross_entropy(*args, chunk, num_items)
    wanted = reference(*args, num_items)
    torch.testing.assert_close(got, wanted, **close)
    factor = torch.tensor(0.37, dtype=dtype)
    ours, theirs = (torch.autograd.grad(loss, args[:2], factor) for loss in (got, wanted))
    torch.testing.assert_close(ours, theirs, **close)


def test_one_token_and_extreme_logits() -> None:
    hidden, weight, _ = inputs(tokens=1)
    args = hidden.detach().mul(1e4).requires_grad_(), weight, torch.tensor([7])
    got, wanted = linear_cross_entropy(*args, 8), reference(*args)
    assert wanted > 1e3
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, weight), torch.autograd.grad(wanted, weight))


def test_bfloat16_is_as_good_as_torch() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    truth = reference(hidden.double(), weight.double(), labels)
    wanted = torch.autograd.grad(truth, (hidden, weight))
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, 8), (hidden, weight))
    theirs = torch.autograd.grad(reference(hidden, weight, labels), (hidden, weight))
    for got, other, exact in zip(ours, theirs, wanted, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - exact).norm() < 1.2 * (other - exact).norm() + 0.003 * exact.norm()


def test_autocast() -> None:
    hidden, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, labels, 8), reference(hidden, weight, labels)
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in losses)
    for got, other in zip(ours, theirs, strict=True):
        assert got.dtype == torch.float32
        assert (got - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("num_items", [None, 5])
def test_no_label_at_all_is_as_in_torch(num_items: int | None) -> None:
    hidden, weight, labels = inputs()
    labels.fill_(-100)
    got, wanted = (
        linear_cross_entropy(hidden, weight, labels, 8, num_items),
        reference(hidden, weight, labels, num_items),
    )
    torch.testing.assert_close(got, wanted, equal_nan=True)
    assert got.isnan() == (num_items is None)
    for loss in (got, wanted):
        assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(frozen: str) -> None:
    hidden, weight, labels = inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    ours, theirs = (
        torch.autograd.grad(loss, free)
        for loss in (linear_cross_entropy(hidden, weight, labels, 8), reference(hidden, weight, labels))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs()

    def refuse(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(Tensor, "scatter_add_", refuse)
    with torch.no_grad():
        loss = linear_cross_entropy(*args, 8)
    torch.testing.assert_close(loss, reference(*args).detach())
    with pytest.raises(AssertionError, match="a gradient was computed"):
        linear_cross_entropy(*args, 8)


def test_backward_twice() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, 8)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(second, tuple(3 * grad for grad in first))
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, (hidden, weight))


def test_bad_arguments() -> None:
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        linear_cross_entropy(hidden, weight, labels, 0)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, labels[1:], 8)
    labels[1] = VOCABULARY
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels, 8)


# -- in the model


@pytest.mark.parametrize("kwargs", [{}, {"num_items_in_batch": torch.tensor(40)}, {"shift_labels": True}])
def test_the_model_loses_as_the_stock_class(tiny_model: KimiK2ForCausalLM, kwargs: dict[str, Any]) -> None:
    hub = tiny_model.config.to_hub_dict() | {"model_type": "deepseek_v3"}
    stock = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(hub)).eval()
    stock.load_state_dict(tiny_model.state_dict())
    ids = torch.randint(3, 331, (3, 13))
    mask = (torch.arange(13) >= torch.tensor([0, 4, 9])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    if "shift_labels" in kwargs:
        kwargs = {"shift_labels": torch.randint(3, 331, (3, 13))}
    wanted = stock(ids, attention_mask=mask, labels=labels, use_cache=False, **kwargs)
    wanted.loss.backward()
    tiny_model.loss_chunk_tokens = 8
    got = tiny_model(ids, attention_mask=mask, labels=labels, use_cache=False, **kwargs)
    got.loss.backward()
    assert got.logits is None
    torch.testing.assert_close(got.loss, wanted.loss)
    theirs = dict(stock.named_parameters())
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(tiny_model(ids).logits, stock(ids).logits)
    assert isinstance(tiny_model(ids, labels=labels, use_cache=False, return_dict=False), tuple)
    assert "loss_chunk_tokens" not in tiny_model.config.to_dict()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_replaced_heads_are_refused(tiny_model: KimiK2ForCausalLM) -> None:
    ids = torch.randint(3, 331, (2, 9))
    tiny_model.loss_chunk_tokens = 8
    with pytest.raises(ValueError, match="logits_to_keep is 3"):
        tiny_model(ids, labels=ids, logits_to_keep=3)
    adapted = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(r=2, target_modules=["o_proj", "lm_head"]))
    with pytest.raises(ValueError, match="lm_head was replaced by a Linear"):
        adapted(input_ids=ids, labels=ids)
    adapted.base_model.model.loss_chunk_tokens = None
    assert adapted(input_ids=ids, labels=ids).loss > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_beside_the_head(tiny_model: KimiK2ForCausalLM) -> None:
    ids = torch.randint(3, 331, (2, 9))
    adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    gradients = []
    for chunk in (None, 8):
        tiny_model.loss_chunk_tokens = chunk
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert tiny_model.lm_head.weight.grad is None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
