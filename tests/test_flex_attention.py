"""Recorded maxima in whole models against float64 logits, for every attention implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_k2 import KimiK2ForCausalLM, flex_attention
from transformers_k2.optim.observe import LogitObserver

HEADS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "initializer_range": 0.4,
}  # fmt: skip


@pytest.fixture(params=["llama", "qwen2", "k2", "k2 without q lora"])
def model(request: pytest.FixtureRequest, tiny_config: Callable[..., Any]) -> Any:
    """In training mode; the Kimi K2 has YaRN, whose scaling is not 1/sqrt(d), and narrower values than keys."""
    if request.param == "llama":
        built: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif request.param == "qwen2":
        built = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    else:
        lora = {} if request.param == "k2" else {"q_lora_rank": None}
        built = KimiK2ForCausalLM(tiny_config(num_hidden_layers=2, **lora))
    return built.train()


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def observe(model: Any, tau: float = -1e9) -> LogitObserver:
    observer = LogitObserver(tau)
    for i, module in enumerate(attentions(model)):
        observer.watch(f"layers.{i}", module, HEADS)
    return observer


def packed_visible(num_rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Two documents in a row, told by positions that start again."""
    first = num_rows // 3
    document = (torch.arange(num_rows) >= first).long()
    positions = torch.cat((torch.arange(first), torch.arange(num_rows - first)))
    visible = torch.ones(num_rows, num_rows, dtype=torch.bool).tril() & (document[:, None] == document)
    return visible, {"position_ids": positions.expand(2, -1).clone()}


def batch(layout: str, num_rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Visible keys [batch, 1, rows, keys], and the arguments of the model."""
    ids = torch.randint(3, 97, (2, num_rows))
    causal = torch.ones(num_rows, num_rows, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    if layout == "left padding":
        real = torch.ones(2, num_rows, dtype=torch.long)
        real[1, : num_rows // 2] = 0
        return causal & real.bool()[:, None, None], {"input_ids": ids, "attention_mask": real}
    if layout == "packed":
        visible, more = packed_visible(num_rows)
        return visible.expand_as(causal), {"input_ids": ids, **more}
    return causal, {"input_ids": ids}


class Truth:
    """Reads what every attention function is given, and computes float64 logits from it by loops over heads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any, visible: Tensor) -> None:
        self.found = torch.full((len(attentions(model)), HEADS), -math.inf)
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def spy(module: Any, query: Tensor, key: Tensor, *rest: Any, scaling: float, **kwargs: Any) -> Any:
            groups = query.shape[1] // key.shape[1]
            for h in range(HEADS):
                logits = (query[:, h].detach().double() @ key[:, h // groups].detach().double().mT) * scaling
                largest = logits[visible[:, 0]].max().float()
                self.found[module.layer_idx, h] = torch.maximum(self.found[module.layer_idx, h], largest)
            return original(module, query, key, *rest, scaling=scaling, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)


@pytest.mark.parametrize(
    ("layout", "num_rows"), [("causal", 1), ("causal", 33), ("left padding", 33), ("packed", 33)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa(
    model: Any, layout: str, num_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.to(dtype).set_attn_implementation("sdpa")
    visible, arguments = batch(layout, num_rows)
    observer, truth = observe(model), Truth(monkeypatch, model, visible)
    model(**arguments, use_cache=False)
    assert torch.equal(observer.packed("cpu")[0], truth.found.flatten())


@pytest.mark.parametrize("layout", ["causal", "left padding", "packed"])
def test_eager_agrees_with_sdpa(model: Any, layout: str) -> None:
    _, arguments = batch(layout, 21)
    observer = observe(model)
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        observer.reset()
        model(**arguments, use_cache=False)
        results.append(observer.packed("cpu")[0])
    assert torch.allclose(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_loss_and_gradients_are_those_without(model: Any, checkpointing: bool | None) -> None:
    _, arguments = batch("left padding", 21)
    model.set_attn_implementation("sdpa")
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()

    def run() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(**arguments, labels=arguments["input_ids"], use_cache=False).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    loss, gradients = run()
    observer = observe(model)
    watched_loss, watched = run()
    assert torch.allclose(loss, watched_loss, rtol=1e-5)
    for a, b in zip(gradients, watched, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6
    seen = observer.packed("cpu")
    assert seen[0].isfinite().all()
    observer.reset()
    model(**arguments, use_cache=False)
    assert torch.equal(observer.packed("cpu"), seen)


def test_evaluation_is_not_recorded(model: Any) -> None:
    observer = observe(model)
    model.eval()
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 9)))
    assert observer.packed("cpu").eq(-math.inf).all()


def test_flex_attention_is_ours_and_stays_so() -> None:
    flex_attention.register()
    flex_attention.register()
    assert AttentionInterface()["flex_attention"] is flex_attention.observed_flex_attention
    assert ALL_ATTENTION_FUNCTIONS["flex_attention"] is flex_attention.observed_flex_attention


@pytest.mark.parametrize("form", ["block mask", "dense", "no mask"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_flex_attention_records(form: str, with_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's function compiles for a minute: here it is one that returns what a GPU, or a CPU, returns."""
    q, k, v = (torch.randn(2, h, 33, 12) * 2 for h in (HEADS, 2, 2))
    visible = torch.ones(33, 33, dtype=torch.bool)
    if form != "no mask":
        visible = visible.tril()
    # Longer than the keys, as with a static cache.
    dense = F.pad(torch.zeros(2, 1, 33, 33).masked_fill(~visible, torch.finfo(torch.float32).min), (0, 7))
    blocks = create_block_mask(causal_mask_function, None, None, 33, 33, device="cpu")
    mask: Any = {"block mask": blocks, "dense": dense, "no mask": None}[form]
    logits = (q.double() @ k.double().repeat_interleave(2, 1).mT) * 0.4
    logits = logits.masked_fill(~visible, -math.inf)

    def upstream(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return query.transpose(1, 2), logits.logsumexp(-1).float() if with_lse else None

    monkeypatch.setattr(flex_attention, "flex_attention_forward", upstream)

    class Module(torch.nn.Module):
        def forward(self, **more: Any) -> Any:
            return flex_attention.observed_flex_attention(self, q, k, v, mask, 0.4, **more)

    module, observer = Module(), LogitObserver(-1e9)
    module(softcap=30.0)
    observer.watch("layer", module, HEADS)
    module()
    assert torch.equal(observer.packed("cpu")[0], logits.amax((0, 2, 3)).float())
    with pytest.raises(ValueError, match="softcap"):
        module(softcap=30.0)


def test_clipping_by_a_power_of_four_is_exact_on_the_whole_module(tiny_config: Callable[..., Any]) -> None:
    """Smaller projections, same batch: the recorded maximum is the old one times gamma, bit for bit."""
    config = tiny_config(num_hidden_layers=1)
    model = KimiK2ForCausalLM(config).train()
    model.set_attn_implementation("sdpa")
    _, arguments = batch("left padding", 33)
    observer, module = observe(model), attentions(model)[0]
    model(**arguments, use_cache=False)
    before = observer.packed("cpu")[0]
    gamma = 4.0**-1
    with torch.no_grad():
        rows_q = module.q_b_proj.weight.view(HEADS, -1, config.q_lora_rank)
        rows_k = module.kv_b_proj.weight.view(HEADS, -1, config.kv_lora_rank)
        rows_q[:, : config.qk_nope_head_dim] *= math.sqrt(gamma)
        rows_q[:, config.qk_nope_head_dim :] *= gamma
        rows_k[:, : config.qk_nope_head_dim] *= math.sqrt(gamma)
    observer.reset()
    model(**arguments, use_cache=False)
    assert torch.equal(observer.packed("cpu")[0], before * gamma)
