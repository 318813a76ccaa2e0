"""The preconditioner of a gradient entry, in Triton device functions: what ``less_fast.ops.rule.Rule`` defines."""

from __future__ import annotations

import triton
import triton.language as tl

# The codes of less_fast.ops.rule.CODES, and Adam's with e = 0, which saves a root.
MODE_NONE, MODE_SIGN, MODE_ADAM, MODE_ADAM_E0 = 0, 1, 2, 3
_NONE, _SIGN, _ADAM = tl.constexpr(MODE_NONE), tl.constexpr(MODE_SIGN), tl.constexpr(MODE_ADAM)
# Smallest normal float32: keeps 0 · inf out of a root.
_TINY = tl.constexpr(1.1754943508222875e-38)


def mode_of(code: int, e: float) -> int:
    """The mode that kernels are compiled for, from a rule's code and e."""
    return MODE_ADAM_E0 if code == MODE_ADAM and e == 0.0 else code


@triton.jit
def precondition(
    g: tl.tensor, a_ptr: tl.tensor, b_ptr: tl.tensor, offset: tl.tensor, mask: tl.tensor,
    alpha: tl.tensor, gamma: tl.tensor, e: tl.tensor, MODE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Map gradients g to u; g's table entries are at ``offset``; where not ``mask``, g must be 0 and so is u.

    Square root and quotient are made of reciprocal square roots, each one instruction and within 2^-22 of exact.
    """
    if MODE == _NONE:
        u = g
    elif MODE == _SIGN:
        u = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g)) + (g - g)  # NaN where g is not finite
    else:
        a = tl.load(a_ptr + offset, mask=mask, other=0.0)
        b = tl.load(b_ptr + offset, mask=mask, other=1.0)
        square = b + gamma * g * g
        if MODE == _ADAM:
            inverse = tl.rsqrt(square * tl.rsqrt(tl.maximum(square, _TINY)) + e)
            inverse *= inverse
        else:
            inverse = tl.rsqrt(square)
        u = (a + alpha * g) * inverse
    return u
