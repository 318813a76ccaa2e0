"""``outer_products``: per-example sums of outer products, the gradients of one Linear's weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def outer_products(
    left: Tensor, right: Tensor, start: int, stop: int, out: Tensor, lengths: Sequence[int] | None = None
) -> None:
    """out[n − start] = Σ_t left[n, t] right[n, t]ᵀ over the tokens of examples n in [start, stop), in float32.

    Parameters
    ----------
    left, right : (N, T, S) and (N, T, L), padded tokens being zero in one of them; or (1, ΣT, S) and (1, ΣT, L) with
        the examples one after the other.
    out : float32 (stop − start, S, L), contiguous; every entry is written.
    lengths : tokens of every example, for the second form; None for the first.
    """
    if lengths is None:
        left, right = left[start:stop].transpose(1, 2), right[start:stop]
        if left.dtype == right.dtype == torch.float32:
            torch.bmm(left, right, out=out)
        elif left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16):
            torch.bmm(left, right, out_dtype=torch.float32, out=out)
        else:
            torch.bmm(left.float(), right.float(), out=out)
        return
    token = sum(lengths[:start])
    for n in range(start, stop):
        rows = slice(token, token + lengths[n])
        torch.mm(left[0, rows].float().T, right[0, rows].float(), out=out[n - start])
        token += lengths[n]
