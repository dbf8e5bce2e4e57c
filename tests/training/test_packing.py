"""Rows: joined ones are plain concatenation, and a packed row gives the numbers that its documents give alone."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.training.packing import pack
from transformers_k2.training.rows import (
    JoinedRows,
    Mixture,
    PackedRows,
    UnpackedRows,
    collate,
    predicted_pairs,
    spread,
)
from transformers_k2.training.token_cache import Document, TokenCache, build_cache


class _Vocabulary:
    """As much of a tokenizer as a cache of ready ids needs."""

    eos_token_id, pad_token_id = 2, 0

    def __len__(self) -> int:
        return 331


def make_cache(folder: Path, lengths: list[int], with_loss: bool = False, seed: int = 0) -> TokenCache:
    generator = np.random.default_rng(seed)

    def encode(batch: list[int]) -> list[Document]:
        documents = []
        for length in batch:
            ids = [*generator.integers(3, 331, length - 1).tolist(), 2]
            loss = (generator.random(length) < 0.6).astype(int).tolist() if with_loss else None
            documents.append(Document(ids, str(ids).encode(), length, loss))
        return documents

    return build_cache(lengths, encode, _Vocabulary(), folder, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("with_loss", [False, True])
def test_joined_rows_are_the_documents_one_after_the_other(tmp_path: Path, with_loss: bool) -> None:
    lengths = [5, 1, 30, 7, 2, 2, 40, 3]
    cache = make_cache(tmp_path / "a", lengths, with_loss)
    for documents in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 3, 6], [1, 4, 5, 7], [6]):
        stream = [int(token) for number in documents for token in cache.tokens(number)]
        wanted = stream
        if cache.loss is not None:
            places = [
                place
                for number in documents
                for place in range(cache.offsets[number], cache.offsets[number + 1])
            ]
            wanted = [int(cache.ids[place]) if cache.loss[place] else -100 for place in places]
        for length in (1, 7, 8):
            rows = JoinedRows(cache, np.array(documents), length, shuffle=False)
            assert len(rows) == len(stream) // length
            ids = [token for number in range(len(rows)) for token in rows[number]["input_ids"].tolist()]
            labels = [token for number in range(len(rows)) for token in rows[number]["labels"].tolist()]
            assert ids == stream[: len(rows) * length]
            assert labels == wanted[: len(rows) * length]
            shuffled = JoinedRows(cache, np.array(documents), length, seed=3)
            seen = Counter(tuple(shuffled[number]["input_ids"].tolist()) for number in range(2 * len(rows)))
            assert seen == Counter(
                tuple(rows[n]["input_ids"].tolist()) for n in range(len(rows)) for _ in "ab"
            )
            if length > 1:
                pairs = zip(
                    *(tokens.tolist() for tokens in predicted_pairs(shuffled, range(len(shuffled)))),
                    strict=True,
                )
                own = [
                    (ids[place - 1], labels[place])
                    for place in range(len(labels))
                    if place % length and labels[place] != -100
                ]
                assert sorted(pairs) == sorted(own)
    for none in (np.array([1]), np.array([], np.int64)):
        with pytest.raises(ValueError, match=r"less than data\.sequence_length 2"):
            JoinedRows(cache, none, 2)


def test_best_fit_is_that_of_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    for capacity in (1, 10, 300):
        lengths = np.minimum(generator.geometric(4 / capacity if capacity > 4 else 1, 400), capacity).tolist()
        rows = pack(lengths, capacity)
        room: list[int] = []
        for length in sorted(lengths, reverse=True):
            fitting = [place for place in range(len(room)) if room[place] >= length]
            if fitting:
                room[min(fitting, key=lambda place: room[place])] -= length
            else:
                room.append(capacity - length)
        assert sorted(item for row in rows for item in row) == list(range(400))
        assert sorted(sum(lengths[item] for item in row) for row in rows) == sorted(
            capacity - r for r in room
        )
        assert len(rows) <= 1.05 * sum(lengths) / capacity + 1


def documents_of(rows: PackedRows, number: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each sequence in a row, by its positions alone."""
    row = rows[number]
    positions = row["position_ids"].tolist()
    borders = [place for place, position in enumerate(positions) if position == 0] + [len(positions)]
    for start, stop in pairwise(borders):
        assert positions[start:stop] == list(range(stop - start))
    return [(row["input_ids"][a:b].tolist(), row["labels"][a:b].tolist()) for a, b in pairwise(borders)]


@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize("longer", ["cut", "drop"])
def test_packed_rows_hold_every_piece_once(tmp_path: Path, with_loss: bool, longer) -> None:
    length = 16
    lengths = [3, 16, 17, 50, 2, 1, 9, 9, 5, 33, 16]
    cache = make_cache(tmp_path / "a", lengths, with_loss)
    chosen = np.array([0, 1, 2, 3, 4, 5, 7, 8, 9])
    expected = []
    for number in chosen:
        begin, end = int(cache.offsets[number]), int(cache.offsets[number + 1])
        if longer == "drop" and end - begin > length:
            continue
        for start in range(begin, end, length):
            places = range(start, min(start + length, end))
            labels = [-100] + [int(cache.ids[p]) for p in places[1:]]
            if cache.loss is not None:
                labels = [a if cache.loss[p] else -100 for a, p in zip(labels, places, strict=True)]
            if any(label != -100 for label in labels):
                expected.append(([int(cache.ids[p]) for p in places], labels))
    rows = PackedRows(cache, chosen, length, seed=1, longer=longer)
    found = [piece for number in range(len(rows)) for piece in documents_of(rows, number)]
    padding = [piece for piece in found if set(piece[1]) == {-100}]
    assert sorted(piece for piece in found if piece not in padding) == sorted(expected)
    assert all(set(ids) == {0} for ids, _ in padding)
    filled = sum(len(ids) for ids, _ in expected)
    assert rows.fill == pytest.approx(filled / (len(rows) * length), rel=1e-12)
    assert filled + sum(len(ids) for ids, _ in padding) == len(rows) * length

    alone = UnpackedRows(cache, chosen, length, seed=1, longer=longer)
    singles = []
    for number in range(len(alone)):
        size = int(alone[number]["attention_mask"].sum())
        assert alone[number]["attention_mask"].tolist() == [1] * size + [0] * (length - size)
        assert set(alone[number]["labels"][size:].tolist()) <= {-100}
        singles.append((alone[number]["input_ids"][:size].tolist(), alone[number]["labels"][:size].tolist()))
    assert sorted(singles) == sorted(expected)
    again = pickle.loads(pickle.dumps(rows))
    assert torch.equal(again[5]["input_ids"], rows[5]["input_ids"])
    with pytest.raises(ValueError, match="None of 1 documents"):
        PackedRows(cache, np.array([5]), length)


def token_losses(
    model: KimiK2ForCausalLM, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the loss of each label: [batch, length], zero where the label is -100."""
    logits = model(
        **{key: value for key, value in batch.items() if key != "labels"}, use_cache=False
    ).logits.float()
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return logits, F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)


@pytest.mark.parametrize(
    ("implementation", "kind"),
    [
        ("sdpa", "packed"),
        ("eager", "packed"),
        ("sdpa", "unpacked"),
        ("eager", "unpacked"),
    ],
)
def test_a_packed_row_equals_its_documents_alone(
    tiny_model: KimiK2ForCausalLM, tmp_path: Path, implementation: str, kind: str
) -> None:
    """Logits, the loss of every token and the gradients of all parameters, in a batch of rows with awkward documents."""
    tiny_model.set_attn_implementation(implementation)
    length = 24
    lengths = [24, 9, 9, 6, 2, 13, 55, 3, 20, 2, 2]  # a full row, a cut document, two-token ones, padding
    cache = make_cache(tmp_path / "a", lengths, with_loss=True)
    numbers = np.arange(len(lengths))
    packed = PackedRows(cache, numbers, length, shuffle=False)
    rows = UnpackedRows(cache, numbers, length, shuffle=False) if kind == "unpacked" else packed
    assert len(packed) > 2
    assert max(len(documents_of(packed, number)) for number in range(len(packed))) > 2
    batch = collate([rows.row(number) for number in range(len(rows))])
    logits, losses = token_losses(tiny_model, batch)
    losses.sum().backward()
    gradients = {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}
    tiny_model.zero_grad()

    sequences = []
    for row in range(len(batch["input_ids"])):
        if kind == "unpacked":
            borders = [0, int(batch["attention_mask"][row].sum())]
        else:
            positions = batch["position_ids"][row]
            borders = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        sequences += [(row, start, stop) for start, stop in pairwise(borders)]
    total = torch.zeros(())
    for row, start, stop in sequences:
        alone = {key: batch[key][row : row + 1, start:stop] for key in ("input_ids", "labels")}
        own_logits, own_losses = token_losses(tiny_model, alone)
        torch.testing.assert_close(logits[row, start:stop], own_logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses[row, start:stop], own_losses[0], rtol=1e-5, atol=1e-5)
        total = total + own_losses.sum()
    total.backward()
    assert len(gradients) > 20
    for name, parameter in tiny_model.named_parameters():
        if parameter.grad is None:
            assert name not in gradients
            continue
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            gradients[name],
            parameter.grad,
            rtol=1e-4,
            atol=1e-5 * scale + 1e-7,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_with_a_cache_transformers_lets_attention_cross_the_borders(
    tiny_model: KimiK2ForCausalLM, tmp_path: Path
) -> None:
    """The trap that rows.py warns of. If this fails, upstream has closed it and the warning may go."""
    cache = make_cache(tmp_path / "a", [8, 8, 8])
    row = collate([PackedRows(cache, np.arange(3), 24)[0]])
    inputs = {key: row[key] for key in ("input_ids", "position_ids")}
    apart = tiny_model(**inputs, use_cache=False).logits
    crossing = tiny_model(**inputs, use_cache=True).logits
    assert (apart[0, :8] - crossing[0, :8]).abs().max() < 1e-5
    assert (apart[0, 8:] - crossing[0, 8:]).abs().max() > 1e-2


def test_a_mixture_reads_its_sources_in_their_own_order(tmp_path: Path) -> None:
    first = JoinedRows(make_cache(tmp_path / "a", [40] * 3, seed=1), np.arange(3), 8, seed=1)
    second = JoinedRows(make_cache(tmp_path / "b", [40] * 9, seed=2), np.arange(9), 8, seed=2)
    mixture = Mixture([first, second], [0.25, 0.75])
    assert len(mixture) >= 60
    parts: list[list[list[int]]] = [[], []]
    own = {tuple(first[number]["input_ids"].tolist()) for number in range(len(first))}
    for number in range(len(mixture)):
        ids = mixture[number]["input_ids"].tolist()
        parts[tuple(ids) not in own].append(ids)
    assert [len(parts[0]) / len(mixture), len(parts[1]) / len(mixture)] == pytest.approx(
        [0.25, 0.75], abs=0.02
    )
    for part, rows in zip(parts, (first, second), strict=True):
        assert part == [rows.row(number)["input_ids"].tolist() for number in range(len(part))]
        assert len(part) >= len(rows)  # each read to its end
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        Mixture([first, second], [1])


def test_far_rows_of_a_run_are_rows_like_others(tmp_path: Path) -> None:
    rows = PackedRows(make_cache(tmp_path / "a", [9, 7, 5, 12, 3, 8, 8]), np.arange(7), 16, seed=4)
    one_pass = [rows.row(number)["input_ids"].tolist() for number in range(len(rows))]
    for first in (len(rows), 2_400_000_000 * len(rows)):
        later = [rows.row(first + number)["input_ids"].tolist() for number in range(len(rows))]
        assert sorted(later) == sorted(one_pass)


def test_evaluation_rows_are_spread_and_different() -> None:
    assert spread(100, 7) == [0, 16, 33, 49, 66, 82, 99]
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(5, 1) == [0]
