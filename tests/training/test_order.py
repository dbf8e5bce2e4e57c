"""The order of rows: bijections, their statistics, and shares of sources by a plain count."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from transformers_k2.training.order import Shares, permute, shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 97, 1000, 4097])
def test_every_pass_is_a_permutation(size: int) -> None:
    for number in range(3):
        assert sorted(permute(index, size, 5, number) for index in range(size)) == list(range(size))


def test_passes_and_seeds_differ() -> None:
    orders = [[shuffled(index, 50, seed) for index in range(150)] for seed in (0, 1)]
    passes = [tuple(order[start : start + 50]) for order in orders for start in (0, 50, 100)]
    assert len(set(passes)) == 6
    assert all(sorted(part) == list(range(50)) for part in passes)


def test_numbers_of_the_real_recipe_do_not_collide() -> None:
    size = 2_400_000_000
    images = [shuffled(index, size, 0) for index in range(size - 5000, size + 5000)]
    assert len(set(images[:5000])) == len(set(images[5000:])) == 5000
    assert min(images) >= 0
    assert max(images) < size
    assert np.mean(images) == pytest.approx(size / 2, rel=0.03)  # 5 sigma of a uniform mean


def chi_square(counts: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 for count in counts) / expected


def test_all_orders_of_four_come_equally_often() -> None:
    seen = Counter(tuple(permute(index, 4, seed) for index in range(4)) for seed in range(4800))
    assert len(seen) == 24
    assert chi_square(list(seen.values()), 200) < 52  # 23 degrees of freedom: exceeded once in 2000


def test_places_are_independent_of_numbers_and_neighbours() -> None:
    size, seeds = 11, 3000
    places, pairs = Counter(), Counter()
    for seed in range(seeds):
        order = [permute(index, size, seed, 3) for index in range(size)]
        places.update(enumerate(order))
        pairs.update(pairwise(order))
    assert (
        chi_square([places[i, j] for i in range(size) for j in range(size)], seeds / size) < 160
    )  # 100 d.f.
    expected = seeds * (size - 1) / (size * (size - 1))
    assert chi_square([pairs[i, j] for i in range(size) for j in range(size) if i != j], expected) < 170


def test_a_long_shuffle_has_no_trend() -> None:
    order = np.array([permute(index, 20_000, 9) for index in range(20_000)])
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 4 / math.sqrt(20_000)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.5, 0.25, 0.25], [3, 1, 1e-3, 0.7, 0.1], [1 / 3] * 7])
def test_shares_hold_in_every_prefix(weights: list[float]) -> None:
    shares = Shares(weights)
    total = sum(map(Fraction, weights))
    counts = [0] * len(weights)
    worst = 0.0
    for index in range(4000):
        source, place = shares.locate(index)
        assert place == counts[source]  # the number of its rows before this one, by counting
        counts[source] += 1
        errors = (
            abs(count - (index + 1) * Fraction(weight) / total)
            for count, weight in zip(counts, weights, strict=True)
        )
        worst = max(worst, float(max(errors)))
    assert worst < max(1, math.ceil(math.log2(len(weights)) + 1))


def test_shares_are_exact_far_out() -> None:
    shares = Shares([0.1, 0.9])
    places = [shares.locate(10**15 + index) for index in range(1000)]
    assert [place for source, place in places if source == 0] == list(
        range(min(p for s, p in places if s == 0), max(p for s, p in places if s == 0) + 1)
    )
    assert sum(source == 0 for source, _ in places) in (99, 100, 101)


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0], [math.inf], [math.nan]])
def test_weights_must_be_positive(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive numbers"):
        Shares(weights)
