"""Per-example gradient, preconditioner and blocked SRHT of one matrix in one kernel; no gradient in device memory.

For every example: G = sum over its tokens of left (S) times right (L), u = rule(G), features += SRHT(u). A program owns
the runs of one example that fall on the same slots of the features, so that their sum stays in its registers; it adds
that sum to a lane of (lanes, N, K) which no other program of the launch touches. The order of an example's additions
depends on the matrix alone: equal calls give equal bits, whatever the batch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from less_fast.kernels.accumulate import COUNTS, capability_of
from less_fast.kernels.mix import BFLOAT16_BITS, MAX_BLOCK, MIN_BLOCK, TF32_BITS, hadamard_matrix, mix
from less_fast.kernels.philox import flip, on_device, packed_signs
from less_fast.kernels.rule import MODE_NONE, mode_of, precondition
from torch import Tensor

from less_fast.projection import TAG_SRHT_IN, TAG_SRHT_OUT

PLACES = ("first_phase", "n_phases", "phase_stride", "n_layers", "base_slot")  # scalars, as COUNTS are
MAX_ENTRIES = 2**30  # S·L of a matrix: positions in it are 32-bit
LAUNCH_LANES = 4  # lanes per chunk that one launch aims at, where the short side is no divisor of the slots


@dataclass(frozen=True)
class Tile:
    """How a matrix is cut: a program multiplies (rows, tokens) by (tokens, block) for ``runs`` runs at a time.

    ``steps`` and ``chunks`` fix the order of additions; they depend on the matrix and K alone.
    """

    rows: int
    tokens: int
    runs: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """Which runs share a slot, and so a program: those whose positions q along the long side are ``stride`` apart.

    ``phases``: starting positions of one launch, of ``stride`` in all. ``steps``: runs of one program.
    ``chunks``: programs that share those of one phase. ``layers``: lanes that one chunk needs.
    """

    stride: int
    phases: int
    steps: int
    chunks: int
    layers: int

    @property
    def lanes(self) -> int:
        return self.chunks * self.layers


@functools.lru_cache(maxsize=1024)  # asked for at every launch
def plan(short: int, long: int, dim: int, block: int) -> Plan:
    """The plan of a matrix (S, L) for K = ``dim``; a pure function of them."""
    slots = dim // block
    stride = slots // math.gcd(short, slots)
    phases = min(stride, max(1, LAUNCH_LANES * slots // short))
    # Runs of one launch are numbered from the first of its phases; each lane holds one run of every slot.
    layers = -(-phases * short // slots) if phases == stride else -(-phases * short // slots) + 1
    total = triton.cdiv(triton.cdiv(long, block), stride)  # runs of one phase
    # A chunk's sum is read and written once: little beside what it sums, if that is 4 (8, if cheap) runs of 64.
    steps = min(total, 8 if short >= 64 else 4)
    return Plan(stride, phases, steps, -(-total // steps), layers)


@functools.lru_cache(maxsize=1024)
def config(short: int, dtype: torch.dtype, capability: int = 90) -> Tile:
    """The tile for a matrix with ``short`` rows and operands of ``dtype`` on a device of ``capability`` (80, 90, …)."""
    # Larger tiles read less; these are the largest whose registers do not spill.
    wide = 90 <= capability < 120  # products of 64 rows by a group of warps; consumer Blackwell has none
    most = (64 if dtype == torch.float32 else 128) // (1 if wide else 2)
    rows = max(16, min(most, triton.next_power_of_2(short)))
    warps = 4 if rows < (32 if dtype == torch.float32 else 64) else 8
    if dtype == torch.float32:  # three products of half the rate, and twice the shared memory
        return Tile(rows, 16 if rows == 64 else 32, 1, warps, 2)
    if not wide or rows < 64:
        return Tile(rows, 64, 1, warps, 3)
    return Tile(rows, 64, 2, warps, 3) if capability >= 100 else Tile(rows, 32, 2, warps, 4)


@triton.jit
def gradients(
    left_start: tl.tensor, right_start: tl.tensor, length: tl.tensor, in_left: tl.tensor,
    in_right: tl.tensor, in_next: tl.tensor, next_step: tl.tensor, right_stride: tl.tensor, one: tl.tensor,
    LEFT_STRIDE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    RUNS: tl.constexpr, PRODUCT: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """G = leftᵀ right over ``length`` tokens, (ROWS, BLOCK) float32; where RUNS is 2, the columns ``next_step`` on too.

    ``left_start`` (TOKENS, ROWS) and ``right_start`` (TOKENS, BLOCK) point to the first tokens; ``in_left`` (ROWS,),
    ``in_right`` and ``in_next`` (BLOCK,) say which columns exist. Tensor cores round their running sum towards zero;
    float32 operands, which are worth more, are added up outside, and the factor ``one`` keeps the compiler from it.
    """
    g = tl.zeros((ROWS, BLOCK), tl.float32)
    next_g = tl.zeros((ROWS, BLOCK), tl.float32)
    token = tl.arange(0, TOKENS)
    for t in range(0, length, TOKENS):
        here = (t + token < length)[:, None]
        left = tl.trans(tl.load(left_start, mask=here & in_left[None, :], other=0.0))  # (ROWS, TOKENS)
        right = tl.load(right_start, mask=here & in_right[None, :], other=0.0)  # (TOKENS, BLOCK)
        if PRODUCT == "tf32x3":
            g += tl.dot(left, right, input_precision=PRODUCT) * one
        else:
            g = tl.dot(left, right, g, input_precision=PRODUCT)
        if RUNS == 2:
            right = tl.load(right_start + next_step, mask=here & in_next[None, :], other=0.0)
            if PRODUCT == "tf32x3":
                next_g += tl.dot(left, right, input_precision=PRODUCT) * one
            else:
                next_g = tl.dot(left, right, next_g, input_precision=PRODUCT)
        left_start += TOKENS * LEFT_STRIDE
        right_start += TOKENS * right_stride
    return g, next_g


@triton.jit
def sign_bits(words_ptr: tl.tensor, mask: tl.tensor, position: tl.tensor, WORDS: tl.constexpr) -> tl.tensor:
    """Sign bits of positions (B,), at bit 31 of an int32 (M, B), from WORDS packed words at ``words_ptr`` (M,)."""
    word = tl.load(words_ptr, mask=mask, other=0)[:, None]
    for w in tl.static_range(1, WORDS):
        other = tl.load(words_ptr + w, mask=mask, other=0)[:, None]
        word = tl.where((position // 32 == w)[None, :], other, word)
    return (word << (31 - position % 32)[None, :]) & -2147483648


@triton.jit
def mixed_run(
    g: tl.tensor, h: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, signs_ptr: tl.tensor,
    q: tl.tensor, short: tl.tensor, n_long: tl.tensor, alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor,
    N_SHORT: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """D' ∘ (D ∘ rule(g)) H for runs (q, short) of gradients g (ROWS, BLOCK)."""
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    position = tl.arange(0, BLOCK)
    long = q * BLOCK + position
    live = (short < N_SHORT)[:, None] & (long < n_long)[None, :]  # (ROWS, BLOCK)
    offset = short[:, None] * n_long + long[None, :]
    u = precondition(g, a_ptr, b_ptr, offset, live, alpha, gamma, e, MODE)
    run = q * N_SHORT + short  # (ROWS,)
    words_ptr = signs_ptr + run * (2 * WORDS)
    known = (short < N_SHORT) & (run < tl.cdiv(n_long, BLOCK) * N_SHORT)
    mixed = mix(flip(u, sign_bits(words_ptr, known, position, WORDS)), h, BITS)
    return flip(mixed, sign_bits(words_ptr + WORDS, known, position, WORDS))


@triton.jit(do_not_specialize=(*COUNTS, *PLACES))
def outer_sketch_kernel(
    left_ptr: tl.tensor, right_ptr: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, signs_ptr: tl.tensor,
    lanes_ptr: tl.tensor, starts_ptr: tl.tensor, lengths_ptr: tl.tensor,
    n_examples: tl.tensor, right_stride: tl.tensor, lane_stride: tl.tensor, example_stride: tl.tensor,
    n_long: tl.tensor, n_slots: tl.tensor, first_phase: tl.tensor, n_phases: tl.tensor, phase_stride: tl.tensor,
    n_steps: tl.tensor, n_layers: tl.tensor, base_slot: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor, scale: tl.tensor, one: tl.tensor,
    N_SHORT: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    RUNS: tl.constexpr, BITS: tl.constexpr, PRODUCT: tl.constexpr, MIXING: tl.constexpr,
) -> None:  # fmt: skip
    """One program: ROWS short indices of one example, the runs of one phase and chunk."""
    N_TILES: tl.constexpr = (N_SHORT + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    short = (pid % N_TILES) * ROWS + tl.arange(0, ROWS)
    pid = pid // N_TILES
    example = (pid % n_examples).to(tl.int64)  # fastest, so that L2 serves the tables to all examples
    pid = pid // n_examples
    phase = first_phase + pid % n_phases
    chunk = pid // n_phases
    start = tl.load(starts_ptr + example).to(tl.int64)
    length = tl.load(lengths_ptr + example)
    token = tl.arange(0, TOKENS)
    position = tl.arange(0, BLOCK)
    left_start = left_ptr + (start + token)[:, None] * N_SHORT + short[None, :]  # (TOKENS, ROWS)
    right_start = right_ptr + (start + token)[:, None] * right_stride + position[None, :]  # (TOKENS, BLOCK)
    h = hadamard_matrix(BLOCK, MIXING)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(chunk * n_steps, (chunk + 1) * n_steps, RUNS):
        q = phase + step * phase_stride
        long = q * BLOCK + position
        next_step = phase_stride * BLOCK
        g, next_g = gradients(
            left_start, right_start + q * BLOCK, length, short < N_SHORT, long < n_long, long + next_step < n_long,
            next_step, right_stride, one, N_SHORT, ROWS, TOKENS, BLOCK, RUNS, PRODUCT,
        )  # fmt: skip
        acc += mixed_run(g, h, a_ptr, b_ptr, signs_ptr, q, short, n_long, alpha, gamma, e, N_SHORT, MODE, BLOCK, BITS)
        if RUNS == 2:
            acc += mixed_run(
                next_g, h, a_ptr, b_ptr, signs_ptr, q + phase_stride, short, n_long, alpha, gamma, e,
                N_SHORT, MODE, BLOCK, BITS,
            )  # fmt: skip
    run = phase * N_SHORT + short  # as if the matrix had one run per phase; the others fall on the same slots
    layer = run // n_slots - first_phase * N_SHORT // n_slots
    slot = (base_slot + run) % n_slots
    lane = (chunk * n_layers + layer).to(tl.int64)
    out = lanes_ptr + lane[:, None] * lane_stride + example * example_stride + slot[:, None] * BLOCK + position[None, :]
    owned = (short < N_SHORT)[:, None]
    tl.store(out, tl.load(out, mask=owned, other=0.0) + acc * scale, mask=owned)


def constants(
    short: int, dtype: torch.dtype, block: int, mode: int, tile: Tile, *, has_bfloat16: bool = True
) -> dict[str, Any]:
    """What the kernel is compiled for; ``has_bfloat16`` is not so of Triton's interpreter."""
    half = dtype != torch.float32
    return {
        "N_SHORT": short, "MODE": mode, "BLOCK": block, "ROWS": tile.rows, "TOKENS": tile.tokens, "RUNS": tile.runs,
        "BITS": BFLOAT16_BITS if half else TF32_BITS, "PRODUCT": "tf32" if half else "tf32x3",
        "MIXING": tl.bfloat16 if half and has_bfloat16 else tl.float32,
    }  # fmt: skip


def sign_table(run_base: int, n_runs: int, block: int, seed: int, device: torch.device) -> Tensor:
    """Packed sign bits of runs, int32 (n_runs, 2·ceil(B / 32)): those before the mixing, then those after it."""
    tables = [packed_signs(run_base, n_runs, block, tag, seed, device) for tag in (TAG_SRHT_IN, TAG_SRHT_OUT)]
    return torch.cat(tables, 1)


def outer_sketch(
    lanes: Tensor, left: Tensor, right: Tensor, starts: Tensor, lengths: Tensor, signs: Tensor,
    rho_base: int, block: int, mode: int = MODE_NONE, table_a: Tensor | None = None, table_b: Tensor | None = None,
    alpha: float = 1.0, gamma: float = 0.0, e: float = 0.0, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Lanes (W, N, K) += blocked SRHT of rule(sum of left (tokens, S) times right (tokens, L) over each segment).

    ``starts``, ``lengths``: int32 (N,). ``signs``: the matrix's ``sign_table``. ``left`` and ``right`` have one dtype
    (bfloat16, float16, float32) and contiguous rows, those of ``left`` next to each other. W >= ``plan(...).lanes``.
    The rule is as for ``accumulate_srht``.
    """
    n, dim = lanes.shape[1:]
    short, long = left.shape[1], right.shape[1]
    if n == 0:
        return
    cut = plan(short, long, dim, block)
    tile = config(short, left.dtype, capability_of(left)) if tile is None else tile
    slots = dim // block
    a, b = (lanes, lanes) if table_a is None or table_b is None else (table_a, table_b)
    with on_device(lanes):
        for first in range(0, cut.stride, cut.phases):
            phases = min(cut.phases, cut.stride - first)
            outer_sketch_kernel[(-(-short // tile.rows) * n * phases * cut.chunks,)](
                left, right, a, b, signs, lanes, starts, lengths,
                n, right.stride(0), lanes.stride(0), lanes.stride(1), long, slots, first, phases, cut.stride,
                cut.steps, cut.layers, rho_base % slots, alpha, gamma, e, 1 / math.sqrt(block), 1.0,
                **constants(short, left.dtype, block, mode_of(mode, e), tile, has_bfloat16=left.is_cuda),
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
            )  # fmt: skip


def refuses(short: int, long: int) -> str | None:
    """None where the fused kernels can take a matrix (S, L), else the reason why not."""
    if short * long > MAX_ENTRIES:
        return f"the matrix has {short * long} entries, and the fused kernels number up to {MAX_ENTRIES}"
    return None


def refuses_block(block: int) -> str | None:
    """None where :func:`outer_sketch` can mix runs of ``block`` entries, else the reason why not."""
    if not MIN_BLOCK <= block <= MAX_BLOCK:
        return f"block is {block}, and the fused kernel mixes runs of {MIN_BLOCK} to {MAX_BLOCK}"
    return None
