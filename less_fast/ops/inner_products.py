"""Inner products of stored codes with queries on the CPU, read straight from the bytes of a store.

Every row is read once and decoded in registers, and a row's result does not depend on how the rows are cut into calls.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import LessFastError, UnsupportedBackendError
from less_fast.ops.native import CPU, MISSING
from less_fast.store.codec import CODECS

Float32 = NDArray[np.float32]
BACKENDS = ("auto", "cpu", "reference")

_CODE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "1bit": 4}
_PRODUCTS_PER_THREAD = 1 << 20  # fewer are done before a thread has woken
_REFERENCE_BYTES = 8 << 20  # of decoded rows at a time


def inner_products(
    codes: NDArray[Any],
    dtype: str,
    dim: int,
    queries: Float32,
    factor: Float32,
    out: Float32,
    *,
    accumulate: bool = False,
    threads: int | None = None,
    backend: str = "auto",
) -> None:
    """Out (n, Q) = factor (n,) · <code, query>, or += where ``accumulate``: float32, as accurate as float32 products.

    Parameters
    ----------
    codes : stored numbers of the store dtype ``dtype``: (n, K) float32, float16, int8 or, for bfloat16, uint16 bit
        patterns; for 1bit uint8 (n, ceil(K / 8)), lowest bit first, of which a set one stands for -1 and a clear one
        for +1. Any memory, a read-only memory map too; each row contiguous.
    dim : K.
    queries : float32 (Q, K), contiguous; for 1bit codes already rotated.
    factor, out : float32 (n,), contiguous, and (n, Q), each row contiguous. ``out`` may be uninitialized where it is
        not added to.
    threads : at most so many; :func:`default_threads` where None. The bits do not depend on it, nor a row's on the
        other rows.
    backend : ``cpu``, the C++ module; ``reference``, numpy; ``auto``, the first of them that is there.

    Raises
    ------
    LessFastError
        where a shape, dtype or layout is another one; UnsupportedBackendError where ``cpu`` is asked for and missing.
    """
    if dtype not in _CODE_TYPES:
        raise LessFastError(f"codes are {dtype!r}; expected one of {', '.join(_CODE_TYPES)}")
    n, n_queries = len(factor), len(queries)
    _check_codes("codes", codes, dtype, n, dim)
    _check("queries", queries, (n_queries, dim))
    _check("factor", factor, (n,))
    _check_out(out, n, n_queries)
    if out.size == 0:
        return
    if _uses_reference(backend):
        for rows in _row_blocks(n, dim):
            _write(out[rows], _decoded(codes[rows], dtype, dim) @ queries.T * factor[rows, None], accumulate)
        return
    _module().inner_products(
        out.ctypes.data,
        out.strides[0] // out.itemsize,
        codes.ctypes.data,
        codes.strides[0],
        _CODE_TYPES[dtype],
        n,
        dim,
        queries.ctypes.data,
        n_queries,
        factor.ctypes.data,
        accumulate,
        _threads(threads, n * dim * n_queries),
    )


def inner_products_bits(
    codes: NDArray[np.uint8],
    dim: int,
    query_codes: NDArray[np.uint8],
    factor: Float32,
    query_factor: Float32,
    out: Float32,
    *,
    accumulate: bool = False,
    threads: int | None = None,
    backend: str = "auto",
) -> None:
    """Out (n, Q) = factor (n,) · query_factor (Q,) · <code, query code>, or += where ``accumulate``.

    Both sides are 1bit codes: uint8 (n, ceil(K / 8)) and, contiguous, (Q, ceil(K / 8)), unused bits 0. Bits that differ
    are counted, so the inner product of the codes is an exact integer before it is rounded to float32. Everything else
    is as in :func:`inner_products`.
    """
    n, n_queries = len(factor), len(query_codes)
    _check_codes("codes", codes, "1bit", n, dim)
    _check_codes("query codes", query_codes, "1bit", n_queries, dim)
    if not query_codes.flags.c_contiguous:
        raise LessFastError("query codes are not contiguous; pass numpy.ascontiguousarray of them")
    _check("factor", factor, (n,))
    _check("query factor", query_factor, (n_queries,))
    _check_out(out, n, n_queries)
    if out.size == 0:
        return
    if _uses_reference(backend):
        queries = _decoded(query_codes, "1bit", dim).T
        for rows in _row_blocks(n, dim):
            counts = _decoded(codes[rows], "1bit", dim) @ queries
            _write(out[rows], counts * (factor[rows, None] * query_factor), accumulate)
        return
    _module().inner_products_bits(
        out.ctypes.data,
        out.strides[0] // out.itemsize,
        codes.ctypes.data,
        codes.strides[0],
        n,
        dim,
        query_codes.ctypes.data,
        n_queries,
        factor.ctypes.data,
        query_factor.ctypes.data,
        accumulate,
        _threads(threads, n * dim * n_queries // 8),
    )


def default_threads() -> int:
    """The first number in OMP_NUM_THREADS where that is set, else the number of CPUs that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if sys.platform.startswith("linux"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(asked: int | None, n_products: int) -> int:
    if asked is not None and asked < 1:
        raise LessFastError(f"threads is {asked}; expected at least 1")
    most = default_threads() if asked is None else asked
    return max(1, min(most, n_products // _PRODUCTS_PER_THREAD))


def _uses_reference(backend: str) -> bool:
    if backend not in BACKENDS:
        raise LessFastError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "cpu" and MISSING is not None:
        raise UnsupportedBackendError(f"backend 'cpu' cannot run: {MISSING}")
    return backend == "reference" or CPU is None


def _module() -> Any:
    return CPU


def _check(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous or not array.flags.aligned:
        raise LessFastError(
            f"{name} are {_described(array)}; expected contiguous float32 {shape}; "
            "numpy.ascontiguousarray and astype make them so"
        )


def _check_codes(name: str, codes: NDArray[Any], dtype: str, n: int, dim: int) -> None:
    if dim < 1:
        raise LessFastError(f"rows have {dim} features; expected at least 1")
    spec = CODECS[dtype].tensors(n, dim)["features"]
    if codes.dtype != np.dtype(spec.dtype) or codes.shape != spec.shape or not codes[:1].flags.c_contiguous:
        raise LessFastError(
            f"{name} are {_described(codes)}; expected {np.dtype(spec.dtype)} {spec.shape} with contiguous rows for "
            f"{dtype} rows of {dim} features"
        )


def _check_out(out: Float32, n: int, n_queries: int) -> None:
    flags = out.flags
    if (
        out.dtype != np.float32
        or out.shape != (n, n_queries)
        or not (flags.writeable and flags.aligned and out[:1].flags.c_contiguous)
        or (out.size > 0 and out.strides[0] % out.itemsize)
    ):
        raise LessFastError(
            f"out is {_described(out)}; expected writeable float32 {(n, n_queries)} with contiguous rows"
        )


def _described(array: NDArray[Any]) -> str:
    kind = "" if array.flags.c_contiguous else "non-contiguous "
    return f"{kind}{array.dtype} {array.shape}"


def _row_blocks(n: int, dim: int) -> list[slice]:
    step = max(1, _REFERENCE_BYTES // (4 * dim))
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def _decoded(codes: NDArray[Any], dtype: str, dim: int) -> Float32:
    return CODECS[dtype].to_float(codes, dim)


def _write(out: Float32, products: Float32, accumulate: bool) -> None:
    if accumulate:
        out += products
    else:
        out[:] = products
