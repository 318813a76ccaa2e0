"""The Hadamard mixing of runs as a product with a ±1 matrix on tensor cores, in Triton device functions.

±1 is exact in every floating dtype, so the product's only error is that of its other operand, which is cut into a
high and a low part: two bfloat16 parts keep 16 bits of float32's 24, two tf32 parts 22.
"""

from __future__ import annotations

import triton
import triton.language as tl

BFLOAT16_BITS, TF32_BITS = 16, 13  # low bits of a float32 that are not in a bfloat16, in a tf32
MIN_BLOCK, MAX_BLOCK = 16, 128  # run lengths that are mixed by a product


@triton.jit
def hadamard_matrix(BLOCK: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """H_B: (BLOCK, BLOCK) of ±1."""
    i = tl.arange(0, BLOCK)
    parity = i[:, None] & i[None, :]  # (BLOCK, BLOCK)
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return (1 - 2 * (parity & 1)).to(DTYPE)


@triton.jit
def round_bits(x: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Float32 x to the nearest number whose lowest BITS bits are 0; in integers, so that it is one on any device."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    MASK: tl.constexpr = -(1 << BITS)
    return ((x.to(tl.int32, bitcast=True) + HALF) & MASK).to(tl.float32, bitcast=True)


@triton.jit
def mix(u: tl.tensor, h: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """The product of u (M, B) float32 and H_B: float32 (M, B); u is cut into two parts that lack BITS of its bits.

    ``h`` is ``hadamard_matrix`` in bfloat16 (BITS = BFLOAT16_BITS) or float32 (BITS = TF32_BITS; also where Triton's
    interpreter, which has no bfloat16, stands in). A row with a non-finite entry becomes NaN.
    """
    high = round_bits(u, BITS)
    low = u - high
    mixed = tl.dot(low.to(h.dtype), h, input_precision="tf32")
    return tl.dot(high.to(h.dtype), h, mixed, input_precision="tf32")
