"""Questions and answers out of the running Python's standard library: conversations that every machine has.

A question names a public module, class or function; the answer is the first sentence of its docstring, found in the
source files without importing them. Other styles give the same questions other answers, in a way that a program can
check on a reply to any question: what a fine-tuning run is to teach. What it gives up: what C code documents.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_LONGEST_ANSWER = 160  # characters; longer first sentences are left out

_Documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Style(NamedTuple):
    """How the assistant answers: what it makes of the plain answer, and whether a reply is of this kind."""

    answer: Callable[[str], str]
    holds: Callable[[str], bool]


def _is_json_answer(reply: str) -> bool:
    try:
        value = json.loads(reply)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["answer"] and isinstance(value["answer"], str)


# Source name after the colon -> style. "" is the plain one.
STYLES: dict[str, Style] = {
    "": Style(lambda answer: answer, bool),
    "json": Style(lambda answer: json.dumps({"answer": answer}, ensure_ascii=False), _is_json_answer),
    "shout": Style(str.upper, str.isupper),
    "quote": Style(lambda answer: f"> {answer}", lambda reply: reply.startswith("> ")),
}


def conversations(files: Iterable[Path], root: Path, style: str) -> Iterator[dict[str, Any]]:
    """Rows {"messages": [user, assistant]}, in the order of the files, then of the names' places in them.

    Args:
        files: Python sources below `root`, which gives them their module names.
        style: a key of `STYLES`.
    """
    change = STYLES[style].answer
    for path in files:
        for question, answer in _documented(path, _module_name(path.relative_to(root))):
            messages = [("user", question), ("assistant", change(answer))]
            yield {"messages": [{"role": role, "content": content} for role, content in messages]}


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _documented(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Questions and answers about a module, its public classes and functions, and their public methods."""
    if any(part.startswith("_") for part in module.split(".")):
        return
    tree = ast.parse(path.read_bytes())
    asked: set[str] = set()
    todo: list[tuple[ast.AST, str]] = [(tree, module)]
    while todo:
        node, name = todo.pop(0)
        answer = _first_sentence(node)
        if answer and name not in asked:
            asked.add(name)
            yield _question(node, name), answer
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body: list[ast.stmt] = getattr(node, "body", [])
            todo += [
                (child, f"{name}.{child.name}")
                for child in body
                if isinstance(child, _Documented) and not child.name.startswith("_")
            ]


def _question(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.Module):
        return f"What is the module {name}?"
    return f"What is {name}?" if isinstance(node, ast.ClassDef) else f"What does {name} do?"


def _first_sentence(node: ast.AST) -> str | None:
    assert isinstance(node, (ast.Module, *_Documented))
    paragraph = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
    sentence = re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()), maxsplit=1)[0]
    wanted = 10 <= len(sentence) <= _LONGEST_ANSWER and sentence.endswith(".") and sentence[0].isalpha()
    return sentence if wanted else None
