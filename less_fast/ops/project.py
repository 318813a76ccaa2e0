"""``project``: the flat API, for gradients that already exist as an N x P matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from less_fast.errors import LessFastError
from less_fast.layout import ParameterLayout
from less_fast.ops.accumulate import accumulate
from less_fast.projection import Projection

# Entries of a converted chunk (N x columns) where the input is not float32 and contiguous.
_CHUNK = 1 << 22
# Columns of one kernel call: kernels number the entries of a matrix in 32 bits.
_WIDEST = 1 << 30


def project(grads: Tensor, projection: Projection, *, backend: str = "auto") -> Tensor:
    """Pi applied to each row of ``grads``.

    Parameters
    ----------
    grads : (N, P), any floating dtype and device. Read once, in chunks of columns; neither it nor Pi is copied whole.
    projection : what to apply; the flat layout (S = 1, L = P) numbers the entries.
    backend : ``auto``, or one by name; ``reference`` also computes in float64.

    Returns
    -------
    (N, K) in float32, or float64 for float64 input.

    Raises
    ------
    LessFastError
        for a matrix that is not 2-D floating point, or ``identity`` with dim != P.
    """
    if grads.ndim != 2 or not grads.is_floating_point():
        raise LessFastError(
            f"project expects a floating-point (N, P) matrix; got shape {tuple(grads.shape)}, {grads.dtype}"
        )
    n, size = grads.shape
    check_identity(projection, size)
    dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
    features = torch.zeros(n, projection.dim, dtype=dtype, device=grads.device)
    if n == 0 or size == 0:
        return features
    width = min(size, _WIDEST // projection.block * projection.block)
    if grads.dtype != dtype or grads.stride(1) != 1:
        block = projection.block
        width = max(1, _CHUNK // (n * block)) * block
    layout = ParameterLayout.flat(size)
    for start in range(0, size, width):
        stop = min(start + width, size)
        chunk = grads[:, start:stop].to(dtype)
        if chunk.stride(1) != 1:
            chunk = chunk.contiguous()
        piece = layout.parameters[0].slice(start, stop)
        # A chunk starts at a whole run because its width is a multiple of the block.
        accumulate(features, chunk.unsqueeze(1), piece, start // projection.block, projection, backend=backend)
    return features


def check_identity(projection: Projection, size: int) -> None:
    """``identity`` means K = P: raise LessFastError where it does not hold."""
    if projection.kind == "identity" and projection.dim != size:
        raise LessFastError(
            f"projection identity has dim = {projection.dim}, but the gradient has P = {size} entries; use dim={size}"
        )
