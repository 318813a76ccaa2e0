"""The codes of int8 and 1bit stores against definitions written anew in float64, and the bytes of every dtype."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from support.stores import DTYPES, folder_hashes, make_store, open_writer, write_pending

from less_fast.store import FeatureStore, Status
from less_fast.store.codec import CODECS
from less_fast.store.rotation import rotate, rotate_back
from less_fast.store.shard import encode_shard

DIMS = (1, 2, 3, 7, 8, 64, 100, 1000, 8192)
EASY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rotated(x: np.ndarray) -> np.ndarray:
    """R x of the documented R for rows (n, K), in float64: every window a product with an explicit ±1 matrix."""
    dim = x.shape[1]
    m = 2 ** int(math.log2(dim))
    n_bytes = math.ceil(m / 8)
    stream = hashlib.shake_256(b"less_fast 1bit rotation").digest(2 * n_bytes)
    out, places = x.astype(np.float64), np.arange(m, dtype=np.uint16)
    sign = np.array([-1.0 if bin(i).count("1") % 2 else 1.0 for i in range(m)])
    for window, first in enumerate([0] if m == dim else [0, dim - m]):
        drawn = stream[window * n_bytes : (window + 1) * n_bytes]
        signs = np.array([-1.0 if drawn[i // 8] >> (i % 8) & 1 else 1.0 for i in range(m)])
        old = out[:, first : first + m] * signs
        for start in range(0, m, 256):  # rows of H: entry (i, j) is -1 to the number of ones that i and j share
            rows = sign[places[start : start + 256, None] & places]
            out[:, first + start : first + start + len(rows)] = old @ rows.T / math.sqrt(m)
    return out


def draw_rows(n: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def decoded(dtype: str, rows: np.ndarray) -> np.ndarray:
    tensors, out = CODECS[dtype].encode(rows), np.empty_like(rows)
    CODECS[dtype].decode(tensors, slice(None), out)
    return out.astype(np.float64)


# The rotation


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_is_the_documented_one(dim: int) -> None:
    x = draw_rows(5, dim)
    expected = rotated(x)
    size = np.sqrt((expected**2).mean())
    assert np.sqrt(((rotate(x) - expected) ** 2).mean()) <= 1e-6 * size
    assert np.abs(rotate_back(rotate(x)) - x).max() <= 1e-5 * size
    assert np.abs(rotate(rotate_back(x)) - x).max() <= 1e-5 * size
    if dim <= 1000:
        matrix = rotate(np.eye(dim, dtype=np.float32)).astype(np.float64)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=2e-6)
        np.testing.assert_allclose(rotate_back(np.eye(dim, dtype=np.float32)), matrix.T, atol=1e-6)


@pytest.mark.parametrize("dim", [8, 100, 8192])
def test_a_row_is_turned_alike_whatever_it_lies_among(dim: int) -> None:
    x = draw_rows(40, dim)
    for turn in (rotate, rotate_back):
        whole = turn(x)
        np.testing.assert_array_equal(np.concatenate([turn(row[None]) for row in x]), whole)
        np.testing.assert_array_equal(turn(np.asfortranarray(x)), whole)
    np.testing.assert_array_equal(x, draw_rows(40, dim))
    assert rotate(x[:0]).shape == (0, dim)


# The codes


@pytest.mark.parametrize("dim", DIMS)
def test_1bit_codes(dim: int) -> None:
    x = draw_rows(6, dim) * np.float32([[1e-30], [1e-3], [1.0], [7.0], [1e5], [1e30]])
    tensors = CODECS["1bit"].encode(x)
    exact = rotated(x)
    codes, scale = tensors["features"], tensors["scale"]
    assert codes.shape == (6, -(-dim // 8)) and codes.dtype == np.uint8 and scale.dtype == np.float32
    bits = np.array([[row[i // 8] >> (i % 8) & 1 for i in range(8 * codes.shape[1])] for row in codes])
    assert not bits[:, dim:].any()
    clear = np.abs(exact) > 1e-5 * np.sqrt((exact**2).mean(axis=1, keepdims=True))
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(bits[:, :dim][clear], (exact < 0)[clear])
    np.testing.assert_allclose(scale, (exact**2).sum(axis=1) / np.abs(exact).sum(axis=1), rtol=1e-6)
    # The value of a row is R^T(scale * sign).
    np.testing.assert_allclose(rotated(decoded("1bit", x)), scale[:, None] * (1.0 - 2.0 * bits[:, :dim]), rtol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_int8_codes(dim: int) -> None:
    x = draw_rows(6, dim) * np.float32([[1e-30], [1e-3], [1.0], [7.0], [1e5], [1e30]])
    tensors = CODECS["int8"].encode(x)
    codes, scale = tensors["features"], tensors["scale"]
    assert codes.shape == x.shape and codes.dtype == np.int8 and scale.dtype == np.float32
    np.testing.assert_allclose(scale, np.abs(x).max(axis=1) / 127.0, rtol=1e-7)
    assert (np.abs(codes.astype(int)).max(axis=1) == 127).all()
    assert np.abs(codes - x.astype(np.float64) / scale[:, None]).max() <= 0.5 * (1 + 1e-4)
    halves = np.float32([[127, 0.5, 1.5, 2.5, -0.5, -1.5]])  # a scale of 1: ties go to even
    assert CODECS["int8"].encode(halves)["features"].tolist() == [[127, 0, 2, 2, 0, -2]]
    assert np.array_equal(CODECS["int8"].encode(-x)["features"], -codes)


@pytest.mark.parametrize("dim", [7, 64, 1000])
def test_signs_do_not_depend_on_the_size_of_a_row(dim: int) -> None:
    rows = np.rint(draw_rows(20, dim) * 256)
    expected = CODECS["1bit"].encode(rows)
    for power in (-149, -100, 50, 100):
        size = np.ldexp(np.float32(1), power)
        found = CODECS["1bit"].encode(rows * size)  # exact: with the first, whole multiples of the smallest number
        np.testing.assert_array_equal(found["features"], expected["features"])
        scale = expected["scale"].astype(np.float64) * size
        np.testing.assert_allclose(found["scale"].astype(np.float64), scale, rtol=1e-6, atol=2.0**-149)


def test_1bit_inner_products_are_unbiased() -> None:
    """For pairs with a known cosine and any direction, as good as any rotation of one pair."""
    n, dim = 4000, 256
    x, other = (draw_rows(n, dim, seed).astype(np.float64) for seed in (1, 2))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    other -= (other * x).sum(axis=1, keepdims=True) * x
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    estimates = decoded("1bit", x.astype(np.float32))
    for cosine in (-0.9, 0.0, 0.3, 1.0):
        query = cosine * x + math.sqrt(1 - cosine**2) * other
        error = (estimates * query).sum(axis=1) - cosine
        # The signs keep sqrt(2 / pi) of a row; what is at right angles to it is spread evenly over the other axes.
        spread = math.sqrt((math.pi / 2 - 1) * (1 - cosine**2) / dim)
        assert abs(error.mean()) <= 4 * spread / math.sqrt(n) + 1e-6
        assert error.std() <= 1.1 * spread + 1e-6


@pytest.mark.parametrize("dim", [7, 64, 100, 1000, 8192])
def test_1bit_keeps_the_direction_of_rows_with_few_entries(dim: int) -> None:
    x = np.zeros((9, dim), np.float32)
    x[np.arange(9), np.linspace(0, dim - 1, 9).astype(int)] = np.linspace(-2, 3, 9)
    x[0, dim // 2] = 1.0
    out = decoded("1bit", x)
    cosine = (out * x).sum(axis=1) / np.linalg.norm(out, axis=1) / np.linalg.norm(x, axis=1)
    # A window holds more than half of the entries, so that one entry is spread over more than half of them.
    assert (cosine >= math.sqrt(0.5)).all()
    if dim & (dim - 1) == 0:
        np.testing.assert_allclose(out[1:], x[1:], atol=1e-5)  # ±1 in every place: nothing is lost


# Through a store


def extremes(largest_dim: int) -> st.SearchStrategy[np.ndarray]:
    """Rows of ordinary, tiny, subnormal, huge and equal numbers, rows of one number, and rows of zeros."""

    def rows(dim: int) -> st.SearchStrategy[np.ndarray]:
        sizes = (st.floats(-low, low, width=32) for low in (1.0, 2.0**-125, 2.0**-140, 2.0**120, 2.0**127))
        row = st.one_of(
            *(hnp.arrays(np.float32, dim, elements=size) for size in sizes),
            st.floats(-(2.0**126), 2.0**126, width=32).map(lambda value: np.full(dim, value, np.float32)),
            st.tuples(st.integers(0, dim - 1), st.floats(-(2.0**126), 2.0**126, width=32)).map(
                lambda entry: np.where(np.arange(dim) == entry[0], np.float32(entry[1]), np.float32(0))
            ),
        )
        return st.lists(row, min_size=1, max_size=6).map(np.stack)

    return st.integers(1, largest_dim).flatmap(rows)


@settings(EASY, max_examples=80)
@given(rows=extremes(40), dtype=st.sampled_from(DTYPES), shard_size=st.integers(1, 7))
def test_what_is_read_is_what_the_codes_can_hold(
    rows: np.ndarray, dtype: str, shard_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dim = rows.shape[1]
    exact = rows.astype(np.float64)
    norms = np.sqrt((exact**2).sum(axis=1))
    store = make_store(tmp_path_factory.mktemp("s") / "s", rows, dtype=dtype, shard_size=shard_size)
    limit = 2.0**127 / math.sqrt(dim if dtype == "1bit" else 1)
    ok = store.status == Status.OK
    sure = np.abs(norms / limit - 1) > 1e-6
    np.testing.assert_array_equal(ok[sure], (norms < limit)[sure])
    out = store[:].astype(np.float64)
    assert np.isfinite(out).all() and not out[~ok].any() and not store.norms[~ok].any()
    np.testing.assert_array_equal(store.norms[ok], norms[ok].astype(np.float32))
    exact, out, norms = exact[ok], out[ok], norms[ok]
    error = np.abs(out - exact)
    pieces = [store.stored(row, row + 1) for row in np.flatnonzero(ok)]
    scale = np.array([1.0 if piece.scale is None else piece.scale[0] for piece in pieces])
    if dtype == "float32":
        np.testing.assert_array_equal(out, exact)
    elif dtype == "int8":
        assert (scale >= 2.0**-126).all()
        assert (error <= scale[:, None] / 2 * (1 + 1e-5)).all()
    elif dtype == "1bit":
        own = (out * exact).sum(axis=1)  # <x, its code> is |x|^2
        slack = 2e-6 * norms * np.linalg.norm(out, axis=1) + norms * dim * 2.0**-148
        assert (np.abs(own - norms**2) <= slack).all()
        assert (np.abs(np.linalg.norm(out, axis=1) - scale * math.sqrt(dim)) <= 1e-5 * scale * dim + 2.0**-140).all()
    else:
        rounding = 2.0**-11 if dtype == "float16" else 2.0**-8
        largest = np.abs(exact).max(axis=1, keepdims=True, initial=0)
        assert (error <= rounding * np.abs(exact) + 2.0**-39 * largest + 2.0**-149).all()


@settings(EASY, max_examples=40)
@given(rows=extremes(30), dtype=st.sampled_from(DTYPES), data=st.data())
def test_a_row_has_the_same_codes_in_any_block(rows: np.ndarray, dtype: str, data: st.DataObject) -> None:
    codec, status = CODECS[dtype], np.zeros(len(rows), np.uint8)
    whole = encode_shard(codec, rows, status)
    for layout in (np.asfortranarray(rows), np.repeat(rows, 2, axis=1)[:, ::2]):
        for name, values in encode_shard(codec, layout, status).items():
            assert values.tobytes() == whole[name].tobytes()
    cut = data.draw(st.integers(0, len(rows)))
    parts = [encode_shard(codec, rows[part], status[part]) for part in (slice(cut), slice(cut, None))]
    for name in whole:
        assert np.concatenate([part[name] for part in parts]).tobytes() == whole[name].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_that_is_resumed_has_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    features = draw_rows(45, 200)
    features[7] = np.nan
    make_store(tmp_path / "whole", features, dtype=dtype, shard_size=20)
    for shard in (1, 0, 2):
        with open_writer(tmp_path / "s", 45, 200, dtype=dtype, shard_size=20) as writer:
            assert shard in writer.pending()
            rows = slice(*writer.bounds(shard))
            numbers = np.arange(45)[rows]
            facts = {"token_budget": 100 + shard}
            writer.write(shard, features[rows], np.zeros(len(numbers)), numbers + 2, numbers + 1, facts)
    assert folder_hashes(tmp_path / "s") == folder_hashes(tmp_path / "whole")


# The format


@pytest.mark.parametrize(("dtype", "version"), [(name, 1 if "float" in name else 2) for name in DTYPES])
def test_a_store_is_written_in_the_first_version_that_has_its_dtype(tmp_path: Path, dtype: str, version: int) -> None:
    assert make_store(tmp_path / "s", np.ones((2, 3), np.float32), dtype=dtype).manifest["schema_version"] == version


SHARD_1 = {
    "float32": "848cd0b4dfdefe26daf8dfa807b43c8fe2b3271315a2bd026f47a6c68d38acdc",
    "float16": "bf223160297c89ec29dea951fd594bcbd402f8634909edd54e7659e1c72b133b",
    "bfloat16": "afde604c622ef58a102d5ee803e060e86166c8df57daf79657881004f00c3053",
    "int8": "61527b92c6bf1d5127fc7bd7adb9a6ba52d41170296d16d9f9870915110f0020",
    "1bit": "d3ee334ddec7026f717cd237f2e21aef42b4efab1fb0f0cb646f1de90ecbca98",
}


def test_the_bytes_of_a_shard_stay_what_they_were(tmp_path: Path) -> None:
    """As first released (float32, float16, bfloat16: in version 1), for rows of very different sizes."""
    whole = (np.arange(220) * 7919 % 1009 - 504).reshape(11, 20).astype(np.float32)
    features = whole * np.ldexp(np.float32(1.0), np.arange(11) * 9 - 50)[:, None]
    for dtype, expected in SHARD_1.items():
        with open_writer(tmp_path / dtype, 11, 20, dtype=dtype) as writer:
            write_pending(writer, features, np.arange(11) % 2)
        found = (tmp_path / dtype / "shards" / "00001.safetensors").read_bytes()
        assert hashlib.sha256(found).hexdigest() == expected, dtype


@pytest.mark.parametrize("dtype", ["int8", "1bit"])
def test_other_libraries_read_the_shards(tmp_path: Path, dtype: str) -> None:
    features = draw_rows(11, 100)
    store = make_store(tmp_path / "s", features, dtype=dtype)
    for start, stop in ((0, 4), (8, 11)):
        with safe_open(tmp_path / "s" / "shards" / f"{start // 4:05}.safetensors", "np") as file:
            stored = store.stored(start, stop)
            assert stored is not None and stored.scale is not None
            np.testing.assert_array_equal(file.get_tensor("features"), stored.codes)
            np.testing.assert_array_equal(file.get_tensor("scale"), stored.scale)
            np.testing.assert_array_equal(file.get_tensor("norms"), stored.norms)
            np.testing.assert_array_equal(file.get_tensor("status"), stored.status)
    assert not stored.codes.flags.writeable
    np.testing.assert_array_equal(FeatureStore(store.path)[:], decoded(dtype, features))
