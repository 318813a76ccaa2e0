"""What kernels share that add to features (N, K), float32, from gradients in device memory: chunks and their sums.

No float is ever added atomically: every feature has one owner per chunk of the matrix, and chunks are summed in order.
Equal calls therefore give equal bits, and the order of an example's additions does not depend on the batch it is in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from less_fast.kernels.philox import WORDS
from torch import Tensor

# Scalars whose value must not choose another compiled kernel: they change from batch to batch or matrix to matrix.
COUNTS = ("n_examples", "n_slots", "n_groups", "n_steps", "n_programs")
STRIDES = (*WORDS, "short_stride", "long_stride")
SUM_BLOCK = 1024
MOST_CHUNKS = 64  # bounds the partial sums to 64·N·K
MAX_ENTRIES = 2**36  # most entries of a flat gradient (S = 1)
MAX_MATRIX_ENTRIES = 2**31 - 1  # most entries S·L where S > 1: they are divided by L in 32 bits


def chunked(total: int, steps: int) -> tuple[int, int]:
    """(steps of a chunk, chunks) for ``total`` steps in all; a chunk has at least ``steps`` where there are as many."""
    steps = min(max(steps, -(-total // MOST_CHUNKS)), max(1, total))
    return steps, max(1, -(-total // steps))


def capability_of(tensor: Tensor) -> int:
    """Compute capability of a tensor's GPU (80, 90, …); an H100's in Triton's interpreter."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@triton.jit
def sum_kernel(
    features_ptr: tl.tensor, partial_ptr: tl.tensor, features_stride: tl.tensor, chunk_stride: tl.tensor,
    dim: tl.tensor, n_chunks: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Add partial sums (chunks, N, K) to features (N, K), chunk by chunk; program ids: (example, tile of K)."""
    example = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = feature < dim
    acc = tl.zeros((BLOCK,), tl.float32)
    partial = partial_ptr + example * dim + feature
    for _ in range(n_chunks):
        acc += tl.load(partial, mask=mask, other=0.0)
        partial += chunk_stride
    out = features_ptr + example * features_stride + feature
    tl.store(out, tl.load(out, mask=mask, other=0.0) + acc, mask=mask)


def or_grads(grads: Tensor, table_a: Tensor | None, table_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tables, or any valid pointers where the mode reads none."""
    return (grads if table_a is None else table_a), (grads if table_b is None else table_b)


def output(features: Tensor, chunks: int) -> tuple[Tensor, int]:
    """Where a kernel writes, and its stride between chunks: the features themselves, or (chunks, N, K) partial sums."""
    if chunks == 1:
        return features, 0
    partial = torch.empty(chunks, *features.shape, dtype=torch.float32, device=features.device)
    return partial, partial.stride(0)


def add_chunks(features: Tensor, out: Tensor) -> None:
    """Features += the sum of :func:`output`'s partial sums; nothing where ``out`` is the features."""
    if out is features:
        return
    sum_kernel[(features.shape[0], -(-features.shape[1] // SUM_BLOCK))](
        features, out, features.stride(0), out.stride(0), features.shape[1], out.shape[0], BLOCK=SUM_BLOCK
    )
