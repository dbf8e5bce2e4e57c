"""Training rows out of a token cache: row i of an endless run, for any i, from the seed and i alone.

| class | a row is | attention |
|---|---|---|
| `JoinedRows` | the next `sequence_length` tokens of all documents, one after the other | crosses borders |
| `PackedRows` | whole documents, as many as fit | each document by itself, by `position_ids` that restart |
| `UnpackedRows` | one document, padded on the right, with an `attention_mask` | the document |
| `Mixture` | a row of one of several of these, by weight | as there |

`PackedRows` rely on transformers' masks: sequences are told apart by positions that restart, if there is neither an
attention mask nor a cache. So the model must run with `use_cache=False` (Trainer's default): with a cache transformers
lets attention cross the borders and says nothing; flash attention does so in batches of more than one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from .order import Shares, shuffled
from .packing import Longer, Plan, plan
from .token_cache import TokenCache

Row = dict[str, torch.Tensor]
IGNORED = -100  # the label that no loss counts


class Rows(Protocol):
    """What a run reads. `len(rows)`: the rows of one pass; `row(i)`, i >= 0: row i of endless passes."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Tensors of int64, each [sequence_length]: `input_ids`, `labels` and what else the model needs."""
        ...


class _CacheRows(Dataset, ABC):
    """Rows of one cache: passes over all of them, each shuffled anew, or in order."""

    def __init__(self, cache: TokenCache, num_rows: int, seed: int, shuffle: bool) -> None:
        self.cache, self.num_rows, self.seed, self.shuffle = cache, num_rows, seed, shuffle

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        return self.row(index)

    def row(self, index: int) -> Row:
        """Row `index` of the run; any index from 0."""
        if self.shuffle:
            return self._row(shuffled(index, self.num_rows, self.seed))
        return self._row(index % self.num_rows)

    @abstractmethod
    def _row(self, number: int) -> Row:
        """Row `number` of the source, in its own order."""


class JoinedRows(_CacheRows):
    """Documents one after the other, cut into rows; `labels` are the `input_ids` (the model shifts them).

    Rows neither overlap nor leave gaps; the last tokens that do not fill a row are unused. Tokens that a cache's loss
    mask leaves out have label -100.
    """

    def __init__(
        self,
        cache: TokenCache,
        documents: np.ndarray,
        sequence_length: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """`documents`: their numbers, int64, ascending. Raises ValueError if they do not fill one row."""
        # Documents that lie one after the other in the file are one stretch: held-out ones are the only gaps.
        breaks = np.flatnonzero(np.diff(documents) != 1) + 1
        first = documents[np.concatenate(([0], breaks)).astype(np.int64)] if len(documents) else documents
        last = (
            documents[np.concatenate((breaks, [len(documents)])).astype(np.int64) - 1]
            if len(documents)
            else documents
        )
        self._starts = cache.offsets[first]
        self._ends = np.cumsum(cache.offsets[last + 1] - self._starts)  # in the joined stream
        self.num_tokens = int(self._ends[-1]) if len(documents) else 0
        self.sequence_length = sequence_length
        if self.num_tokens < sequence_length:
            raise ValueError(
                f"The text has {self.num_tokens} tokens, less than data.sequence_length {sequence_length}: expected at "
                "least one sequence; use more text, another data.held_out_share or a shorter sequence."
            )
        super().__init__(cache, self.num_tokens // sequence_length, seed, shuffle)

    def _row(self, number: int) -> Row:
        start, stop = number * self.sequence_length, (number + 1) * self.sequence_length
        ids = self._slice(self.cache.ids, start, stop)
        labels = ids.copy()
        if self.cache.loss is not None:
            labels[self._slice(self.cache.loss, start, stop) == 0] = IGNORED
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def _slice(self, values: np.ndarray, start: int, stop: int) -> np.ndarray:
        """`values[start:stop]` of the joined stream, as int64."""
        result = np.empty(stop - start, np.int64)
        done, stretch = 0, int(np.searchsorted(self._ends, start, side="right"))
        while done < len(result):
            left = int(self._ends[stretch]) - (start + done)
            end = int(self._starts[stretch]) + self._length(stretch)
            size = min(left, len(result) - done)
            result[done : done + size] = values[end - left : end - left + size]
            done, stretch = done + size, stretch + 1
        return result

    def _length(self, stretch: int) -> int:
        return int(self._ends[stretch] - (self._ends[stretch - 1] if stretch else 0))


class _PlannedRows(_CacheRows):
    """Rows of whole documents."""

    packed: ClassVar[bool]

    def __init__(
        self,
        cache: TokenCache,
        documents: np.ndarray,
        sequence_length: int,
        seed: int = 0,
        shuffle: bool = True,
        longer: Longer = "cut",
    ) -> None:
        """`documents` and `longer`: see `packing.plan`, also for the errors."""
        self.sequence_length = sequence_length
        self.plan: Plan = plan(cache, documents, sequence_length, self.packed, longer=longer)
        super().__init__(cache, self.plan.num_rows, seed, shuffle)

    @property
    def fill(self) -> float:
        """The share of places that hold a token and not padding."""
        return self.plan.fill(self.sequence_length)


class PackedRows(_PlannedRows):
    """Whole documents in a row, apart from each other: `position_ids` restart at each.

    Labels are -100 at a document's first token, which nothing predicts, and in the rest of the row that no document
    fills, which is a sequence of its own. Pieces without a token to learn are left out.
    """

    packed = True

    def _row(self, number: int) -> Row:
        ids, labels, positions, _ = _lay_out(self.cache, self.plan, number, self.sequence_length)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }


class UnpackedRows(_PlannedRows):
    """One document in a row, padded on the right; the same documents, pieces and labels as `PackedRows`."""

    packed = False

    def _row(self, number: int) -> Row:
        ids, labels, _, size = _lay_out(self.cache, self.plan, number, self.sequence_length)
        mask = (np.arange(self.sequence_length) < size).astype(np.int64)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy(mask),
        }


def _lay_out(
    cache: TokenCache, rows: Plan, number: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Ids, labels and positions, each int64 [length], and how many places are filled."""
    pieces = slice(int(rows.rows[number]), int(rows.rows[number + 1]))
    sizes = rows.lengths[pieces]
    ends = np.cumsum(sizes)
    begins, size = ends - sizes, int(ends[-1])
    places = np.arange(length)
    source = np.repeat(rows.starts[pieces] - begins, sizes) + places[:size]
    ids = np.full(length, cache.meta.pad_token_id, np.int64)
    ids[:size] = cache.ids[source]
    labels = np.full(length, IGNORED, np.int64)
    labels[:size] = ids[:size] if cache.loss is None else np.where(cache.loss[source], ids[:size], IGNORED)
    labels[begins] = IGNORED
    positions = places - size
    positions[:size] = places[:size] - np.repeat(begins, sizes)
    return ids, labels, positions, size


class Mixture(Dataset):
    """Rows of several sources, in every stretch of the run as many of each as its weight says.

    The shares are of rows. Each source has its own passes. One pass of the mixture, `len`, is a run in which every source
    has been read to its end.
    """

    def __init__(self, rows: Sequence[Rows], weights: Sequence[float]) -> None:
        """Raises ValueError if there is not one positive weight for each source."""
        if len(rows) != len(weights):
            raise ValueError(
                f"There are {len(weights)} weights for {len(rows)} sources: expected one for each."
            )
        self.rows = list(rows)
        self.shares = Shares(weights)

    def __len__(self) -> int:
        # A source's share is late by less than one row for each of the fewer than len(rows) halvings above it.
        return max(
            int(-(-(len(rows) + len(self.rows)) // share))
            for rows, share in zip(self.rows, self.shares.shares, strict=True)
        )

    def __getitem__(self, index: int) -> Row:
        return self.row(index)

    def row(self, index: int) -> Row:
        """Row `index` of the run; any index from 0."""
        source, place = self.shares.locate(index)
        return self.rows[source].row(place)


def spread(num_rows: int, count: int) -> list[int]:
    """`count` of the numbers below `num_rows`, evenly spread; all of them if there are no more."""
    count = min(count, num_rows)
    return [place * (num_rows - 1) // max(count - 1, 1) for place in range(count)]


def collate(rows: Sequence[Row]) -> Row:
    """A batch: tensors of int64 [rows, sequence_length]."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def predicted_pairs(rows: Rows, numbers: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows with these numbers: the tokens that a loss counts, and the ones in front of them.

    Returns:
        Previous and predicted tokens, int64 [pairs] each.
    """
    previous, predicted = [], []
    for row in map(rows.row, numbers):
        labels = row["labels"][1:]
        counted = labels != IGNORED
        previous.append(row["input_ids"][:-1][counted])
        predicted.append(labels[counted])
    return torch.cat(previous).numpy(), torch.cat(predicted).numpy()
