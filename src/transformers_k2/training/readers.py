"""How each kind of file is read: text, lines of JSON, parquet and datasets, a part at a time."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DATASETS = "datasets:"

_READ_BYTES = 1 << 20
_READ_ROWS = 256
# A text file given alone is cut at the first blank line after this many characters.
_PIECE_CHARACTERS = 2000


def read_text(path: Path, lenient: bool) -> str | None:
    try:
        text = "".join(read_parts(path))
    except ValueError:
        if lenient:
            return None
        raise
    return None if lenient and "\0" in text else text


def read_parts(path: Path) -> Iterator[str]:
    """The text of a file, in parts.

    Raises:
        ValueError: it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while True:
            block = file.read(_READ_BYTES)
            first = file.tell() - len(block) - len(decoder.getstate()[0])  # of what is decoded now
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"data.source file {path} is not UTF-8 at byte {first + error.start}: expected UTF-8 text."
                ) from None
            yield text.removeprefix("\ufeff") if first == 0 else text
            if not block:
                return


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """Text cut after blank lines into pieces of at least `_PIECE_CHARACTERS`; joined, they are the text again."""
    rest = ""
    for part in parts:
        rest += part
        start = 0
        while (blank := rest.find("\n\n", start + _PIECE_CHARACTERS)) >= 0:
            yield rest[start : blank + 2]
            start = blank + 2
        rest = rest[start:]
    if rest:
        yield rest


def read_json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Each line's value and where it stands."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"data.source file {path}, line {number} is not JSON: {error}.") from None
            yield row, f"{path}, line {number}"


def read_parquet(path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    """Rows with one column, or with all."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if column is not None and column not in file.schema_arrow.names:
            raise no_field(str(path), column, file.schema_arrow.names)
        for batch in file.iter_batches(_READ_ROWS, columns=None if column is None else [column]):
            yield from batch.to_pylist()


def open_dataset(part: str) -> Any:
    import datasets

    name, config, split = (*part.removeprefix(DATASETS).split(":"), "", "")[:3]
    folder = Path(name).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(folder))
        return loaded[split or "train"] if isinstance(loaded, datasets.DatasetDict) else loaded
    return datasets.load_dataset(name, config or None, split=split or "train")


def dataset_files(part: str) -> list[Path]:
    """The Arrow files a dataset is read from; their names and times change with its content."""
    return [Path(file["filename"]) for file in open_dataset(part).cache_files]


def without_nulls(value: Any) -> Any:
    """`value` without members that are None: in columns a row has the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def text_of(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict) or text_field not in row:
        raise no_field(where, text_field, list(row) if isinstance(row, dict) else ())
    value = row[text_field]
    if not isinstance(value, str):
        raise ValueError(f"data.source {where}: {text_field!r} is {type(value).__name__}, expected text.")
    return value


def no_field(where: str, text_field: str, names: Any) -> ValueError:
    found = ", ".join(map(str, names)) or "no fields"
    return ValueError(
        f"data.source {where} has no {text_field!r}: expected data.text_field to be one of {found}."
    )
