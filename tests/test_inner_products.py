"""Inner products of stored codes with queries on the CPU: accuracy, exactness, equal bits, refusals."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from less_fast.errors import LessFastError, UnsupportedBackendError
from less_fast.ops import inner_products as module
from less_fast.ops.inner_products import default_threads, inner_products, inner_products_bits

Array = NDArray[Any]

DTYPES = ("float32", "float16", "bfloat16", "int8", "1bit")
INSTRUCTIONS = ("portable", "avx2", "avx512")
DIMS = (1, 7, 8, 63, 64, 100, 1000, 8192)
COUNTS = (1, 2, 3, 9, 57)

needs_module = pytest.mark.skipif(module.CPU is None, reason=str(module.MISSING))


@pytest.fixture(params=(*INSTRUCTIONS, "reference"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the C++ module, and numpy."""
    if request.param == "reference":
        yield "reference"
        return
    if module.CPU is None:
        pytest.skip(str(module.MISSING))
    level = INSTRUCTIONS.index(request.param)
    try:
        if module.CPU.use_instructions(level) < level:
            pytest.skip(f"this CPU has no {request.param}")
        yield "cpu"
    finally:
        module.CPU.use_instructions(len(INSTRUCTIONS) - 1)


def random_codes(dtype: str, n: int, dim: int, rng: np.random.Generator) -> Array:
    """Codes as a store has them: entries of one row differ much in size, 1bit rows end in zeros."""
    if dtype == "1bit":
        return np.packbits(rng.random((n, dim)) < 0.5, axis=1, bitorder="little")
    if dtype == "int8":
        return rng.integers(-127, 128, (n, dim), np.int8)
    values = np.ldexp(rng.uniform(-1, 1, (n, dim)), rng.integers(-5, 15, (n, dim))).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)


def values_of(codes: Array, dtype: str, dim: int) -> Array:
    """The numbers that codes stand for, float64."""
    if dtype == "1bit":
        return 1.0 - 2.0 * np.unpackbits(codes, axis=1, count=dim, bitorder="little")
    if dtype == "bfloat16":
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return codes.astype(np.float64)


def random_floats(*shape: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)


def products(codes: Array, dtype: str, dim: int, queries: Array, **options: Any) -> NDArray[np.float32]:
    out = np.full((len(codes), len(queries)), np.nan, np.float32)
    factor = options.pop("factor", np.ones(len(codes), np.float32))
    inner_products(codes, dtype, dim, queries, factor, out, **options)
    return out


class Guarded:
    """Memory between two pages that end the process when they are touched."""

    def __init__(self, pages: int) -> None:
        self._memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._end = (pages + 1) * mmap.PAGESIZE
        for page in (0, self._end):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), mmap.PAGESIZE, 0) == 0

    def hold(self, values: Array, last: bool) -> Array:
        """A copy that ends right before the page behind it, or begins right after the one before it."""
        offset = self._end - values.nbytes if last else mmap.PAGESIZE
        copy: Array = np.ndarray(values.shape, values.dtype, self._memory, offset)
        copy[...] = values
        return copy


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_as_accurate_as_float32_ones(backend: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for dim in DIMS:
        for count in (*COUNTS, 97, 285) if dim < 1000 else COUNTS:
            codes, queries = random_codes(dtype, 13, dim, rng), random_floats(count, dim, rng=rng)
            factor, values = random_floats(13, rng=rng), values_of(codes, dtype, dim)
            found = products(codes, dtype, dim, queries, factor=factor, backend=backend)
            exact = factor[:, None].astype(np.float64) * (values @ queries.T.astype(np.float64))
            plain = factor[:, None] * (values.astype(np.float32) @ queries.T)
            assert rms(found - exact) <= 2 * rms(plain - exact) + 1e-6 * rms(exact), (dim, count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages as Linux does")
@pytest.mark.parametrize("last", [True, False], ids=["at the end", "at the start"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beyond_the_codes_is_read(backend: str, dtype: str, last: bool) -> None:
    """Rows may be the last bytes of a file: a read past them would end the process."""
    rng = np.random.default_rng(3)
    places = [Guarded(16) for _ in range(4)]
    for dim in (*range(1, 70), 127, 128, 129, 255, 257, 1023, 1025):
        n, count = 1 + dim % 9, 1 + dim % 11
        codes = places[0].hold(random_codes(dtype, n, dim, rng), last)
        factor = places[1].hold(random_floats(n, rng=rng), last)
        queries = places[2].hold(random_floats(count, dim, rng=rng), last)
        out = places[3].hold(np.zeros((n, count), np.float32), last)
        inner_products(codes, dtype, dim, queries, factor, out, backend=backend, threads=1)
        exact = factor[:, None] * (values_of(codes, dtype, dim) @ queries.T.astype(np.float64))
        assert rms(out - exact) <= 1e-5 * rms(exact)
        if dtype == "1bit":
            bits = places[2].hold(random_codes("1bit", count, dim, rng), last)
            inner_products_bits(codes, dim, bits, factor, np.ones(count, np.float32), out, backend=backend, threads=1)
            counted = factor[:, None] * (values_of(codes, "1bit", dim) @ values_of(bits, "1bit", dim).T)
            np.testing.assert_allclose(out, counted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_and_sums_are_exact_where_all_numbers_are_small_integers(backend: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    n, dim, count = 101, 1100, 13
    codes = random_codes(dtype, n, dim, rng)
    if dtype != "1bit":
        small = rng.integers(-100, 101, (n, dim)).astype(np.int8 if dtype == "int8" else np.float32)
        codes = (small.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else small.astype(dtype)
    queries = rng.integers(-9, 10, (count, dim)).astype(np.float32)
    factor = np.ldexp(np.float32(1), rng.integers(-3, 4, n)).astype(np.float32)
    expected = factor[:, None] * (values_of(codes, dtype, dim) @ queries.T)
    wide = np.full((n, count + 2), 7, np.float32)
    out = wide[:, 1:-1]
    inner_products(codes, dtype, dim, queries, factor, out, backend=backend)
    np.testing.assert_array_equal(out, expected)
    inner_products(codes, dtype, dim, queries, factor, out, accumulate=True, backend=backend)
    np.testing.assert_array_equal(out, 2 * expected)
    np.testing.assert_array_equal(wide[:, [0, -1]], 7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_every_finite_code_is_decoded_exactly(backend: str, dtype: str) -> None:
    patterns = np.arange(256, dtype=np.uint8) if dtype == "int8" else np.arange(65536, dtype=np.uint16)
    codes = (patterns if dtype == "bfloat16" else patterns.view(dtype)).reshape(-1, 64).copy()
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(values_of(codes, dtype, 64))
    codes[~finite] = 0
    found = products(codes, dtype, 64, np.eye(64, dtype=np.float32), backend=backend)
    np.testing.assert_array_equal(found, values_of(codes, dtype, 64))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_code_that_is_not_finite_shows_in_its_row_alone(backend: str, dtype: str, value: float) -> None:
    rng = np.random.default_rng(3)
    codes = random_codes(dtype, 30, 77, rng)
    bad = np.array([value], np.float32)
    codes[17, 70] = bad.view(np.uint32)[0] >> 16 if dtype == "bfloat16" else value
    for count in (1, 20):
        found = products(codes, dtype, 77, random_floats(count, 77, rng=rng), backend=backend)
        np.testing.assert_array_equal(np.isfinite(found), np.arange(30)[:, None] != np.full(count, 17))


@needs_module
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, count", [(2500, 1), (2500, 7), (77, 130)])
def test_bits_depend_on_neither_threads_nor_the_other_rows(dtype: str, dim: int, count: int, backend: str) -> None:
    if backend == "reference":
        pytest.skip("numpy promises no bits")
    rng = np.random.default_rng(4)
    n = 1100
    codes, queries = random_codes(dtype, n, dim, rng), random_floats(count, dim, rng=rng)
    factor = random_floats(n, rng=rng)
    whole = products(codes, dtype, dim, queries, factor=factor, threads=1)
    for threads in (2, 5):
        again = products(codes, dtype, dim, queries, factor=factor, threads=threads)
        np.testing.assert_array_equal(again.view(np.uint32), whole.view(np.uint32))
    pieces = np.empty_like(whole)
    for start, stop in [(0, 1), (1, 4), (4, 101), (101, 614), (614, n)]:
        inner_products(codes[start:stop], dtype, dim, queries, factor[start:stop], pieces[start:stop])
    np.testing.assert_array_equal(pieces.view(np.uint32), whole.view(np.uint32))


@needs_module
def test_callers_on_several_threads_get_the_same_bits() -> None:
    rng = np.random.default_rng(5)
    codes, queries = random_codes("1bit", 3000, 512, rng), random_floats(9, 512, rng=rng)
    expected = products(codes, "1bit", 512, queries, threads=1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: products(codes, "1bit", 512, queries, threads=3), range(16)))
    for one in found:
        np.testing.assert_array_equal(one, expected)


@settings(max_examples=60, deadline=None)
@given(dim=st.integers(1, 9000), n=st.integers(1, 9), count=st.integers(1, 12), seed=st.integers(0, 99))
def check_counts(backend: str, dim: int, n: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, queries = random_codes("1bit", n, dim, rng), random_codes("1bit", count, dim, rng)
    expected = values_of(codes, "1bit", dim) @ values_of(queries, "1bit", dim).T
    out = np.full((n, count), np.nan, np.float32)
    factor, query_factor = np.full(n, 0.5, np.float32), np.arange(1, count + 1, dtype=np.float32)
    inner_products_bits(codes, dim, queries, factor, query_factor, out, backend=backend)
    np.testing.assert_array_equal(out, 0.5 * query_factor * expected)
    inner_products_bits(codes, dim, queries, factor, query_factor, out, accumulate=True, backend=backend)
    np.testing.assert_array_equal(out, query_factor * expected)


def test_counts_of_bits_are_exact(backend: str) -> None:
    check_counts(backend)


@pytest.mark.parametrize("dim", [1984, 1985, 7936, 8000, 8192, 16384])
def test_counts_do_not_overflow_where_every_bit_differs(backend: str, dim: int) -> None:
    codes = random_codes("1bit", 300, dim, np.random.default_rng(6))
    opposite = np.packbits(np.unpackbits(codes, axis=1, count=dim, bitorder="little") == 0, axis=1, bitorder="little")
    out, ones = np.empty((300, 300), np.float32), np.ones(300, np.float32)
    inner_products_bits(codes, dim, opposite, ones, ones, out, threads=2, backend=backend)
    np.testing.assert_array_equal(np.diag(out), -dim)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    dim=st.integers(1, 300),
    n=st.integers(1, 40),
    count=st.integers(1, 30),
    skipped=st.integers(0, 9),
    gap=st.integers(0, 5),
)
def test_codes_may_lie_on_any_address_and_rows_apart(
    dtype: str, dim: int, n: int, count: int, skipped: int, gap: int
) -> None:
    rng = np.random.default_rng(7)
    codes, queries = random_codes(dtype, n, dim, rng), random_floats(count, dim, rng=rng)
    stride = codes[0].nbytes + gap
    memory = np.full(skipped + n * stride, 0xFF, np.uint8)
    moved: Array = np.ndarray(codes.shape, codes.dtype, memory.data, skipped, (stride, codes.itemsize))
    moved[:] = codes
    expected = products(codes, dtype, dim, queries)
    np.testing.assert_array_equal(products(moved, dtype, dim, queries), expected)


def test_a_read_only_memory_map_is_read_in_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    codes, queries = random_codes("float16", 700, 333, rng), random_floats(5, 333, rng=rng)
    path = tmp_path / "codes"
    path.write_bytes(b"header!" + codes.tobytes())
    mapped = np.memmap(path, np.float16, "r", offset=7, shape=codes.shape)
    np.testing.assert_array_equal(products(mapped, "float16", 333, queries), products(codes, "float16", 333, queries))


def test_no_rows_and_no_queries_are_no_work(backend: str) -> None:
    assert products(np.empty((0, 8), np.int8), "int8", 8, np.ones((3, 8), np.float32), backend=backend).shape == (0, 3)
    assert products(np.ones((4, 8), np.int8), "int8", 8, np.ones((0, 8), np.float32), backend=backend).shape == (4, 0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": "float64"}, "codes are 'float64'; expected one of float32"),
        ({"dim": 9}, r"int8 \(4, 8\); expected int8 \(4, 9\)"),
        ({"dim": 0}, "0 features"),
        ({"codes": np.ones((4, 8), np.uint8)}, "expected int8"),
        ({"codes": np.ones((8, 4), np.int8).T}, "contiguous rows"),
        ({"queries": np.ones((3, 8))}, r"queries are float64 \(3, 8\)"),
        ({"queries": np.ones((3, 7), np.float32)}, r"queries .* expected contiguous float32 \(3, 8\)"),
        ({"queries": np.ones((8, 3), np.float32).T}, "queries are non-contiguous"),
        ({"factor": np.ones(8, np.float32)[::2]}, "factor are non-contiguous"),
        ({"factor": np.ones(5, np.float32)}, r"expected int8 \(5, 8\)"),
        ({"out": np.ones((4, 2), np.float32)}, r"out is float32 \(4, 2\); expected writeable float32 \(4, 3\)"),
        ({"out": np.ones((3, 4), np.float32).T}, "out is non-contiguous"),
        ({"out": np.broadcast_to(np.float32(1), (4, 3))}, "writeable"),
        ({"threads": 0}, "threads is 0"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "codes": np.ones((4, 8), np.int8),
        "dtype": "int8",
        "dim": 8,
        "queries": np.ones((3, 8), np.float32),
        "factor": np.ones(4, np.float32),
        "out": np.zeros((4, 3), np.float32),
    }
    with pytest.raises(LessFastError, match=words) as refusal:
        inner_products(**{**arguments, **change})
    assert "\n" not in str(refusal.value)


def test_query_bits_that_do_not_fit_are_refused() -> None:
    codes, ones, out = np.zeros((2, 4), np.uint8), np.ones(2, np.float32), np.zeros((2, 2), np.float32)
    inner_products_bits(codes, 31, codes, ones, ones, out)
    with pytest.raises(LessFastError, match=r"query codes are uint8 \(2, 3\)"):
        inner_products_bits(codes, 31, codes[:, :3].copy(), ones, ones, out)
    with pytest.raises(LessFastError, match="query codes are not contiguous"):
        inner_products_bits(codes, 31, np.zeros((4, 4), np.uint8)[::2], ones, ones, out)
    with pytest.raises(LessFastError, match="query factor"):
        inner_products_bits(codes, 31, codes, ones, np.ones(3, np.float32), out)


def test_numpy_takes_over_where_the_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.array([[1, 2], [3, 4]], np.int8)
    monkeypatch.setattr(module, "CPU", None)
    monkeypatch.setattr(module, "MISSING", "there was no compiler")
    np.testing.assert_array_equal(products(codes, "int8", 2, np.eye(2, dtype=np.float32)), codes)
    with pytest.raises(UnsupportedBackendError, match="there was no compiler"):
        products(codes, "int8", 2, np.eye(2, dtype=np.float32), backend="cpu")


def test_threads_are_those_that_openmp_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in [("3", 3), ("5,2", 5)]:
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert default_threads() == expected
    for text in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert default_threads() >= 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    unset = default_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "-1")
    assert default_threads() == unset


def test_torch_is_not_imported(tmp_path: Path) -> None:
    program = "import sys, less_fast.ops.inner_products; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
