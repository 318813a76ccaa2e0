"""Per-example gradient, preconditioner and SJLT of one matrix in one kernel; no gradient in device memory.

Non-zeros go anywhere, so they are added atomically, in int64 fixed point as in ``less_fast.kernels.sjlt``: sums of
integers do not depend on their order. The unit has to be known before any gradient is, so it comes from a bound on |u|:
Adam's from its tables, the raw gradient's from the largest operands of the example.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from less_fast.kernels.accumulate import COUNTS, STRIDES
from less_fast.kernels.outer_sketch import Tile, gradients
from less_fast.kernels.philox import bucket_pair, join_words, on_device, split_words
from less_fast.kernels.rule import MODE_ADAM, MODE_NONE, mode_of, precondition
from less_fast.kernels.sjlt import (
    FINISH_BLOCK,
    fixed_point_bits,
    fixed_point_shift,
    power_of_two,
    sjlt_finish_kernel,
)
from torch import Tensor

BLOCK = 64  # long indices of one program
SLACK = 1.01  # a bound is computed in float32 like what it bounds: rounding must not take u beyond it
LARGEST_TOKENS, LARGEST_WIDTH = 32, 128


def config(short: int, dtype: torch.dtype) -> Tile:
    """The tile for a matrix with ``short`` rows. Small: it is the atomic additions that take the time."""
    rows = 16 if short <= 16 else 32
    if dtype == torch.float32:
        return Tile(rows, 32, 1, 4 if rows == 16 else 8, 2)
    return Tile(rows, 64, 1, 4, 3)


def constants(short: int, dtype: torch.dtype, nnz: int, mode: int, tile: Tile) -> dict[str, Any]:
    """What the kernel is compiled for."""
    product = "tf32x3" if dtype == torch.float32 else "tf32"
    return {
        "N_SHORT": short, "MODE": mode, "NNZ": nnz, "ROWS": tile.rows, "TOKENS": tile.tokens, "BLOCK": BLOCK,
        "PRODUCT": product,
    }  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def segment_largest_kernel(
    x_ptr: tl.tensor, largest_ptr: tl.tensor, starts_ptr: tl.tensor, lengths_ptr: tl.tensor,
    n_examples: tl.tensor, x_stride: tl.tensor, width: tl.tensor, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Largest (N,) int32: bits of max |x| of each segment; non-negative floats order as their bits do, NaN last."""
    example = tl.program_id(0) % n_examples
    col = tl.program_id(0) // n_examples * WIDTH + tl.arange(0, WIDTH)
    start = tl.load(starts_ptr + example).to(tl.int64)
    length = tl.load(lengths_ptr + example)
    token = tl.arange(0, TOKENS)
    tile = x_ptr + (start + token)[:, None] * x_stride + col[None, :]
    largest = tl.zeros((TOKENS, WIDTH), tl.int32)
    for t in range(0, length, TOKENS):
        x = tl.load(tile, mask=(t + token < length)[:, None] & (col < width)[None, :], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        tile += TOKENS * x_stride
    tl.atomic_max(largest_ptr + example, tl.max(tl.max(largest, 1), 0), sem="relaxed")


@triton.jit(do_not_specialize=(*STRIDES, *COUNTS))
def outer_sjlt_kernel(
    left_ptr: tl.tensor, right_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, bound_ptr: tl.tensor,
    bad_ptr: tl.tensor, sums_ptr: tl.tensor, starts_ptr: tl.tensor, lengths_ptr: tl.tensor,
    n_examples: tl.tensor, right_stride: tl.tensor, n_long: tl.tensor, dim: tl.tensor, bits: tl.tensor,
    short_stride: tl.tensor, long_stride: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor, one: tl.tensor,
    N_SHORT: tl.constexpr, MODE: tl.constexpr, NNZ: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, PRODUCT: tl.constexpr,
) -> None:  # fmt: skip
    """One program: a tile (ROWS, BLOCK) of one example's gradient, into its sums (K,) int64."""
    N_TILES: tl.constexpr = (N_SHORT + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    short = (pid % N_TILES) * ROWS + tl.arange(0, ROWS)
    pid = pid // N_TILES
    example = (pid % n_examples).to(tl.int64)  # fastest, so that L2 serves the tables to all examples
    long = pid // n_examples * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(starts_ptr + example).to(tl.int64)
    length = tl.load(lengths_ptr + example)
    token = tl.arange(0, TOKENS)
    left_start = left_ptr + (start + token)[:, None] * N_SHORT + short[None, :]  # (TOKENS, ROWS)
    right_start = right_ptr + (start + token)[:, None] * right_stride + long[None, :]  # (TOKENS, BLOCK)
    in_left, in_right = short < N_SHORT, long < n_long
    g, _ = gradients(
        left_start, right_start, length, in_left, in_right, in_right, 0, right_stride, one,
        N_SHORT, ROWS, TOKENS, BLOCK, 1, PRODUCT,
    )  # fmt: skip
    live = in_left[:, None] & in_right[None, :]
    u = precondition(g, a_ptr, b_ptr, short[:, None] * n_long + long[None, :], live, alpha, gamma, e, MODE)
    bound = tl.load(bound_ptr + example)  # the bits of a float32, as in fixed_point_shift
    finite = (u.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    tl.atomic_max(bad_ptr + example, tl.max(tl.max((~finite & live).to(tl.int32), 1), 0), sem="relaxed")
    fixed = tl.where(finite & (bound < 0x7F800000), u * power_of_two(fixed_point_shift(bound, bits)), 0.0)
    fixed = tl.floor(fixed + 0.5).to(tl.int64)
    seed = join_words(seed_lo, seed_hi)
    index = join_words(base_lo, base_hi) + (
        short.to(tl.int64)[:, None] * short_stride + long.to(tl.int64)[None, :] * long_stride
    )
    row_ptr = sums_ptr + example * dim
    for pair in range((NNZ + 1) // 2):
        call = tl.zeros((ROWS, BLOCK), tl.int32) + pair
        bucket0, sign0, bucket1, sign1 = bucket_pair(index, call, seed, dim)  # (ROWS, BLOCK)
        tl.atomic_add(row_ptr + bucket0, tl.where((sign0 & 1) == 1, -fixed, fixed), mask=live, sem="relaxed")
        second = live & (2 * call + 1 < NNZ)
        tl.atomic_add(row_ptr + bucket1, tl.where((sign1 & 1) == 1, -fixed, fixed), mask=second, sem="relaxed")


def update_bound(a: Tensor, b: Tensor, alpha: float, gamma: float, e: float) -> float:
    """A number that no |(a + alpha·g) / (sqrt(b + gamma·g²) + e)| exceeds, whatever g, for gamma > 0."""
    return (float((a.abs() / (b.sqrt() + e)).max()) + alpha / math.sqrt(gamma)) * SLACK


def outer_sjlt(
    features: Tensor, left: Tensor, right: Tensor, starts: Tensor, lengths: Tensor,
    j_base: int, short_stride: int, long_stride: int, nnz: int, seed: int, mode: int = MODE_NONE,
    table_a: Tensor | None = None, table_b: Tensor | None = None,
    alpha: float = 1.0, gamma: float = 0.0, e: float = 0.0, bound: float | None = None, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Features (N, K) += SJLT of rule(sum of left (tokens, S) times right (tokens, L) over each segment).

    Entry (s, l) has global index j_base + s·short_stride + l·long_stride. ``bound``: Adam's ``update_bound``; made
    here, which waits for the device, where it is not given. Adam needs gamma > 0. The other arguments are those of
    ``outer_sketch.outer_sketch``.
    A row that holds a non-finite u becomes NaN throughout.
    """
    n, dim = features.shape
    short, long = left.shape[1], right.shape[1]
    if n == 0:
        return
    tile = config(short, left.dtype) if tile is None else tile
    bits = fixed_point_bits(short * long * nnz)
    a, b = (features, features) if table_a is None or table_b is None else (table_a, table_b)
    with on_device(features):
        if mode == MODE_NONE:
            largest = _gradient_bound(left, right, starts, lengths)
        else:
            bound = (update_bound(a, b, alpha, gamma, e) if bound is None else bound) if mode == MODE_ADAM else 1.0
            largest = torch.full((n,), bound, device=features.device)
        largest = largest.view(torch.int32)
        bad = torch.zeros(n, dtype=torch.int32, device=features.device)
        sums = torch.zeros(n, dim, dtype=torch.int64, device=features.device)
        outer_sjlt_kernel[(-(-short // tile.rows) * n * -(-long // BLOCK),)](
            left, right, a, b, largest, bad, sums, starts, lengths,
            n, right.stride(0), long, dim, bits, short_stride, long_stride,
            *split_words(j_base), *split_words(seed), alpha, gamma, e, 1.0,
            **constants(short, left.dtype, nnz, mode_of(mode, e), tile),
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
        largest = torch.maximum(largest, bad * 0x7F800000)
        sjlt_finish_kernel[(n, -(-dim // FINISH_BLOCK))](
            features, sums, largest, features.stride(0), dim, bits, 1 / math.sqrt(nnz), BLOCK=FINISH_BLOCK
        )


def _gradient_bound(left: Tensor, right: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """No |G| of an example exceeds tokens · max |left| · max |right|: float32 (N,)."""
    bounds = []
    for x in (left, right):
        largest = torch.zeros(len(starts), dtype=torch.int32, device=x.device)
        segment_largest_kernel[(len(starts) * -(-x.shape[1] // LARGEST_WIDTH),)](
            x, largest, starts, lengths, len(starts), x.stride(0), x.shape[1],
            TOKENS=LARGEST_TOKENS, WIDTH=LARGEST_WIDTH,
        )  # fmt: skip
        bounds.append(largest.view(torch.float32))
    return bounds[0] * bounds[1] * (lengths * SLACK)
