"""Philox4x32-10 in pure torch, and the signs and buckets that projections are made of.

This is the definition that the C++ and Triton generators reproduce bit for bit. Source: Salmon, Moraes, Dror and
Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A call takes four 32-bit counter words and a 64-bit
key, and returns four 32-bit words; torch has no full set of uint32 operations, so words travel in int64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from less_fast.projection import TAG_GAUSSIAN, TAG_RADEMACHER, TAG_SJLT

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 tensors of 32-bit counter words (broadcastable) -> four int64 tensors of 32-bit random words."""
    key_lo, key_hi = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        # The 64-bit product may wrap to a negative int64; its bits are still the product's, so mask after the shift.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        hi0, lo0 = (product0 >> 32) & _MASK, product0 & _MASK
        hi1, lo1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = hi1 ^ c1 ^ key_lo, lo1, hi0 ^ c3 ^ key_hi, lo0
        key_lo, key_hi = (key_lo + _WEYL[0]) & _MASK, (key_hi + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(index: Tensor, block: Tensor, tag: int, seed: int) -> Tensor:
    """Philox words for counter (index_lo, index_hi, block, tag); int64 of shape broadcast(index, block) + (4,)."""
    index, block = torch.broadcast_tensors(index, block)
    tags = torch.full_like(index, tag)
    return torch.stack(philox4x32(index & _MASK, (index >> 32) & _MASK, block, tags, seed), dim=-1)


def sign_bits(index: Tensor, n_bits: int, tag: int, seed: int) -> Tensor:
    """The first ``n_bits`` sign bits of each 64-bit index: uint8 of shape index.shape + (n_bits,), 1 meaning -1.

    Bit i is bit (i mod 32), counted from the least significant, of word (i mod 128) // 32 of the call with third
    counter word i // 128.
    """
    n_calls = -(-n_bits // 128)
    block = torch.arange(n_calls, dtype=torch.int64, device=index.device)
    drawn = words(index.unsqueeze(-1), block, tag, seed)  # (..., n_calls, 4)
    shifts = torch.arange(32, dtype=torch.int64, device=index.device)
    bits = (drawn.unsqueeze(-1) >> shifts) & 1  # (..., n_calls, 4, 32)
    return bits.flatten(-3)[..., :n_bits].to(torch.uint8)


def signs(index: Tensor, n_bits: int, tag: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`sign_bits` as +1 and -1 in ``dtype``."""
    return 1 - 2 * sign_bits(index, n_bits, tag, seed).to(dtype)


def rademacher_columns(index: Tensor, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns j of sqrt(K)·Pi for ``rademacher``: (n, dim) of +-1; independent of K up to the prefix taken."""
    return signs(index, dim, TAG_RADEMACHER, seed, dtype)


def gaussian_columns(index: Tensor, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns j of sqrt(K)·Pi for ``gaussian``: (n, dim) standard normals, computed in float64.

    Entry i comes from the call with third counter word i // 4: words (0, 1) give entries 0 and 1 of the four by
    Box-Muller (cosine, then sine), words (2, 3) give entries 2 and 3. A word w is the uniform ((w >> 9) + 1/2) / 2^23.
    """
    block = torch.arange(-(-dim // 4), dtype=torch.int64, device=index.device)
    drawn = words(index.unsqueeze(-1), block, TAG_GAUSSIAN, seed)  # (n, calls, 4)
    uniform = ((drawn >> 9).to(torch.float64) + 0.5) * 2.0**-23
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))  # (n, calls, 2)
    angle = 2.0 * math.pi * uniform[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-3)[..., :dim].to(dtype)


def sjlt_columns(index: Tensor, dim: int, nnz: int, seed: int) -> tuple[Tensor, Tensor]:
    """Buckets (n, nnz) int64 in [0, dim) and sign bits (n, nnz) uint8 of each column j for ``sjlt``.

    Non-zero t comes from the call with third counter word t // 2: bucket = (word[2·(t mod 2)] · K) >> 32 and the
    sign is the least significant bit of the word after it. Two non-zeros of one column may share a bucket.
    """
    block = torch.arange(-(-nnz // 2), dtype=torch.int64, device=index.device)
    drawn = words(index.unsqueeze(-1), block, TAG_SJLT, seed).unflatten(-1, (2, 2)).flatten(-3, -2)[..., :nnz, :]
    return (drawn[..., 0] * dim) >> 32, (drawn[..., 1] & 1).to(torch.uint8)
