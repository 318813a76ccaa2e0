"""``outer_products``: per-example sums of outer products, the gradients of one Linear's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from less_fast.segments import Segments


class Scratch:
    """A buffer that grows to the largest size asked for: fresh memory costs a page fault for every page."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, device=device)

    def take(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the next call."""
        size = shape[0] * shape[1] * shape[2]
        if self._buffer.numel() < size or self._buffer.dtype != dtype:
            self._buffer = torch.empty(size, dtype=dtype, device=self._buffer.device)
        return self._buffer[:size].view(shape)


def outer_products(left: Tensor, right: Tensor, segments: Segments, start: int, stop: int, out: Tensor) -> None:
    """out[n − start] = Σ_t left[t] right[t]ᵀ over the tokens of examples n in [start, stop), in the dtype of out.

    Parameters
    ----------
    left, right : (tokens, S) and (tokens, L). Where the segments are padded rows, one of the two is zero behind each
        row's tokens, and the sums run over whole rows.
    out : float32 or float64 (stop − start, S, L), contiguous; every entry is written.
    """
    if segments.row_length is not None:
        rows = slice(start * segments.row_length, stop * segments.row_length)
        shape = stop - start, segments.row_length
        left, right = left[rows].unflatten(0, shape).transpose(1, 2), right[rows].unflatten(0, shape)
        if left.dtype == right.dtype == out.dtype:
            torch.bmm(left, right, out=out)
        elif left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16):
            torch.bmm(left, right, out_dtype=torch.float32, out=out)
        else:
            torch.bmm(left.to(out.dtype), right.to(out.dtype), out=out)
        return
    for n in range(start, stop):
        rows = slice(segments.starts[n], segments.starts[n] + segments.lengths[n])
        torch.mm(left[rows].to(out.dtype).T, right[rows].to(out.dtype), out=out[n - start])
