"""CRC-32 of bytes that were hashed in pieces.

zlib computes it, but Python's does not offer zlib's `crc32_combine`: the CRC of `b` moves past the bytes of `a` by a
multiplication with a power of x modulo the polynomial (zlib's crc32.c, multmodp and x2nmodp).
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # IEEE 802.3, bits reversed


def combine(first: int, second: int, num_bytes: int) -> int:
    """The CRC-32 of two pieces from theirs; `num_bytes` is the length of the second."""
    return _product(_power(num_bytes), first) ^ second


def _product(a: int, b: int) -> int:
    """a(x) * b(x) modulo the polynomial; the highest bit is the constant term."""
    mask, result = 1 << 31, 0
    while a:
        if a & mask:
            result ^= b
            a ^= mask
        mask >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return result


@lru_cache(maxsize=4096)
def _power(num_bytes: int) -> int:
    """x to the power of 8 times `num_bytes`."""
    result, square, left = 1 << 31, 1 << 30, 8 * num_bytes
    while left:
        if left & 1:
            result = _product(square, result)
        square = _product(square, square)
        left >>= 1
    return result
