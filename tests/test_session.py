"""Sessions against plain `generate`, of this model and of transformers' DeepSeek-V3 with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2Model,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, KimiK2Tokenizer
from transformers_k2.latent_cache import Int8LatentLayer, LatentCache, LatentLayer
from transformers_k2.session import GenerationSession
from transformers_k2.tokenizer_training import train_tokenizer

GREEDY = {"max_new_tokens": 9, "do_sample": False}


@pytest.fixture
def stock(tiny_model: KimiK2ForCausalLM) -> DeepseekV3ForCausalLM:
    hub = tiny_model.config.to_hub_dict() | {"model_type": "deepseek_v3"}
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(hub)).eval()
    model.load_state_dict(tiny_model.state_dict())
    return model


def prompt(num: int) -> Tensor:
    return torch.randint(3, 331, (1, num))


def joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1)


@contextmanager
def fed(model: KimiK2ForCausalLM) -> Iterator[list[int]]:
    """How many tokens each forward of the decoder is given."""
    counts: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield counts
    handle.remove()


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_turns(chunk: int | None, tiny_model: KimiK2ForCausalLM, stock: DeepseekV3ForCausalLM) -> None:
    """Longer, the same twice, edited in the middle, shorter, another, one token: always what a fresh call gives."""
    session = GenerationSession(tiny_model, prefill_chunk_size=chunk)
    history, num_cached = prompt(13), 0

    def turn(ids: Tensor, num_reused: int) -> Tensor:
        with fed(tiny_model) as counts:
            got = session.generate(ids, **GREEDY)
        assert torch.equal(got, stock.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY))
        num_new = got.shape[1] - ids.shape[1]
        assert session.last[:3] == (num_reused, ids.shape[1] - num_reused, num_new)
        assert session.last.prefill_seconds > 0
        assert session.last.decode_seconds > 0
        assert session.num_cached_tokens == got.shape[1] - 1
        assert {layer.get_seq_length() for layer in session.cache.layers} == {got.shape[1] - 1}
        assert sum(counts) == ids.shape[1] - num_reused + num_new - 1
        assert max(counts) <= (chunk or 4096)
        return got

    for extra in (7, 1, 12):
        history = turn(history, num_cached)
        num_cached = history.shape[1] - 1
        history = joined(history, prompt(extra))
    last = turn(history, num_cached)
    turn(history, history.shape[1] - 1)
    edited = history.clone()
    edited[0, 6] = (edited[0, 6] + 1) % 331
    turn(edited, 6)
    turn(edited[:, :20], 19)
    turn(last, 6)
    turn(joined((last[:, :1] + 1) % 331, last[:, 1:9]), 0)
    turn((last[:, :1] + 1) % 331, 0)


@pytest.mark.parametrize(
    "options",
    [
        GREEDY | {"do_sample": True, "temperature": 0.8, "top_k": 20},
        GREEDY | {"prompt_lookup_num_tokens": 3, "max_new_tokens": 25},
        GREEDY | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        GREEDY | {"guidance_scale": 1.5},
        GREEDY
        | {"generation_config": GenerationConfig(prefill_chunk_size=2, eos_token_id=2, pad_token_id=0)},
        {"max_new_tokens": 1},
    ],
    ids=["sampling", "prompt lookup", "penalties", "guidance", "generation config", "one token"],
)
def test_options(options: dict[str, Any], tiny_model: KimiK2ForCausalLM) -> None:
    session = GenerationSession(tiny_model, prefill_chunk_size=8)
    ids = prompt(12)
    ids = joined(ids, ids[:, :9])
    for turn in range(3):
        torch.manual_seed(turn)
        got = session.generate(ids, **options)
        torch.manual_seed(turn)
        assert torch.equal(got, tiny_model.generate(ids, attention_mask=torch.ones_like(ids), **options))
        assert session.num_cached_tokens == got.shape[1] - 1
        if turn:
            assert session.last.num_reused >= ids.shape[1] - 5
        ids = joined(got, ids[:, -4:])


def test_drafts(tiny_model: KimiK2ForCausalLM, tiny_config: Callable[..., KimiK2Config]) -> None:
    """By lookup more than one token a forward is kept; another model and the model itself can draft."""
    session = GenerationSession(tiny_model)
    ids = joined(*[prompt(7)] * 3)
    plain = tiny_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    session.generate(plain, max_new_tokens=1)  # the cache holds all that is to come
    with fed(tiny_model) as counts:
        got = session.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(got, plain)
    assert counts[0] <= 5
    assert len(counts) < plain.shape[1] - ids.shape[1]
    draft = KimiK2ForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    for assistant in (draft, draft, tiny_model):
        assert torch.equal(session.generate(ids, assistant_model=assistant, **GREEDY), plain[:, :30])
    assert torch.equal(session.generate(plain[:, :30], assistant_model=draft, **GREEDY), plain[:, :39])


class Streamer(BaseStreamer):
    def __init__(self, stop_after: int = 10**9) -> None:
        self.ids: list[int] = []
        self.ended, self.stop_after = False, stop_after

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()
        if len(self.ids) >= self.stop_after:
            raise InterruptedError

    def end(self) -> None:
        self.ended = True


def test_streamer_and_dictionary(tiny_model: KimiK2ForCausalLM) -> None:
    session, ids = GenerationSession(tiny_model), prompt(8)
    session.generate(ids, **GREEDY)
    streamer = Streamer()
    got = session.generate(
        ids,
        streamer=streamer,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
        **GREEDY,
    )
    plain = tiny_model.generate(ids, return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert torch.equal(got.sequences, plain.sequences)
    torch.testing.assert_close(got.scores, plain.scores, rtol=1e-4, atol=1e-4)
    assert streamer.ids == got.sequences[0].tolist()
    assert streamer.ended
    assert got.past_key_values is session.cache
    assert got.hidden_states[0][0].shape[1] == 1  # of what was fed


class Fails(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] >= self.length:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "prompt lookup"])
def test_an_error_leaves_what_is_certain(options: dict[str, Any], tiny_model: KimiK2ForCausalLM) -> None:
    session, ids = GenerationSession(tiny_model, cache=DynamicCache(), prefill_chunk_size=4), prompt(14)
    plain = tiny_model.generate(ids, **GREEDY)

    def consistent(num_cached: int) -> None:
        assert session.num_cached_tokens == num_cached
        assert {layer.get_seq_length() for layer in session.cache.layers} == {num_cached}
        assert torch.equal(session.fork().generate(ids, **GREEDY), plain)

    # In the middle of a forward: in the first chunk of the prompt, the second, and a step.
    attention = tiny_model.model.layers[1].self_attn
    for num_calls, num_cached in ((1, 0), (2, 4), (6, 14)):
        session.reset()
        seen = []

        def interrupt(*_: Any, seen: list = seen, num_calls: int = num_calls) -> None:
            seen.append(0)
            if len(seen) == num_calls:
                raise KeyboardInterrupt

        handle = attention.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.generate(ids, **GREEDY, **options)
        handle.remove()
        consistent(num_cached)
    with pytest.raises(KeyboardInterrupt):
        session.generate(ids, stopping_criteria=StoppingCriteriaList([Fails(18)]), **GREEDY, **options)
    consistent(14)
    with pytest.raises(InterruptedError):
        session.generate(ids, streamer=Streamer(stop_after=17), **GREEDY, **options)
    consistent(14)


def test_stopped_early(tiny_model: KimiK2ForCausalLM) -> None:
    session, ids = GenerationSession(tiny_model), prompt(8)
    plain = tiny_model.generate(ids, **GREEDY)
    stop = plain[0, 12].item()
    got = session.generate(ids, eos_token_id=stop, **GREEDY)
    assert torch.equal(got, tiny_model.generate(ids, eos_token_id=stop, **GREEDY))
    assert session.num_cached_tokens == got.shape[1] - 1 < 13
    assert torch.equal(session.generate(got, max_new_tokens=17 - got.shape[1], do_sample=False), plain)


def test_fork_and_reset(tiny_model: KimiK2ForCausalLM) -> None:
    session, ids = GenerationSession(tiny_model), prompt(8)
    trunk = session.generate(ids, **GREEDY)
    branches = [session, session.fork(), session.fork()]
    histories = [trunk] * 3
    for _ in range(3):
        for index, branch in enumerate(branches):
            longer = joined(histories[index], prompt(3 + index))
            histories[index] = branch.generate(longer, **GREEDY)
            plain = tiny_model.generate(longer, attention_mask=torch.ones_like(longer), **GREEDY)
            assert torch.equal(histories[index], plain)
            assert branch.last.num_prefilled == 4 + index
    assert "num_cached_tokens=" in repr(session)
    session.reset()
    assert session.num_cached_tokens == session.cache.get_seq_length() == 0
    assert torch.equal(session.generate(ids, **GREEDY), trunk)
    assert branches[1].num_cached_tokens > 20


def test_caches(tiny_model: KimiK2ForCausalLM) -> None:
    ids = prompt(10)
    eight = GenerationSession(tiny_model, cache="int8")
    mine = LatentCache(dtype="int8")
    wanted = tiny_model.generate(ids, past_key_values=LatentCache(dtype="int8"), **GREEDY)
    for session in (eight, GenerationSession(tiny_model, cache=mine)):
        got = session.generate(ids, **GREEDY)
        assert torch.equal(got, wanted)
        assert {type(layer) for layer in session.cache.layers} == {Int8LatentLayer}
        assert torch.equal(session.generate(ids, **GREEDY), wanted)
    for cache in (DynamicCache(), DynamicCache(config=tiny_model.config)):
        session = GenerationSession(tiny_model, cache=cache)
        assert torch.equal(session.generate(ids, **GREEDY), tiny_model.generate(ids, **GREEDY))
        assert {type(layer) for layer in cache.layers} == {LatentLayer}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter(tiny_model: KimiK2ForCausalLM) -> None:
    model = get_peft_model(
        tiny_model, LoraConfig(r=4, target_modules=["q_b_proj", "kv_b_proj"], init_lora_weights=False)
    ).eval()
    session, ids = GenerationSession(model), prompt(9)
    for _ in range(2):
        got = session.generate(ids, **GREEDY)
        assert torch.equal(got, model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY))
        ids = joined(got, prompt(4))
    assert session.last.num_reused == 17


def test_progress(tiny_model: KimiK2ForCausalLM, capfd: pytest.CaptureFixture[str]) -> None:
    ids = prompt(30)
    GenerationSession(tiny_model, prefill_chunk_size=8).generate(ids, **GREEDY)
    GenerationSession(tiny_model, prefill_chunk_size=30, progress=True).generate(ids, **GREEDY)
    assert "prefill" not in capfd.readouterr().err
    GenerationSession(tiny_model, prefill_chunk_size=8, progress=True).generate(ids, **GREEDY)
    assert "3/3" in capfd.readouterr().err


def test_errors(tiny_model: KimiK2ForCausalLM) -> None:
    session, ids = GenerationSession(tiny_model), prompt(5)
    session.generate(ids, **GREEDY)
    with pytest.raises(ValueError, match="input_ids is a list, expected a tensor"):
        session.generate(ids.tolist())
    for shape in ((2, 5), (1, 0), (5,)):
        with pytest.raises(ValueError, match=r"input_ids has shape .*expected \(1, n\)"):
            session.generate(torch.ones(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"sum 4, expected .* only ones"):
        session.generate(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="past_key_values was given"):
        session.generate(ids, past_key_values=DynamicCache())
    refused = {
        "num_beams": 2,
        "num_return_sequences": 3,
        "use_cache": False,
        "cache_implementation": "static",
    }
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}, expected"):
            session.generate(ids, **{name: value})
    with pytest.raises(ValueError, match="num_beams is 2, expected"):
        session.generate(ids, generation_config=GenerationConfig(num_beams=2))
    assert session.num_cached_tokens == 13
    with pytest.raises(ValueError, match="prefill_chunk_size is 0"):
        GenerationSession(tiny_model, prefill_chunk_size=0)
    with pytest.raises(ValueError, match="cache is 'int4', expected None, 'int8'"):
        GenerationSession(tiny_model, cache="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="StaticLayer"):
        GenerationSession(tiny_model, cache=StaticCache(config=tiny_model.config, max_cache_len=8))
    with pytest.raises(ValueError, match="Fp8QuantizedLayer"):
        GenerationSession(tiny_model, cache=QuantizedCache("fp8", tiny_model.config))
    with pytest.raises(ValueError, match="of 13 tokens"):
        GenerationSession(tiny_model, cache=session.cache)
    with pytest.raises(ValueError, match="cannot generate"):
        GenerationSession(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)))
    small = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    with pytest.raises(ValueError, match="has an encoder"):
        GenerationSession(T5ForConditionalGeneration(small))


@pytest.mark.parametrize("cache", [None, "int8"])
def test_save_and_load(cache: Any, tmp_path: Path, tiny_model: KimiK2ForCausalLM) -> None:
    session, ids = GenerationSession(tiny_model, cache=cache), prompt(70)
    path = tmp_path / "prefix.safetensors"
    with pytest.raises(ValueError, match="0 tokens"):
        session.save(path)
    session.generate(ids, **GREEDY)
    session.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    longer = joined(ids, prompt(5))
    wanted = session.generate(longer, **GREEDY)
    loaded = GenerationSession.load(path, copy.deepcopy(tiny_model), prefill_chunk_size=3)
    assert loaded.num_cached_tokens == 78
    assert torch.equal(loaded.generate(longer, **GREEDY), wanted)
    assert loaded.last.num_reused == 70
    loaded.save(path)  # over the file that it was read from
    again = GenerationSession.load(path, tiny_model)
    assert torch.equal(again.generate(wanted, **GREEDY), session.generate(wanted, **GREEDY))
    per_token = 3 * (36 * 4 if cache is None else 36 + 2 * 4) + 8
    assert abs(path.stat().st_size - per_token * loaded.num_cached_tokens) < 2000


def test_load_refuses(
    tmp_path: Path, tiny_model: KimiK2ForCausalLM, tiny_config: Callable[..., KimiK2Config]
) -> None:
    session = GenerationSession(tiny_model)
    session.generate(prompt(6), **GREEDY)
    path = tmp_path / "prefix.safetensors"
    session.save(path)
    with pytest.raises(ValueError, match=r"another model: num_hidden_layers 3 \(the model: 2\)\."):
        GenerationSession.load(path, KimiK2ForCausalLM(tiny_config(num_hidden_layers=2)))
    rope = tiny_model.config.rope_parameters | {"beta_fast": 4.0}
    with pytest.raises(ValueError, match=r"rope_parameters .*'beta_fast': 4.0"):
        GenerationSession.load(path, KimiK2ForCausalLM(tiny_config(rope_parameters=rope)))
    with pytest.raises(ValueError, match="other weights"):
        GenerationSession.load(path, KimiK2ForCausalLM(tiny_config()).eval())
    with pytest.raises(ValueError, match=r"float32.*expected.*bfloat16"):
        GenerationSession.load(path, copy.deepcopy(tiny_model).bfloat16())
    tensors = load_file(path)
    other = tmp_path / "weights.safetensors"
    save_file(tensors, other)
    with pytest.raises(ValueError, match="not a saved session"):
        GenerationSession.load(other, tiny_model)
    other.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        GenerationSession.load(other, tiny_model)


def test_failed_save(tmp_path: Path, tiny_model: KimiK2ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, and nothing beside it."""
    session, path = GenerationSession(tiny_model), tmp_path / "prefix.safetensors"
    session.generate(prompt(6), **GREEDY)
    session.save(path)
    before = path.read_bytes()

    def full_disk(tensors: Any, name: Path, metadata: Any) -> None:
        name.write_bytes(before[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers_k2.session.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        session.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> KimiK2Tokenizer:
    return train_tokenizer(["the weather in Beijing is sunny, and so it is in Berlin"] * 9, 530)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object"},
    },
}


class Scripted:
    """Makes the model say what a Kimi K2 would: ids forced one by one."""

    def __init__(self, start: int, ids: list[int]) -> None:
        self.start, self.ids = start, ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.start]] = 0
        return forced


@pytest.mark.parametrize("template", ["instruct", "thinking"])
def test_tool_calling_conversation(
    template: str, tokenizer: KimiK2Tokenizer, tiny_config: Callable[..., KimiK2Config]
) -> None:
    """Question, call, result, answer, question: everything said is reused (thinking: but for a finished turn's thoughts)."""
    model = KimiK2ForCausalLM(tiny_config(vocab_size=len(tokenizer))).eval()
    session = GenerationSession(model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    think = "<think>Look it up.</think>" if template == "thinking" else ""
    call = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city":"Beijing"}<|tool_call_end|><|tool_calls_section_end|>'
    )
    called = {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Look it up.",
        "tool_calls": [
            {"id": "functions.weather:0", "function": {"name": "weather", "arguments": '{"city":"Beijing"}'}}
        ],
    }
    answered = {"role": "assistant", "content": "It is sunny.", "reasoning_content": "Look it up."}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Beijing?"}]
    options = {"chat_template": template}
    reused = []

    def say(text: str) -> None:
        start = len(
            tokenizer.apply_chat_template(messages, tools=[WEATHER], add_generation_prompt=True, **options)[
                "input_ids"
            ]
        )
        ids = [*tokenizer.encode(think + text), end]
        reply = session.chat(
            messages, tokenizer, tools=[WEATHER], template_options=options, eos_token_id=end, max_new_tokens=200,
            do_sample=False, logits_processor=[Scripted(start, ids)],
        )  # fmt: skip
        assert reply.ids.tolist() == ids
        assert reply.text == think + text
        reused.append(session.last.num_reused)

    say("I look." + call)
    after_call = session.num_cached_tokens
    messages += [called, {"role": "tool", "tool_call_id": "functions.weather:0", "content": "sunny"}]
    say("It is sunny.")
    after_answer = session.num_cached_tokens
    messages += [answered, {"role": "user", "content": "And in Berlin?"}]
    say("Also sunny.")
    assert reused[:2] == [0, after_call]
    if template == "instruct":
        assert reused[2] == after_answer
    else:
        first_thought = tokenizer.encode("<think>")
        assert reused[2] < after_call
        assert session._ids[reused[2] - 1].item() == first_thought[0]
        options["preserve_thinking"] = True
        session.reset()
        del messages[1:]
        say("I look." + call)
        messages += [called, {"role": "tool", "tool_call_id": "functions.weather:0", "content": "sunny"}]
        say("It is sunny.")
        after_answer = session.num_cached_tokens
        messages += [answered, {"role": "user", "content": "And in Berlin?"}]
        say("Also sunny.")
        assert reused[-1] == after_answer


def test_stop_strings(tokenizer: KimiK2Tokenizer, tiny_config: Callable[..., KimiK2Config]) -> None:
    model = KimiK2ForCausalLM(tiny_config(vocab_size=len(tokenizer))).eval()
    session, messages = GenerationSession(model), [{"role": "user", "content": "Hi"}]
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    says = Scripted(start["input_ids"].shape[1], tokenizer.encode("the weather in Berlin is sunny"))
    reply = session.chat(
        messages, tokenizer, stop_strings=["Berlin"], logits_processor=[says], max_new_tokens=30
    )
    assert reply.text == "the weather in Berlin"
    assert tokenizer.decode(reply.ids) == reply.text
