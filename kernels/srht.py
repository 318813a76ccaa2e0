"""Add the blocked SRHT of preconditioned gradients (N, S, L) that are in device memory to features (N, K), float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from less_fast.kernels.accumulate import COUNTS, add_chunks, capability_of, chunked, or_grads, output
from less_fast.kernels.mix import MAX_BLOCK as MAX_PRODUCT
from less_fast.kernels.mix import MIN_BLOCK as MIN_PRODUCT
from less_fast.kernels.mix import TF32_BITS, hadamard_matrix, mix
from less_fast.kernels.philox import (
    TAG_SRHT_IN,
    TAG_SRHT_OUT,
    WORDS,
    flip,
    join_words,
    on_device,
    sign_mask,
    split_words,
)
from less_fast.kernels.rule import MODE_NONE, MODE_SIGN, mode_of, precondition
from torch import Tensor

# How a run is mixed: in registers; by one product in the gradients' dtype; by one of each of u's two tf32 parts.
BUTTERFLIES, PRODUCT, SPLIT_PRODUCT = 0, 1, 2
_BUTTERFLIES, _PRODUCT = tl.constexpr(BUTTERFLIES), tl.constexpr(PRODUCT)
MAX_BLOCK = 4096  # the longest run that is mixed in one program's registers
_IN_FLIGHT = 32 << 10  # bytes of gradients that a program requests ahead: two or three programs then cover the latency


@dataclass(frozen=True)
class Tile:
    """How a call is cut into programs: each owns ``slots`` of ``examples`` and does ``steps`` of one of ``chunks``.

    A step is one run of each slot. ``steps`` and ``chunks`` fix the order of additions and ``mixing`` the rounding,
    so they depend on the matrix alone, not on N; so does the number of rows (examples x slots) of a product.
    """

    mixing: int
    examples: int
    slots: int
    steps: int
    chunks: int
    warps: int
    stages: int


def config(
    n_examples: int, short: int, long: int, dim: int, block: int, mode: int, dtype: torch.dtype, capability: int
) -> Tile:
    """The tile of one call. Chunks exist because slots x examples alone are too few programs to fill a GPU.

    With one product of 16 examples x 4 slots x 64 entries a gradient entry costs 12 instructions on an H100, which
    moves its 2 bytes in the time of 19. An A100 keeps all of H in registers, where two tf32 parts do not fit.
    """
    slots = dim // block
    mixing = BUTTERFLIES
    if MIN_PRODUCT <= block <= MAX_PRODUCT:
        if mode in (MODE_NONE, MODE_SIGN) and dtype.itemsize == 2:
            mixing = PRODUCT
        elif 90 <= capability < 120:
            mixing = SPLIT_PRODUCT
    if mixing == BUTTERFLIES:
        # 512 positions x 4 examples: 16 values a thread, over which the cost of its signs is spread.
        examples = min(4, triton.next_power_of_2(n_examples), max(1, 2048 // block))
        width = min(max(1, 512 // block), triton.next_power_of_2(slots))
        warps, stages = (4 if examples * width * block <= 2048 else 16), 1
    else:
        rows = 64 if block >= 64 else 128  # 64 is the fewest that an H100's products have
        width = min(rows // min(16, triton.next_power_of_2(n_examples)), triton.next_power_of_2(slots))
        examples = rows // width
        # Four warps of a B200 keep two words of one product on the stack.
        warps = 8 if rows * block > 4096 or (mixing == PRODUCT and capability >= 100) else 4
        stages = min(4, 1 + _IN_FLIGHT // (rows * block * dtype.itemsize))
    total = -(-short * -(-long // block) // slots)
    steps, chunks = chunked(total, 8)
    return Tile(mixing, examples, width, steps, chunks, warps, stages)


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


@triton.jit
def rows(x: tl.tensor, EXAMPLES: tl.constexpr) -> tl.tensor:
    """(SLOTS, B) for every example: (EXAMPLES · SLOTS, B). The compiler makes one copy a thread, whatever EXAMPLES."""
    shared = tl.broadcast_to(x[None, :, :], (EXAMPLES, x.shape[0], x.shape[1]))
    return tl.reshape(shared, (EXAMPLES * x.shape[0], x.shape[1]))


@triton.jit
def run_entries(
    q: tl.tensor, s: tl.tensor, n_short: tl.tensor, n_long: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Offsets in the matrix of runs' entries and where these exist: (M, BLOCK); run i is s + S·q, s < 2·S, of (M,)."""
    carry = s >= n_short
    long = (q + carry.to(tl.int64))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    short = tl.where(carry, s - n_short, s).to(tl.int64)
    return short[:, None] * n_long + long, long < n_long


@triton.jit(do_not_specialize=(*WORDS, *COUNTS))
def srht_kernel(
    grads_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, out_ptr: tl.tensor,
    n_examples: tl.tensor, grads_stride: tl.tensor, out_stride: tl.tensor, chunk_stride: tl.tensor,
    n_short: tl.tensor, n_long: tl.tensor, n_slots: tl.tensor, n_groups: tl.tensor, n_steps: tl.tensor,
    base_lo: tl.tensor, base_hi: tl.tensor, seed_lo: tl.tensor, seed_hi: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor, scale: tl.tensor,
    MODE: tl.constexpr, MIXING: tl.constexpr, BITS: tl.constexpr, ADD: tl.constexpr,
    EXAMPLES: tl.constexpr, SLOTS: tl.constexpr, LOG_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program: the runs of one chunk that fall on SLOTS slots, for EXAMPLES examples (fastest, to share L2).

    The loop keeps the chunk's next run as (short index s, position q along the long side) instead of dividing; runs
    past the end of the matrix are masked by their position. Gradients are indexed by the product's rows, since a
    reshaped load makes Triton 3.6 draw every sign twice; tables and signs, which examples share, by (SLOTS, BLOCK).
    """
    BLOCK: tl.constexpr = 2**LOG_BLOCK
    ROWS: tl.constexpr = EXAMPLES * SLOTS
    DTYPE: tl.constexpr = grads_ptr.dtype.element_ty
    n_tiles = tl.cdiv(n_examples, EXAMPLES)
    pid = tl.program_id(0)
    group = (pid // n_tiles) % n_groups
    chunk = pid // n_tiles // n_groups
    base = join_words(base_lo, base_hi)
    seed = join_words(seed_lo, seed_hi)
    base_slot = (base % n_slots).to(tl.int32)
    slot = group * SLOTS + tl.arange(0, SLOTS)
    first = tl.where(slot >= base_slot, slot - base_slot, slot - base_slot + n_slots)  # this matrix's first run there
    row = tl.arange(0, ROWS)  # of the product: the slots of the first example, of the second, ...
    example = (pid % n_tiles) * EXAMPLES + row // SLOTS
    row_slot = group * SLOTS + row % SLOTS
    row_first = tl.where(row_slot >= base_slot, row_slot - base_slot, row_slot - base_slot + n_slots)
    owned = ((example < n_examples) & (row_slot < n_slots))[:, None]
    rows_ptr = grads_ptr + (example.to(tl.int64) * grads_stride)[:, None]
    run = chunk.to(tl.int64) * n_steps * n_slots
    q, s = run // n_short, (run % n_short).to(tl.int32)
    if MIXING == _PRODUCT:
        h = hadamard_matrix(BLOCK, DTYPE)
    elif MIXING != _BUTTERFLIES:
        h = hadamard_matrix(BLOCK, tl.float32)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(n_steps):
        offset, live = run_entries(q + row_first // n_short, s + row_first % n_short, n_short, n_long, BLOCK)
        g = tl.load(rows_ptr + offset, mask=live & owned, other=0.0)  # (ROWS, BLOCK)
        offset, live = run_entries(q + first // n_short, s + first % n_short, n_short, n_long, BLOCK)
        u = tl.reshape(g.to(tl.float32), (EXAMPLES, SLOTS, BLOCK))
        live = (live & (slot < n_slots)[:, None])[None, :, :]
        u = precondition(u, a_ptr, b_ptr, offset[None, :, :], live, alpha, gamma, e, MODE)
        before = sign_mask(base + run + first, 0, seed, TAG_SRHT_IN, BLOCK)  # (SLOTS, BLOCK)
        after = sign_mask(base + run + first, 0, seed, TAG_SRHT_OUT, BLOCK)
        if MIXING == _BUTTERFLIES:
            mixed = flip(hadamard(flip(u, before[None, :, :]), LOG_BLOCK), after[None, :, :])
            acc += tl.reshape(mixed, (ROWS, BLOCK))
        elif MIXING == _PRODUCT:
            u = flip(tl.reshape(u.to(DTYPE), (ROWS, BLOCK)), rows(before, EXAMPLES))
            acc += flip(tl.dot(u, h), rows(after, EXAMPLES))
        else:
            u = flip(tl.reshape(u, (ROWS, BLOCK)), rows(before, EXAMPLES))
            acc += flip(mix(u, h, BITS), rows(after, EXAMPLES))
        run += n_slots
        s += n_slots % n_short
        wrap = s >= n_short
        q += n_slots // n_short + wrap.to(tl.int64)
        s = tl.where(wrap, s - n_short, s)
    acc *= scale
    feature = row_slot[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    out = out_ptr + chunk.to(tl.int64) * chunk_stride + (example.to(tl.int64) * out_stride)[:, None] + feature
    if ADD:
        acc += tl.load(out, mask=owned, other=0.0)
    tl.store(out, acc, mask=owned)


def accumulate_srht(
    features: Tensor, grads: Tensor, rho_base: int, block: int, seed: int, mode: int = MODE_NONE,
    table_a: Tensor | None = None, table_b: Tensor | None = None,
    alpha: float = 1.0, gamma: float = 0.0, e: float = 0.0,
) -> None:  # fmt: skip
    """Features (N, K) += blocked SRHT of the preconditioned grads (N, S, L), whose first run is number ``rho_base``.

    ``block`` is B, a power of two up to MAX_BLOCK that divides K. Grads are bfloat16, float16 or float32, (S, L)
    contiguous, as are rows of features; up to 2^36 entries. ``mode`` and what follows is the rule
    (``less_fast.ops.rule``): its code, tables (S, L) float32 and scalars.
    """
    n, short, long = grads.shape
    dim = features.shape[1]
    if n == 0:
        return
    tile = config(n, short, long, dim, block, mode, grads.dtype, capability_of(grads))
    slots = dim // block
    groups = -(-slots // tile.slots)
    with on_device(features):
        out, chunk_stride = output(features, tile.chunks)
        srht_kernel[(-(-n // tile.examples) * groups * tile.chunks,)](
            grads, *or_grads(grads, table_a, table_b), out, n, grads.stride(0), out.stride(-2), chunk_stride,
            short, long, slots, groups, tile.steps,
            *split_words(rho_base), *split_words(seed), alpha, gamma, e, 1 / math.sqrt(block),
            MODE=mode_of(mode, e), MIXING=tile.mixing, BITS=TF32_BITS, ADD=tile.chunks == 1,
            EXAMPLES=tile.examples, SLOTS=tile.slots, LOG_BLOCK=block.bit_length() - 1,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
        add_chunks(features, out)
