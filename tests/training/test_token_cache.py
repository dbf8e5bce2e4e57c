"""The token cache: its content against plain tokenisation, its split against sorting, killed and crowded builds."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from transformers_k2 import KimiK2Tokenizer
from transformers_k2.tokenizer_training import train_tokenizer
from transformers_k2.training.sources import Source
from transformers_k2.training.token_cache import (
    TokenCache,
    build_cache,
    encode_texts,
    fingerprint,
    hash_texts,
    held_out_mask,
    kept,
    split,
    tokenizer_identity,
)

STDLIB = Path(json.__file__).parent


def texts() -> list[str]:
    lines = (STDLIB / "decoder.py").read_text(encoding="utf-8").splitlines()
    pieces = ["\n".join(lines[start : start + 5]) for start in range(0, 300, 5)]
    return [*pieces, "naïve 中文 [EOS]", "x", *pieces[:7]]


@pytest.fixture(scope="module")
def tokenizer() -> KimiK2Tokenizer:
    return train_tokenizer(texts(), 600)


def build(documents, tokenizer, folder: Path, seed: int = 0, progress=None) -> TokenCache:
    return build_cache(
        documents, lambda batch: encode_texts(batch, tokenizer), tokenizer, folder, seed, progress
    )


def test_ids_are_those_of_each_text_and_eos(tokenizer, tmp_path: Path) -> None:
    done: list[int] = []
    cache = build(iter(texts()), tokenizer, tmp_path / "a", progress=done.append)
    expected = [
        [*tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), tokenizer.eos_token_id]
        for text in texts()
    ]
    assert cache.num_documents == len(expected)
    assert [cache.tokens(number).tolist() for number in range(len(expected))] == expected
    assert cache.ids.tolist() == list(chain.from_iterable(expected))
    assert cache.num_tokens == sum(map(len, expected))
    assert cache.ids.dtype == np.uint16
    assert cache.num_bytes.tolist() == [len(text.encode()) for text in texts()]
    assert sum(done) == sum(cache.num_bytes)
    assert cache.loss is None
    again = pickle.loads(pickle.dumps(cache))
    assert again.ids.tolist() == cache.ids.tolist()
    assert len(pickle.dumps(cache)) < 500  # a path, not the tokens


def test_large_vocabularies_take_more_bytes(tokenizer, tmp_path: Path) -> None:
    wide = train_tokenizer(texts(), 600)
    wide.add_tokens([f"extra{number}" for number in range(66_000)])
    cache = build(["extra65999 extra0"], wide, tmp_path / "wide")
    assert cache.ids.dtype == np.int32
    assert cache.ids.max() > 1 << 16


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.97])
def test_the_split_is_that_of_sorted_hashes(tokenizer, tmp_path: Path, share: float) -> None:
    for seed in (0, 7):
        cache = build(texts(), tokenizer, tmp_path / str(seed), seed)
        digests = [
            hashlib.blake2b(text.encode(), digest_size=16, salt=seed.to_bytes(16, "big")).digest()
            for text in texts()
        ]
        bound = sorted(digests)[max(1, round(share * len(digests))) - 1]
        training, held_out = split(cache, share)
        assert held_out.tolist() == [number for number, digest in enumerate(digests) if digest <= bound]
        assert sorted([*training, *held_out]) == list(range(len(digests)))
        mask = held_out_mask(hash_texts(texts(), seed), share)
        assert np.flatnonzero(mask).tolist() == held_out.tolist()
        assert list(kept(iter(texts()), ~mask)) == [texts()[number] for number in training]


def test_ties_in_the_first_half_of_a_hash_are_broken_by_the_second() -> None:
    hashes = np.zeros((6, 16), np.uint8)
    hashes[:, 15] = [5, 3, 9, 3, 200, 1]
    assert np.flatnonzero(held_out_mask(hashes, 0.5)).tolist() == [1, 3, 5]
    hashes[:, 0] = [255, 0, 128, 0, 127, 254]  # unsigned, the most significant first
    assert np.flatnonzero(held_out_mask(hashes, 0.5)).tolist() == [1, 3, 4]


def test_both_sides_have_documents() -> None:
    mask = held_out_mask(hash_texts(["a", "b", "b", "b"], 0), 0.9)
    assert 0 < mask.sum() < 4
    for few in ([], ["a"], ["a", "a"]):
        with pytest.raises(ValueError, match=f"gives {len(few)} documents, {min(len(few), 1)} different"):
            held_out_mask(hash_texts(few, 0), 0.5)
    with pytest.raises(ValueError, match="another number"):
        list(kept(["a"], np.array([True, True])))
    with pytest.raises(ValueError, match="another number"):
        list(kept(["a", "b"], np.array([True])))


def test_a_complete_cache_is_not_built_again(tokenizer, tmp_path: Path) -> None:
    def never() -> Iterator[str]:
        raise AssertionError("read although the cache is complete")
        yield

    first = build(texts(), tokenizer, tmp_path / "a")
    assert build(never(), tokenizer, tmp_path / "a").ids.tolist() == first.ids.tolist()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ids.bin", lambda data: data[:-1], "ids.bin has"),
        ("offsets.bin", lambda data: data[8:], "offsets.bin has"),
        ("offsets.bin", lambda data: data[:-8] + bytes(8), "does not belong"),
        ("hashes.bin", lambda data: None, "hashes.bin has 0 bytes"),
        ("meta.json", lambda data: data[:20], "not a token cache's"),
        ("meta.json", lambda data: None, "missing"),
        ("meta.json", lambda data: data.replace(b'"version": 1', b'"version": 0'), "version 0"),
    ],
)
def test_damage_is_told_and_mended(tokenizer, tmp_path: Path, name: str, damage, message: str) -> None:
    folder = tmp_path / "a"
    whole = build(texts(), tokenizer, folder).ids.tolist()
    data = damage((folder / name).read_bytes())
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        TokenCache(folder)
    assert build(texts(), tokenizer, folder).ids.tolist() == whole


def test_a_failed_build_leaves_nothing(tokenizer, tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield from texts()
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        build(failing(), tokenizer, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]


def _slow_build(folder: Path, results, delay: float) -> None:
    tokenizer = KimiK2Tokenizer.from_pretrained(folder.parent / "tokenizer")

    def slowly() -> Iterator[str]:
        results.put(("reads", os.getpid()))
        for text in texts():
            time.sleep(delay)
            yield text

    cache = build(slowly(), tokenizer, folder)
    results.put(("tokens", cache.num_tokens))


def test_killed_and_crowded_builds(tokenizer, tmp_path: Path) -> None:
    """A killed build leaves no cache; of three that ask at once, one reads the text and all get the tokens."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    context = multiprocessing.get_context("fork")
    folder = tmp_path / "a"
    started, results = context.Queue(), context.Queue()  # the killed one may die holding its queue's lock
    victim = context.Process(target=_slow_build, args=(folder, started, 60))
    victim.start()
    assert started.get(timeout=20)[0] == "reads"
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert not folder.exists()
    assert (tmp_path / ".a.partial").exists()
    crowd = [context.Process(target=_slow_build, args=(folder, results, 0.005)) for _ in range(3)]
    for process in crowd:
        process.start()
    told = [results.get(timeout=20) for _ in range(4)]
    for process in crowd:
        process.join()
    assert [kind for kind, _ in told].count("reads") == 1
    tokens = {value for kind, value in told if kind == "tokens"}
    assert tokens == {build(texts(), tokenizer, tmp_path / "b").num_tokens}
    assert not (tmp_path / ".a.partial").exists()


def test_the_fingerprint_follows_files_tokenizer_and_settings(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one\n", encoding="utf-8")

    def name(settings: object = 0, source: str = str(tmp_path), model: KimiK2Tokenizer = tokenizer) -> str:
        return fingerprint(Source(source).identity(), tokenizer_identity(model), settings)

    first = name()
    assert name() == first
    other = train_tokenizer(texts(), 601)
    chat = train_tokenizer(texts(), 600)
    assert name(model=chat) == first
    chat.chat_template = "thinking"
    names = [first, name(1), name(model=other), name(model=chat), name(source=str(path))]
    path.write_text("two\n", encoding="utf-8")
    os.utime(path, ns=(1, 1))
    names.append(name())
    (tmp_path / "y.txt").write_text("more", encoding="utf-8")
    names.append(name())
    assert len(set(names)) == 7
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        tokenizer_identity(object())  # type: ignore[arg-type]
