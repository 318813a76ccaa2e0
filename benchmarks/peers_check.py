"""Are a peer's features those of the exact gradients, as far as a random matrix of its own allows?"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Comparison:
    """How far the geometry of the features is from that of the exact vectors; 0 is equal.

    ``cosine_rms``: of the cosines between different examples. ``gram_error``: of the inner products of the examples
    less their mean, relative, after the best common scale; unlike cosines it sees what is left beside a momentum that
    all examples share, and an example with a loss of the wrong scale.
    """

    cosine_rms: float
    gram_error: float


def compare(features: Matrix, exact: Matrix) -> Comparison:
    """Compare (N, K) features with (N, P) vectors; N at least 3."""
    theirs, ours = (np.asarray(x, np.float64) for x in (features, exact))
    other = ~np.eye(len(ours), dtype=bool)
    cosines = [_products(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (theirs, ours)]
    a, b = (_products(x - x.mean(0)) for x in (theirs, ours))
    scale = (a * b).sum() / (a * a).sum()
    return Comparison(
        cosine_rms=float(np.sqrt(np.square((cosines[0] - cosines[1])[other]).mean())),
        gram_error=float(np.linalg.norm(scale * a - b) / np.linalg.norm(b)),
    )


def _products(x: Matrix) -> Matrix:
    return x @ x.T


def chance(n: int, k: int) -> float:
    """About the ``gram_error`` of a dense ±1 projection to K of N vectors that have little to do with each other."""
    return sqrt(n / k)
