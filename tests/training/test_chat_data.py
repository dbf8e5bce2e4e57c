"""Conversations: the loss mask against spans written by hand, foreign templates, rows from files, the built-in source."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from transformers_k2 import KimiK2Tokenizer
from transformers_k2.tokenizer_training import train_tokenizer
from transformers_k2.training.chat_data import encode_conversation, encode_conversations, read_conversations
from transformers_k2.training.sources import Source
from transformers_k2.training.stdlib_chat import STYLES
from transformers_k2.training.token_cache import build_cache, split

HUB_CONFIG = (
    Path(__file__)
    .resolve()
    .parents[2]
    .parent.joinpath("shared", "data", "checkpoints", "kimi_k2_instruct.tokenizer_config.json")
)

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What's the time in Zürich? 时间"}
CALL = {
    "type": "function",
    "id": "functions.clock:0",
    "function": {"name": "clock", "arguments": '{"zone": "CET"}'},
}
CALLING = {"role": "assistant", "content": "One moment.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "functions.clock:0", "name": "clock", "content": "12:00"}
DONE = {"role": "assistant", "content": "Noon: 正午."}
THOUGHT = {**DONE, "reasoning_content": "12:00 is noon."}

SYSTEM_TEXT = "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
ASK_TEXT = f"<|im_user|>user<|im_middle|>{ASK['content']}<|im_end|>"
HEADER = "<|im_assistant|>assistant<|im_middle|>"
CALL_TEXT = (
    "One moment.<|tool_calls_section_begin|><|tool_call_begin|>functions.clock:0<|tool_call_argument_begin|>"
    '{"zone": "CET"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
RESULT_TEXT = "<|im_system|>clock<|im_middle|>## Return of functions.clock:0\n12:00<|im_end|>"
TOOLS_TEXT = (
    '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"clock","parameters":{"type":'
    '"object","properties":{}}}}]<|im_end|>'
)

# Name: messages, tools, template arguments, and the text in parts, True where the assistant wrote it.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any, dict[str, Any], list[tuple[str, bool]]]] = {
    "one turn": (
        [SYSTEM, ASK, DONE],
        None,
        {},
        [(SYSTEM_TEXT + ASK_TEXT + HEADER, False), ("Noon: 正午.<|im_end|>", True)],
    ),
    "two turns, the last a question": (
        [SYSTEM, ASK, DONE, ASK, {"role": "assistant", "content": ""}, ASK],
        None,
        {},
        [
            (SYSTEM_TEXT + ASK_TEXT + HEADER, False),
            ("Noon: 正午.<|im_end|>", True),
            (ASK_TEXT + HEADER, False),
            ("<|im_end|>", True),
            (ASK_TEXT, False),
        ],
    ),
    "tools": (
        [SYSTEM, ASK, CALLING, RESULT, DONE],
        [TOOL],
        {},
        [
            (TOOLS_TEXT + SYSTEM_TEXT + ASK_TEXT + HEADER, False),
            (CALL_TEXT, True),
            (RESULT_TEXT + HEADER, False),
            ("Noon: 正午.<|im_end|>", True),
        ],
    ),
    "thinking": (
        [SYSTEM, ASK, CALLING, RESULT, THOUGHT],
        [TOOL],
        {"chat_template": "thinking", "preserve_thinking": True},
        [
            (TOOLS_TEXT + SYSTEM_TEXT + ASK_TEXT + HEADER, False),
            ("<think></think>" + CALL_TEXT, True),
            (RESULT_TEXT + HEADER, False),
            ("<think>12:00 is noon.</think>Noon: 正午.<|im_end|>", True),
        ],
    ),
    "the assistant begins": (
        [DONE, ASK],
        None,
        {"default_system_message": ""},
        [(HEADER, False), ("Noon: 正午.<|im_end|>", True), (ASK_TEXT, False)],
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> KimiK2Tokenizer:
    return train_tokenizer([ASK_TEXT + CALL_TEXT + RESULT_TEXT + DONE["content"]] * 3, 540)


def without_markers(tokenizer: KimiK2Tokenizer, name: str = "instruct") -> str:
    template = tokenizer.get_chat_template(name)
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def by_hand(tokenizer: KimiK2Tokenizer, parts: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Every part ends at a special token or at a turn's text, so that the parts can be encoded one by one."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text, _ in parts]
    return sum(ids, []), [int(own) for part, (_, own) in zip(ids, parts, strict=True) for _ in part]  # noqa: RUF017


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("markers", [True, False])
def test_the_mask_is_the_one_written_by_hand(tokenizer, name: str, markers: bool) -> None:
    messages, tools, template, parts = CONVERSATIONS[name]
    if not markers:
        plain = without_markers(tokenizer, template.get("chat_template", "instruct"))
        template = {**template, "chat_template": plain}
        if messages[0] is DONE:
            with pytest.raises(ValueError, match="begins with an assistant turn"):
                encode_conversation({"messages": messages}, tokenizer, template)
            return
    found = encode_conversation({"messages": messages, "tools": tools}, tokenizer, template)
    assert found == by_hand(tokenizer, parts)


@pytest.mark.skipif(not HUB_CONFIG.is_file(), reason="needs ../shared/data")
def test_the_published_template_without_markers(tokenizer) -> None:
    july = json.loads(HUB_CONFIG.read_text(encoding="utf-8"))["chat_template"]
    assert "generation" not in july.replace("add_generation_prompt", "")
    for name in ("one turn", "two turns, the last a question"):
        messages, _, _, parts = CONVERSATIONS[name]
        found = encode_conversation({"messages": messages}, tokenizer, {"chat_template": july})
        assert found == by_hand(tokenizer, parts)


def test_a_template_that_rewrites_history_is_an_error(tokenizer) -> None:
    messages = [SYSTEM, ASK, {**CALLING, "reasoning_content": "Look."}, RESULT, DONE]
    plain = without_markers(tokenizer, "thinking")
    with pytest.raises(ValueError, match=r"up to message 2 \(assistant\) differently"):
        encode_conversation({"messages": messages}, tokenizer, {"chat_template": plain})
    joined = (
        "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}{{ 'a' if add_generation_prompt }}"
    )
    merged = train_tokenizer(["ab ab ab ab ab"], 514)
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="'ab' lies across the border"):
        encode_conversation(row, merged, {"chat_template": joined})


@pytest.mark.parametrize("template", [{}, {"chat_template": "thinking"}])
def test_thinking_is_not_dropped_silently(tokenizer, template: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"leaves out the reasoning '12:00 is noon\.'"):
        encode_conversation({"messages": [SYSTEM, ASK, THOUGHT]}, tokenizer, template)


def test_text_cannot_become_a_turn(tokenizer) -> None:
    for row in (
        {"messages": [{"role": "user", "content": "a<|im_end|>"}, DONE]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "[EOS]"}]}, DONE]},
        {"messages": [ASK, DONE], "tools": [{"function": {"description": "<|im_user|>"}}]},
    ):
        with pytest.raises(ValueError, match="spells the special token"):
            encode_conversation(row, tokenizer, {})


def test_conversations_in_a_cache(tokenizer, tmp_path: Path) -> None:
    """Ids and masks as of each conversation; the same question is held out whatever the answer."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{number % 9}"},
                {"role": "assistant", "content": str(number)},
            ]
        }
        for number in range(40)
    ]
    cache = build_cache(
        rows, lambda batch: encode_conversations(batch, tokenizer, {}), tokenizer, tmp_path / "a", seed=0
    )
    assert cache.loss is not None
    for number, row in enumerate(rows):
        ids, loss = encode_conversation(row, tokenizer, {})
        assert cache.tokens(number).tolist() == ids
        assert cache.loss[cache.offsets[number] : cache.offsets[number + 1]].tolist() == loss
    training, held_out = split(cache, 0.2)
    questions = [{number % 9 for number in side} for side in (training, held_out)]
    assert not questions[0] & questions[1]
    assert len(questions[1]) > 1


def test_rows_from_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    row = {"messages": [ASK, CALLING, RESULT, DONE], "tools": [TOOL]}
    plain = {"messages": [ASK, DONE], "tools": None}
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(value) + "\n" for value in (row, plain)), encoding="utf-8")
    assert list(read_conversations(Source(str(lines)))) == [row, plain]
    # In columns tools are text, and keys that a message does not have come back as None.
    table = datasets.Dataset.from_list(
        [
            {"messages": value["messages"], "tools": json.dumps(value["tools"]) if value["tools"] else None}
            for value in (row, plain)
        ]
    )
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    for source in (str(tmp_path / "rows.parquet"), f"datasets:{tmp_path / 'saved'}"):
        assert list(read_conversations(Source(source))) == [row, plain]
        assert Source(source).identity() == Source(source).identity()
    size = len(json.dumps(row, ensure_ascii=False).encode())
    assert list(read_conversations(Source(str(lines), max_bytes=size))) == [row]
    assert list(read_conversations(Source(str(lines), max_bytes=size - 1))) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "has the keys text: expected 'messages'"),
        ('{"messages": []}', "expected 'messages', a list that is not empty"),
        ('{"messages": [{"content": "a"}]}', "has no role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of role 'assistant'"),
        ('["a"]', "is list: expected an object"),
    ],
)
def test_rows_that_are_no_conversation(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list(read_conversations(Source(str(path))))
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match="is text: expected rows"):
        list(read_conversations(Source(str(tmp_path / "a.txt"))))


def test_the_standard_library_answers() -> None:
    rows = {
        style: list(
            islice(read_conversations(Source(f"stdlib_chat:{style}" if style else "stdlib_chat")), 400)
        )
        for style in STYLES
    }
    assert all(len(value) == 400 for value in rows.values())
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows[""]}
    assert len(answers) == 400  # no question twice
    # Without ast.get_docstring or the walk: the text itself, found in the module.
    assert answers["What is the module abc?"] == "Abstract Base Classes (ABCs) according to PEP 3119."
    import abc

    assert (
        answers["What does abc.abstractmethod do?"]
        == (abc.abstractmethod.__doc__ or "").strip().split("\n")[0]
    )
    for style, (_, holds) in STYLES.items():
        questions = [row["messages"][0]["content"] for row in rows[style]]
        assert questions == list(answers)
        replies = [row["messages"][1]["content"] for row in rows[style]]
        assert all(map(holds, replies))
        if style:
            assert not any(map(holds, answers.values()))
    assert json.loads(rows["json"][0]["messages"][1]["content"]) == {"answer": next(iter(answers.values()))}
    assert rows["shout"][0]["messages"][1]["content"] == next(iter(answers.values())).upper()
    with pytest.raises(ValueError, match="expected stdlib_chat or one of stdlib_chat:json"):
        Source("stdlib_chat:rhyme")
    with pytest.raises(ValueError, match="gives conversations"):
        list(Source("stdlib_chat"))
