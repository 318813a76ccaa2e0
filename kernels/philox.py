"""Philox4x32-10 in Triton: device functions for signs, normals and buckets, and kernels that write them as tables.

The definition of every bit is in ``less_fast.ops.philox``; nothing here depends on the launch shape or the device.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from less_fast import projection

TAG_RADEMACHER = tl.constexpr(projection.TAG_RADEMACHER)
TAG_GAUSSIAN = tl.constexpr(projection.TAG_GAUSSIAN)
TAG_SJLT = tl.constexpr(projection.TAG_SJLT)
TAG_SRHT_IN = tl.constexpr(projection.TAG_SRHT_IN)
TAG_SRHT_OUT = tl.constexpr(projection.TAG_SRHT_OUT)
HALF_PI = tl.constexpr(math.pi / 2)

# Tiles of the table kernels: indices, and Philox calls or columns.
SIGNS_N, SIGNS_C = 64, 4
SJLT_N = 256
COLUMNS_N, COLUMNS_K = 16, 128

# Scalars whose value must not choose another compiled kernel.
WORDS = ("base_lo", "base_hi", "seed_lo", "seed_hi")


def split_words(value: int) -> tuple[int, int]:
    """(low, high) 32-bit words of a 64-bit integer as signed ints, so that every value has the argument type int32."""
    low, high = value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make ``tensor``'s GPU the current one, which is where Triton launches; nothing to do for the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def join_words(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The inverse of :func:`split_words`: a 64-bit scalar."""
    return (high.to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def draw(index: tl.tensor, call: tl.tensor, seed: tl.tensor, TAG: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Four uint32 words for counter (index_lo, index_hi, call, TAG); ``index`` int64 and ``call`` int32 broadcast."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, call.to(tl.uint32), tl.full((1, 1), TAG, tl.uint32))


@triton.jit
def interleave(x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor) -> tl.tensor:
    """Four (M, C) tiles -> (M, 4C), the four entries of a position side by side."""
    joined = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # (M, C, 2, 2)
    return tl.reshape(joined, (x0.shape[0], 4 * x0.shape[1]))


@triton.jit
def sign_mask(
    index: tl.tensor, first_call: tl.tensor, seed: tl.tensor, TAG: tl.constexpr, N_BITS: tl.constexpr
) -> tl.tensor:
    """The sign bits of positions 128·first_call + [0, N_BITS) of each index (M,), at bit 31 of an int32 (M, N_BITS).

    N_BITS is a power of two. One Philox call serves 128 positions.
    """
    N_CALLS: tl.constexpr = (N_BITS + 127) // 128
    WIDTH: tl.constexpr = N_BITS // N_CALLS
    call = first_call + tl.arange(0, N_CALLS)
    w0, w1, w2, w3 = draw(index[:, None], call[None, :], seed, TAG)  # (M, N_CALLS)
    position = tl.arange(0, WIDTH)[None, None, :]
    quarter = position // 32
    upper = tl.where(quarter == 2, w2[:, :, None], w3[:, :, None])
    word = tl.where(quarter == 0, w0[:, :, None], tl.where(quarter == 1, w1[:, :, None], upper))
    bit = (word >> (position % 32).to(tl.uint32)) << 31  # (M, N_CALLS, WIDTH)
    return tl.reshape(bit, (index.shape[0], N_BITS)).to(tl.int32, bitcast=True)


@triton.jit
def flip(x: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Negate the entries of ``x``, of 16 or 32 bits, whose ``mask`` has bit 31 set; its other bits are 0."""
    if x.dtype.primitive_bitwidth == 16:
        y = (x.to(tl.int16, bitcast=True) ^ (mask >> 16).to(tl.int16)).to(x.dtype, bitcast=True)
    else:
        y = (x.to(tl.int32, bitcast=True) ^ mask).to(x.dtype, bitcast=True)
    return y


@triton.jit
def normal_pair(w0: tl.tensor, w1: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Box-Muller on two uint32 words: (radius·cos, radius·sin) in float32, absolute error below 2e-6.

    The angle is reduced to an eighth of a turn in integers, where a Taylor series is as good as float32: the library's
    cosine keeps a table on the stack for large arguments, which never occur here.
    """
    n0 = ((w0 >> 9) * 2 + 1).to(tl.int32)  # the uniform is n / 2^24, exactly
    n1 = ((w1 >> 9) * 2 + 1).to(tl.int32)
    radius = tl.sqrt(-2.0 * tl.log(n0.to(tl.float32) * 5.9604644775390625e-08))
    quadrant = (n1 + 2097152) >> 22
    x = (n1 - (quadrant << 22)).to(tl.float32) * 2.384185791015625e-07 * HALF_PI  # in [-pi/4, pi/4]
    s = x * x
    sine = x * (1.0 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cosine = 1.0 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320))))
    swapped = (quadrant & 1) == 1
    c = tl.where(swapped, sine, cosine)
    d = tl.where(swapped, cosine, sine)
    c = tl.where(((quadrant + 1) & 2) == 2, -c, c)
    d = tl.where((quadrant & 2) == 2, -d, d)
    return radius * c, radius * d


@triton.jit
def normals(index: tl.tensor, first_call: tl.tensor, seed: tl.tensor, N_COLS: tl.constexpr) -> tl.tensor:
    """Standard normals of positions 4·first_call + [0, N_COLS) of each index (M,): float32 (M, N_COLS)."""
    call = first_call + tl.arange(0, N_COLS // 4)
    w0, w1, w2, w3 = draw(index[:, None], call[None, :], seed, TAG_GAUSSIAN)
    x0, x1 = normal_pair(w0, w1)
    x2, x3 = normal_pair(w2, w3)
    return interleave(x0, x1, x2, x3)


@triton.jit
def columns(
    index: tl.tensor, tile: tl.tensor, seed: tl.tensor, GAUSSIAN: tl.constexpr, N_COLS: tl.constexpr
) -> tl.tensor:
    """Tile ``tile`` of the columns of sqrt(K)·Pi of each index (M,): float32 (M, N_COLS), N_COLS a multiple of 128."""
    if GAUSSIAN:
        x = normals(index, tile * (N_COLS // 4), seed, N_COLS)
    else:
        mask = sign_mask(index, tile * (N_COLS // 128), seed, TAG_RADEMACHER, N_COLS)
        x = flip(tl.full((index.shape[0], N_COLS), 1.0, tl.float32), mask)
    return x


@triton.jit
def bucket_pair(index: tl.tensor, pair: tl.tensor, seed: tl.tensor, dim: tl.tensor) -> tuple[tl.tensor, ...]:
    """Buckets int32 and sign words (bit 0) of non-zeros 2·pair and 2·pair + 1 of each index; shapes broadcast."""
    w0, w1, w2, w3 = draw(index, pair, seed, TAG_SJLT)
    width = (tl.zeros(w0.shape, tl.int32) + dim).to(tl.uint32)  # dim itself is a Python int where it is 1
    return tl.umulhi(w0, width).to(tl.int32), w1, tl.umulhi(w2, width).to(tl.int32), w3


@triton.jit(do_not_specialize=WORDS)
def signs_kernel(
    out_ptr: tl.tensor, n_index: tl.tensor, n_words: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    TAG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """Write a (n_index, n_words) int32 table of packed sign bits; one program makes (BLOCK_N, 4·BLOCK_C) of it."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    call = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    index = join_words(base_lo, base_hi) + row
    w0, w1, w2, w3 = draw(index[:, None], call[None, :], join_words(seed_lo, seed_hi), TAG)
    words = interleave(w0, w1, w2, w3).to(tl.int32, bitcast=True)  # (BLOCK_N, 4 * BLOCK_C)
    col = tl.program_id(1) * (4 * BLOCK_C) + tl.arange(0, 4 * BLOCK_C)
    offset = row.to(tl.int64)[:, None] * n_words + col[None, :]
    tl.store(out_ptr + offset, words, mask=(row < n_index)[:, None] & (col < n_words)[None, :])


@triton.jit(do_not_specialize=WORDS)
def sjlt_kernel(
    bucket_ptr: tl.tensor, sign_ptr: tl.tensor, n_index: tl.tensor, nnz: tl.tensor, dim: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Write (n_index, nnz) tables of buckets (int32) and sign bits (uint8); program ids: (rows, pair of non-zeros)."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # (BLOCK_N, 1)
    pair = tl.program_id(1) + tl.zeros((1, 1), tl.int32)
    index = join_words(base_lo, base_hi) + row
    seed = join_words(seed_lo, seed_hi)
    bucket0, sign0, bucket1, sign1 = bucket_pair(index, pair, seed, dim)
    offset = row.to(tl.int64) * nnz + 2 * pair
    live = row < n_index
    second = live & (2 * pair + 1 < nnz)
    tl.store(bucket_ptr + offset, bucket0, mask=live)
    tl.store(sign_ptr + offset, (sign0 & 1).to(tl.uint8), mask=live)
    tl.store(bucket_ptr + offset + 1, bucket1, mask=second)
    tl.store(sign_ptr + offset + 1, (sign1 & 1).to(tl.uint8), mask=second)


@triton.jit(do_not_specialize=WORDS)
def columns_kernel(
    out_ptr: tl.tensor, n_index: tl.tensor, dim: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    GAUSSIAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """Write (n_index, dim) entries of sqrt(K)·Pi in the output's dtype; one program makes (BLOCK_N, BLOCK_K) of it."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = join_words(base_lo, base_hi) + row
    x = columns(index, tl.program_id(1), join_words(seed_lo, seed_hi), GAUSSIAN, BLOCK_K)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offset = row.to(tl.int64)[:, None] * dim + col[None, :]
    tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=(row < n_index)[:, None] & (col < dim)[None, :])


def packed_signs(base: int, n_index: int, n_bits: int, tag: int, seed: int, device: torch.device) -> Tensor:
    """Sign bits of indices base .. base + n_index - 1, packed: int32 (n_index, ceil(n_bits / 32)).

    Bit i is bit (i mod 32), counted from the least significant, of word i // 32; 1 means -1.
    """
    n_words = -(-n_bits // 32)
    out = torch.empty(n_index, n_words, dtype=torch.int32, device=device)
    grid = (-(-n_index // SIGNS_N), -(-n_words // (4 * SIGNS_C)))
    with on_device(out):
        signs_kernel[grid](
            out, n_index, n_words, *split_words(base), *split_words(seed), TAG=tag, BLOCK_N=SIGNS_N, BLOCK_C=SIGNS_C
        )
    return out


def sjlt_table(base: int, n_index: int, dim: int, nnz: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Buckets int32 and sign bits uint8 (1 means -1), both (n_index, nnz), of indices from ``base`` on."""
    buckets = torch.empty(n_index, nnz, dtype=torch.int32, device=device)
    bits = torch.empty(n_index, nnz, dtype=torch.uint8, device=device)
    grid = (-(-n_index // SJLT_N), -(-nnz // 2))
    with on_device(buckets):
        sjlt_kernel[grid](buckets, bits, n_index, nnz, dim, *split_words(base), *split_words(seed), BLOCK_N=SJLT_N)
    return buckets, bits


def dense_columns(
    kind: str, base: int, n_index: int, dim: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Columns of sqrt(K)·Pi, ``rademacher`` or ``gaussian``, indices from ``base`` on: (n_index, dim) ``dtype``."""
    out = torch.empty(n_index, dim, dtype=dtype, device=device)
    grid = (-(-n_index // COLUMNS_N), -(-dim // COLUMNS_K))
    with on_device(out):
        columns_kernel[grid](
            out, n_index, dim, *split_words(base), *split_words(seed),
            GAUSSIAN=kind == "gaussian", BLOCK_N=COLUMNS_N, BLOCK_K=COLUMNS_K,
        )  # fmt: skip
    return out
