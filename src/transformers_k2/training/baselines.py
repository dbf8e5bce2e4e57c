"""What counting gets: the unigram and bigram losses that a trained model has to beat, on the same tokens.

A loss alone says little; a model that does not beat a table of word pairs has learned nothing worth its matrices. The
bigram is interpolated with the unigram after Witten and Bell (the weight of a context's unseen continuations is its
number of different continuations), which needs no tuning.
"""

from __future__ import annotations

import numpy as np


def unigram_and_bigram_loss(
    training: np.ndarray, held_out: np.ndarray, vocab_size: int
) -> tuple[float, float]:
    """Mean losses in nats per predicted token of a unigram and a bigram table.

    Args:
        training: blocks to count, int [blocks, length]; pairs across blocks are not counted.
        held_out: blocks to predict, int [blocks, length]; the first token of each is given, as for the model.

    Source: Witten and Bell, 1991; Chen and Goodman, TR-10-98, section 2.6.
    """
    tokens = training.astype(np.int64)
    counts = np.bincount(tokens.ravel(), minlength=vocab_size)
    num_kinds = np.count_nonzero(counts)
    unigram = (counts + num_kinds / vocab_size) / (counts.sum() + num_kinds)  # sums to 1

    pairs, pair_counts = np.unique(tokens[:, :-1] * vocab_size + tokens[:, 1:], return_counts=True)
    context_kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)
    context_counts = np.bincount(tokens[:, :-1].ravel(), minlength=vocab_size)

    previous, current = held_out[:, :-1].astype(np.int64).ravel(), held_out[:, 1:].astype(np.int64).ravel()
    wanted = previous * vocab_size + current
    places = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[places] == wanted, pair_counts[places], 0)
    total = context_counts[previous] + context_kinds[previous]
    mixed = (seen + context_kinds[previous] * unigram[current]) / np.maximum(total, 1)
    bigram = np.where(total > 0, mixed, unigram[current])
    return float(-np.log(unigram[current]).mean()), float(-np.log(bigram).mean())
