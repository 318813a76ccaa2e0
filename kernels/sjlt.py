"""Add the SJLT of preconditioned gradients (N, S, L) that are in device memory to features (N, K), float32.

Non-zeros of neighbouring entries go anywhere, so they are added atomically, in int64 fixed point with one scale per
example: integer sums do not depend on their order, so equal calls give equal bits. With n = S·L·nnz terms the unit is
at most n·2^-60 of the example's largest |u| (and no less than 2^-126), below the float32 rounding of the features.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from less_fast.kernels.accumulate import MODE_NONE, STRIDES, or_grads, precondition
from less_fast.kernels.philox import bucket_pair, join_words, on_device, split_words
from torch import Tensor

ENTRIES = 256  # gradient entries of one program
FINISH_BLOCK = 1024


def config(n_examples: int) -> int:
    """Examples per program, which share its buckets and signs."""
    return min(4, triton.next_power_of_2(n_examples))


def fixed_point_bits(terms: int) -> int:
    """F such that ``terms`` integers of size up to 2^F add up to less than 2^62."""
    return 62 - terms.bit_length()


@triton.jit
def sjlt_entries(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, n_examples: tl.tensor, grads_stride: tl.tensor,
    n_entries: tl.tensor, alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor,
    MODE: tl.constexpr, EXAMPLES: tl.constexpr, ENTRIES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """This program's examples (EXAMPLES, 1), entries (ENTRIES,) and u (EXAMPLES, ENTRIES)."""
    n_tiles = tl.cdiv(n_examples, EXAMPLES)
    pid = tl.program_id(0)
    example = (pid % n_tiles) * EXAMPLES + tl.arange(0, EXAMPLES)[:, None]
    entry = (pid // n_tiles) * ENTRIES + tl.arange(0, ENTRIES)
    live = (entry < n_entries)[None, :]
    row = grads_ptr + example.to(tl.int64) * grads_stride
    g = tl.load(row + entry[None, :], mask=live & (example < n_examples), other=0.0)
    u = precondition(g, a_ptr, b_ptr, entry[None, :], live, alpha, gamma, e, MODE)
    return example, entry, u


@triton.jit
def sjlt_largest_kernel(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, largest_ptr: tl.tensor,
    n_examples: tl.tensor, grads_stride: tl.tensor, n_entries: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor,
    MODE: tl.constexpr, EXAMPLES: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """Largest (N,) int32: bits of each example's max |u|; non-negative floats order as their bits do, NaN last."""
    example, _, u = sjlt_entries(
        grads_ptr, a_ptr, b_ptr, n_examples, grads_stride, n_entries, alpha, gamma, e, MODE, EXAMPLES, ENTRIES
    )
    bits = tl.max(u.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # (EXAMPLES,)
    row = tl.reshape(example, (EXAMPLES,))
    tl.atomic_max(largest_ptr + row, bits, mask=row < n_examples, sem="relaxed")


@triton.jit
def fixed_point_shift(largest: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """The shift s such that |u|·2^s <= 2^bits for every |u| up to the float whose bits are ``largest``; |s| <= 126."""
    exponent = largest >> 23  # biased: |u| < 2^(exponent - 126)
    return bits + 126 - tl.maximum(exponent, bits)


@triton.jit
def power_of_two(exponent: tl.tensor) -> tl.tensor:
    """2^exponent, -126 <= exponent <= 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=STRIDES)
def sjlt_add_kernel(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, largest_ptr: tl.tensor, sums_ptr: tl.tensor,
    n_examples: tl.tensor, grads_stride: tl.tensor, n_entries: tl.tensor, n_long: tl.tensor, dim: tl.tensor,
    bits: tl.tensor, short_stride: tl.tensor, long_stride: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor,
    NNZ: tl.constexpr, MODE: tl.constexpr, EXAMPLES: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """Sums (N, K) int64 += signed fixed-point u at its buckets; integer additions commute, so atomics are exact."""
    example, entry, u = sjlt_entries(
        grads_ptr, a_ptr, b_ptr, n_examples, grads_stride, n_entries, alpha, gamma, e, MODE, EXAMPLES, ENTRIES
    )
    base = join_words(base_lo, base_hi)
    seed = join_words(seed_lo, seed_hi)
    index = base + (entry // n_long).to(tl.int64) * short_stride + (entry % n_long).to(tl.int64) * long_stride
    live = (example < n_examples) & (entry < n_entries)[None, :]
    largest = tl.load(largest_ptr + example, mask=example < n_examples, other=0x7F800000)  # (EXAMPLES, 1)
    finite = largest < 0x7F800000
    fixed = tl.where(finite, u * power_of_two(fixed_point_shift(largest, bits)), 0.0)
    fixed = tl.floor(fixed + 0.5).to(tl.int64)
    row_ptr = sums_ptr + example.to(tl.int64) * dim
    for pair in range((NNZ + 1) // 2):
        call = tl.zeros((1, ENTRIES), tl.int32) + pair
        bucket0, sign0, bucket1, sign1 = bucket_pair(index[None, :], call, seed, dim)  # (1, ENTRIES)
        tl.atomic_add(row_ptr + bucket0, tl.where((sign0 & 1) == 1, -fixed, fixed), mask=live, sem="relaxed")
        second = live & (2 * call + 1 < NNZ)
        tl.atomic_add(row_ptr + bucket1, tl.where((sign1 & 1) == 1, -fixed, fixed), mask=second, sem="relaxed")


@triton.jit
def sjlt_finish_kernel(
    features_ptr: tl.tensor, sums_ptr: tl.tensor, largest_ptr: tl.tensor, features_stride: tl.tensor, dim: tl.tensor,
    bits: tl.tensor, scale: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Features (N, K) += sums back in float32; a row with a non-finite gradient becomes NaN."""
    example = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = feature < dim
    largest = tl.load(largest_ptr + example + tl.zeros((BLOCK,), tl.int64))
    total = tl.load(sums_ptr + example * dim + feature, mask=mask, other=0)
    value = total.to(tl.float32) * power_of_two(-fixed_point_shift(largest, bits)) * scale
    value = tl.where(largest < 0x7F800000, value, float("nan"))
    out = features_ptr + example * features_stride + feature
    tl.store(out, tl.load(out, mask=mask, other=0.0) + value, mask=mask)


def accumulate_sjlt(
    features: Tensor, grads: Tensor, j_base: int, short_stride: int, long_stride: int, nnz: int, seed: int,
    mode: int = MODE_NONE, table_a: Tensor | None = None, table_b: Tensor | None = None,
    alpha: float = 1.0, gamma: float = 0.0, e: float = 0.0,
) -> None:  # fmt: skip
    """Features (N, K) += SJLT of the preconditioned grads (N, S, L) with ``nnz`` non-zeros per column.

    Entry (s, l) has global index j_base + s·short_stride + l·long_stride. The other arguments are those of
    ``accumulate_srht``. A row that holds a non-finite u becomes NaN throughout.
    """
    n, short, long = grads.shape
    dim, entries = features.shape[1], short * long
    if n == 0:
        return
    examples, bits = config(n), fixed_point_bits(entries * nnz)
    programs = (-(-n // examples) * -(-entries // ENTRIES),)
    a, b = or_grads(grads, table_a, table_b)
    with on_device(features):
        largest = torch.zeros(n, dtype=torch.int32, device=features.device)
        sums = torch.zeros(n, dim, dtype=torch.int64, device=features.device)
        sjlt_largest_kernel[programs](
            grads, a, b, largest, n, grads.stride(0), entries, alpha, gamma, e,
            MODE=mode, EXAMPLES=examples, ENTRIES=ENTRIES, enable_fp_fusion=True,
        )  # fmt: skip
        sjlt_add_kernel[programs](
            grads, a, b, largest, sums, n, grads.stride(0), entries, long, dim, bits, short_stride, long_stride,
            *split_words(j_base), *split_words(seed), alpha, gamma, e,
            NNZ=nnz, MODE=mode, EXAMPLES=examples, ENTRIES=ENTRIES, enable_fp_fusion=True,
        )  # fmt: skip
        sjlt_finish_kernel[(n, -(-dim // FINISH_BLOCK))](
            features, sums, largest, features.stride(0), dim, bits, 1 / math.sqrt(nnz), BLOCK=FINISH_BLOCK
        )
