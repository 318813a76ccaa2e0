"""The fixed rotation R that 1bit codes are taken after: it makes any row's entries look like draws of one normal law.

Without it a row with a few large entries (a raw gradient, a count sketch) would lose them: a sign says nothing of size.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_SEED = b"less_fast 1bit rotation"
_CHUNK = 1 << 16  # entries transformed at a time: two buffers of them stay in the second-level cache


def rotate(rows: Float32) -> Float32:
    """R x for every row of float32 (n, K), as a new array.

    With m the largest power of two up to K, H the Sylvester-Hadamard matrix of m rows and D_w the signs of window w:
    H D_0 / sqrt(m) turns entries [0, m), then, where m < K, H D_1 / sqrt(m) turns entries [K - m, K). Every step is an
    addition, a sign or one product with 1 / sqrt(m) in a fixed order, so that the bits are the same everywhere.
    """
    out = np.array(rows, np.float32, order="C")
    for chunk in _chunks(out):
        for window, signs in _windows(out.shape[1]):
            chunk[:, window] = _hadamard(chunk[:, window] * signs)
    return out


def rotate_back(rows: Float32) -> Float32:
    """The inverse of :func:`rotate`, up to rounding."""
    out = np.array(rows, np.float32, order="C")
    for chunk in _chunks(out):
        for window, signs in reversed(_windows(out.shape[1])):
            chunk[:, window] = _hadamard(chunk[:, window]) * signs
    return out


def _chunks(rows: Float32) -> list[Float32]:
    n, dim = rows.shape
    step = max(1, _CHUNK // dim)
    return [rows[start : start + step] for start in range(0, n, step)]


@lru_cache(4)
def _windows(dim: int) -> tuple[tuple[slice, Float32], ...]:
    size = 1 << (dim.bit_length() - 1)
    starts = [0] if size == dim else [0, dim - size]
    width = -(-size // 8)
    stream = np.frombuffer(hashlib.shake_256(_SEED).digest(2 * width), np.uint8).reshape(2, width)
    signs = np.float32(1.0) - np.float32(2.0) * np.unpackbits(stream, axis=1, count=size, bitorder="little")
    return tuple((slice(start, start + size), row) for start, row in zip(starts, signs))


def _hadamard(rows: Float32) -> Float32:
    """H x / sqrt(m) for every row (n, m): sums and differences of entries 1 apart, then 2, 4, ..., m / 2."""
    n, size = rows.shape
    low = 1 << (size.bit_length() // 2)
    # H of m = (H of m / low) x (H of low). Each is done along a middle axis, where numpy's inner loop is long.
    turned = _butterflies(np.ascontiguousarray(rows.reshape(n, size // low, low).transpose(0, 2, 1)))
    out = _butterflies(np.ascontiguousarray(turned.transpose(0, 2, 1))).reshape(n, size)
    out *= np.float32(1.0 / math.sqrt(size))
    return out


def _butterflies(x: Float32) -> Float32:
    """Unscaled Sylvester-Hadamard transform along the middle axis of (n, a, b); ``x`` is overwritten."""
    n, a, b = x.shape
    other = np.empty_like(x)
    step = 1
    while step < a:
        shape = (n, a // (2 * step), 2, step * b)
        old, new = x.reshape(shape), other.reshape(shape)
        np.add(old[:, :, 0], old[:, :, 1], out=new[:, :, 0])
        np.subtract(old[:, :, 0], old[:, :, 1], out=new[:, :, 1])
        x, other = other, x
        step *= 2
    return x
