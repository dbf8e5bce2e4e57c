"""`generate` on Kimi K2 gives what it gives on transformers' DeepSeek-V3, with every cache and search it offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, pipeline, set_seed

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, LatentCache, generation

PROMPT = torch.tensor([[17, 4, 301, 99, 4, 230, 41]])
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def stock(tiny_model: KimiK2ForCausalLM) -> DeepseekV3ForCausalLM:
    hub = tiny_model.config.to_hub_dict() | {"model_type": "deepseek_v3"}
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(hub)).eval()
    model.load_state_dict(tiny_model.state_dict())
    return model


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    set_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **options)


def by_hand(model: KimiK2ForCausalLM, ids: torch.Tensor, num_new: int) -> torch.Tensor:
    """Greedy decoding without `generate` and without a cache."""
    with torch.no_grad():
        for _ in range(num_new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == model.config.eos_token_id:
                break
    return ids


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 50},
        {"max_new_tokens": 12, "do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 12, "do_sample": True, "num_beams": 2},
        GREEDY | {"use_cache": False},
        GREEDY | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "sampling", "beams", "sampled beams", "no cache", "penalties"],
)
def test_equals_deepseek(options: dict, tiny_model: KimiK2ForCausalLM, stock: DeepseekV3ForCausalLM) -> None:
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    got = generate(tiny_model, ids, **options)
    assert torch.equal(got, generate(stock, ids, **options))
    assert got.shape[1] > ids.shape[1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_cache_gives_the_text_without_one(cache: str, tiny_model: KimiK2ForCausalLM) -> None:
    options = GREEDY | {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(generate(tiny_model, PROMPT, **options), by_hand(tiny_model, PROMPT, 12))


QUANTO = {"backend": "quanto", "nbits": 4, "q_group_size": 12, "residual_length": 4}


@pytest.mark.parametrize(
    ("quantised", "tolerance"),
    [
        ({"backend": "fp8"}, 0.05),
        pytest.param(QUANTO, 0.5, marks=pytest.mark.slow),
    ],  # quanto compiles C++ first
)
def test_quantised_cache(quantised: dict[str, Any], tolerance: float, tiny_model: KimiK2ForCausalLM) -> None:
    """The compressed latents are what is quantised: the prompt's own logits never meet them, the next ones do."""
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    exact = tiny_model.generate(PROMPT, **options)
    got = tiny_model.generate(PROMPT, **options, cache_implementation="quantized", cache_config=quantised)
    assert got.sequences.shape == exact.sequences.shape
    assert torch.equal(got.logits[0], exact.logits[0])
    error = (got.logits[1] - exact.logits[1]).norm() / exact.logits[1].norm()
    assert 0 < error < tolerance


def test_left_padded_batch_equals_each_alone(tiny_model: KimiK2ForCausalLM) -> None:
    prompts = [PROMPT[0], PROMPT[0, :2], torch.tensor([250, 9, 33, 12])]
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in prompts]).long()
    batch = generate(tiny_model, ids, mask, **GREEDY)[:, longest:]
    for row, prompt in zip(batch, prompts, strict=True):
        alone = generate(tiny_model, prompt[None], **GREEDY)[0, len(prompt) :]
        assert torch.equal(row[: len(alone)], alone)
        assert (row[len(alone) :] == tiny_model.config.pad_token_id).all()


LONG = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}


def test_200_greedy_tokens_are_deepseeks(
    tiny_model: KimiK2ForCausalLM,
    stock: DeepseekV3ForCausalLM,
    tiny_config: Callable[..., KimiK2Config],
) -> None:
    """From absorbed queries, whatever the cache and whoever proposes the tokens."""
    draft = KimiK2ForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    expected = generate(stock, PROMPT, **LONG)
    ways: dict[str, dict[str, Any]] = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "chunked": {"prefill_chunk_size": 3},
        "upstream's layers": {"past_key_values": DynamicCache()},
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "a draft": {"assistant_model": draft},
    }
    for way, options in ways.items():
        assert torch.equal(generate(tiny_model, PROMPT, **LONG, **options), expected), way
    beams = LONG | {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(tiny_model, PROMPT, **beams), generate(stock, PROMPT, **beams))
    ids = torch.stack((PROMPT[0], torch.nn.functional.pad(PROMPT[0, :4], (3, 0))))
    mask = torch.stack((torch.ones(7), torch.arange(7) >= 3)).long()
    assert torch.equal(generate(tiny_model, ids, mask, **LONG), generate(stock, ids, mask, **LONG))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_200_greedy_tokens_compiled(
    backend: str, tiny_model: KimiK2ForCausalLM, stock: DeepseekV3ForCausalLM
) -> None:
    """One graph for the prompt, one for every later token."""
    expected = generate(stock, PROMPT, **LONG)
    torch._dynamo.reset()
    counters.clear()
    tiny_model.forward = torch.compile(tiny_model.forward, fullgraph=True, backend=backend)  # type: ignore[method-assign]
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(tiny_model, PROMPT, **LONG, **options), expected)
    assert counters["stats"]["unique_graphs"] <= 3
    torch._dynamo.reset()


def test_long_prompts_go_in_chunks(tiny_model: KimiK2ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size of ours, unless the user names one."""
    ids = torch.randint(3, 331, (1, 50))
    seen: list[int] = []
    tiny_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    whole = generate(tiny_model, ids, **GREEDY)
    assert seen[0] == 50
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 16)
    for options, chunks in (({}, [16, 16, 16, 2, 1]), ({"prefill_chunk_size": 40}, [40, 10, 1])):
        seen.clear()
        assert torch.equal(generate(tiny_model, ids, **GREEDY, **options), whole)
        assert seen[: len(chunks)] == chunks
    seen.clear()
    generate(tiny_model, ids, **GREEDY, cache_implementation="static", disable_compile=True)
    assert seen[0] == 50


def test_the_quantised_cache_is_8_bit_latents(tiny_model: KimiK2ForCausalLM) -> None:
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    exact = tiny_model.generate(PROMPT, **options)
    got = tiny_model.generate(PROMPT, **options, cache_implementation="quantized")
    assert isinstance(got.past_key_values, LatentCache)
    for mine, wanted in zip(got.logits[:2], exact.logits[:2], strict=True):
        assert 0 < (mine - wanted).norm() / wanted.norm() < 0.05
    with pytest.raises(ValueError, match="cache_config has nbits"):
        tiny_model.generate(PROMPT, **GREEDY, cache_implementation="quantized", cache_config={"nbits": 4})


def test_stops_at_the_end_token(tiny_model: KimiK2ForCausalLM) -> None:
    free = generate(tiny_model, PROMPT, **GREEDY)[0, PROMPT.shape[1] :].tolist()
    stop = free[4]
    got = generate(tiny_model, PROMPT, **GREEDY, eos_token_id=stop)[0, PROMPT.shape[1] :].tolist()
    assert got == free[: free.index(stop) + 1]


def test_assisted_by_a_smaller_model(
    tiny_model: KimiK2ForCausalLM, tiny_config: Callable[..., KimiK2Config]
) -> None:
    draft = KimiK2ForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    assisted = generate(tiny_model, PROMPT, assistant_model=draft, **GREEDY)
    assert torch.equal(assisted, generate(tiny_model, PROMPT, **GREEDY))
    # The draft is asked for the same kind of cache, and keeps it from round to round.
    got = generate(tiny_model, PROMPT, assistant_model=draft, **GREEDY, cache_implementation="quantized")
    assert got.shape == assisted.shape


def test_the_cache_holds_latents(tiny_model: KimiK2ForCausalLM) -> None:
    """kv_lora_rank + qk_rope_head_dim numbers per token and layer, not two per head."""
    cache = tiny_model(PROMPT, use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape == (1, 1, 7, 24)
        assert layer.values.shape == (1, 1, 7, 12)


def test_text_generation_pipeline(
    tiny_model: KimiK2ForCausalLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    vocabulary = {"<pad>": 0, **{f"w{index}": index for index in range(1, 331)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    writer = pipeline("text-generation", model=tiny_model, tokenizer=tokenizer)
    text = " ".join(f"w{index}" for index in PROMPT[0].tolist())
    [answer] = writer(text, max_new_tokens=12, do_sample=False, return_full_text=False)
    wanted = by_hand(tiny_model, PROMPT, 12)[0, PROMPT.shape[1] :].tolist()
    assert answer["generated_text"].split() == [f"w{index}" for index in wanted]
    assert "not supported" not in caplog.text
