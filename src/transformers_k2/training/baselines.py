"""What counting gets: the unigram and bigram losses that a trained model has to beat, on the same tokens.

A loss alone says little; a model that does not beat a table of word pairs has learned nothing worth its matrices. The
bigram is interpolated with the unigram after Witten and Bell (the weight of a context's unseen continuations is its
number of different continuations), which needs no tuning.
"""

from __future__ import annotations

import numpy as np

Pairs = tuple[np.ndarray, np.ndarray]


def unigram_and_bigram_loss(training: Pairs, held_out: Pairs, vocab_size: int) -> tuple[float, float]:
    """Mean losses in nats per predicted token of a unigram and a bigram table.

    Args:
        training: previous and predicted tokens to count, int64 [pairs] each (`rows.predicted_pairs`).
        held_out: those to predict.

    Source: Witten and Bell, 1991; Chen and Goodman, TR-10-98, section 2.6.
    """
    before, tokens = training
    counts = np.bincount(tokens, minlength=vocab_size)
    num_kinds = np.count_nonzero(counts)
    unigram = (counts + num_kinds / vocab_size) / (counts.sum() + num_kinds)  # sums to 1

    pairs, pair_counts = np.unique(before * vocab_size + tokens, return_counts=True)
    context_kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)
    context_counts = np.bincount(before, minlength=vocab_size)

    previous, current = held_out
    wanted = previous * vocab_size + current
    places = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[places] == wanted, pair_counts[places], 0)
    total = context_counts[previous] + context_kinds[previous]
    mixed = (seen + context_kinds[previous] * unigram[current]) / np.maximum(total, 1)
    bigram = np.where(total > 0, mixed, unigram[current])
    return float(-np.log(unigram[current]).mean()), float(-np.log(bigram).mean())
