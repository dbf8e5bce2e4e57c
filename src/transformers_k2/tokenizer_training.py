"""Train a small tokenizer of Kimi K2's kind: for debug models, tests and new domains.

The pre-tokenisation pattern, the byte-level BPE and the 256 reserved ids after the ranks are Kimi's, so a
folder written here loads like one from the hub. Given up: the trainer's own list of merges. As in the hub's
file only the ranks are kept, and they alone determine the ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from .tokenization_kimi_k2 import NUM_RESERVED_TOKENS, KimiK2Tokenizer
from .tokenizer_conversion import (
    BYTE_ALPHABET,
    backend_ranks,
    build_backend,
    pre_tokenizer,
    replace_surrogates,
)

MIN_VOCAB_SIZE = 256 + NUM_RESERVED_TOKENS


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, save_directory: str | Path | None = None
) -> KimiK2Tokenizer:
    """Train byte-level BPE on `texts`. The same texts give the same tokenizer, in any order.

    Args:
        texts: the documents; no token spans two of them.
        vocab_size: all ids: 256 single bytes, merged tokens, and 256 reserved ids at the end. At least 512.
        save_directory: where to write tiktoken.model, tokenizer_config.json, tokenizer.json,
            chat_template.jinja.

    Raises:
        ValueError: `vocab_size` is below 512, `texts` is one string or holds something else than strings, or
            the texts have too few different words to give `vocab_size` ids.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: expected at least {MIN_VOCAB_SIZE} "
            f"(256 single bytes and {NUM_RESERVED_TOKENS} reserved ids)."
        )
    if isinstance(texts, str):
        raise ValueError("texts is one string: expected an iterable of strings, such as [text].")
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizer()
    num_ranks = vocab_size - NUM_RESERVED_TOKENS
    trainer = BpeTrainer(vocab_size=num_ranks, initial_alphabet=list(BYTE_ALPHABET), show_progress=False)
    trained.train_from_iterator(_checked(texts), trainer)
    ranks = backend_ranks(trained)
    if len(ranks) < num_ranks:
        raise ValueError(
            f"vocab_size {vocab_size} is too large for these texts: they give at most "
            f"{len(ranks) + NUM_RESERVED_TOKENS} ids, expected more text or a smaller vocab_size."
        )
    tokenizer = KimiK2Tokenizer(tokenizer_object=build_backend(ranks))
    if save_directory is not None:
        tokenizer.save_pretrained(save_directory)
    return tokenizer


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{number}] is {type(text).__name__}: expected a string.")
        yield replace_surrogates(text)
