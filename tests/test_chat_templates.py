"""The chat templates against the published strings and the hub's own template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from transformers_k2 import KimiK2Tokenizer
from transformers_k2.tokenization_kimi_k2 import CHAT_TEMPLATES
from transformers_k2.tokenizer_training import train_tokenizer

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
HUB_CONFIG = SHARED / "checkpoints" / "kimi_k2_instruct.tokenizer_config.json"
needs_hub_data = pytest.mark.skipif(not HUB_CONFIG.is_file(), reason="needs ../shared/data")


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    train_tokenizer([], 512, folder)
    return folder


@pytest.fixture(scope="module")
def small(small_folder: Path) -> KimiK2Tokenizer:
    return AutoTokenizer.from_pretrained(small_folder)


@pytest.fixture(scope="module")
def render(small: KimiK2Tokenizer) -> Callable[..., str]:
    return lambda messages, **kwargs: small.apply_chat_template(messages, tokenize=False, **kwargs)


# Published renderings of one conversation with one tool.
DESCRIPTION = "Get weather information. Call this tool when the user needs to get weather information"
CITY = {"type": "string", "description": "City name"}
PARAMETERS = {"type": "object", "required": ["city"], "properties": {"city": CITY}}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": DESCRIPTION, "parameters": PARAMETERS},
}
QUESTION = {"role": "user", "content": "What's the weather like in Beijing today? Use the tool to check."}
PROMPT = (
    '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"get_weather",'
    '"description":"Get weather information.'
    ' Call this tool when the user needs to get weather information",'
    '"parameters":{"type":"object","required":["city"],"properties":{"city":{"type":"string",'
    '"description":"City name"}}}}}]<|im_end|><|im_system|>system<|im_middle|>You are Kimi,'
    " an AI assistant created by Moonshot AI.<|im_end|><|im_user|>user<|im_middle|>"
    "What's the weather like in Beijing today? Use the tool to check.<|im_end|><|im_assistant|>"
    "assistant<|im_middle|>"
)
ANSWERED = (
    "<|tool_calls_section_begin|><|tool_call_begin|>"
    'functions.get_weather:0<|tool_call_argument_begin|>{"city": "Beijing"}<|tool_call_end|>'
    "<|tool_calls_section_end|><|im_end|><|im_system|>get_weather<|im_middle|>"
    '## Return of functions.get_weather:0\n{"weather": "Sunny"}<|im_end|><|im_assistant|>'
    "assistant<|im_middle|>"
)


def call(arguments: object, name: str = "get_weather", **fields: str) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def result(content: object, **fields: str) -> dict:
    return {"role": "tool", "content": content, **fields}


@pytest.mark.parametrize("arguments", [{"city": "Beijing"}, '{"city": "Beijing"}'])
@pytest.mark.parametrize("content", ["", None, []])
def test_published_strings(render, arguments: object, content: object) -> None:
    assert render([QUESTION], tools=[WEATHER], add_generation_prompt=True) == PROMPT
    messages = [
        QUESTION,
        {
            "role": "assistant",
            "content": content,
            "tool_calls": [call(arguments, id="functions.get_weather:0")],
        },
        result('{"weather": "Sunny"}', tool_call_id="functions.get_weather:0", name="get_weather"),
    ]
    assert render(messages, tools=[WEATHER], add_generation_prompt=True) == PROMPT + ANSWERED
    messages[1]["reasoning_content"] = "Look it up."
    thinking = render(messages, tools=[WEATHER], add_generation_prompt=True, chat_template="thinking")
    assert thinking == PROMPT + "<think>Look it up.</think>" + ANSWERED


@needs_hub_data
@pytest.mark.parametrize("system", [None, "Be brief.\n  {{ not jinja }} "])
def test_plain_chat_equals_the_july_template(render, system: str | None) -> None:
    july = json.loads(HUB_CONFIG.read_text(encoding="utf-8"))["chat_template"]
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": " leading and trailing \n"},
        {"role": "assistant", "content": "naïve 中文 <b>&amp;</b>"},
        {"role": "user", "content": "bye"},
    ]
    for prompt in (True, False):
        ours = render(
            messages, add_generation_prompt=prompt, default_system_message="You are a helpful assistant"
        )
        assert ours == render(messages, add_generation_prompt=prompt, chat_template=july)


def test_names_parts_and_tools(render) -> None:
    tool = {"type": "function", "function": {"name": "查询", "parameters": {"z": 1, "a": "<é'>"}}}
    messages = [
        {
            "role": "system",
            "name": "guide",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "name": "Ann", "content": ""},
        {"role": "assistant", "name": "bot", "content": "c"},
        {"role": "developer", "content": "d"},
    ]
    assert render(messages, tools=[tool]) == (
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"查询","parameters":'
        '{"z":1,"a":"<é\'>"}}}]<|im_end|><|im_system|>guide<|im_middle|>ab<|im_end|><|im_user|>Ann<|im_middle|>'
        "<|im_end|><|im_assistant|>bot<|im_middle|>c<|im_end|><|im_system|>developer<|im_middle|>d<|im_end|>"
    )
    assert render([QUESTION], default_system_message="").startswith("<|im_user|>")
    with pytest.raises(TemplateError, match="'image'"):
        render([{"role": "user", "content": [{"type": "image"}]}])


def test_tool_ids(render) -> None:
    """Ids of the form stay, others are numbered over the conversation, and results follow their call."""
    messages = [
        QUESTION,
        {"role": "assistant", "tool_calls": [call({}, id="call_a"), call({}, name="clock", id="call_b")]},
        result("second", tool_call_id="call_b", name="clock"),
        result("first", tool_call_id="call_a"),
        {"role": "assistant", "tool_calls": [call({}, id="functions.get_weather:5"), call({}), call({})]},
        result("kept", tool_call_id="functions.get_weather:5"),
        result({"n": "é"}),
        result(None),
    ]
    rendered = render(messages)
    ids = ["get_weather:0", "clock:1", "get_weather:5", "get_weather:6", "get_weather:7"]
    assert [part.split("<|")[0] for part in rendered.split("<|tool_call_begin|>functions.")[1:]] == ids
    returns = [part.split("<|")[0] for part in rendered.split("## Return of functions.")[1:]]
    assert returns == [
        *("clock:1\nsecond", "get_weather:0\nfirst", "get_weather:5\nkept", 'get_weather:6\n{"n": "é"}'),
        "get_weather:7\n",
    ]
    with pytest.raises(TemplateError, match="no call before it"):
        render([QUESTION, result("lost")])


def test_thinking_history(render) -> None:
    def turn(number: int, **fields: object) -> dict:
        return {"role": "assistant", "content": f"c{number}", "reasoning_content": f"r{number}", **fields}

    step = {"tool_calls": [call("{}")]}
    messages = [
        QUESTION,
        turn(1, **step),
        result("x"),
        turn(2),
        QUESTION,
        turn(3, **step),
        result("y"),
        turn(4, **step),
    ]

    def thoughts(**kwargs: object) -> list[str]:
        parts = render(messages, chat_template="thinking", **kwargs).split("<think>")[1:]
        return [part.split("<|")[0] for part in parts]

    assert thoughts() == ["</think>c1", "</think>c2", "r3</think>c3", "r4</think>c4"]
    assert thoughts(preserve_thinking=True) == [f"r{n}</think>c{n}" for n in (1, 2, 3, 4)]
    messages.append(turn(5))
    assert thoughts() == [f"</think>c{n}" for n in (1, 2, 3, 4, 5)]
    assert "think" not in render(messages)


def test_assistant_mask_covers_the_generated_tokens(small: KimiK2Tokenizer) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "sure ", "tool_calls": [call("{}")]}, result("x")]
    messages += [{"role": "assistant", "content": "done"}]
    for template, thought in (("instruct", ""), ("thinking", "<think></think>")):
        batch = small.apply_chat_template(messages, chat_template=template, return_assistant_tokens_mask=True)
        chosen = [i for i, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True) if mask]
        assert small.decode(chosen) == (
            f"{thought}sure <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
            "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
            f"{thought}done<|im_end|>"
        )


def test_templates_agree_and_can_be_chosen(small_folder: Path) -> None:
    thinking = iter(CHAT_TEMPLATES["thinking"].splitlines())
    assert all(line in thinking for line in CHAT_TEMPLATES["instruct"].splitlines()), "not a subsequence"
    chosen = AutoTokenizer.from_pretrained(small_folder, chat_template="thinking")
    assert chosen.chat_template == CHAT_TEMPLATES["thinking"]
    assert AutoTokenizer.from_pretrained(small_folder).chat_template == CHAT_TEMPLATES["instruct"]
    prefilled = [QUESTION, {"role": "assistant", "content": "It is "}]
    assert chosen.apply_chat_template(prefilled, continue_final_message=True, tokenize=False).endswith(
        "</think>It is "
    )
