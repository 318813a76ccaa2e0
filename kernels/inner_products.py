"""Inner products of stored codes with queries on tensor cores: codes are converted in registers, never in memory.

A tensor core multiplies 16-bit floats exactly, so both factors are cut into parts that are exact in 16 bits. int8, ±1
and bfloat16 codes are bfloat16 as they are, and a float32 query is three bfloat16 parts; float16 codes meet three
float16 parts; a float32 code is three bfloat16 parts too, and of the nine products the three below 2^-24 of the whole
are left out. Bits meet bits as int8 with int32 sums, exactly. What tensor cores add up they round towards zero, so
they add up one step of K only and the steps are added outside, in order: no atomics, and equal calls give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from less_fast.kernels.accumulate import capability_of
from less_fast.kernels.mix import BFLOAT16_BITS, round_bits
from less_fast.kernels.philox import on_device
from torch import Tensor

FEW_QUERIES, MOST_QUERIES = 16, 64  # of one program
MAX_SIGN_DIM = 2**24  # up to which sums of ±1 are exact in float32
_SIGN = 64  # what a bit counts in sums of bits, so that it need not be moved to the bottom of its byte
_COUNTS = ("n_rows", "n_queries", "n_steps", "n_tiles")
_SHIFT = tl.constexpr(_SIGN.bit_length() - 2)


@dataclass(frozen=True)
class Tile:
    """How a call is cut: a program owns ``rows`` x ``queries`` inner products, and adds ``step`` features at a time.

    ``planes``: 8 where codes are bits, and then plane b of a step holds the features at bit b of its bytes; else 1.
    ``step`` and ``planes`` fix the order of additions, and depend on the dtypes alone.
    """

    rows: int
    queries: int
    step: int
    planes: int
    warps: int
    stages: int


def config(n_queries: int, codes: torch.dtype, parts: torch.dtype, capability: int) -> Tile:
    """The tile for ``codes`` of uint8 (bits), int8, bfloat16, float16 or float32 and ``parts`` of queries.

    A query has six bytes a feature and a code mostly one, so tiles with more rows than queries read the least from L2.
    """
    queries = queries_of(n_queries)
    step, planes = steps_of(codes, parts)
    unpacked = planes == 8 and parts != torch.int8
    if unpacked and 100 <= capability < 120:  # Triton 3.6 gives each of 24 products tensor memory of its own
        queries = FEW_QUERIES
    large = queries == MOST_QUERIES
    # What converts codes at length has no registers for 256 rows.
    rows = 256 if large and 90 <= capability < 100 and not unpacked and codes != torch.float32 else 128
    warps = 8 if large and not 100 <= capability < 120 else 4
    stages = 2 if planes == 8 and not 90 <= capability < 120 else 3  # 99 KB of shared memory are all that some have
    return Tile(rows, queries, step, planes, warps, stages)


def queries_of(n_queries: int) -> int:
    """Queries are padded to a multiple of this, which is that of one program or a multiple of it."""
    return FEW_QUERIES if n_queries <= FEW_QUERIES else MOST_QUERIES


def steps_of(codes: torch.dtype, parts: torch.dtype) -> tuple[int, int]:
    """Features of a step and planes of a byte."""
    if codes == torch.uint8:
        return (256 if parts == torch.int8 else 128), 8
    return (32 if codes == torch.float32 else 64), 1


def part_dtype(codes: torch.dtype) -> torch.dtype:
    """What float32 queries are cut into for ``codes``."""
    return torch.float16 if codes == torch.float16 else torch.bfloat16


def query_parts(queries: Tensor, codes: torch.dtype) -> Tensor:
    """Float32 (Q, K), at most 1 in size (2^15 for float16 codes), as three parts that add up to it, low bits last.

    (3, Q, K) in ``part_dtype(codes)``, laid out as the kernel reads it: padded with zeros, plane by plane.
    """
    dtype = part_dtype(codes)
    parts, rest = [], queries
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return _laid_out(torch.stack(parts), *steps_of(codes, dtype))


def sign_parts(signs: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ±1 (Q, K) as the kernel reads them, int8 (1, Q, K), and their sums, int32 (Q,).

    Bit b of a byte that is masked, not moved, counts 2^b (bit 7, moved down with its sign, -1): weights make all equal.
    """
    laid_out = _laid_out(signs[None], *steps_of(torch.uint8, torch.int8))
    weights = torch.tensor([_SIGN >> b for b in range(7)] + [-_SIGN], dtype=torch.int8, device=signs.device)
    step, planes = steps_of(torch.uint8, torch.int8)
    weighted = laid_out.view(*laid_out.shape[:2], -1, planes, step // planes) * weights[:, None]
    return weighted.view(laid_out.shape), signs.sum(1, dtype=torch.int32)


def _laid_out(parts: Tensor, step: int, planes: int) -> Tensor:
    """(P, Q, K) padded with zeros to whole programs and steps, plane by plane within a step."""
    _, n, dim = parts.shape
    rows = queries_of(n)
    padded = torch.nn.functional.pad(parts, (0, -dim % step, 0, -n % rows))
    return padded.view(*padded.shape[:2], -1, step // planes, planes).transpose(3, 4).reshape(padded.shape).contiguous()


@triton.jit
def code_operand(c: tl.tensor, PLANE: tl.constexpr, PLANES: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Codes as a product's operand: numbers in DTYPE; of bytes, the ±1 of bit PLANE; or for int8, 2^b (-1) if set."""
    if PLANES == 1:
        a = c.to(DTYPE)
    elif tl.int8 == DTYPE:
        if PLANE == 7:
            a = c.to(tl.int8, bitcast=True) >> 7
        else:
            a = (c & (1 << PLANE)).to(tl.int8, bitcast=True)
    else:
        sign = (c.to(tl.int32) << (31 - PLANE)) & -2147483648
        a = (sign | 0x3F800000).to(tl.float32, bitcast=True).to(DTYPE)
    return a


@triton.jit
def query_operand(start: tl.tensor, part_stride: tl.tensor, PART: tl.constexpr) -> tl.tensor:
    """One part of the queries of one plane of a step: (K, QUERIES). Padding is in memory, so nothing is masked."""
    return tl.trans(tl.load(start + PART * part_stride.to(tl.int64)))


@triton.jit(do_not_specialize=_COUNTS)
def inner_products_kernel(
    codes_ptr: tl.tensor, parts_ptr: tl.tensor, factor_ptr: tl.tensor, query_factor_ptr: tl.tensor,
    query_sum_ptr: tl.tensor, out_ptr: tl.tensor,
    n_rows: tl.tensor, n_queries: tl.tensor, n_steps: tl.tensor, n_tiles: tl.tensor, row_length: tl.tensor,
    row_stride: tl.tensor, part_stride: tl.tensor, query_stride: tl.tensor, out_stride: tl.tensor, one: tl.tensor,
    ADD: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, STEP: tl.constexpr,
    PLANES: tl.constexpr,
) -> None:  # fmt: skip
    """One program: ROWS x QUERIES inner products; tiles of queries are fastest, so that L2 serves them the same codes.

    A row is ``row_length`` stored numbers (bytes, of bits). The factor ``one`` keeps the compiler from adding steps
    up on the tensor core.
    """
    DTYPE: tl.constexpr = parts_ptr.dtype.element_ty
    WIDTH: tl.constexpr = STEP // PLANES
    pid = tl.program_id(0)
    row = (pid // n_tiles) * ROWS + tl.arange(0, ROWS)
    query = (pid % n_tiles) * QUERIES + tl.arange(0, QUERIES)
    position = tl.arange(0, WIDTH)
    live, known = row < n_rows, query < n_queries
    code_start = codes_ptr + (row.to(tl.int64) * row_stride)[:, None] + position[None, :]  # (ROWS, WIDTH)
    part_start = parts_ptr + (query.to(tl.int64) * query_stride)[:, None] + position[None, :]  # (QUERIES, WIDTH)
    acc = tl.zeros((ROWS, QUERIES), tl.int32 if tl.int8 == DTYPE else tl.float32)
    for step in range(n_steps):
        here = (step * WIDTH + position < row_length)[None, :]
        c = tl.load(code_start, mask=here & live[:, None], other=0)
        if tl.int8 == DTYPE:
            for plane in tl.static_range(PLANES):
                q = query_operand(part_start + plane * WIDTH, part_stride, 0)
                acc = tl.dot(code_operand(c, plane, PLANES, DTYPE), q, acc, out_dtype=tl.int32)
        else:
            total = tl.zeros((ROWS, QUERIES), tl.float32)
            for plane in tl.static_range(PLANES):
                high = query_operand(part_start + plane * WIDTH, part_stride, 0)
                middle = query_operand(part_start + plane * WIDTH, part_stride, 1)
                low = query_operand(part_start + plane * WIDTH, part_stride, 2)
                if tl.float32 == codes_ptr.dtype.element_ty:
                    c_high = round_bits(c, BITS)
                    c_middle = round_bits(c - c_high, BITS)
                    total = tl.dot((c - c_high - c_middle).to(DTYPE), high, total, input_precision="ieee")
                    total = tl.dot(c_middle.to(DTYPE), middle, total, input_precision="ieee")
                    total = tl.dot(c_middle.to(DTYPE), high, total, input_precision="ieee")
                    a = c_high.to(DTYPE)
                else:
                    a = code_operand(c, plane, PLANES, DTYPE)
                total = tl.dot(a, low, total, input_precision="ieee")
                total = tl.dot(a, middle, total, input_precision="ieee")
                total = tl.dot(a, high, total, input_precision="ieee")
            acc += total * one
        code_start += WIDTH
        part_start += STEP
    if tl.int8 == DTYPE:  # acc: the query's signs where the row's bits are set, 64 times their sum
        acc = tl.load(query_sum_ptr + query, mask=known, other=0)[None, :] - (acc >> _SHIFT)
    factor = tl.load(factor_ptr + row, mask=live, other=0.0)
    query_factor = tl.load(query_factor_ptr + query, mask=known, other=0.0)
    value = acc.to(tl.float32) * query_factor[None, :] * factor[:, None]
    out = out_ptr + (row.to(tl.int64) * out_stride)[:, None] + query[None, :]
    owned = live[:, None] & known[None, :]
    if ADD:
        value += tl.load(out, mask=owned, other=0.0)
    tl.store(out, value, mask=owned)


def constants(tile: Tile, accumulate: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "ADD": accumulate, "BITS": BFLOAT16_BITS, "ROWS": tile.rows, "QUERIES": tile.queries, "STEP": tile.step,
        "PLANES": tile.planes,
    }  # fmt: skip


def inner_products(
    out: Tensor, codes: Tensor, parts: Tensor, factor: Tensor, query_factor: Tensor, query_sum: Tensor | None = None,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """Out (N, Q) = factor · query_factor · codes · queries, or += where ``accumulate``; float32, rows contiguous.

    ``codes``: (N, K) float32, float16, bfloat16 or int8, or uint8 (N, ceil(K / 8)) of bits, rows contiguous.
    ``parts``: what ``query_parts`` makes of the queries for this dtype, or ``sign_parts``, with its ``query_sum``.
    ``factor`` (N,) and ``query_factor`` (Q,) are float32.
    """
    n, n_queries = out.shape
    if n == 0 or n_queries == 0:
        return
    tile = config(n_queries, codes.dtype, parts.dtype, capability_of(codes))
    tiles = -(-n_queries // tile.queries)
    if parts.dtype == torch.bfloat16 and not parts.is_cuda:
        parts = parts.float()  # Triton's interpreter has no products of bfloat16
    with on_device(out):
        inner_products_kernel[(-(-n // tile.rows) * tiles,)](
            codes, parts, factor, query_factor, query_factor if query_sum is None else query_sum, out,
            n, n_queries, parts.shape[2] // tile.step, tiles, codes.shape[1],
            codes.stride(0), parts.stride(0), parts.stride(1), out.stride(0), 1.0,
            **constants(tile, accumulate), num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
