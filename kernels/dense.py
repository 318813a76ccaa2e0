"""Add dense ±1 or normal projections of gradients (N, S, L) that are in device memory to features (N, K), float32.

Columns of the matrix are made in registers, transposed, and multiplied on tensor cores. u is cut into a high and a low
tf32 part, and so are normals; ±1, and gradients of 16 bits with no rule to apply, are exact in one part. Each step's
product is added to the sum so far outside the tensor core, which would round that sum towards zero every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from less_fast.kernels.accumulate import COUNTS, STRIDES, add_chunks, capability_of, chunked, or_grads, output
from less_fast.kernels.mix import TF32_BITS, round_bits
from less_fast.kernels.philox import TAG_RADEMACHER, draw, join_words, normals, on_device, split_words
from less_fast.kernels.rule import MODE_NONE, MODE_SIGN, mode_of, precondition
from torch import Tensor

COLS = 128  # features of one program: those of one Philox call for signs
_COLS = tl.constexpr(COLS)


@dataclass(frozen=True)
class Tile:
    """How a call is cut into programs: each owns ``COLS`` features of ``examples`` over one of ``chunks``.

    A step is ``entries`` gradient entries; ``exact``: u is exact in the gradients' dtype. ``entries``, ``steps`` and
    ``chunks`` do not depend on N.
    """

    exact: bool
    examples: int
    entries: int
    steps: int
    chunks: int
    warps: int
    stages: int


def config(n_examples: int, size: int, kind: str, mode: int, dtype: torch.dtype, capability: int) -> Tile:
    """The tile of one call on gradients of ``size`` entries.

    A sign costs 5 instructions on an H100 whatever the number of examples it serves, a normal 58.
    """
    exact = dtype.itemsize == 2 and mode in (MODE_NONE, MODE_SIGN)
    if kind == "gaussian":
        most, entries, warps, stages = (64 if exact else 32), 32, 8, 2
    elif exact:  # Triton 3.6 draws anew for every bit on a B200, for which four warps have too few registers
        most, entries, warps, stages = (64 if capability >= 90 else 32), 128, (8 if capability >= 100 else 4), 3
    else:
        most, entries, warps, stages = 32, (64 if capability >= 90 else 32), 4, 3
    examples = min(most, max(16, triton.next_power_of_2(n_examples)))
    steps, chunks = chunked(-(-size // entries), max(1, 1024 // entries))
    return Tile(exact, examples, entries, steps, chunks, warps, stages)


@triton.jit
def program(n_examples: tl.tensor, n_groups: tl.tensor, EXAMPLES: tl.constexpr) -> tuple[tl.tensor, ...]:
    """This program's examples (EXAMPLES,), group of features and chunk; examples fastest."""
    n_tiles = tl.cdiv(n_examples, EXAMPLES)
    pid = tl.program_id(0)
    example = (pid % n_tiles) * EXAMPLES + tl.arange(0, EXAMPLES)
    return example, (pid // n_tiles) % n_groups, pid // n_tiles // n_groups


@triton.jit
def global_index(
    entry: tl.tensor, n_long: tl.tensor, short_stride: tl.tensor, long_stride: tl.tensor, FLAT: tl.constexpr
) -> tl.tensor:
    """Global index, int64 and less the base, of entries (int64) of a matrix; FLAT: S = 1, which saves the divisions."""
    if FLAT:
        index = entry * long_stride
    else:
        e = entry.to(tl.int32)
        index = (e // n_long).to(tl.int64) * short_stride + (e % n_long).to(tl.int64) * long_stride
    return index


@triton.jit
def sign_rows(w0: tl.tensor, w1: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """±1 of the bits of two Philox words (1, M): (64, M) in a dtype of 16 or 32 bits."""
    row = tl.arange(0, 64)[:, None]
    bit = tl.where(row < 32, w0, w1) >> (row % 32).to(tl.uint32)
    if tl.float32 == DTYPE:
        x = ((bit << 31) | 0x3F800000).to(tl.float32, bitcast=True)
    elif tl.bfloat16 == DTYPE:
        x = ((bit << 15).to(tl.uint16) | 0x3F80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        x = ((bit << 15).to(tl.uint16) | 0x3C00).to(tl.uint16).to(tl.float16, bitcast=True)
    return x


@triton.jit
def store_tile(
    acc: tl.tensor, out_ptr: tl.tensor, example: tl.tensor, feature: tl.tensor, n_examples: tl.tensor,
    dim: tl.tensor, out_stride: tl.tensor, ADD: tl.constexpr,
) -> None:  # fmt: skip
    """Write (or, under ADD, add) a tile (features, examples) to rows of features, leaving what is out of range."""
    out = out_ptr + (example.to(tl.int64) * out_stride)[None, :] + feature[:, None]
    owned = (example < n_examples)[None, :] & (feature < dim)[:, None]
    if ADD:
        acc += tl.load(out, mask=owned, other=0.0)
    tl.store(out, acc, mask=owned)


@triton.jit(do_not_specialize=(*STRIDES, *COUNTS))
def rademacher_kernel(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, out_ptr: tl.tensor,
    n_examples: tl.tensor, grads_stride: tl.tensor, out_stride: tl.tensor, chunk_stride: tl.tensor,
    n_long: tl.tensor, n_entries: tl.tensor, dim: tl.tensor, n_groups: tl.tensor, n_steps: tl.tensor,
    short_stride: tl.tensor, long_stride: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor, scale: tl.tensor,
    MODE: tl.constexpr, EXACT: tl.constexpr, BITS: tl.constexpr, ADD: tl.constexpr, FLAT: tl.constexpr,
    EXAMPLES: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """One program: 128 features of EXAMPLES examples over one chunk of gradient entries.

    In two products of 64 features: since the words of one Philox call then feed both, the compiler draws them once, a
    thread each, and hands them round. For one product it would draw them anew in every thread that needs a bit.
    """
    DTYPE: tl.constexpr = grads_ptr.dtype.element_ty if EXACT else tl.float32
    example, group, chunk = program(n_examples, n_groups, EXAMPLES)
    base = join_words(base_lo, base_hi)
    seed = join_words(seed_lo, seed_hi)
    call = tl.zeros((1, 1), tl.int32) + group
    rows_ptr = grads_ptr + (example.to(tl.int64) * grads_stride)[:, None]
    acc0 = tl.zeros((64, EXAMPLES), tl.float32)
    acc1 = tl.zeros((64, EXAMPLES), tl.float32)
    start = chunk.to(tl.int64) * n_steps * ENTRIES
    for _ in range(n_steps):
        entry = start + tl.arange(0, ENTRIES)
        live = (entry < n_entries)[None, :]
        g = tl.load(rows_ptr + entry[None, :], mask=live & (example < n_examples)[:, None], other=0.0)
        u = precondition(g.to(tl.float32), a_ptr, b_ptr, entry[None, :], live, alpha, gamma, e, MODE)
        index = base + global_index(entry, n_long, short_stride, long_stride, FLAT)
        w0, w1, w2, w3 = draw(index[None, :], call, seed, TAG_RADEMACHER)  # (1, ENTRIES)
        x0, x1 = sign_rows(w0, w1, DTYPE), sign_rows(w2, w3, DTYPE)
        if EXACT:
            v = tl.trans(u.to(DTYPE))
            acc0 += tl.dot(x0, v) * scale
            acc1 += tl.dot(x1, v) * scale
        else:
            high = round_bits(u, BITS)
            low = tl.trans(u - high)
            high = tl.trans(high)
            part = tl.dot(x0, low, input_precision="tf32")
            acc0 += tl.dot(x0, high, part, input_precision="tf32") * scale
            part = tl.dot(x1, low, input_precision="tf32")
            acc1 += tl.dot(x1, high, part, input_precision="tf32") * scale
        start += ENTRIES
    out_ptr += chunk.to(tl.int64) * chunk_stride
    feature = group * _COLS + tl.arange(0, 64)
    store_tile(acc0, out_ptr, example, feature, n_examples, dim, out_stride, ADD)
    store_tile(acc1, out_ptr, example, feature + 64, n_examples, dim, out_stride, ADD)


@triton.jit(do_not_specialize=(*STRIDES, *COUNTS))
def gaussian_kernel(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, out_ptr: tl.tensor,
    n_examples: tl.tensor, grads_stride: tl.tensor, out_stride: tl.tensor, chunk_stride: tl.tensor,
    n_long: tl.tensor, n_entries: tl.tensor, dim: tl.tensor, n_groups: tl.tensor, n_steps: tl.tensor,
    short_stride: tl.tensor, long_stride: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor, scale: tl.tensor,
    MODE: tl.constexpr, EXACT: tl.constexpr, BITS: tl.constexpr, ADD: tl.constexpr, FLAT: tl.constexpr,
    EXAMPLES: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """The same with normals; the product of the two low parts, 2^-22 of the whole, is left out."""
    example, group, chunk = program(n_examples, n_groups, EXAMPLES)
    base = join_words(base_lo, base_hi)
    seed = join_words(seed_lo, seed_hi)
    rows_ptr = grads_ptr + (example.to(tl.int64) * grads_stride)[:, None]
    acc = tl.zeros((_COLS, EXAMPLES), tl.float32)
    start = chunk.to(tl.int64) * n_steps * ENTRIES
    for _ in range(n_steps):
        entry = start + tl.arange(0, ENTRIES)
        live = (entry < n_entries)[None, :]
        g = tl.load(rows_ptr + entry[None, :], mask=live & (example < n_examples)[:, None], other=0.0)
        u = precondition(g.to(tl.float32), a_ptr, b_ptr, entry[None, :], live, alpha, gamma, e, MODE)
        index = base + global_index(entry, n_long, short_stride, long_stride, FLAT)
        x = normals(index, group * (_COLS // 4), seed, _COLS)  # (ENTRIES, COLS)
        x_high = round_bits(x, BITS)
        x_low = tl.trans(x - x_high)
        x_high = tl.trans(x_high)
        high = u if EXACT else round_bits(u, BITS)
        part = tl.dot(x_low, tl.trans(high), input_precision="tf32")
        if not EXACT:
            part = tl.dot(x_high, tl.trans(u - high), part, input_precision="tf32")
        acc += tl.dot(x_high, tl.trans(high), part, input_precision="tf32") * scale
        start += ENTRIES
    out_ptr += chunk.to(tl.int64) * chunk_stride
    feature = group * _COLS + tl.arange(0, _COLS)
    store_tile(acc, out_ptr, example, feature, n_examples, dim, out_stride, ADD)


def accumulate_dense(
    features: Tensor, grads: Tensor, j_base: int, short_stride: int, long_stride: int, seed: int, kind: str,
    mode: int = MODE_NONE, table_a: Tensor | None = None, table_b: Tensor | None = None,
    alpha: float = 1.0, gamma: float = 0.0, e: float = 0.0, scale: float | None = None,
) -> None:  # fmt: skip
    """Features (N, K) += Pi·u for ``kind`` ``rademacher`` or ``gaussian``; entry (s, l) has global index
    j_base + s·short_stride + l·long_stride. ``scale`` of the ±1s or normals is 1/√K unless given; the other arguments
    are those of ``accumulate_srht``.
    """
    n, short, long = grads.shape
    dim = features.shape[1]
    if n == 0:
        return
    tile = config(n, short * long, kind, mode, grads.dtype, capability_of(grads))
    groups = -(-dim // COLS)
    kernel = gaussian_kernel if kind == "gaussian" else rademacher_kernel
    with on_device(features):
        out, chunk_stride = output(features, tile.chunks)
        kernel[(-(-n // tile.examples) * groups * tile.chunks,)](
            grads, *or_grads(grads, table_a, table_b), out, n, grads.stride(0), out.stride(-2), chunk_stride,
            long, short * long, dim, groups, tile.steps, short_stride, long_stride,
            *split_words(j_base), *split_words(seed), alpha, gamma, e, 1 / math.sqrt(dim) if scale is None else scale,
            MODE=mode_of(mode, e), EXACT=tile.exact, BITS=TF32_BITS, ADD=tile.chunks == 1,
            FLAT=short == 1, EXAMPLES=tile.examples, ENTRIES=tile.entries,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
        add_chunks(features, out)
