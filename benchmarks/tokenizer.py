"""Seconds to encode one megabyte of Python source: KimiK2Tokenizer against tiktoken with the same ranks and pattern.

The ranks are trained here (16,384 ids); with the hub's `tiktoken.model` pass --vocab. Runs alternate; medians are compared.

    python benchmarks/tokenizer.py [--vocab tiktoken.model] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import tiktoken

from transformers_k2 import KimiK2Tokenizer, train_tokenizer
from transformers_k2.tokenizer_conversion import PATTERN, read_ranks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=Path, help="a tiktoken.model; default: train one")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in sources]
    text = "".join(texts)[:1_000_000]
    with tempfile.TemporaryDirectory() as folder:
        vocab = arguments.vocab
        if vocab is None:
            train_tokenizer(texts, 16384, folder)
            vocab = Path(folder) / "tiktoken.model"
        tokenizer = KimiK2Tokenizer(vocab_file=vocab)
        ranks = {token: rank for rank, token in enumerate(read_ranks(vocab))}
        reference = tiktoken.Encoding("k2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    kinds = {
        "transformers_k2": lambda: tokenizer.encode(text, split_special_tokens=True),
        "tiktoken": lambda: reference.encode_ordinary(text),
    }
    assert kinds["transformers_k2"]() == kinds["tiktoken"](), "the two tokenizers disagree"
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repeats):
        for kind, encode in kinds.items():
            start = time.perf_counter()
            encode()
            seconds[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    print(
        "  ".join(f"{kind} {value:.3f} s" for kind, value in medians.items())
        + f"  for {len(text):,} characters"
    )
    print(f"ratio  {medians['transformers_k2'] / medians['tiktoken']:.1f}")


if __name__ == "__main__":
    main()
