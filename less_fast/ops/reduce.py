"""Features of a smaller dim from those of a larger one, where the smaller matrix is a fold or prefix of the larger."""

from __future__ import annotations

import math

from torch import Tensor

from less_fast.projection import Projection


def can_reduce(larger: Projection, smaller: Projection) -> bool:
    """Whether :func:`reduce_features` can make ``smaller``'s features from ``larger``'s."""
    if larger.dim == smaller.dim:
        return larger.same_matrix(smaller)
    if (larger.kind, larger.seed) != (smaller.kind, smaller.seed) or larger.dim < smaller.dim:
        return False
    if smaller.kind in ("rademacher", "gaussian"):
        return True
    if larger.dim % smaller.dim:
        return False
    same_field = {"srht": larger.block == smaller.block, "sjlt": larger.nnz == smaller.nnz}
    return same_field.get(smaller.kind, False)


def reduce_features(features: Tensor, larger: Projection, smaller: Projection) -> Tensor:
    """(N, K) -> (N, K'); requires :func:`can_reduce`.

    ``rademacher`` and ``gaussian`` take a prefix. ``srht`` puts run rho in slot rho mod (K/B), so with K' dividing K
    entries i mod K' are added up; ``sjlt`` puts a word w in bucket w·K >> 32, so neighbours are.
    """
    if larger.dim == smaller.dim:
        return features
    if smaller.kind in ("rademacher", "gaussian"):
        return features[:, : smaller.dim] * math.sqrt(larger.dim / smaller.dim)
    if smaller.kind == "srht":
        return features.unflatten(1, (-1, smaller.dim)).sum(1)
    return features.unflatten(1, (smaller.dim, -1)).sum(2)
