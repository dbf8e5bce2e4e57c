"""Text for training, from wherever `data.source` points: a lazily read, deterministically ordered run of documents.

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

What it gives up: compressed text other than .jsonl.gz, and streaming from the hub.
"""

from __future__ import annotations

import glob
import gzip
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
# A text file given alone is cut at the first blank line after this many characters.
_PIECE_CHARACTERS = 2000
_DATASETS = "datasets:"


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
            yield from _dataset_rows(part, self.text_field)
            return
        alone = len(self.parts) == 1 and len(files) == 1 and part != "stdlib"
        for path in files:
            if path.suffix == ".parquet":
                yield from _parquet(path, self.text_field)
            elif path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from _json_lines(path, self.text_field)
            elif part == "stdlib":
                with tokenize.open(path) as file:  # honours a coding cookie
                    yield file.read()
            else:
                text = _text(path, lenient=Path(part).is_dir())
                if text is None:
                    self.skipped += 1
                else:
                    yield from _pieces(text) if alone else (text,)
        if part == "stdlib":
            yield from _help_topics()


def _resolve(part: str) -> list[Path] | None:
    """The files of one source in a fixed order; None for a dataset."""
    if part.startswith(_DATASETS):
        if not part.removeprefix(_DATASETS) or part.count(":") > 3:
            raise ValueError(
                f"data.source is {part!r}: expected datasets:NAME, datasets:NAME:CONFIG or datasets:NAME:CONFIG:SPLIT."
            )
        _need("datasets", part)
        return None
    if part == "stdlib":
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
            f"data.source is {part!r}, which does not exist here: expected stdlib, a file, a folder, a glob pattern or "
            f"datasets:NAME{f' (such as datasets:{part})' if part.count('/') == 1 else ''}."
        )
    if not files:
        raise ValueError(f"data.source {part!r} holds no files: expected at least one.")
    if any(file.suffix == ".parquet" for file in files):
        _need("pyarrow", part)
    return files


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
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


def _text(path: Path, lenient: bool) -> str | None:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if lenient:
            return None
        raise ValueError(
            f"data.source file {path} is not UTF-8 at byte {error.start}: expected UTF-8 text."
        ) from None
    return None if lenient and "\0" in text else text


def _pieces(text: str) -> Iterator[str]:
    """`text` cut after blank lines into pieces of at least `_PIECE_CHARACTERS`; joined, they are `text` again."""
    start = 0
    while (blank := text.find("\n\n", start + _PIECE_CHARACTERS)) >= 0:
        yield text[start : blank + 2]
        start = blank + 2
    if start < len(text):
        yield text[start:]


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"data.source file {path}, line {number} is not JSON: {error}.") from None
            yield _field(row, text_field, f"{path}, line {number}")


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            raise _no_field(str(path), text_field, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[text_field]):
            for row in batch.to_pylist():
                yield _field(row, text_field, str(path))


def _dataset_rows(part: str, text_field: str) -> Iterator[str]:
    import datasets

    name, config, split = (*part.removeprefix(_DATASETS).split(":"), "", "")[:3]
    folder = Path(name).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(folder))
        rows = loaded[split or "train"] if isinstance(loaded, datasets.DatasetDict) else loaded
    else:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    if text_field not in (rows.column_names or ()):
        raise _no_field(part, text_field, rows.column_names or ())
    for row in rows:
        yield _field(row, text_field, part)


def _field(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict) or text_field not in row:
        raise _no_field(where, text_field, list(row) if isinstance(row, dict) else ())
    value = row[text_field]
    if not isinstance(value, str):
        raise ValueError(f"data.source {where}: {text_field!r} is {type(value).__name__}, expected text.")
    return value


def _no_field(where: str, text_field: str, names: Any) -> ValueError:
    found = ", ".join(map(str, names)) or "no fields"
    return ValueError(
        f"data.source {where} has no {text_field!r}: expected data.text_field to be one of {found}."
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
    return source if isinstance(source, str) else ", ".join(source)
