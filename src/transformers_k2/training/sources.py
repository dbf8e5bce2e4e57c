"""Text or rows for training, from wherever `data.source` points: read lazily, in a fixed order.

Documents are texts; conversations are rows with a list of messages. Either is read as it is wanted, so that memory
holds one file of a folder, one line or one batch of rows.

| data.source | documents |
|---|---|
| `stdlib` | the running Python's own standard library: one per module, one per help topic |
| a text file | one per file; a file given alone is cut at blank lines, because it must yield several |
| `*.jsonl`, `*.jsonl.gz` | one per line: the text under `data.text_field` |
| `*.parquet` | one per row: the column `data.text_field` |
| a folder | every visible file below it, each by its kind; files that are not text are counted and left out |
| a glob pattern | every matching file, each by its kind |
| `datasets:NAME[:CONFIG[:SPLIT]]` | rows of a Hugging Face dataset (a hub name, a local path or a saved one) |
| a list | all of these, one after the other |

| data.source | rows (conversations) |
|---|---|
| `stdlib_chat` | questions about the standard library, answered from its docstrings: see stdlib_chat.py |
| `stdlib_chat:STYLE` | the same questions answered as `json`, in capitals (`shout`) or as a quotation (`quote`) |
| `*.jsonl`, `*.jsonl.gz`, `*.parquet`, `datasets:...`, folders, globs and lists of these | one per line or row |

What it gives up: compressed text other than .jsonl.gz, and streaming from the hub.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .readers import (
    DATASETS,
    dataset_files,
    no_field,
    open_dataset,
    pieces,
    read_json_lines,
    read_parquet,
    read_parts,
    read_text,
    text_of,
    without_nulls,
)
from .stdlib_chat import STYLES, conversations

# Left out of "stdlib": tests and packages are not the library; lib2to3 and idlelib are applications; encodings is
# mostly generated tables, on which any model looks good.
_STDLIB_EXCLUDED = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
}
_STDLIB_EXCLUDED |= {"dist-packages", "__pycache__"}
_STDLIB_CHAT = "stdlib_chat"


@dataclass
class Source:
    """An iterable of documents (str). `skipped` counts a folder's files that are not text, after iterating."""

    source: str | list[str]
    text_field: str = "text"
    max_bytes: int | None = None
    skipped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError if a part of the source cannot exist; nothing is read yet."""
        self.parts = [self.source] if isinstance(self.source, str) else list(self.source)
        if not self.parts:
            raise ValueError("data.source is an empty list: expected at least one source.")
        self.files = {part: _resolve(part) for part in self.parts}

    @property
    def num_bytes(self) -> int | None:
        """The size of the files, an upper bound for the text; None where it is not known before reading."""
        sizes = [path.stat().st_size for files in self.files.values() if files is not None for path in files]
        if any(files is None for files in self.files.values()):
            return None
        return sum(sizes) if self.max_bytes is None else min(sum(sizes), self.max_bytes)

    def identity(self) -> list[Any]:
        """What the documents follow from, as JSON values: settings, and every file's path, size and time of change."""
        files: list[Path] = []
        for part in self.parts:
            found = self.files[part]
            files += dataset_files(part) if found is None else found
        stats = [(str(path.resolve()), path.stat()) for path in files]
        changes = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return [self.parts, self.text_field, self.max_bytes, sys.version, changes]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of files of rows, as conversations are, until the next one would exceed `max_bytes` as JSON.

        Raises:
            ValueError: a part is text, or a line is no JSON object.
        """
        total = 0
        for part in self.parts:
            for row in self._rows(part):
                if self.max_bytes is not None:
                    total += len(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
                    if total > self.max_bytes:
                        return
                yield row

    def _rows(self, part: str) -> Iterator[dict[str, Any]]:
        files = self.files[part]
        if files is None:
            for row in open_dataset(part):
                yield without_nulls(row)
            return
        if _is_stdlib_chat(part):
            yield from conversations(files, _stdlib_root(), part.removeprefix(_STDLIB_CHAT).removeprefix(":"))
            return
        for path in files:
            if path.suffix == ".parquet":
                yield from map(without_nulls, read_parquet(path, None))
            elif path.name.endswith((".jsonl", ".jsonl.gz")):
                for row, where in read_json_lines(path):
                    if not isinstance(row, dict):
                        raise ValueError(
                            f"data.source file {where} is {type(row).__name__}: expected an object."
                        )
                    yield row
            else:
                raise ValueError(
                    f"data.source file {path} is text: expected rows (.jsonl, .jsonl.gz, .parquet, datasets:NAME or "
                    f"{_STDLIB_CHAT})."
                )

    def __iter__(self) -> Iterator[str]:
        """Non-empty documents, until the next one would exceed `max_bytes` of UTF-8."""
        self.skipped, total = 0, 0
        for part in self.parts:
            for text in self._documents(part):
                if not text.strip():
                    continue
                total += len(text.encode("utf-8", "replace"))
                if self.max_bytes is not None and total > self.max_bytes:
                    return
                yield text

    def _documents(self, part: str) -> Iterator[str]:
        files = self.files[part]
        if files is None:
            rows = open_dataset(part)
            if self.text_field not in (rows.column_names or ()):
                raise no_field(part, self.text_field, rows.column_names or ())
            for row in rows.select_columns([self.text_field]):
                yield text_of(row, self.text_field, part)
            return
        if _is_stdlib_chat(part):
            raise ValueError(
                f"data.source {part!r} gives conversations: expected a source of text, such as stdlib."
            )
        alone = len(self.parts) == 1 and len(files) == 1 and part != "stdlib"
        for path in files:
            if path.suffix == ".parquet":
                for row in read_parquet(path, self.text_field):
                    yield text_of(row, self.text_field, str(path))
            elif path.name.endswith((".jsonl", ".jsonl.gz")):
                for row, where in read_json_lines(path):
                    yield text_of(row, self.text_field, where)
            elif part == "stdlib":
                with tokenize.open(path) as file:  # honours a coding cookie
                    yield file.read()
            elif alone:
                yield from pieces(read_parts(path))
            elif (text := read_text(path, lenient=Path(part).is_dir())) is not None:
                yield text
            else:
                self.skipped += 1
        if part == "stdlib":
            yield from _help_topics()


def _resolve(part: str) -> list[Path] | None:
    """The files of one source in a fixed order; None for a dataset."""
    if part.startswith(DATASETS):
        if not part.removeprefix(DATASETS) or part.count(":") > 3:
            raise ValueError(
                f"data.source is {part!r}: expected datasets:NAME, datasets:NAME:CONFIG or datasets:NAME:CONFIG:SPLIT."
            )
        _need("datasets", part)
        return None
    if part == "stdlib":
        return _stdlib_files()
    if _is_stdlib_chat(part):
        if part != _STDLIB_CHAT and part.removeprefix(f"{_STDLIB_CHAT}:") not in filter(None, STYLES):
            choices = ", ".join(f"{_STDLIB_CHAT}:{style}" for style in filter(None, STYLES))
            raise ValueError(f"data.source is {part!r}: expected {_STDLIB_CHAT} or one of {choices}.")
        return _stdlib_files()
    path = Path(part).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        visible = (
            file
            for file in path.rglob("*")
            if file.is_file() and not any(name.startswith(".") for name in file.relative_to(path).parts)
        )
        files = sorted(visible, key=lambda file: file.relative_to(path).as_posix())
    elif glob.has_magic(part):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    else:
        raise ValueError(
            f"data.source is {part!r}, which does not exist here: expected stdlib, {_STDLIB_CHAT}, a file, a folder, a glob "
            f"pattern or datasets:NAME{f' (such as datasets:{part})' if part.count('/') == 1 else ''}."
        )
    if not files:
        raise ValueError(f"data.source {part!r} holds no files: expected at least one.")
    if any(file.suffix == ".parquet" for file in files):
        _need("pyarrow", part)
    return files


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _is_stdlib_chat(part: str) -> bool:
    return part == _STDLIB_CHAT or part.startswith(f"{_STDLIB_CHAT}:")


def _stdlib_files() -> list[Path]:
    root = _stdlib_root()
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # Never entered, not only left out: site-packages may be large.
        subfolders[:] = [
            name for name in subfolders if name not in _STDLIB_EXCLUDED and not name.startswith("config-")
        ]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _need(package: str, part: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"data.source {part!r} needs {package}: install it with pip install 'transformers_k2[train]'."
        )


def _help_topics() -> Iterator[str]:
    """The language reference that `help()` shows, by topic: the documentation that every installation has."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def describe(source: str | list[str]) -> str:
    """The source in a few words, for titles and reports."""
    if source == "stdlib":
        return f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
    if isinstance(source, str) and _is_stdlib_chat(source):
        return f"questions about {describe('stdlib')}" + source.removeprefix(_STDLIB_CHAT).replace(
            ":", ", style "
        )
    return source if isinstance(source, str) else ", ".join(source)
