"""Converted stores: the codes of a direct extraction, norms from before any rounding, and nothing lost on the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.children import child_environment
from support.cli import less_fast, refused
from support.stores import folder_hashes, make_rows, make_store, open_writer, write_pending

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.scoring import influence
from less_fast.store import FeatureStore, Status, StoreWriter, convert_store
from less_fast.store.codec import CODECS

N, K = 11, 40  # K is no power of two
DTYPES = tuple(CODECS)
STATUS = np.array([0, 0, Status.NO_LABELS, 0, 0, 0, Status.NON_FINITE, 0, 0, 0, 0], np.uint8)


@pytest.fixture
def features() -> np.ndarray:
    """Rows of very different sizes, one of them zero."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((N, K)) * 10.0 ** generator.integers(-9, 6, (N, 1))
    x[4] = 0
    return x.astype(np.float32)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def quietly(source: Path, out: Path, **options: Any) -> FeatureStore:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not come back")
        return convert_store(source, out, **{"progress": False, **options})


def flip_bit(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def fail_at(call: int, error: BaseException) -> Callable[..., None]:
    """A stand-in for ``os.fsync`` that raises at the call with this number."""
    left = [call]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise error

    return fsync


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_float32_the_files_are_those_of_a_direct_extraction(
    tmp_path: Path, features: np.ndarray, dtype: str
) -> None:
    source = make_store(tmp_path / "source", features, status=STATUS, subtasks=["a", None] * 5 + ["b"])
    direct = make_store(tmp_path / "direct", features, status=STATUS, subtasks=["a", None] * 5 + ["b"], dtype=dtype)
    converted = quietly(source.path, tmp_path / "converted", dtype=dtype)
    ours, theirs = folder_hashes(converted.path), folder_hashes(direct.path)
    assert {name for name in theirs if ours.get(name) != theirs[name]} == {"manifest.json"}
    assert ours.keys() == theirs.keys()
    origin = {"dtype": "float32", "manifest": source.manifest["sha256"]}
    assert converted.facts == {**direct.facts, "converted_from": origin}
    assert converted.verify().ok and converted.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source_dtype", DTYPES)
def test_every_pair(tmp_path: Path, features: np.ndarray, source_dtype: str, dtype: str) -> None:
    source = make_store(tmp_path / "source", features, status=STATUS, dtype=source_dtype)
    converted = quietly(source.path, tmp_path / "converted", dtype=dtype)
    decoded = np.where(STATUS[:, None] == Status.OK, source[:], np.float32(0))
    again = make_store(tmp_path / "again", decoded, status=STATUS, dtype=dtype)
    for start in range(0, N, 4):
        stored = converted.stored(start, min(start + 4, N))
        expected = (source if dtype == source_dtype else again).stored(start, min(start + 4, N))
        assert stored is not None and expected is not None
        np.testing.assert_array_equal(stored.codes, expected.codes)
        np.testing.assert_array_equal(stored.scale, expected.scale)
        np.testing.assert_array_equal(stored.center, expected.center)
    for name in ("status", "n_tokens", "n_labels", "norms"):
        np.testing.assert_array_equal(getattr(converted, name), getattr(source, name))
    exact = np.where(STATUS == Status.OK, np.linalg.norm(features.astype(np.float64), axis=1), 0)
    np.testing.assert_allclose(converted.norms, exact, rtol=1e-7)
    assert converted.rows == source.rows
    assert [entry["facts"] for entry in converted.manifest["shards"]] == [{"token_budget": 100 + i} for i in range(3)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    x=hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 9), st.integers(1, 20)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    pair=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    sizes=st.tuples(st.integers(1, 10), st.integers(1, 10)),
)
def test_any_features_and_any_windows(
    tmp_path_factory: pytest.TempPathFactory, x: np.ndarray, pair: tuple[str, str], sizes: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = make_store(folder / "source", x, dtype=pair[0], shard_size=sizes[0])
    converted = quietly(source.path, folder / "converted", dtype=pair[1], shard_size=sizes[1])
    direct = make_store(folder / "direct", source[:], dtype=pair[1], shard_size=sizes[1])
    np.testing.assert_array_equal(converted.norms, source.norms)
    np.testing.assert_array_equal(converted.status, source.status)
    assert converted.shard_size == sizes[1] and converted.verify().ok
    if pair[0] == pair[1] != "1bit":
        np.testing.assert_array_equal(converted[:], source[:])
    elif pair[1] != "1bit":
        np.testing.assert_array_equal(converted[:], direct[:])
    lost = (source.norms > 0) & ~source[:].any(axis=1)  # rows that an earlier rounding has brought to zero
    for start in range(0, len(x), sizes[1]):
        rows = slice(start, min(start + sizes[1], len(x)))
        same_shard = rows.start % sizes[0] == 0 and rows.stop == min(rows.start + sizes[0], len(x))
        origin = source if pair[0] == pair[1] and same_shard else direct
        found, expected = (store.stored(rows.start, rows.stop) for store in (converted, origin))
        assert found is not None and expected is not None
        if pair[1] == "1bit":
            assert found.scale is not None and expected.scale is not None
            np.testing.assert_array_equal(found.center, expected.center)
            np.testing.assert_array_equal(found.codes[~lost[rows]], expected.codes[~lost[rows]])
            np.testing.assert_array_equal(found.scale[~lost[rows]], expected.scale[~lost[rows]])


def test_signs_that_come_into_other_shards_are_taken_again(tmp_path: Path) -> None:
    x = np.random.default_rng(5).standard_normal((24, 256)).astype(np.float32) + 3
    source = make_store(tmp_path / "source", x, dtype="1bit", shard_size=8)
    same = quietly(source.path, tmp_path / "same", dtype="1bit")
    ours, theirs = folder_hashes(same.path), folder_hashes(source.path)
    assert {name for name in theirs if ours[name] != theirs[name]} == {"manifest.json"}
    other = quietly(source.path, tmp_path / "other", dtype="1bit", shard_size=12)
    np.testing.assert_array_equal(other.norms, source.norms)
    for start in (0, 12):
        stored = other.stored(start, start + 12)
        assert stored is not None and stored.center is not None
        unit = source[start : start + 12].astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        np.testing.assert_allclose(stored.center, unit.mean(axis=0), rtol=1e-6)
    cosines = (other[:] * x).sum(axis=1) / np.linalg.norm(other[:], axis=1) / np.linalg.norm(x, axis=1)
    assert (cosines > 0.95).all()  # signs twice; with none it is 0.95 at most


def test_a_row_that_an_earlier_rounding_brought_to_zero_stays_near_zero(tmp_path: Path) -> None:
    x = np.random.default_rng(6).standard_normal((9, 256)).astype(np.float32) + 3
    x[3] = 1e-42  # int8 has no scale that is small enough
    source = make_store(tmp_path / "source", x, dtype="int8", shard_size=9)
    assert source.norms[3] > 0 and not source[3].any()
    converted = quietly(source.path, tmp_path / "out", dtype="1bit")
    unit = converted[:].astype(np.float64) / converted.norms[:, None].astype(np.float64)
    assert abs((unit[3] * unit[4]).sum()) < 0.1 < (unit[5] * unit[4]).sum()


def test_other_windows_keep_what_was_said_of_the_old_ones(tmp_path: Path, features: np.ndarray) -> None:
    source = make_store(tmp_path / "source", features, status=STATUS)
    converted = quietly(source.path, tmp_path / "converted", dtype="int8", shard_size=6)
    old = [{"start": 4 * i, "stop": min(4 * i + 4, N), "facts": {"token_budget": 100 + i}} for i in range(3)]
    found = [(entry["start"], entry["stop"], entry["facts"]) for entry in converted.manifest["shards"]]
    assert found == [(0, 6, {"converted_from": old[:2]}), (6, N, {"converted_from": old[1:]})]
    whole = quietly(source.path, tmp_path / "whole", dtype="float32", shard_size=N)
    assert folder_hashes(whole.path)["rows.parquet"] == folder_hashes(source.path)["rows.parquet"]
    np.testing.assert_array_equal(whole[:], source[:])


def test_a_chain_names_every_step_and_rounds_little_more_than_one(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    source = make_store(tmp_path / "float32", x, shard_size=32)
    half = quietly(source.path, tmp_path / "float16", dtype="float16")
    chain = quietly(half.path, tmp_path / "chain", dtype="int8")
    direct = quietly(source.path, tmp_path / "direct", dtype="int8")
    origin = {"dtype": "float32", "manifest": source.manifest["sha256"]}
    assert chain.facts["converted_from"] == {
        "dtype": "float16",
        "manifest": half.manifest["sha256"],
        "converted_from": origin,
    }

    def error(store: FeatureStore) -> float:
        return float(np.sqrt(np.mean((store[:].astype(np.float64) - x) ** 2)))

    assert 0 < error(chain) <= 2 * error(direct)
    np.testing.assert_array_equal(chain.norms, source.norms)


@pytest.mark.parametrize(
    ("source", "dtype", "warned"),
    [("1bit", "int8", True), ("int8", "float32", True), ("float16", "float32", True), ("float16", "bfloat16", False)]
    + [("float32", dtype, False) for dtype in DTYPES],
)
def test_a_larger_dtype_gets_a_warning(
    tmp_path: Path, features: np.ndarray, source: str, dtype: str, warned: bool
) -> None:
    path = make_store(tmp_path / "source", features, dtype=source).path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_store(path, tmp_path / "out", dtype=dtype, progress=False)
    expected = f"{path} holds {source}, and {dtype} is larger: what was rounded away does not come back"
    assert [str(warning.message) for warning in caught] == [expected] * warned


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_an_interrupted_conversion_goes_on(
    tmp_path: Path, features: np.ndarray, stop: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_store(tmp_path / "source", features, status=STATUS)
    expected = folder_hashes(quietly(source.path, tmp_path / "whole", dtype="1bit").path)
    out = tmp_path / "out"
    states = set()
    for call in range(1, 40):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail_at(call, stop))
            try:
                quietly(source.path, out, dtype="1bit")
            except (KeyboardInterrupt, LessFastError) as error:
                assert isinstance(error, KeyboardInterrupt) or "the disk is full" in str(error)
        before = {file.name: file.stat().st_mtime_ns for file in (out / "shards").glob("*.safetensors")}
        states.add(len(before))
        quietly(source.path, out, dtype="1bit")
        assert folder_hashes(out) == expected
        for name, stamp in before.items():
            assert (out / "shards" / name).stat().st_mtime_ns == stamp  # what was finished is not made again
        for file in sorted(out.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
    assert states == {0, 1, 2, 3}


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((400, 64)).astype(np.float32)
    source = make_store(tmp_path / "source", x, shard_size=4).path
    expected = folder_hashes(quietly(source, tmp_path / "whole", dtype="int8").path)
    program = "import sys; from less_fast.store import convert_store; convert_store(*sys.argv[1:], dtype='int8')"
    shards = tmp_path / "out" / "shards"
    for least in (1, 30):
        command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
        writer = subprocess.Popen(command, env=child_environment(OMP_NUM_THREADS="1"), stderr=subprocess.DEVNULL)
        while len(list(shards.glob("*.safetensors"))) < least and writer.poll() is None:
            time.sleep(0.001)
        writer.kill()
        assert writer.wait() == -9
    done = len(list(shards.glob("*.safetensors")))
    assert 30 <= done < 100
    quietly(source, tmp_path / "out", dtype="int8")
    assert folder_hashes(tmp_path / "out") == expected


def test_another_source_is_not_mixed_in(tmp_path: Path, features: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stores have the same facts, as those of two machines may."""
    source = make_store(tmp_path / "source", features)
    other = make_store(tmp_path / "other", features + 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_at(8, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            quietly(source.path, tmp_path / "out", dtype="int8")
    before = folder_hashes(tmp_path / "out")
    with pytest.raises(LessFastError, match=r"begun with other settings .*: converted_from\.manifest: "):
        quietly(other.path, tmp_path / "out", dtype="int8")
    assert folder_hashes(tmp_path / "out") == before


def test_a_damaged_shard_is_named_and_what_was_finished_stays(tmp_path: Path, features: np.ndarray) -> None:
    source = make_store(tmp_path / "source", features)
    file = source.path / "shards" / "00001.safetensors"
    whole = file.read_bytes()
    flip_bit(file, len(whole) - 5)  # in the exponent of the last feature, before four statuses
    with pytest.raises(
        CorruptStoreError, match=r"00001\.safetensors: damaged \(SHA-256.*1 of 3 shards of .* are finished"
    ):
        quietly(source.path, tmp_path / "out", dtype="int8")
    assert [path.name for path in (tmp_path / "out" / "shards").iterdir()] == ["00000.safetensors"]
    quietly(source.path, tmp_path / "unverified", dtype="int8", verify=False)  # the flip is in the features alone
    file.write_bytes(whole)
    expected = folder_hashes(quietly(source.path, tmp_path / "whole", dtype="int8").path)
    quietly(source.path, tmp_path / "out", dtype="int8")
    assert folder_hashes(tmp_path / "out") == expected
    assert folder_hashes(tmp_path / "unverified") != expected


@pytest.mark.parametrize("verify", [True, False])
def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, features: np.ndarray, verify: bool) -> None:
    def refusal(out: str) -> str:
        with pytest.raises(LessFastError) as error:
            quietly(tmp_path / "source", tmp_path / out, dtype="int8", verify=verify)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is not a feature store: there is no such folder" in refusal("none")
    file = make_store(tmp_path / "source", features).path / "shards" / "00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f"{file}: " in refusal("truncated")
    file.unlink()
    assert f"{file}: No such file" in refusal("missing")
    file.write_bytes(whole)
    (tmp_path / "source" / "rows.parquet").write_bytes(b"PAR1")
    assert "rows.parquet" in refusal("rows")
    with open_writer(tmp_path / "begun", N, K) as writer:
        writer.write(0, features[:4], np.zeros(4), np.ones(4), np.ones(4))
    with pytest.raises(LessFastError, match="is not finished: 2 of 3 shards are missing"):
        quietly(tmp_path / "begun", tmp_path / "out", dtype="int8", verify=verify)
    assert not (tmp_path / "out").exists()


def test_memory_is_the_codes_of_a_shard(tmp_path: Path) -> None:
    n, dim = 2048, 4096
    source = make_store(
        tmp_path / "source", np.ones((n, dim), np.float32), dtype="float16", shard_size=n
    )  # 32 MB in float32
    tracemalloc.start()
    try:
        quietly(source.path, tmp_path / "out", dtype="1bit")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < n * dim  # a quarter of that; the codes are 1 MB


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("pool_dtype", DTYPES)
def test_stores_of_different_dtypes_are_compared(tmp_path: Path, pool_dtype: str, target_dtype: str) -> None:

    generator = np.random.default_rng(2)
    pool = make_store(tmp_path / "pool", generator.standard_normal((9, 32)).astype(np.float32))
    target = make_store(tmp_path / "target", generator.standard_normal((5, 32)).astype(np.float32))
    stores = [
        quietly(store.path, tmp_path / f"{store.path.name}-converted", dtype=dtype)
        for store, dtype in ((pool, pool_dtype), (target, target_dtype))
    ]
    scores = influence(stores[0], stores[1])
    left, right = (store[:].astype(np.float64) / store.norms[:, None] for store in stores)
    np.testing.assert_allclose(np.asarray(scores.matrix)[:, 0], (left @ right.T).mean(axis=1), atol=2e-6)


def test_no_rows(tmp_path: Path) -> None:
    with open_writer(tmp_path / "source", 0, K) as writer:
        write_pending(writer, np.zeros((0, K), np.float32))
    assert len(quietly(tmp_path / "source", tmp_path / "out", dtype="1bit")) == 0


def test_the_command(tmp_path: Path, features: np.ndarray) -> None:
    source = make_store(tmp_path / "source", features, status=STATUS, precondition={"kind": "sgd"}).path
    result = less_fast("convert", source, tmp_path / "out", "--dtype", "int8", "--shard-size", 6, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["path"], told["rows"], told["dtype"]) == (str(tmp_path / "out"), N, "int8")
    assert told["shards"] == {"done": 2, "total": 2}
    assert told["status"] == {"ok": 9, "no_labels": 1, "non_finite": 1}
    assert told["converted_from"] == {"dtype": "float32", "manifest": FeatureStore(source).manifest["sha256"]}
    assert "int8: 100%" in result.stderr and f"{N}/{N}" in result.stderr and "row/s" in result.stderr
    share = told["bytes"] / sum(entry["bytes"] for entry in FeatureStore(source).manifest["shards"])
    again = less_fast("convert", source, tmp_path / "out", "--dtype", "int8", "--shard-size", 6, "--no-progress")
    assert again.stderr == ""
    assert again.stdout == (
        f"{tmp_path / 'out'}: 11 rows x 40 in int8, sgd (9 ok, 1 no_labels, 1 non_finite), "
        f"{share:.1%} of the bytes of {source}\n"
    )
    less_fast("convert", source, tmp_path / "default", "--dtype", "int8")
    assert FeatureStore(tmp_path / "default").shard_size == 4


def test_what_the_command_refuses(tmp_path: Path, features: np.ndarray) -> None:
    source = make_store(tmp_path / "source", features).path
    before = folder_hashes(source)
    out = tmp_path / "out"
    assert "dtype is 'int4'; expected one of float32, " in refused("convert", source, out, "--dtype", "int4")
    assert "Missing option '--dtype'" in missing_option(source, out)
    assert "shard_size is 0" in refused("convert", source, out, "--dtype", "int8", "--shard-size", 0)
    assert "is the store to convert; choose another" in refused("convert", source, source, "--dtype", "float32")
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    assert "holds mine and is not a feature store" in refused("convert", source, out, "--dtype", "int8")
    file = tmp_path / "file"
    file.write_text("text")
    assert "is a file, and a folder is expected" in refused("convert", source, file, "--dtype", "int8")
    assert f"{file} is not a feature store" in refused("convert", file, tmp_path / "new", "--dtype", "int8")
    half = tmp_path / "half"
    quietly(source, half, dtype="float16")
    assert 'dtype: "float16" -> "int8"' in refused("convert", source, half, "--dtype", "int8")
    writer = StoreWriter(
        tmp_path / "busy",
        {**FeatureStore(source).facts, "converted_from": {"dtype": "float32", "manifest": "?"}},
        make_rows(N),
        dim=K,
        dtype="int8",
        shard_size=4,
    )
    with writer:
        assert "is being written by another process" in refused("convert", source, tmp_path / "busy", "--dtype", "int8")
    assert folder_hashes(source) == before


def missing_option(source: Path, out: Path) -> str:
    result = less_fast("convert", source, out)
    assert result.exit_code == 2
    return str(result.stderr)
