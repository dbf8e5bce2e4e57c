"""Which documents share a row: whole documents packed into rows of one length, planned once and kept beside the cache.

Best fit, longest first, among some thousands of documents at a time: rows are filled to 99 % and more wherever short
documents exist, in one pass over the lengths. Documents longer than a row are cut. What it gives up: documents meet
only those near them in the source, always the same ones; as attention keeps them apart, this is of no consequence.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .once import build_once
from .token_cache import TokenCache

_WINDOW = 8192  # documents packed together

Longer = Literal["cut", "drop"]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the items in each row: every item once, no row longer than `capacity`.

    Items are placed longest first, each into the fullest row that has room (best-fit decreasing).
    """
    rows: list[list[int]] = []
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # open rows by the room they have left
    rooms = 0  # bit r is set where by_room[r] holds a row
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        assert 0 < length <= capacity
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(item)
        if room > length:
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


@dataclass(frozen=True)
class Plan:
    """Rows as pieces of a cache: row r is pieces `rows[r]` to `rows[r + 1]`."""

    folder: Path
    starts: np.ndarray  # int64 [pieces], into the cache's ids
    lengths: np.ndarray  # int64 [pieces]
    rows: np.ndarray  # int64 [rows + 1]

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files again instead of receiving their content."""
        return _read, (self.folder,)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.rows) - 1

    def fill(self, capacity: int) -> float:
        """The share of all rows' places that hold a token."""
        return float(self.lengths.sum()) / (self.num_rows * capacity)


def plan(cache: TokenCache, documents: np.ndarray, capacity: int, packed: bool, longer: Longer) -> Plan:
    """The plan for these documents, made once and kept in the cache's folder.

    Args:
        documents: their numbers, int64, ascending.
        packed: several documents to a row; else one piece to a row.
        longer: what becomes of documents longer than a row: cut into pieces, or left out.

    Raises:
        ValueError: no document has a token to learn that fits.
    """
    key = hashlib.blake2b(documents.astype(np.int64).tobytes(), digest_size=8)
    key.update(f"{capacity} {packed} {longer}".encode())

    def build(folder: Path) -> None:
        num_pieces = 0
        with (
            (folder / "starts.bin").open("wb") as starts,
            (folder / "lengths.bin").open("wb") as lengths,
            (folder / "rows.bin").open("wb") as rows,
        ):
            rows.write(array("q", [0]))
            for first in range(0, len(documents), _WINDOW):
                window = _pieces(cache, documents[first : first + _WINDOW], capacity, longer)
                sizes = window[1].tolist()
                packing = pack(sizes, capacity) if packed else [[item] for item in range(len(sizes))]
                order = [item for row in packing for item in row]
                starts.write(window[0][order].tobytes())
                lengths.write(window[1][order].tobytes())
                rows.write((num_pieces + np.cumsum([len(row) for row in packing], dtype=np.int64)).tobytes())
                num_pieces += len(sizes)

    made = build_once(cache.folder / f"rows-{key.hexdigest()}", _read, build)
    if made.num_rows == 0:
        raise ValueError(
            f"None of {len(documents)} documents gives a row of data.sequence_length {capacity}: expected one with two "
            f"tokens or more, some of them to learn{' and no longer than a row' if longer == 'drop' else ''}."
        )
    return made


def _read(folder: Path) -> Plan:
    paths = [folder / f"{name}.bin" for name in ("starts", "lengths", "rows")]
    if not all(path.is_file() for path in paths):
        raise ValueError(f"{folder} is no packing plan: expected {', '.join(path.name for path in paths)}.")
    starts, lengths, rows = (
        np.asarray(np.memmap(path, np.int64, "r")) if path.stat().st_size else np.empty(0, np.int64)
        for path in paths
    )
    if len(rows) == 0 or not len(starts) == len(lengths) == rows[-1]:
        raise ValueError(f"{folder} is damaged: its files disagree on the number of pieces.")
    return Plan(folder, starts, lengths, rows)


def _pieces(
    cache: TokenCache, documents: np.ndarray, capacity: int, longer: Longer
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the pieces with something to learn; a piece's first token is never predicted."""
    first, sizes = cache.offsets[documents], cache.offsets[documents + 1] - cache.offsets[documents]
    if longer == "drop":
        first, sizes = first[sizes <= capacity], sizes[sizes <= capacity]
    counts = -(-sizes // capacity)
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(first, counts) + numbers * capacity
    lengths = np.minimum(np.repeat(sizes, counts) - numbers * capacity, capacity)
    useful = lengths > 1
    if (loss := cache.loss) is not None:
        spans: Iterator[tuple[int, int]] = zip(starts.tolist(), lengths.tolist(), strict=True)
        useful &= np.fromiter(
            (bool(loss[start + 1 : start + size].any()) for start, size in spans), bool, len(starts)
        )
    return starts[useful], lengths[useful]
