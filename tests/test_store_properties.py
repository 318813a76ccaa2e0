"""Stores that someone else made, by accident or on purpose: refused in words, in little time and in little memory."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.stores import DTYPES, change_manifest, flip_bit, make_rows, make_store, open_writer, refusal, seal

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.store import FeatureStore, Status

N, K = 11, 20
FEATURES = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
EASY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
FILES = ("manifest.json", "rows.parquet", *(f"shards/0000{i}.safetensors" for i in range(3)))
SHARD_1 = FILES[3]
MOST_MEMORY = 4 << 20  # bytes; a store here has about 10 kB
MOST_SECONDS = 5


@contextlib.contextmanager
def little_work() -> Iterator[None]:
    """The block must neither allocate much (numpy tells tracemalloc what it asks for, touched or not) nor hang."""
    pq.ParquetFile  # noqa: B018  (imported before memory is counted)
    tracemalloc.start()
    begun = time.monotonic()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
        assert time.monotonic() - begun < MOST_SECONDS
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for dtype in DTYPES:
        make_store(folder / dtype, FEATURES, dtype=dtype, subtasks=["a", None] * 5 + ["b"])
    return folder


@pytest.fixture
def copies(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a new copy of the store of a dtype."""

    def copy(dtype: str) -> Path:
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        shutil.copytree(originals / dtype, tmp_path / "s")
        return tmp_path / "s"

    return copy


@pytest.fixture
def path(copies: Callable[[str], Path]) -> Path:
    return copies("float32")


USES: list[Callable[[FeatureStore], object]] = [
    lambda store: store.status,
    lambda store: (store.norms, store.n_tokens, store.n_labels),
    lambda store: store[: min(len(store), 3)],
    lambda store: store[-1] if len(store) else None,
    lambda store: store[[len(store) // 2, 0]] if len(store) else None,
    lambda store: store.stored(0, 1) if len(store) else None,
    lambda store: [next(store.blocks(4), None), repr(store), store.dim],
    lambda store: store.rows,
    lambda store: store.projection,
    lambda store: pickle.loads(pickle.dumps(store)).verify().problems,
    lambda store: store.require_intact(),
]


def use(path: Path) -> int:
    """Open a store in every way, and do with it whatever one does; only LessFastError may come of it. How often."""
    errors = 0
    for allow_partial, verify in ((False, False), (True, False), (True, True)):
        try:
            store = FeatureStore(path, allow_partial=allow_partial, verify=verify)
        except LessFastError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000 and path.name in str(error)
            errors += 1
            continue
        for each in USES:
            try:
                each(store)
            except LessFastError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000
                errors += 1
    with contextlib.suppress(LessFastError):
        open_writer(path, N, K).release()
    return errors


# Any bit of any file


@settings(EASY, max_examples=150)
@given(dtype=st.sampled_from(DTYPES), name=st.sampled_from(FILES), data=st.data())
def test_verify_finds_any_flipped_bit_and_any_cut(
    dtype: str, name: str, data: st.DataObject, copies: Callable[[str], Path], originals: Path
) -> None:
    path, expected = copies(dtype), FeatureStore(originals / dtype)
    file = path / name
    size = file.stat().st_size
    if data.draw(st.booleans(), "cut"):
        last = size - (2 if name == "manifest.json" else 1)  # the newline that ends the manifest says nothing
        os.truncate(file, data.draw(st.integers(0, last), "length"))
    else:
        flip_bit(file, data.draw(st.integers(0, 8 * size - 1), "bit"))
    if not name.startswith("shards"):
        assert file.name in refusal(lambda: FeatureStore(path, allow_partial=True, verify=True))
        return
    store = FeatureStore(path, allow_partial=True, verify=True)
    start, stop = (4 * FILES.index(name) - 8, min(N, 4 * FILES.index(name) - 4))
    lost = (np.arange(N) >= start) & (np.arange(N) < stop)
    with pytest.warns(UserWarning, match=file.name):
        np.testing.assert_array_equal(store[:], np.where(lost[:, None], 0, expected[:]))
    np.testing.assert_array_equal(store.status, np.where(lost, Status.MISSING, expected.status))
    assert file.name in refusal(lambda: FeatureStore(path, verify=True)[:])
    assert [file.name in problem for problem in FeatureStore(path).verify().problems] == [True]


@settings(EASY, max_examples=100)
@given(dtype=st.sampled_from(DTYPES), name=st.sampled_from(FILES), data=st.data())
def test_nothing_but_a_refusal_comes_of_any_bytes(
    dtype: str, name: str, data: st.DataObject, copies: Callable[[str], Path]
) -> None:
    path = copies(dtype)
    content = (path / name).read_bytes()
    first = data.draw(st.integers(0, len(content)), "first")
    length = data.draw(st.integers(0, 40), "length")
    (path / name).write_bytes(content[:first] + data.draw(st.binary(max_size=40), "new") + content[first + length :])
    with warnings.catch_warnings(), little_work():
        warnings.simplefilter("ignore")
        use(path)


# Any value in the manifest

DEEP: Any = 0
for _ in range(60):
    DEEP = [DEEP]
HOSTILE = [
    *(0, 1, 3, 4, 7, -1, 2**31, 2**53, 2**62, 2**64, 10**30, 10**4000, 0.0, 4.0, 1e300, float("nan"), float("inf")),
    *(None, True, False, "", "x", "4", "\0", "\ud800", "a\nb", "float32", "1bit", "x" * 100_000, "../x", "/etc/passwd"),
    *("shards", ".", "rows.parquet", "manifest.json", SHARD_1, FILES[2], [], {}, [[]], [0] * 1000, {"kind": "sjlt"}),
    *({"file": "../x"}, DEEP, [DEEP] * 10),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values inside a JSON value are: keys and positions from the top."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, child in inner for place in places(child, (*at, key)))]


def changed(manifest: Any, place: tuple[Any, ...], how: str, value: Any) -> Any:
    manifest = json.loads(json.dumps(manifest))
    if not place:
        return value if how == "replace" else manifest
    parent = manifest
    for key in place[:-1]:
        parent = parent[key]
    if how == "delete":
        del parent[place[-1]]
    elif how == "double" and isinstance(parent, list):
        parent.append(parent[place[-1]])
    elif how == "add" and isinstance(parent, dict):
        parent["added\n"] = value
    else:
        parent[place[-1]] = value
    return manifest


@settings(EASY, max_examples=200)
@given(dtype=st.sampled_from(DTYPES), sealed=st.booleans(), data=st.data())
def test_nothing_but_a_refusal_comes_of_any_manifest(
    dtype: str, sealed: bool, data: st.DataObject, copies: Callable[[str], Path]
) -> None:
    path = copies(dtype)
    manifest = json.loads((path / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        place = data.draw(st.sampled_from(places(manifest)), "place")
        how = data.draw(st.sampled_from(["replace", "replace", "delete", "double", "add"]), "how")
        manifest = changed(manifest, place, how, data.draw(st.sampled_from(HOSTILE), "value"))
    with contextlib.suppress(ValueError):  # NaN and the like have no checksum
        manifest = seal(manifest) if sealed and isinstance(manifest, dict) else manifest
    (path / "manifest.json").write_text(json.dumps(manifest))
    outside = sorted(path.parent.iterdir())
    with warnings.catch_warnings(), little_work():
        warnings.simplefilter("ignore")
        use(path)
    assert sorted(path.parent.iterdir()) == outside


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_rows": 2**62}, "n_rows is 4611686018427387904; expected an integer from 0 to"),
        ({"n_rows": 10**4000}, "an integer has more than 20 digits"),
        ({"n_rows": 2**40}, "shards of 1099511627776 rows; expected at most"),
        ({"dim": 2**62}, "dim is 4611686018427387904"),
        ({"dim": 1e3}, "dim is 1000.0"),
        ({"shard_size": 2**62}, "shard_size is 4611686018427387904"),
        ({"shard_size": True}, "shard_size is True"),
        ({"dtype": "int8"}, "schema version 1 has no dtype int8"),
        ({"dtype": "1bit"}, "schema version 1 has no dtype 1bit"),
        ({"dtype": {}}, "dtype is {}"),
        ({"schema_version": 3, "dtype": "int4"}, "schema version 3, but this less_fast reads up to 2; upgrade"),
        ({"schema_version": 10**19}, "schema version 10000000000000000000, but this less_fast reads up to 2; upgrade"),
        ({"schema_version": 1.0}, "schema_version is 1.0"),
        ({"schema_version": True}, "schema_version is True"),
        ({"schema_version": 0}, "schema_version is 0"),
        ({"rows": {"file": "../rows.parquet", "content_sha256": "", "sha256": ""}}, "'../rows.parquet'"),
        ({"rows": {"content_sha256": "", "sha256": 0}}, "rows_sha256 is 0"),
        ({"rows": []}, "rows is []"),
        ({"shards": {}}, "shards is {}"),
        ({"shards": [7]}, "an entry of shards is 7"),
        ({"model": float("nan")}, "NaN is not a JSON value"),
        ({"model": float("inf")}, "Infinity is not a JSON value"),
        ({"model": [[DEEP]] * 5 + [[[[[DEEP]]]]]}, "nested more than 64 deep"),
    ],
)
def test_hostile_manifests_are_refused_at_opening(path: Path, fields: dict[str, Any], message: str) -> None:
    change_manifest(path, **fields)
    for allow_partial in (False, True):
        with little_work():
            told = refusal(lambda partial=allow_partial: FeatureStore(path, allow_partial=partial))  # type: ignore[misc]
        assert message in told and str(path / "manifest.json") in told


@pytest.mark.parametrize(
    "file",
    [
        "a\n.safetensors",
        "\0.safetensors",
        "\ud800.safetensors",
        "",
        "x" * 5000 + ".safetensors",
        "rows.parquet",
        "shards/../../x",
        "//x",
        "c:x",
        "..\\x",
    ],
)
def test_names_of_shards_that_are_none_are_refused(path: Path, file: str) -> None:
    entries = json.loads((path / "manifest.json").read_text())["shards"]
    change_manifest(path, shards=[entries[0], {**entries[1], "file": file}])
    told = refusal(lambda: FeatureStore(path, allow_partial=True))
    assert "lies outside of the store" in told or "is no name of a .safetensors file" in told


def test_a_key_that_is_there_twice_is_refused(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"dim": 20', '"dim": 20, "dim": 21'))
    assert "an object has a key twice" in refusal(lambda: FeatureStore(path))


def test_a_manifest_larger_than_any_store_needs_is_not_read(path: Path) -> None:
    os.truncate(path / "manifest.json", 1 << 40)
    with little_work():
        assert "manifest.json is not valid JSON: it is larger than" in refusal(lambda: FeatureStore(path))


def test_sizes_that_no_file_vouches_for_ask_for_no_memory(path: Path) -> None:
    """What is not there reads as zeros, but not as many as a manifest claims."""
    change_manifest(path, dim=2**31 - 1)
    with warnings.catch_warnings(), little_work():
        warnings.simplefilter("ignore")
        store = FeatureStore(path, allow_partial=True)
        assert (store.status == Status.MISSING).all() and len(store.damaged) == 3
        for ask in (lambda: store[:], lambda: store[3], lambda: store[[1, 2]], lambda: next(store.blocks(1))):
            assert "no shard that can be read" in refusal(ask)
    change_manifest(path, dim=K, n_rows=2**53 - 1, shard_size=2**52, shards=[])
    with little_work():
        told = refusal(lambda: FeatureStore(path, allow_partial=True))
    assert "rows.parquet is missing or damaged: it has 11 rows, but the manifest says 9007199254740991" in told


def test_rows_that_stand_for_more_than_the_file_can_hold_are_refused(path: Path) -> None:
    n = 3_000_000
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array(["x"])).cast(pa.string())
    pq.write_table(pa.table(dict.fromkeys(("id", "dataset", "subtask"), column)), path / "rows.parquet")
    assert (path / "rows.parquet").stat().st_size < 25_000
    change_manifest(path, n_rows=n, shard_size=n, shards=[])
    with little_work():
        told = refusal(lambda: FeatureStore(path, allow_partial=True))
    assert "rows.parquet is missing or damaged: it claims to hold 3000000 rows" in told


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": pa.array(range(N)), "dataset": ["d"] * N, "subtask": [None] * N}, "column of strings named id"),
        ({"id": ["i"] * N, "subtask": ["s"] * N}, "column of strings named dataset"),
        ({"id": ["i"] * N, "dataset": ["d"] * N, "subtask": [["s"]] * N}, "column of strings named subtask"),
        ({"id": ["i"] * N, "dataset": [None, *["d"] * (N - 1)], "subtask": ["s"] * N}, "no id or no dataset"),
    ],
)
def test_rows_of_other_types_are_refused(path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), path / "rows.parquet")
    assert message in refusal(lambda: FeatureStore(path).rows)


# Hostile shards


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replace a shard's header by what ``change`` makes of it; its tensors stay."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    made = change(header)
    text = made if isinstance(made, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def set_tensor(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a shape of 2^62": set_tensor("features", shape=[2**62, K]),
    "a shape of floats": set_tensor("features", shape=[4.0, K]),
    "a negative shape": set_tensor("features", shape=[-4, -K]),
    "another type": set_tensor("norms", dtype="F64"),
    "offsets that overlap": set_tensor("features", data_offsets=[0, 16 * K]),
    "negative offsets": set_tensor("n_labels", data_offsets=[-16, 0]),
    "offsets past the end": set_tensor("status", data_offsets=[2**62, 2**62 + 4]),
    "offsets that are floats": set_tensor("n_labels", data_offsets=[0.0, 16.0]),
    "an empty header": lambda header: b"{}",
    "a header that is a list": lambda header: b"[]",
    "a header that is no JSON": lambda header: b"{'a': 1}",
    "a header nested deep": lambda header: b"[" * 100_000,
    "a header in another encoding": lambda header: b"\xff\xfe{\0}\0",
    "a key twice": lambda header: json.dumps(header).encode()[:-1] + b', "status": 1}',
    "a tensor more": lambda header: header.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    "a tensor less": lambda header: header.pop("n_tokens") and None,
    "a tensor that is a number": lambda header: header.update(norms=7),
    "metadata of numbers": lambda header: header["__metadata__"].update(start=4),
    "metadata that is a list": lambda header: header.update(__metadata__=[]),
    "other rows": lambda header: header["__metadata__"].update(start="0", stop="4"),
    "no metadata": lambda header: header.pop("__metadata__") and None,
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_shards_are_named(path: Path, name: str) -> None:
    rewrite(path / SHARD_1, HEADERS[name])
    if name.endswith("floats"):  # the same numbers, and none of them is used
        np.testing.assert_array_equal(FeatureStore(path)[:], FEATURES)
        return
    with little_work():
        for ask in (lambda s: s.status, lambda s: s[4:5], lambda s: s.stored(4, 6)):
            with pytest.raises(CorruptStoreError, match=SHARD_1) as caught:
                ask(FeatureStore(path))
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**62, 2**64 - 1])
def test_a_header_longer_than_its_file_is_not_read(path: Path, length: int) -> None:
    content = (path / SHARD_1).read_bytes()
    (path / SHARD_1).write_bytes(length.to_bytes(8, "little") + content[8:])
    with little_work():
        assert "not a safetensors file, or truncated" in refusal(lambda: FeatureStore(path).status)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("tensor", ["norms", "scale"])
def test_numbers_that_no_row_has_are_refused(
    copies: Callable[[str], Path], dtype: str, value: float, tensor: str
) -> None:
    path = copies(dtype)
    rewrite(path / SHARD_1, lambda header: None)
    content = bytearray((path / SHARD_1).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if tensor not in header:
        assert dtype == "float32"
        return
    place = end + header[tensor]["data_offsets"][0] + 4
    content[place : place + 4] = np.float32(value).tobytes()
    (path / SHARD_1).write_bytes(content)
    assert f"tensor {tensor} holds a negative or non-finite number" in refusal(lambda: FeatureStore(path).status)
    status = end + header["status"]["data_offsets"][0]
    content[place : place + 4] = bytes(4)
    content[status] = 3
    (path / SHARD_1).write_bytes(content)
    assert "tensor status holds 3, expected 0, 1 or 2" in refusal(lambda: FeatureStore(path).status)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_center_that_is_not_finite_is_refused(copies: Callable[[str], Path], value: float) -> None:
    path = copies("1bit")
    content = bytearray((path / SHARD_1).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    place = end + json.loads(content[8:end])["center"]["data_offsets"][1] - 4
    content[place : place + 4] = np.float32(value).tobytes()
    (path / SHARD_1).write_bytes(content)
    assert "tensor center holds a non-finite number" in refusal(lambda: FeatureStore(path).status)


def test_rows_are_read_as_they_were_written(path: Path) -> None:
    assert FeatureStore(path).rows == make_rows(N, ["a", None] * 5 + ["b"])
