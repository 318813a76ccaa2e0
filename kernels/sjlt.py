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
from less_fast.kernels.accumulate import COUNTS, STRIDES, or_grads
from less_fast.kernels.dense import global_index
from less_fast.kernels.philox import bucket_pair, join_words, on_device, split_words
from less_fast.kernels.rule import MODE_NONE, MODE_SIGN, mode_of, precondition
from torch import Tensor

ENTRIES = 256  # gradient entries of one program, for as many examples as share their buckets and signs
LARGEST_ENTRIES, LARGEST_STEPS, LARGEST_WARPS = 4096, 8, 8  # entries of one example read at a time, and times
FINISH_BLOCK = 1024
_INFINITY = tl.constexpr(0x7F800000)  # the bits of float32's infinity; those of NaN are larger
_ONE = 0x3F800000


def config(n_examples: int) -> int:
    """Examples per program, which share its buckets and signs."""
    return min(4, triton.next_power_of_2(n_examples))


def steps_of(entries: int) -> int:
    """Tiles of ``ENTRIES`` that one program of :func:`sjlt_add_kernel` adds: the grid stays within its 2^31."""
    return 1 + entries // 2**24


def fixed_point_bits(terms: int) -> int:
    """F such that ``terms`` integers of size up to 2^F add up to less than 2^62."""
    return 62 - terms.bit_length()


@triton.jit
def magnitude_bits(u: tl.tensor) -> tl.tensor:
    """Bits of |u| as int32: non-negative floats order as their bits do, NaN last."""
    return u.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=COUNTS)
def sjlt_largest_kernel(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, largest_ptr: tl.tensor,
    grads_stride: tl.tensor, n_entries: tl.tensor, n_programs: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor,
    MODE: tl.constexpr, ENTRIES: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """Largest (N,) int32 = bits of each example's max |u|, which n_programs programs share, STEPS · ENTRIES each."""
    pid = tl.program_id(0)
    example = (pid // n_programs).to(tl.int64)
    start = (pid % n_programs).to(tl.int64) * (ENTRIES * STEPS)
    row_ptr = grads_ptr + example * grads_stride
    bits = tl.zeros((ENTRIES,), tl.int32)
    for _ in range(STEPS):
        entry = start + tl.arange(0, ENTRIES)
        live = entry < n_entries
        g = tl.load(row_ptr + entry, mask=live, other=0.0).to(tl.float32)
        u = precondition(g, a_ptr, b_ptr, entry, live, alpha, gamma, e, MODE)
        bits = tl.maximum(bits, magnitude_bits(u))
        start += ENTRIES
    tl.atomic_max(largest_ptr + example, tl.max(bits, axis=0), sem="relaxed")


@triton.jit
def fixed_point_shift(largest: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """The shift s such that |u|·2^s <= 2^bits for every |u| up to the float whose bits are ``largest``; |s| <= 126."""
    exponent = largest >> 23  # biased: |u| < 2^(exponent - 126)
    return bits + 126 - tl.maximum(exponent, bits)


@triton.jit
def power_of_two(exponent: tl.tensor) -> tl.tensor:
    """2^exponent, -126 <= exponent <= 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=(*STRIDES, *COUNTS))
def sjlt_add_kernel(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, largest_ptr: tl.tensor, sums_ptr: tl.tensor,
    n_examples: tl.tensor, grads_stride: tl.tensor, n_entries: tl.tensor, n_long: tl.tensor, dim: tl.tensor,
    bits: tl.tensor, n_steps: tl.tensor, short_stride: tl.tensor, long_stride: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor,
    NNZ: tl.constexpr, MODE: tl.constexpr, FLAT: tl.constexpr, BOUND: tl.constexpr,
    EXAMPLES: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """Sums (N, K) int64 += signed fixed-point u at its buckets; integer additions commute, so atomics are exact.

    The scale is that of ``largest``, or of a BOUND (bits, not 0) that is known beforehand; then ``largest`` is raised
    to a non-finite u where there is one.
    """
    n_tiles = tl.cdiv(n_examples, EXAMPLES)
    pid = tl.program_id(0)
    example = ((pid % n_tiles) * EXAMPLES + tl.arange(0, EXAMPLES))[:, None]
    present = example < n_examples
    start = (pid // n_tiles).to(tl.int64) * n_steps * ENTRIES
    rows_ptr = grads_ptr + example.to(tl.int64) * grads_stride
    sums_ptr += example.to(tl.int64) * dim
    base = join_words(base_lo, base_hi)
    seed = join_words(seed_lo, seed_hi)
    if BOUND == 0:
        known = tl.load(largest_ptr + example, mask=present, other=_INFINITY)  # (EXAMPLES, 1)
    else:
        known = tl.full((EXAMPLES, 1), BOUND, tl.int32)
    unit = power_of_two(fixed_point_shift(known, bits))
    for _ in range(n_steps):
        entry = start + tl.arange(0, ENTRIES)
        live = (entry < n_entries)[None, :]
        g = tl.load(rows_ptr + entry[None, :], mask=live & present, other=0.0).to(tl.float32)
        u = precondition(g, a_ptr, b_ptr, entry[None, :], live, alpha, gamma, e, MODE)  # (EXAMPLES, ENTRIES)
        largest = known
        if BOUND != 0:
            largest = tl.max(magnitude_bits(u), axis=1, keep_dims=True)
            tl.atomic_max(largest_ptr + example, largest, mask=present & (largest >= _INFINITY), sem="relaxed")
        fixed = tl.floor(tl.where(largest < _INFINITY, u * unit, 0.0) + 0.5).to(tl.int64)
        index = (base + global_index(entry, n_long, short_stride, long_stride, FLAT))[None, :]
        live &= present
        for pair in range((NNZ + 1) // 2):
            call = tl.zeros((1, ENTRIES), tl.int32) + pair
            bucket0, sign0, bucket1, sign1 = bucket_pair(index, call, seed, dim)  # (1, ENTRIES)
            tl.atomic_add(sums_ptr + bucket0, tl.where((sign0 & 1) == 1, -fixed, fixed), mask=live, sem="relaxed")
            second = live & (2 * call + 1 < NNZ)
            tl.atomic_add(sums_ptr + bucket1, tl.where((sign1 & 1) == 1, -fixed, fixed), mask=second, sem="relaxed")
        start += ENTRIES


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
    value = tl.where(largest < _INFINITY, value, float("nan"))
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

    The gradients are read twice, for the scale of each example's fixed point and for its sums; once where the rule is
    ``sign``, whose |u| is at most 1. (Adam's |u| has a bound too, but one entry with a tiny second moment would make
    it so loose that the sums of all the others lose their accuracy.)
    """
    n, short, long = grads.shape
    dim, entries = features.shape[1], short * long
    if n == 0:
        return
    examples, bits = config(n), fixed_point_bits(entries * nnz)
    a, b = or_grads(grads, table_a, table_b)
    bound = _ONE if mode == MODE_SIGN else 0
    rule = (alpha, gamma, e)
    with on_device(features):
        largest = torch.full((n,), bound, dtype=torch.int32, device=features.device)
        sums = torch.zeros(n, dim, dtype=torch.int64, device=features.device)
        if not bound:
            programs = -(-entries // (LARGEST_ENTRIES * LARGEST_STEPS))
            sjlt_largest_kernel[(n * programs,)](
                grads, a, b, largest, grads.stride(0), entries, programs, *rule,
                MODE=mode_of(mode, e), ENTRIES=LARGEST_ENTRIES, STEPS=LARGEST_STEPS,
                num_warps=LARGEST_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        steps = steps_of(entries)
        sjlt_add_kernel[(-(-n // examples) * -(-entries // (ENTRIES * steps)),)](
            grads, a, b, largest, sums, n, grads.stride(0), entries, long, dim, bits, steps, short_stride, long_stride,
            *split_words(j_base), *split_words(seed), *rule,
            NNZ=nnz, MODE=mode_of(mode, e), FLAT=short == 1, BOUND=bound,
            EXAMPLES=examples, ENTRIES=ENTRIES, enable_fp_fusion=True,
        )  # fmt: skip
        sjlt_finish_kernel[(n, -(-dim // FINISH_BLOCK))](
            features, sums, largest, features.stride(0), dim, bits, 1 / math.sqrt(nnz), BLOCK=FINISH_BLOCK
        )
