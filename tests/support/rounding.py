"""Products with an explicit matrix, and how far from float64's they may be."""

from __future__ import annotations

from torch import Tensor


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


def assert_product(out: Tensor, x: Tensor, matrix: Tensor) -> None:
    """``out`` is x · matrixᵀ, of a float64 ``matrix`` (outputs, inputs), to the rounding of x's dtype."""
    exact = x.double() @ matrix.T
    in_dtype = x @ matrix.T.to(x.dtype)
    assert out.dtype == x.dtype and out.shape == exact.shape
    assert rms(out - exact) <= 2 * rms(in_dtype - exact) + 1e-6 * rms(exact)
