"""Conversations as training documents: ids by the tokenizer's chat template, and which of them the assistant wrote.

The loss is on assistant turns alone: thinking, content, tool calls and the token that ends the turn, not the header,
which is given at inference. Templates with `{% generation %}` markers say where that is. For others it follows from
rendering the conversation up to each assistant turn and past it, which works if later turns change nothing before
them, and is an error if not. What it gives up: conversations whose text spells a special token (an error).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from .sources import Source
from .token_cache import Document

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # transformers' own test for the markers

Conversation = Mapping[str, Any]


def read_conversations(source: Source) -> Iterator[dict[str, Any]]:
    """The source's rows as {"messages": [...], "tools": [...] or None}.

    `tools` and a call's `arguments` may be JSON text; columns (parquet, datasets) should keep them so, because there
    every row has the keys of all, and keys without a value are taken for absent.

    Raises:
        ValueError: a row has no messages, a message no role, or no message is the assistant's.
    """
    for number, row in enumerate(source.rows(), 1):
        where = f"data.source {source.source!r}, conversation {number}"
        messages, tools = row.get("messages"), row.get("tools")
        if not isinstance(messages, list) or not messages:
            raise ValueError(
                f"{where} has the keys {', '.join(row) or '(none)'}: expected 'messages', a list that is not empty."
            )
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(
                    f"{where}: the message {message!r} has no role, expected {{'role': ..., ...}}."
                )
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError(f"{where} has no message of role 'assistant': expected one, to learn from.")
        if isinstance(tools, str):
            tools = json.loads(tools) if tools.strip() else None
        yield {"messages": messages, "tools": tools or None}


def encode_conversations(
    rows: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]
) -> list[Document]:
    """Conversations as documents with a loss mask; no EOS is added, as the template ends each turn.

    They are held out by what comes before the first answer, so that no question is on both sides of the split.

    Args:
        template: further arguments of the chat template, such as `preserve_thinking` or `default_system_message`.

    Raises:
        ValueError: as `encode_conversation`.
    """
    documents = []
    for row in rows:
        messages = row["messages"]
        answer = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
        content = json.dumps([messages[:answer], row.get("tools")], sort_keys=True, ensure_ascii=False)
        ids, loss = encode_conversation(row, tokenizer, template)
        size = len(json.dumps(messages, ensure_ascii=False).encode("utf-8", "replace"))
        documents.append(Document(ids, content.encode("utf-8", "surrogatepass"), size, loss))
    return documents


def encode_conversation(
    row: Conversation, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """The ids of a conversation and its loss mask, 1 on what the assistant wrote: two lists of the same length.

    Raises:
        ValueError: the text spells a special token; the template leaves out a message's reasoning; or it has no markers
            and a conversation does not begin as its own beginning does.
    """
    messages, tools = row["messages"], row.get("tools")
    _check_text([messages, tools], tokenizer)
    if _MARKER.search(tokenizer.get_chat_template(template.get("chat_template"), tools)):
        encoded: Any = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, **template
        )
        ids, loss = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    else:
        ids, loss = _encode_by_prefixes(messages, tools, tokenizer, template)
    _check_reasoning(messages, ids, tokenizer)
    return ids, loss


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template ends an assistant turn with: where generation has to stop."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, loss = encode_conversation({"messages": turns}, tokenizer, {})
    return max((place, token) for place, token in enumerate(ids) if loss[place])[1]


def _encode_by_prefixes(
    messages: list[dict[str, Any]],
    tools: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: Mapping[str, Any],
) -> tuple[list[int], list[int]]:
    def render(number: int, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages[:number], tools=tools, tokenize=False, add_generation_prompt=prompt, **template
        )
        assert isinstance(text, str)
        return text

    full = render(len(messages), False)
    spans: list[tuple[int, int]] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if place == 0:
            raise ValueError(
                "The conversation begins with an assistant turn, and the chat template has no {% generation %} markers: "
                "expected a message before it."
            )
        before, after = render(place, True), render(place + 1, False)
        if not (full.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"The chat template writes the turns up to message {place} (assistant) differently when others follow, "
                "and has no {% generation %} markers: expected a template with them, or one that keeps earlier turns."
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    loss = []
    for start, stop in encoded["offset_mapping"]:
        touches = any(start < last and first < stop for first, last in spans)
        if touches and not any(first <= start and stop <= last for first, last in spans):
            raise ValueError(
                f"The token {full[start:stop]!r} lies across the border of an assistant turn: expected a chat template "
                "with a special token there."
            )
        loss.append(int(touches))
    return list(encoded["input_ids"]), loss


def _check_reasoning(
    messages: list[dict[str, Any]], ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Templates leave reasoning out of history, and some out of every turn: what was to be learned would be gone."""
    thoughts = [message.get("reasoning_content") or message.get("reasoning") for message in messages]
    text = tokenizer.decode(ids) if any(thoughts) else ""
    for thought in thoughts:
        if isinstance(thought, str) and thought.strip() not in text:
            raise ValueError(
                f"The chat template leaves out the reasoning {thought[:80]!r}: expected one that writes it (for Kimi's "
                "chat_template: thinking, preserve_thinking: true), or messages without reasoning_content."
            )


def _check_text(value: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse text that the tokenizer would read as a turn's beginning or end."""
    pattern = _special_pattern(tuple(tokenizer.all_special_tokens))
    for text in _strings(value):
        if found := pattern.search(text):
            raise ValueError(
                f"A conversation's text spells the special token {found[0]!r} ({text[:80]!r}): expected text without "
                "it; rewrite the text or remove the conversation."
            )


@lru_cache(maxsize=8)
def _special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
