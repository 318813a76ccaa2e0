"""The explicit matrix Pi, written straight from the definitions in numpy: the oracle for every backend."""

from __future__ import annotations

import numpy as np

from less_fast.layout import ParameterLayout
from less_fast.projection import Projection

_U32 = np.uint64(0xFFFFFFFF)


def philox(counter: tuple[np.ndarray, ...], seed: int) -> np.ndarray:
    """Philox4x32-10 on four uint64 arrays of 32-bit words -> (..., 4) uint64."""
    c = [np.asarray(word, dtype=np.uint64) for word in np.broadcast_arrays(*counter)]
    k = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & _U32, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & _U32]
        k = [(k[0] + np.uint64(0x9E3779B9)) & _U32, (k[1] + np.uint64(0xBB67AE85)) & _U32]
    return np.stack(c, axis=-1)


def draw(index: int, block: int, tag: int, seed: int) -> list[int]:
    """The four words of one call."""
    words = (index & 0xFFFFFFFF, index >> 32, block, tag)
    return [int(w) for w in philox(tuple(np.uint64(w) for w in words), seed)]


def sign(index: int, position: int, tag: int, seed: int) -> int:
    """+1 or -1: bit (position mod 128) of call position div 128."""
    word = draw(index, position // 128, tag, seed)[position % 128 // 32]
    return 1 - 2 * (word >> (position % 32) & 1)


def sign_row(index: int, n: int, tag: int, seed: int) -> np.ndarray:
    """The first n signs of an index."""
    blocks = np.arange(-(-n // 128), dtype=np.uint64)
    counter = (np.uint64(index & 0xFFFFFFFF), np.uint64(index >> 32), blocks, np.uint64(tag))
    words = philox(counter, seed)  # (calls, 4)
    bits = (words[..., None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
    return 1.0 - 2.0 * bits.reshape(-1)[:n].astype(np.float64)


def words(index: np.ndarray, block: np.ndarray, tag: int, seed: int) -> np.ndarray:
    """Philox words of every (index, block): uint64 (len(index), len(block), 4)."""
    j, b = index.astype(np.uint64)[:, None], block.astype(np.uint64)[None, :]
    return philox((j & _U32, j >> np.uint64(32), b, np.uint64(tag)), seed)


def matrix(projection: Projection, layout: ParameterLayout) -> np.ndarray:
    """Pi as float64 (K, P), its columns in the order of the global index."""
    size, dim, seed, nnz = layout.size, projection.dim, projection.seed, projection.nnz
    j = np.arange(size)
    if projection.kind == "identity":
        return np.eye(size)
    if projection.kind == "rademacher":
        drawn = words(j, np.arange(-(-dim // 128)), 1, seed)
        bits = (drawn[..., None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
        return (1.0 - 2.0 * bits.reshape(size, -1)[:, :dim]).T / np.sqrt(dim)
    if projection.kind == "gaussian":
        u = ((words(j, np.arange(-(-dim // 4)), 2, seed) >> np.uint64(9)) + 0.5) / 2.0**23
        radius, angle = np.sqrt(-2 * np.log(u[..., ::2])), 2 * np.pi * u[..., 1::2]
        normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
        return normals.reshape(size, -1)[:, :dim].T / np.sqrt(dim)
    pi = np.zeros((dim, size))
    if projection.kind == "sjlt":
        pairs = words(j, np.arange(-(-nnz // 2)), 3, seed).reshape(size, -1, 2)
        for t in range(nnz):
            bucket = pairs[:, t, 0] * np.uint64(dim) >> np.uint64(32)
            pi[bucket, j] += (1.0 - 2.0 * (pairs[:, t, 1] & np.uint64(1))) / np.sqrt(nnz)
        return pi
    _srht(pi, projection, layout)
    return pi


def _srht(pi: np.ndarray, projection: Projection, layout: ParameterLayout) -> None:
    block, slots, seed = projection.block, projection.dim // projection.block, projection.seed
    h = np.array([[(-1) ** bin(i & j).count("1") for j in range(block)] for i in range(block)], dtype=np.float64)
    rho = 0
    for p in layout.parameters:
        for q in range(-(-p.long // block)):
            for s in range(p.short):
                mixed = sign_row(rho, block, 5, seed)[:, None] * h * sign_row(rho, block, 4, seed)[None, :]
                rows = slice(rho % slots * block, (rho % slots + 1) * block)
                long = np.arange(q * block, min((q + 1) * block, p.long))
                row, col = (s, long) if p.short_is_rows else (long, s)
                pi[rows, p.offset + row * p.cols + col] += mixed[:, : len(long)] / np.sqrt(block)
                rho += 1
