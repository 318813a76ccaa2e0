"""The dense random projection as plain torch does it: chunks of a ±1 matrix are drawn, multiplied with and dropped."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of the ±1 chunk that exists at a time: far more than the L2 cache, so that each chunk costs its passes.
CHUNK_BYTES = 1 << 30


def random_signs(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A (rows, columns) matrix of ±1: random words whose sign bits are kept, the cheapest way that torch has."""
    per_word = 8 // dtype.itemsize
    words = torch.empty(-(-rows * columns // per_word), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    noise = words.view(dtype)[: rows * columns]
    return torch.copysign(torch.ones((), dtype=dtype, device=noise.device), noise).view(rows, columns)


def dense_projection(grads: Tensor, dim: int, seed: int = 0) -> Tensor:
    """Float32 (N, dim) / sqrt(dim) of (N, P): products in the dtype of ``grads``, sums over chunks in float32."""
    generator = torch.Generator(grads.device).manual_seed(seed)
    n, size = grads.shape
    width = max(1, CHUNK_BYTES // (dim * grads.dtype.itemsize))
    out = torch.zeros(n, dim, device=grads.device)
    for start in range(0, size, width):
        chunk = grads[:, start : start + width]
        out += chunk @ random_signs(chunk.shape[1], dim, grads.dtype, generator)
    return out * dim**-0.5
