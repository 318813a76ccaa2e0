"""Add the sketch of preconditioned gradients (N, S, L) that are in device memory to features (N, K), float32.

S is the matrix's short side (the LoRA rank), L its long side. No float is ever added atomically: every
feature has one owner per chunk of the matrix, and chunks are summed in order. Equal calls therefore give equal bits,
and the order of an example's additions does not depend on the batch it is in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from less_fast.kernels.philox import (
    TAG_SRHT_IN,
    TAG_SRHT_OUT,
    WORDS,
    columns,
    flip,
    join_words,
    on_device,
    sign_mask,
    split_words,
)
from torch import Tensor

MODE_NONE, MODE_SIGN, MODE_ADAM = 0, 1, 2
_SIGN, _ADAM = tl.constexpr(MODE_SIGN), tl.constexpr(MODE_ADAM)
MAX_BLOCK = 4096  # the longest run that is mixed in one program's registers
MAX_ENTRIES = 2**30  # most entries S·L of a matrix: positions in it are 32-bit
STRIDES = (*WORDS, "short_stride", "long_stride")


@dataclass(frozen=True)
class Tile:
    """How a call is cut into programs: each owns ``examples`` x ``width`` and does ``steps`` of one of ``chunks``.

    ``width`` and a step are: srht: slots, and one run of each; dense: features, and ``DENSE_ENTRIES`` gradient
    entries. ``steps`` and ``chunks`` fix the order of additions, so they depend on the matrix alone, not on N.
    """

    examples: int
    width: int
    steps: int
    chunks: int
    warps: int


DENSE_ENTRIES, DENSE_COLS = 16, 128
SUM_BLOCK = 1024
_MOST_CHUNKS = 64  # bounds the partial sums to 64·N·K


def config(kind: str, n_examples: int, short: int, long: int, dim: int, block: int = 1) -> Tile:
    """The tile of one call: ``kind`` is ``srht`` or ``dense`` (both generated kinds); sizes as in the launchers.

    Chunks exist because slots x examples alone are too few programs to fill a GPU.
    """
    if kind == "srht":
        # 512 positions x 4 examples: 16 values a thread, over which the cost of its signs is spread.
        examples = min(4, triton.next_power_of_2(n_examples), max(1, 2048 // block))
        width = min(max(1, 512 // block), triton.next_power_of_2(dim // block))
        total, steps = -(-short * -(-long // block) // (dim // block)), 8
        warps = 4 if examples * width * block <= 2048 else 8
    else:
        examples, width, warps = 16 if n_examples <= 16 else 32, DENSE_COLS, 8
        total, steps = -(-short * long // DENSE_ENTRIES), 64
    steps = min(max(steps, -(-total // _MOST_CHUNKS)), max(1, total))
    return Tile(examples, width, steps, max(1, -(-total // steps)), warps)


@triton.jit
def precondition(
    g: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, offset: tl.tensor, mask: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor, MODE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Map gradients g to u; g's table entries are at ``offset``; where not ``mask``, g must be 0 and so is u."""
    if MODE == _SIGN:
        u = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g)) + (g - g)  # NaN where g is not finite
    elif MODE == _ADAM:
        a = tl.load(a_ptr + offset, mask=mask, other=0.0)
        b = tl.load(b_ptr + offset, mask=mask, other=1.0)
        u = (a + alpha * g) / (tl.sqrt(b + gamma * g * g) + e)
    else:
        u = g
    return u


@triton.jit
def hadamard(x: tl.tensor, LOG_BLOCK: tl.constexpr) -> tl.tensor:
    """Unnormalised Sylvester-Hadamard transform of the last dimension, 2^LOG_BLOCK long, of a (E, G, B) tile.

    Each pass adds and subtracts neighbours and moves that bit of the position to the top, so that after LOG_BLOCK
    passes every bit is back in its place.
    """
    E: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1]
    HALF: tl.constexpr = x.shape[2] // 2
    for _ in tl.static_range(LOG_BLOCK):
        low, high = tl.split(tl.reshape(x, (E, G, HALF, 2)))
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)), (E, G, 2 * HALF))
    return x


@triton.jit(do_not_specialize=WORDS)
def srht_kernel(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, out_ptr: tl.tensor,
    n_examples: tl.tensor, grads_stride: tl.tensor, out_stride: tl.tensor, chunk_stride: tl.tensor,
    n_short: tl.tensor, n_long: tl.tensor, n_runs: tl.tensor, n_slots: tl.tensor, n_groups: tl.tensor,
    n_steps: tl.tensor, base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor, scale: tl.tensor,
    MODE: tl.constexpr, ADD: tl.constexpr, EXAMPLES: tl.constexpr, SLOTS: tl.constexpr, LOG_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program: the runs of one chunk that fall on SLOTS slots, for EXAMPLES examples (fastest, to share L2)."""
    BLOCK: tl.constexpr = 2**LOG_BLOCK
    n_tiles = tl.cdiv(n_examples, EXAMPLES)
    pid = tl.program_id(0)
    example = (pid % n_tiles) * EXAMPLES + tl.arange(0, EXAMPLES)[:, None, None]
    slot = ((pid // n_tiles) % n_groups) * SLOTS + tl.arange(0, SLOTS)
    chunk = pid // n_tiles // n_groups
    position = tl.arange(0, BLOCK)
    base = join_words(base_lo, base_hi)
    seed = join_words(seed_lo, seed_hi)
    base_slot = (base % n_slots).to(tl.int32)
    first = tl.where(slot >= base_slot, slot - base_slot, slot - base_slot + n_slots)  # this matrix's first run there
    rows_ptr = grads_ptr + example.to(tl.int64) * grads_stride
    acc = tl.zeros((EXAMPLES, SLOTS, BLOCK), tl.float32)
    for step in range(chunk * n_steps, (chunk + 1) * n_steps):
        run = first + step * n_slots  # (SLOTS,)
        long = (run // n_short)[:, None] * BLOCK + position[None, :]  # (SLOTS, BLOCK)
        offset = ((run % n_short)[:, None] * n_long + long)[None, :, :]
        live = (((run < n_runs) & (slot < n_slots))[:, None] & (long < n_long))[None, :, :]
        g = tl.load(rows_ptr + offset, mask=live & (example < n_examples), other=0.0)  # (EXAMPLES, SLOTS, BLOCK)
        u = precondition(g, a_ptr, b_ptr, offset, live, alpha, gamma, e, MODE)
        index = base + run
        mixed = hadamard(flip(u, sign_mask(index, 0, seed, TAG_SRHT_IN, BLOCK)[None, :, :]), LOG_BLOCK)
        acc += flip(mixed, sign_mask(index, 0, seed, TAG_SRHT_OUT, BLOCK)[None, :, :])
    acc *= scale
    feature = (slot[:, None] * BLOCK + position[None, :])[None, :, :]
    out = out_ptr + chunk.to(tl.int64) * chunk_stride + example.to(tl.int64) * out_stride + feature
    owned = (example < n_examples) & (slot < n_slots)[None, :, None]
    if ADD:
        acc += tl.load(out, mask=owned, other=0.0)
    tl.store(out, acc, mask=owned)


@triton.jit(do_not_specialize=STRIDES)
def dense_kernel(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, out_ptr: tl.tensor,
    n_examples: tl.tensor, grads_stride: tl.tensor, out_stride: tl.tensor, chunk_stride: tl.tensor,
    n_long: tl.tensor, n_entries: tl.tensor, dim: tl.tensor, n_groups: tl.tensor, n_steps: tl.tensor,
    short_stride: tl.tensor, long_stride: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor, scale: tl.tensor,
    MODE: tl.constexpr, ADD: tl.constexpr, GAUSSIAN: tl.constexpr,
    EXAMPLES: tl.constexpr, ENTRIES: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One program: COLS features of EXAMPLES examples over one chunk of gradient entries; columns made in registers."""
    n_tiles = tl.cdiv(n_examples, EXAMPLES)
    pid = tl.program_id(0)
    example = (pid % n_tiles) * EXAMPLES + tl.arange(0, EXAMPLES)[:, None]
    group = (pid // n_tiles) % n_groups
    chunk = pid // n_tiles // n_groups
    base = join_words(base_lo, base_hi)
    seed = join_words(seed_lo, seed_hi)
    rows_ptr = grads_ptr + example.to(tl.int64) * grads_stride
    acc = tl.zeros((EXAMPLES, COLS), tl.float32)
    for step in range(chunk * n_steps, (chunk + 1) * n_steps):
        entry = step * ENTRIES + tl.arange(0, ENTRIES)
        offset = entry[None, :]
        live = offset < n_entries
        g = tl.load(rows_ptr + offset, mask=live & (example < n_examples), other=0.0)  # (EXAMPLES, ENTRIES)
        u = precondition(g, a_ptr, b_ptr, offset, live, alpha, gamma, e, MODE)
        index = base + (entry // n_long).to(tl.int64) * short_stride + (entry % n_long).to(tl.int64) * long_stride
        x = columns(index, group, seed, GAUSSIAN, COLS)  # (ENTRIES, COLS)
        acc = tl.dot(u, x, acc, input_precision="ieee")
    acc *= scale
    feature = group * COLS + tl.arange(0, COLS)[None, :]
    out = out_ptr + chunk.to(tl.int64) * chunk_stride + example.to(tl.int64) * out_stride + feature
    owned = (example < n_examples) & (feature < dim)
    if ADD:
        acc += tl.load(out, mask=owned, other=0.0)
    tl.store(out, acc, mask=owned)


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


def accumulate_srht(
    features: Tensor, grads: Tensor, rho_base: int, block: int, seed: int, mode: int = MODE_NONE,
    table_a: Tensor | None = None, table_b: Tensor | None = None,
    alpha: float = 1.0, gamma: float = 0.0, e: float = 0.0,
) -> None:  # fmt: skip
    """Features (N, K) += blocked SRHT of the preconditioned grads (N, S, L), whose first run is number ``rho_base``.

    ``block`` is B, a power of two up to MAX_BLOCK that divides K. Rows of features and the (S, L) of grads are
    contiguous; S·L <= MAX_ENTRIES. ``mode`` and what follows is the rule (``less_fast.ops.rule``): its code, tables
    (S, L) and scalars.
    """
    n, short, long = grads.shape
    dim = features.shape[1]
    if n == 0:
        return
    tile = config("srht", n, short, long, dim, block)
    slots = dim // block
    groups = -(-slots // tile.width)
    with on_device(features):
        out, chunk_stride = _output(features, tile.chunks)
        srht_kernel[(-(-n // tile.examples) * groups * tile.chunks,)](
            grads, *or_grads(grads, table_a, table_b), out, n, grads.stride(0), out.stride(-2), chunk_stride,
            short, long, short * -(-long // block), slots, groups, tile.steps,
            *split_words(rho_base), *split_words(seed), alpha, gamma, e, 1 / math.sqrt(block),
            MODE=mode, ADD=tile.chunks == 1, EXAMPLES=tile.examples, SLOTS=tile.width,
            LOG_BLOCK=block.bit_length() - 1, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
        _add_chunks(features, out)


def accumulate_dense(
    features: Tensor, grads: Tensor, j_base: int, short_stride: int, long_stride: int, seed: int, kind: str,
    mode: int = MODE_NONE, table_a: Tensor | None = None, table_b: Tensor | None = None,
    alpha: float = 1.0, gamma: float = 0.0, e: float = 0.0,
) -> None:  # fmt: skip
    """Features (N, K) += Pi·u for ``kind`` ``rademacher`` or ``gaussian``; entry (s, l) has global index
    j_base + s·short_stride + l·long_stride. The other arguments are those of :func:`accumulate_srht`.
    """
    n, short, long = grads.shape
    dim = features.shape[1]
    if n == 0:
        return
    tile = config("dense", n, short, long, dim)
    groups = -(-dim // tile.width)
    with on_device(features):
        out, chunk_stride = _output(features, tile.chunks)
        dense_kernel[(-(-n // tile.examples) * groups * tile.chunks,)](
            grads, *or_grads(grads, table_a, table_b), out, n, grads.stride(0), out.stride(-2), chunk_stride,
            long, short * long, dim, groups, tile.steps, short_stride, long_stride,
            *split_words(j_base), *split_words(seed), alpha, gamma, e, 1 / math.sqrt(dim),
            MODE=mode, ADD=tile.chunks == 1, GAUSSIAN=kind == "gaussian",
            EXAMPLES=tile.examples, ENTRIES=DENSE_ENTRIES, COLS=tile.width,
            num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
        _add_chunks(features, out)


def or_grads(grads: Tensor, table_a: Tensor | None, table_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tables, or any valid pointers where the mode reads none."""
    return (grads if table_a is None else table_a), (grads if table_b is None else table_b)


def _output(features: Tensor, chunks: int) -> tuple[Tensor, int]:
    """Where a kernel writes, and its stride between chunks: the features themselves, or (chunks, N, K) partial sums."""
    if chunks == 1:
        return features, 0
    partial = torch.empty(chunks, *features.shape, dtype=torch.float32, device=features.device)
    return partial, partial.stride(0)


def _add_chunks(features: Tensor, out: Tensor) -> None:
    if out is features:
        return
    sum_kernel[(features.shape[0], -(-features.shape[1] // SUM_BLOCK))](
        features, out, features.stride(0), out.stride(0), features.shape[1], out.shape[0], BLOCK=SUM_BLOCK
    )
