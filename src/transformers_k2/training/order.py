"""Which row comes when, computed from the row's number alone.

The real recipe reads 2.4e9 rows: a shuffled list of them would be 20 GB in every process, and resuming would have to
draw it again. Here the place of row `i` in its shuffled pass is a keyed bijection of integers, and its source is exact
integer arithmetic, so that a run starts anywhere at no cost and is the same on any number of processes. What it gives
up: the permutation is a hash's, good for shuffling, not for secrets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

_MASK = (1 << 64) - 1
_NUM_ROUNDS = 8  # as many 64-bit keys as one BLAKE2b digest holds; 4 give a pseudo-random permutation (Luby and Rackoff)


def permute(index: int, size: int, seed: int, number: int = 0) -> int:
    """The image of `index` under permutation `number` of `seed` of the integers below `size`.

    A Feistel network on pairs (index mod a, index div a), a = ceil(sqrt(size)); results beyond `size` are sent through
    again, which keeps it a bijection.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002 (generalised Feistel and cycle walking).
    """
    assert 0 <= index < size, (index, size)
    columns, rows, keys = _network(size, seed, number)
    while True:
        high, low = divmod(index, columns)
        for step in range(0, _NUM_ROUNDS, 2):
            low = (low + _mix(high ^ keys[step])) % columns
            high = (high + _mix(low ^ keys[step + 1])) % rows
        index = high * columns + low
        if index < size:
            return index


def shuffled(index: int, size: int, seed: int) -> int:
    """Place `index` of endless passes over the integers below `size`, every pass in an order of its own."""
    number, place = divmod(index, size)
    return permute(place, size, seed, number)


@lru_cache(maxsize=256)
def _network(size: int, seed: int, number: int) -> tuple[int, int, tuple[int, ...]]:
    columns = math.isqrt(size - 1) + 1 if size > 1 else 1
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    keys = tuple(int.from_bytes(digest[start : start + 8], "little") for start in range(0, len(digest), 8))
    return columns, -(-size // columns), keys


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


class Shares:
    """Deal rows out to sources so that every stretch of the run has the wanted shares.

    The sources are halved again and again, and each halving deals exactly: of its first n rows, one side has had
    floor(n * share). After any n rows, a source has had its share of n to within one row per halving above it.

    Raises:
        ValueError: there are no weights, or one of them is not positive and finite.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"The weights of the sources are {list(weights)}: expected positive numbers, one for each source."
            )
        exact = [Fraction(weight) for weight in weights]
        self.shares: list[Fraction] = [weight / sum(exact) for weight in exact]
        self._tree = _halve(exact, 0)

    def locate(self, index: int) -> tuple[int, int]:
        """The source of row `index`, and how many rows of that source come before it."""
        node = self._tree
        while isinstance(node, tuple):
            share, left, right = node
            before = index * share.numerator // share.denominator
            if (index + 1) * share.numerator // share.denominator > before:
                node, index = left, before
            else:
                node, index = right, index - before
        return node, index


_Node = int | tuple[Fraction, "_Node", "_Node"]


def _halve(weights: list[Fraction], first: int) -> _Node:
    """A source's number, or (the left side's share, left, right), cut where the sides weigh about the same."""
    if len(weights) == 1:
        return first
    total = sum(weights)
    cut = min(range(1, len(weights)), key=lambda place: abs(2 * sum(weights[:place]) - total))
    return (
        sum(weights[:cut], Fraction()) / total,
        _halve(weights[:cut], first),
        _halve(weights[cut:], first + cut),
    )
