"""``project``: the flat API, for gradients that already exist as an N x P matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from less_fast.errors import LessFastError, UnsupportedBackendError
from less_fast.layout import ParameterLayout
from less_fast.ops.accumulate import accumulate, resolve
from less_fast.projection import Projection

# Entries of a converted chunk (N x columns) where no fast backend takes the input as it is.
_CHUNK = 1 << 22
# Columns of one kernel call.
_WIDEST = 1 << 36
_TILE = 128  # entries that the CPU's dense kinds add up before they touch a feature


def project(grads: Tensor, projection: Projection, *, backend: str = "auto") -> Tensor:
    """Pi applied to each row of ``grads``.

    Parameters
    ----------
    grads : (N, P), any floating dtype and device. Neither it nor Pi is copied whole: kernels
        read the dtypes they take in place, and what they do not is converted a chunk of columns at a time.
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
    grads = grads.resolve_neg()  # kernels read memory, where such a view has the other sign
    n, size = grads.shape
    check_identity(projection, size)
    dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
    features = torch.zeros(n, projection.dim, dtype=dtype, device=grads.device)
    if n == 0 or size == 0:
        return features
    # Chunks are of whole runs, and of whole tiles of the dense kinds: their number depends on N, and bits must not.
    unit = max(projection.block, _TILE)
    width = min(size, _WIDEST // unit * unit)
    in_place = grads.stride(1) == 1 and (grads.dtype == dtype or _taken(features, grads, projection, backend))
    if not in_place:
        width = max(1, _CHUNK // (n * unit)) * unit
    layout = ParameterLayout.flat(size)
    for start in range(0, size, width):
        stop = min(start + width, size)
        chunk = grads[:, start:stop]
        if not in_place:
            chunk = chunk.to(dtype).contiguous()
        piece = layout.parameters[0].slice(start, stop)
        accumulate(features, chunk.unsqueeze(1), piece, start // projection.block, projection, backend=backend)
    return features


def _taken(features: Tensor, grads: Tensor, projection: Projection, backend: str) -> bool:
    """Whether a fast backend takes ``grads`` (N, P) in their own dtype."""
    try:
        return resolve(features, grads.unsqueeze(1), projection, backend) != "reference"
    except UnsupportedBackendError:  # accumulate says why, should it not take the converted ones either
        return False


def check_identity(projection: Projection, size: int) -> None:
    """``identity`` means K = P: raise LessFastError where it does not hold."""
    if projection.kind == "identity" and projection.dim != size:
        raise LessFastError(
            f"projection identity has dim = {projection.dim}, but the gradient has P = {size} entries; use dim={size}"
        )
