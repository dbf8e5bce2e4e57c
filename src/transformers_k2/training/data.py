"""From documents to fixed-length blocks of token ids: split, train the tokenizer, tokenise, pack, order.

Documents are held out by a hash of their text, so a document and its duplicates are always on the same side. The
training documents are concatenated, each followed by EOS, and cut into blocks; attention crosses document borders
inside a block, as in most pre-training. What it gives up: the text and its ids (int32) are held in memory, which is
right up to a few GB.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

_TOKENIZE_BATCH = 16

Progress = Callable[[int], None]


def split_documents(
    documents: Iterable[str], held_out_share: float, seed: int
) -> tuple[list[str], list[str]]:
    """Training and held-out documents, each in the given order.

    The documents with the smallest hashes of seed and text are held out: `held_out_share` of them, at least one.

    Raises:
        ValueError: fewer than two different documents.
    """
    documents = list(documents)
    hashes = [
        hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=16, salt=seed.to_bytes(16, "big")
        ).digest()
        for text in documents
    ]
    if len(set(hashes)) < 2:
        raise ValueError(
            f"data.source gives {len(documents)} documents, {len(set(hashes))} different: expected at least two, one "
            "to train on and one to hold out."
        )
    count = max(1, round(held_out_share * len(documents)))
    threshold = sorted(hashes)[count - 1]
    if threshold == max(hashes):  # duplicates filled the whole of it
        threshold = min(hashes)
    training = [text for text, digest in zip(documents, hashes, strict=True) if digest > threshold]
    held_out = [text for text, digest in zip(documents, hashes, strict=True) if digest <= threshold]
    return training, held_out


def tokenize(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> np.ndarray:
    """All documents as one stream of ids, each document followed by EOS: int32 [tokens].

    Text that spells a special token is tokenised as plain text. The tokenizer must have an EOS token.
    """
    streams = []
    for start in range(0, len(documents), _TOKENIZE_BATCH):
        batch = list(documents[start : start + _TOKENIZE_BATCH])
        encoded = tokenizer(
            batch, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        streams += [
            np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded["input_ids"]
        ]
        if progress:
            progress(sum(map(num_bytes, batch)))
    return np.concatenate(streams) if streams else np.empty(0, dtype=np.int32)


def num_bytes(text: str) -> int:
    """The length of `text` in UTF-8."""
    return len(text.encode("utf-8", "replace"))


def block_order(num_blocks: int, num_wanted: int, seed: int) -> np.ndarray:
    """Which block comes when: shuffled passes over all blocks, each pass in another order; int64 [num_wanted]."""
    passes = math.ceil(num_wanted / num_blocks)
    shuffles = [np.random.default_rng([seed, number]).permutation(num_blocks) for number in range(passes)]
    return np.concatenate(shuffles)[:num_wanted]


@dataclass(frozen=True)
class TokenBlocks(Dataset):
    """A map-style dataset of consecutive blocks of one token stream.

    Item `i` is block `order[i]`: `input_ids` and `labels`, both int64 [sequence_length] and equal; the model shifts the
    labels itself. Blocks neither overlap nor leave gaps; the last `len(tokens) % sequence_length` tokens are unused.
    """

    tokens: np.ndarray  # int32 [tokens]
    sequence_length: int
    order: np.ndarray  # int64 [items]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self.order[index]) * self.sequence_length
        ids = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def matrix(self) -> np.ndarray:
        """The distinct blocks that the dataset holds, in stream order: int32 [blocks, sequence_length]."""
        blocks = self.tokens[: len(self.tokens) // self.sequence_length * self.sequence_length]
        return blocks.reshape(-1, self.sequence_length)[np.unique(self.order)]


def training_blocks(tokens: np.ndarray, sequence_length: int, num_wanted: int, seed: int) -> TokenBlocks:
    """`num_wanted` shuffled blocks, in as many passes as that takes.

    Raises:
        ValueError: `tokens` do not fill one block.
    """
    num_blocks = len(tokens) // sequence_length
    if num_blocks == 0:
        raise ValueError(
            f"The training text has {len(tokens)} tokens, less than data.sequence_length {sequence_length}: expected "
            "at least one sequence; use more text or a shorter sequence."
        )
    return TokenBlocks(tokens, sequence_length, block_order(num_blocks, num_wanted, seed))


def held_out_blocks(tokens: np.ndarray, sequence_length: int, max_blocks: int) -> TokenBlocks:
    """At most `max_blocks` blocks, evenly spread over the held-out tokens.

    Raises:
        ValueError: `tokens` do not fill one block.
    """
    num_blocks = len(tokens) // sequence_length
    if num_blocks == 0:
        raise ValueError(
            f"The held-out text has {len(tokens)} tokens, less than data.sequence_length {sequence_length}: expected "
            "at least one sequence; raise data.held_out_share or use more text."
        )
    return TokenBlocks(
        tokens, sequence_length, np.linspace(0, num_blocks - 1, min(max_blocks, num_blocks)).astype(np.int64)
    )
