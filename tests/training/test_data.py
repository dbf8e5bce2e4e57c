"""Text in, blocks out: sources, the held-out split, packing, order, and the counted baselines."""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from transformers_k2.tokenizer_training import train_tokenizer
from transformers_k2.training import readers
from transformers_k2.training.baselines import unigram_and_bigram_loss
from transformers_k2.training.sources import Source

STDLIB = Path(json.__file__).parent


def documents(number: int = 60) -> list[str]:
    """Pieces of a real module, some of them twice."""
    lines = (STDLIB / "decoder.py").read_text(encoding="utf-8").splitlines()
    pieces = ["\n".join(lines[start : start + 5]) for start in range(0, 5 * number, 5)]
    return [*pieces, *pieces[:7]]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(), 600)


def test_counted_losses_match_a_table_written_out() -> None:
    generator = np.random.default_rng(0)
    vocab_size = 11
    training = generator.integers(0, 8, (13, 9)).astype(np.int32)  # tokens 8 to 10 never occur
    held_out = generator.integers(0, vocab_size, (5, 9)).astype(np.int32)

    counts = Counter(training[:, 1:].ravel().tolist())  # the tokens that are predicted
    kinds, total = len(counts), training[:, 1:].size
    pairs = Counter(pair for row in training.tolist() for pair in pairwise(row))

    def unigram(token: int) -> float:
        return counts[token] / (total + kinds) + kinds / (total + kinds) / vocab_size

    def bigram(previous: int, token: int) -> float:
        following = {right: number for (left, right), number in pairs.items() if left == previous}
        if not following:
            return unigram(token)
        seen, different = sum(following.values()), len(following)
        backoff = different / (seen + different)
        return (1 - backoff) * following.get(token, 0) / seen + backoff * unigram(token)

    assert math.isclose(sum(map(unigram, range(vocab_size))), 1, rel_tol=1e-12)
    for previous in (0, 9):
        assert math.isclose(sum(bigram(previous, token) for token in range(vocab_size)), 1, rel_tol=1e-12)
    wanted = [pair for row in held_out.tolist() for pair in pairwise(row)]
    expected = (
        -sum(math.log(unigram(token)) for _, token in wanted) / len(wanted),
        -sum(math.log(bigram(*pair)) for pair in wanted) / len(wanted),
    )
    counted, predicted = (
        (tokens[:, :-1].ravel().astype(np.int64), tokens[:, 1:].ravel().astype(np.int64))
        for tokens in (training, held_out)
    )
    assert unigram_and_bigram_loss(counted, predicted, vocab_size) == pytest.approx(expected, rel=1e-12)


def write_folder(root: Path) -> Path:
    (root / "deep" / ".hidden").mkdir(parents=True)
    (root / "b.txt").write_text("zwei\n", encoding="utf-8-sig")
    (root / "a.md").write_text("eins: ä\n", encoding="utf-8")
    (root / "deep" / "c.py").write_text("drei = 3\n", encoding="utf-8")
    (root / "deep" / "d.jsonl").write_text('{"text": "vier"}\n\n{"text": "fünf"}\n', encoding="utf-8")
    (root / "deep" / "empty.txt").write_text(" \n", encoding="utf-8")
    (root / "deep" / ".hidden" / "no.txt").write_text("nein", encoding="utf-8")
    (root / "image.bin").write_bytes(bytes(range(256)))
    (root / "zeros.bin").write_bytes(b"\0" * 10)
    return root


def test_a_folder_gives_its_texts_in_order_and_counts_the_rest(tmp_path: Path) -> None:
    source = Source(str(write_folder(tmp_path)))
    expected = ["eins: ä\n", "zwei\n", "drei = 3\n", "vier", "fünf"]
    assert list(source) == expected
    assert list(source) == expected  # again from the start
    assert source.skipped == 2
    assert list(Source(str(tmp_path / "**" / "*.py"))) == ["drei = 3\n"]
    assert list(Source([str(tmp_path / "b.txt"), str(tmp_path / "a.md")])) == ["zwei\n", "eins: ä\n"]
    assert list(Source(str(tmp_path), max_bytes=14)) == expected[:2]
    assert list(Source(str(tmp_path), max_bytes=13)) == expected[:1]


def test_a_single_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    text = (STDLIB / "encoder.py").read_text(encoding="utf-8")
    path = tmp_path / "one.txt"
    path.write_text(text, encoding="utf-8")
    pieces = list(Source(str(path)))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])


@pytest.mark.parametrize("size", [3, 5, 1000])
def test_a_long_text_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Letters of several bytes and blank lines that lie across two reads; the fault's place counts from the start."""
    monkeypatch.setattr(readers, "_READ_BYTES", size)
    monkeypatch.setattr(readers, "_PIECE_CHARACTERS", 4)
    path = tmp_path / "one.txt"
    text = "äöü\r\n正午です\n\nnoon 🕛\n\n\nab\n\ncdefg"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(Source(str(path))) == ["äöü\r\n正午です\n\n", "noon 🕛\n\n", "\nab\n\ncdefg"]
    path.write_bytes(text.encode() + b"\xff")
    with pytest.raises(ValueError, match=f"at byte {len(text.encode())}:"):
        list(Source(str(path)))
    path.write_bytes(text.encode() + "正".encode()[:2])
    with pytest.raises(ValueError, match=f"at byte {len(text.encode())}:"):
        list(Source(str(path)))


def test_rows_of_json_lines_parquet_and_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = ["eins", "zwei\nzeilen", "drei"]
    rows = datasets.Dataset.from_dict({"body": texts, "n": [1, 2, 3]})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "both")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in texts)
    for source, expected in (
        (str(tmp_path / "rows.parquet"), texts),
        (str(tmp_path / "rows.jsonl.gz"), texts),
        (f"datasets:{tmp_path / 'saved'}", texts),
        (f"datasets:{tmp_path / 'both'}", texts),
        (f"datasets:{tmp_path / 'both'}::test", texts[:1]),
    ):
        assert list(Source(source, text_field="body")) == expected
        with pytest.raises(ValueError, match=r"'text'.*one of .*body"):
            list(Source(source))
    with pytest.raises(ValueError, match=r"'n' is int, expected text"):
        list(Source(str(tmp_path / "rows.parquet"), text_field="n"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("no/such", r"does not exist here: expected stdlib.*such as datasets:no/such"),
        ("*.nothing", "holds no files"),
        ("datasets:", "expected datasets:NAME"),
        ([], "empty list"),
    ],
)
def test_a_source_that_cannot_be_is_refused_before_reading(source: str | list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Source(source)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"x.txt is not UTF-8 at byte 3"):
        list(Source(str(tmp_path / "x.txt")))
    with pytest.raises(ValueError, match=r"x.jsonl, line 2 is not JSON"):
        list(Source(str(tmp_path / "x.jsonl")))


def test_the_standard_library_without_tests_and_tables() -> None:
    source = Source("stdlib")
    files = source.files["stdlib"]
    assert files is not None
    names = {path.as_posix().split(f"python3.{sys.version_info.minor}/", 1)[-1] for path in files}
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= names
    assert not any(name.startswith(("test/", "site-packages/", "encodings/", "idlelib/")) for name in names)
    limited = list(Source("stdlib", max_bytes=200_000))
    assert sum(len(text.encode()) for text in limited) <= 200_000
    assert limited == list(Source("stdlib", max_bytes=200_000))
