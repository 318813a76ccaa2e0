"""The codes of int8 and 1bit stores against definitions written anew in float64, and the bytes of every dtype."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from support.stores import (
    DTYPES,
    folder_hashes,
    make_store,
    open_writer,
    rotated,
    sign_values,
    unit_rows,
    write_pending,
)

from less_fast.store import FeatureStore, Status
from less_fast.store.codec import CODECS, Array, encode_signs
from less_fast.store.rotation import rotate, rotate_back
from less_fast.store.shard import encode_shard

DIMS = (1, 2, 3, 7, 8, 64, 100, 1000, 8192)
EASY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw_rows(n: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def encoded(dtype: str, rows: np.ndarray, status: np.ndarray | None = None) -> dict[str, Array]:
    """A shard of these rows."""
    return encode_shard(CODECS[dtype], rows, np.zeros(len(rows), np.uint8) if status is None else status)


def decoded(dtype: str, tensors: dict[str, Array], dim: int) -> np.ndarray:
    out = np.empty((len(tensors["status"]), dim), np.float32)
    CODECS[dtype].decode(tensors, slice(None), out)
    return out


def signs_of(x: np.ndarray) -> np.ndarray:
    """What the signs of the rows alone, without a center, are read as; float64."""
    codes, scale = encode_signs(x)
    bits = np.unpackbits(codes, axis=1, count=x.shape[1], bitorder="little")
    return rotate_back(np.float32(1) - np.float32(2) * bits).astype(np.float64) * scale[:, None]


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
    x = draw_rows(6, dim) * np.float32([[1e-38], [1e-3], [1.0], [7.0], [1e5], [1e36]])
    tensors = encoded("1bit", x)
    codes, scale, center = (tensors[name] for name in ("features", "scale", "center"))
    assert codes.shape == (6, -(-dim // 8)) and codes.dtype == np.uint8
    assert scale.dtype == center.dtype == np.float32 and center.shape == (dim,)
    unit = unit_rows(x)
    np.testing.assert_allclose(center, unit.mean(axis=0), rtol=1e-6, atol=1e-8)
    exact = rotated(unit - unit.mean(axis=0))
    bits = np.array([[row[i // 8] >> (i % 8) & 1 for i in range(8 * codes.shape[1])] for row in codes])
    assert not bits[:, dim:].any()
    clear = np.abs(exact) > 1e-5 * np.sqrt((exact**2).mean(axis=1, keepdims=True))
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(bits[:, :dim][clear], (exact < 0)[clear])
    np.testing.assert_allclose(scale, (exact**2).sum(axis=1) / np.abs(exact).sum(axis=1), rtol=2e-6)
    # The value of a row is norm * (center + R^T(scale * sign)).
    left = decoded("1bit", tensors, dim) / tensors["norms"][:, None].astype(np.float64) - center
    np.testing.assert_allclose(rotated(left), scale[:, None] * (1.0 - 2.0 * bits[:, :dim]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_rows_like_all_others_have_no_signs(dim: int) -> None:
    row = draw_rows(1, dim, 3)
    for rows in (row, np.repeat(row, 37, axis=0), row * np.ldexp(np.float32(1), np.arange(-30, 30))[:, None]):
        tensors = encoded("1bit", rows)
        assert not tensors["scale"].any() and not tensors["features"].any()
        np.testing.assert_allclose(tensors["center"], unit_rows(row)[0], rtol=1e-7)
        np.testing.assert_array_equal(decoded("1bit", tensors, dim), tensors["norms"][:, None] * tensors["center"])


@pytest.mark.parametrize("dim", [1, 7, 100])
def test_the_center_is_that_of_rows_with_a_direction(dim: int) -> None:
    rows = draw_rows(40, dim)
    rows[::5] = 0
    status = np.zeros(40, np.uint8)
    status[1::5] = Status.NO_LABELS
    rows[2], rows[3, 0], rows[7, -1] = np.float32(3e38), np.nan, np.inf
    lost = [2, 3, 7] if dim > 1 else [3, 7]  # the norm of row 2
    if dim == 1:
        rows[2] = 1.0
    tensors = encoded("1bit", rows, status)
    used = np.setdiff1d(np.arange(40), [*range(0, 40, 5), *range(1, 40, 5), *lost])
    np.testing.assert_array_equal(np.flatnonzero(tensors["norms"]), used)
    np.testing.assert_array_equal(np.flatnonzero(tensors["status"] == Status.NON_FINITE), lost)
    np.testing.assert_allclose(tensors["center"], unit_rows(rows[used]).mean(axis=0), rtol=1e-6, atol=1e-8)
    others = np.setdiff1d(np.arange(40), used)
    assert not tensors["scale"][others].any() and not tensors["features"][others].any()
    assert not decoded("1bit", tensors, dim)[others].any()
    alone = encoded("1bit", rows[used])
    for name in ("features", "scale", "norms"):
        np.testing.assert_array_equal(tensors[name][used], alone[name])
    np.testing.assert_array_equal(tensors["center"], alone["center"])
    for nothing in (encoded("1bit", rows[others], status[others]), encoded("1bit", rows[:0], status[:0])):
        assert nothing["center"].shape == (dim,) and not nothing["center"].any() and not nothing["scale"].any()
        assert not decoded("1bit", nothing, dim).any()


def test_what_all_rows_share_takes_no_signs() -> None:
    """Rows with 85 % of their energy in one direction, as gradients after Adam have; queries of any direction."""
    rng = np.random.default_rng(4)
    n, dim = 500, 512
    shared, directions = rng.standard_normal(dim), rng.standard_normal((20, dim))
    rows = math.sqrt(0.85 / 0.15) * shared + (rng.standard_normal((n, 20)) @ directions) / math.sqrt(20)
    x = (rows * 10.0 ** rng.uniform(-5, 5, (n, 1))).astype(np.float32)
    queries = unit_rows(rng.standard_normal((30, 20)) @ directions)
    exact = unit_rows(x) @ queries.T
    tensors = encoded("1bit", x)
    read = decoded("1bit", tensors, dim) / tensors["norms"][:, None].astype(np.float64)
    plain = signs_of(unit_rows(x).astype(np.float32))
    errors = [np.sqrt(((values @ queries.T - exact) ** 2).mean()) for values in (read, plain)]
    assert 2 * errors[0] < errors[1]


@pytest.mark.parametrize("largest", [1e-45, 1e-42, 2e-38, 1e38])
def test_the_smallest_and_largest_rows_keep_their_directions(largest: float) -> None:
    dim = 64
    signs = np.where(draw_rows(9, dim) < 0, -1.0, 1.0)
    x = (signs * largest / (8 if largest > 1 else 1)).astype(np.float32)
    tensors = encoded("1bit", x)
    assert not tensors["status"].any() and np.isfinite(tensors["norms"]).all() and (tensors["norms"] > 0).all()
    unit = signs / math.sqrt(dim)
    center = unit.mean(axis=0)
    np.testing.assert_allclose(tensors["center"], center, atol=1e-7)
    np.testing.assert_allclose(tensors["scale"], np.abs(sign_values(unit - center)).mean(axis=1), rtol=1e-5)
    out = decoded("1bit", tensors, dim)
    assert np.isfinite(out).all()
    if largest > 1e-40:
        assert ((unit_rows(out) * unit).sum(axis=1) > 0.75).all()  # sqrt(2 / pi), or a little more or less


def test_an_entry_beyond_float32_is_read_as_the_largest_number() -> None:
    """The signs of two opposite rows along an axis of R, up to its smallest entries, are read as one entry."""
    dim = 64
    axis = rotate_back(np.eye(dim, dtype=np.float32)[:1])[0].astype(np.float64) + 1e-3 * rotate_back(
        np.ones((1, dim), np.float32)
    )[0].astype(np.float64)
    x = (np.stack([axis, -axis]) / np.linalg.norm(axis) * 2.0**126.9).astype(np.float32)
    tensors = encoded("1bit", x)
    assert not tensors["status"].any() and not tensors["center"].any()
    out = decoded("1bit", tensors, dim)
    largest = np.finfo(np.float32).max
    assert out.max() == largest and out.min() == -largest and np.isfinite(out).all()


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
    expected = encoded("1bit", rows)
    for power in (-149, -100, 50, 110):
        size = np.ldexp(np.float32(1), power)
        found = encoded("1bit", rows * size)  # exact: with the first, whole multiples of the smallest number
        for name in ("features", "scale", "center"):
            np.testing.assert_array_equal(found[name], expected[name])
        norms = expected["norms"].astype(np.float64) * size
        np.testing.assert_allclose(found["norms"].astype(np.float64), norms, rtol=1e-6, atol=2.0**-149)


def test_inner_products_with_signs_are_unbiased() -> None:
    """For pairs with a known cosine and any direction, as good as any rotation of one pair."""
    n, dim = 4000, 256
    x, other = (draw_rows(n, dim, seed).astype(np.float64) for seed in (1, 2))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    other -= (other * x).sum(axis=1, keepdims=True) * x
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    estimates = signs_of(x.astype(np.float32))
    for cosine in (-0.9, 0.0, 0.3, 1.0):
        query = cosine * x + math.sqrt(1 - cosine**2) * other
        error = (estimates * query).sum(axis=1) - cosine
        # The signs keep sqrt(2 / pi) of a row; what is at right angles to it is spread evenly over the other axes.
        spread = math.sqrt((math.pi / 2 - 1) * (1 - cosine**2) / dim)
        assert abs(error.mean()) <= 4 * spread / math.sqrt(n) + 1e-6
        assert error.std() <= 1.1 * spread + 1e-6


@pytest.mark.parametrize("dim", [7, 64, 100, 1000, 8192])
def test_signs_keep_the_direction_of_rows_with_few_entries(dim: int) -> None:
    x = np.zeros((9, dim), np.float32)
    x[np.arange(9), np.linspace(0, dim - 1, 9).astype(int)] = np.linspace(-2, 3, 9)
    x[0, dim // 2] = 1.0
    out = signs_of(x)
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
    ok = store.status == Status.OK
    sure = np.abs(norms / 2.0**127 - 1) > 1e-6
    np.testing.assert_array_equal(ok[sure], (norms < 2.0**127)[sure])
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
        centers = np.stack([piece.center for piece in pieces]) if pieces else np.empty((0, dim))
        shards = np.flatnonzero(ok) // shard_size
        means = [
            unit_rows(exact[shards == shard]).sum(axis=0) / max(1, (norms[shards == shard] > 0).sum())
            for shard in shards
        ]
        np.testing.assert_allclose(centers, np.reshape(means, centers.shape), rtol=1e-6, atol=1e-7)
        # Not those with an entry that is cut off, and relative to what a subnormal number may be off by.
        some = (norms > 0) & (np.abs(out).max(axis=1, initial=0) < np.finfo(np.float32).max)
        left, read = unit_rows(exact) - centers, np.zeros_like(out)
        read[some] = out[some] / norms[some, None] - centers[some]
        slack = 1e-5 + np.divide(dim * 2.0**-148, norms, out=np.zeros_like(norms), where=norms > 0)
        size = scale * math.sqrt(dim)
        # <x/|x| - center, its code> is the square of its length.
        assert (np.abs((left * read).sum(axis=1) - (left**2).sum(axis=1)) <= slack * (1 + size))[some].all()
        assert (np.abs(np.linalg.norm(read, axis=1) - size) <= slack * (1 + size))[some].all()
        assert not out[norms == 0].any() and not scale[norms == 0].any()
    else:
        rounding = 2.0**-11 if dtype == "float16" else 2.0**-8
        largest = np.abs(exact).max(axis=1, keepdims=True, initial=0)
        assert (error <= rounding * np.abs(exact) + 2.0**-39 * largest + 2.0**-149).all()


@settings(EASY, max_examples=40)
@given(rows=extremes(30), dtype=st.sampled_from(DTYPES), data=st.data())
def test_a_row_has_the_same_codes_in_any_block(rows: np.ndarray, dtype: str, data: st.DataObject) -> None:
    whole = encoded(dtype, rows)
    for layout in (np.asfortranarray(rows), np.repeat(rows, 2, axis=1)[:, ::2]):
        for name, values in encoded(dtype, layout).items():
            assert values.tobytes() == whole[name].tobytes()
    with patch("less_fast.store.shard._SLAB_ROWS", data.draw(st.integers(1, 7))):
        for name, values in encoded(dtype, rows).items():
            assert values.tobytes() == whole[name].tobytes()
    if dtype == "1bit":  # its rows depend on the center of their shard
        return
    cut = data.draw(st.integers(0, len(rows)))
    parts = [encoded(dtype, rows[part]) for part in (slice(cut), slice(cut, None))]
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
    "1bit": "6905f47b90700e86d6d38db1b912fe2be2560b3b2b14171cde5f358b497623b9",
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
            assert (stored.center is not None) == (dtype == "1bit")
            if stored.center is not None:
                np.testing.assert_array_equal(file.get_tensor("center"), stored.center)
    assert not stored.codes.flags.writeable
    expected = [decoded(dtype, encoded(dtype, features[start : start + 4]), 100) for start in (0, 4, 8)]
    np.testing.assert_array_equal(FeatureStore(store.path)[:], np.concatenate(expected))
