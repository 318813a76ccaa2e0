"""Stores that are unfinished, damaged, being written or shared: what is sound is read, and the rest is named once."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from support.stores import (
    DTYPES,
    change_manifest,
    flip_bit,
    folder_hashes,
    make_store,
    open_writer,
    refusal,
    write_pending,
)

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.store import FeatureStore, Status, reader, shard

N, K = 11, 8
FEATURES = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
MISSING, SOUND = slice(4, 8), np.r_[0:4, 8:11]
SHARD_1 = "shards/00001.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_store(tmp_path / "s", FEATURES)
    return tmp_path / "s"


def flip_a_feature(file: Path) -> None:
    flip_bit(file, 8 * (file.stat().st_size - 10) + 6)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = [flip_a_feature, truncate, Path.unlink]


# Damage


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_verify_names_a_damaged_shard_before_its_first_row_is_used(
    tmp_path: Path, dtype: str, damage: Callable[[Path], None]
) -> None:
    expected = make_store(tmp_path / "s", FEATURES, dtype=dtype)[:]
    damage(tmp_path / "s" / SHARD_1)
    store = FeatureStore(tmp_path / "s", verify=True)
    np.testing.assert_array_equal(store[:4], expected[:4])
    np.testing.assert_array_equal(store[[10, 8]], expected[[10, 8]])
    assert store.stored(8, 10) is not None
    asks = (lambda: store[3:6], lambda: store[5], lambda: store[[0, 5]], lambda: store.status, lambda: store.norms)
    for ask in (*asks, lambda: store.n_tokens, lambda: store.stored(5, 6), lambda: list(store.blocks(5))):
        with pytest.raises(CorruptStoreError, match=r"00001\.safetensors.* repeat the command"):
            ask()
    assert SHARD_1 in refusal(store.require_intact)
    assert not store.damaged


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rest_of_a_damaged_store_stays_usable(tmp_path: Path, dtype: str, damage: Callable[[Path], None]) -> None:
    whole = make_store(tmp_path / "s", FEATURES, dtype=dtype)
    expected = whole[:]
    expected[MISSING] = 0
    damage(tmp_path / "s" / SHARD_1)
    store = FeatureStore(tmp_path / "s", allow_partial=True, verify=True)
    with pytest.warns(UserWarning) as caught:
        np.testing.assert_array_equal(store[:], expected)
        np.testing.assert_array_equal(store[[7, 3, 10, 4]], expected[[7, 3, 10, 4]])
        np.testing.assert_array_equal(store[np.arange(N) % 2 == 0], expected[::2])
        np.testing.assert_array_equal(np.concatenate([block for _, block in store.blocks(3)]), expected)
        np.testing.assert_array_equal(store.status, [0] * 4 + [Status.MISSING] * 4 + [0] * 3)
        for name in ("norms", "n_tokens", "n_labels"):
            column = getattr(store, name)
            np.testing.assert_array_equal(column[SOUND], getattr(whole, name)[SOUND])
            assert not column[MISSING].any()
        assert store.stored(4, 8) is None and store.stored(5, 6) is None
        assert store[5].shape == (K,) and not store[5].any()
    assert len(caught) == 1 and "rows 4 to 8 are left out" in str(caught[0].message)
    assert len(store.damaged) == 1 and SHARD_1 in store.damaged[0]
    assert store.rows == whole.rows


@pytest.mark.parametrize("ask", [lambda s: s[0:6], lambda s: s[5], lambda s: s.norms, lambda s: s.stored(4, 5)])
def test_the_warning_is_laid_to_who_asked(path: Path, ask: Callable[[FeatureStore], object]) -> None:
    (path / SHARD_1).unlink()
    store = FeatureStore(path, allow_partial=True)
    with pytest.warns(UserWarning) as caught:
        ask(store)
    assert [warning.filename for warning in caught] == [__file__]


def test_columns_follow_damage_that_is_found_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_OPEN_SHARDS", 1)  # a shard that stays open is not looked at again
    path = make_store(tmp_path / "s", FEATURES, shard_size=1).path
    store = FeatureStore(path, allow_partial=True)
    assert (store.status == Status.OK).all() and store.norms.all()
    (path / SHARD_1).unlink()
    with pytest.warns(UserWarning, match="00001"):
        assert not store[1].any() and store[2].any()
    np.testing.assert_array_equal(store.status == Status.MISSING, np.arange(N) == 1)
    np.testing.assert_array_equal(store.norms == 0, np.arange(N) == 1)


def test_each_shard_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s", np.ones((20, K), np.float32), shard_size=1)
    hashed = []
    original = shard.sha256_of_open
    monkeypatch.setattr(shard, "sha256_of_open", lambda file: hashed.append(1) or original(file))
    store = FeatureStore(tmp_path / "s", verify=True)
    assert not hashed
    assert store[3].all() and len(hashed) == 1
    for _ in range(2):
        assert store[:].all() and store.norms.all() and store[::-1].all()
    assert len(hashed) == 20
    assert FeatureStore(tmp_path / "s")[:].all() and len(hashed) == 20


def test_what_is_hashed_is_what_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file that takes the name of a shard between its check and its use is not used."""
    original = shard.sha256_of_open

    def exchange(file: Any) -> str:
        found = original(file)
        (path / "other").write_bytes((path / SHARD_1).read_bytes()[:-4] + b"abcd")
        os.replace(path / "other", path / SHARD_1)
        return found

    monkeypatch.setattr(shard, "sha256_of_open", exchange)
    np.testing.assert_array_equal(FeatureStore(path, verify=True)[4:8], FEATURES[4:8])


@pytest.mark.parametrize("allow_partial", [False, True])
def test_verify_checks_manifest_and_rows_at_opening(path: Path, allow_partial: bool) -> None:
    manifest, rows = ((path / name).read_bytes() for name in ("manifest.json", "rows.parquet"))
    (path / "manifest.json").write_bytes(manifest.replace(b'"examples": "e"', b'"examples": "f"'))
    FeatureStore(path)
    assert "manifest.json: altered" in refusal(lambda: FeatureStore(path, allow_partial=allow_partial, verify=True))
    (path / "manifest.json").write_bytes(manifest)
    (path / "rows.parquet").write_bytes(rows[:-1] + b"x")
    np.testing.assert_array_equal(FeatureStore(path)[:], FEATURES)
    assert "rows.parquet: damaged" in refusal(lambda: FeatureStore(path, allow_partial=allow_partial, verify=True))


def test_a_store_without_any_shard_tells_nothing_of_features(tmp_path: Path) -> None:
    open_writer(tmp_path / "s", N, K).release()
    store = FeatureStore(tmp_path / "s", allow_partial=True)
    assert (store.status == Status.MISSING).all() and not store.norms.any() and store.stored(0, 4) is None
    assert store[:0].shape == store[[]].shape == (0, K)
    assert "has no shard that can be read" in refusal(lambda: store[:])


# Other processes and threads


def test_missing_shards_are_told_when_a_store_is_opened_without_them(tmp_path: Path) -> None:
    make_store(tmp_path / "s", FEATURES)
    whole = (tmp_path / "s/manifest.json").read_bytes()
    change_manifest(tmp_path / "s", shards=json.loads(whole)["shards"][:2])
    with pytest.warns(UserWarning, match=r"s: 1 of 3 shards are missing"):
        FeatureStore(tmp_path / "s", allow_partial=True)
    assert "--allow-partial" in refusal(lambda: FeatureStore(tmp_path / "s"))


def test_readers_see_whole_shards_while_a_writer_works(tmp_path: Path) -> None:
    n, path = 120, tmp_path / "s"
    features = np.random.default_rng(1).standard_normal((n, 100)).astype(np.float32) + 5
    writer = open_writer(path, n, 100, shard_size=3)
    child = os.fork()
    if not child:
        code = 1
        try:
            with patch("os.fsync"):
                write_pending(writer, features)
            code = 0
        finally:
            os._exit(code)
    seen = [0]
    while seen[-1] < n // 3:
        running = os.waitpid(child, os.WNOHANG) == (0, 0)
        with warnings.catch_warnings(), patch("os.fsync"):
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "(?s).* shards are missing; their rows are left out")
            store = FeatureStore(path, allow_partial=True, verify=True)
            present = store.status == Status.OK
            if present.any():
                np.testing.assert_array_equal(store[:], features * present[:, None])
        assert (present.reshape(-1, 3).all(axis=1) == present.reshape(-1, 3).any(axis=1)).all()
        assert (store.status[~present] == Status.MISSING).all()
        seen.append(len(store.manifest["shards"]))
        assert seen[-1] >= seen[-2] and present.sum() == 3 * seen[-1]
        assert running or seen[-1] == n // 3, "the writer failed"
    writer.release()
    assert FeatureStore(path).verify().ok
    assert len(set(seen)) > 3, "the reader came too late to see anything"


def test_a_shard_that_is_made_again_does_not_touch_its_readers(path: Path) -> None:
    before = folder_hashes(path)
    reader, late = FeatureStore(path), FeatureStore(path, allow_partial=True)
    rows = reader.stored(4, 8)
    assert rows is not None
    (path / SHARD_1).unlink()
    with pytest.warns(UserWarning, match="left out"):
        assert late.stored(4, 8) is None
    np.testing.assert_array_equal(reader[4:8], FEATURES[4:8])
    with pytest.warns(UserWarning, match="made again"):
        writer = open_writer(path, N, K)
    write_pending(writer, FEATURES)
    writer.close()
    os.replace(path / "shards" / "00000.safetensors", path / SHARD_1)  # whatever takes the name
    np.testing.assert_array_equal(rows.codes, FEATURES[4:8])
    np.testing.assert_array_equal(reader[4:8], FEATURES[4:8])
    assert "holds rows '0' to '4', expected 4 to 8" in refusal(lambda: FeatureStore(path)[4:8])
    assert before["rows.parquet"] == folder_hashes(path)["rows.parquet"]


def test_a_pickled_store_works_in_another_process(path: Path, tmp_path: Path) -> None:
    store = FeatureStore(path, verify=True)
    assert store.rows and store.norms.all() and store[5].any()
    pickled = pickle.dumps(store)
    assert len(pickled) < 8000  # neither features nor rows travel
    code = (
        "import pickle, sys; store = pickle.load(sys.stdin.buffer)\n"
        "print(store[5].tolist(), store.rows.ids[10], store.status.sum(), len(list(store.blocks(4))))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.decode() == f"{FEATURES[5].tolist()} id-10 0 3\n"


def test_threads_share_a_store(tmp_path: Path) -> None:
    features = np.random.default_rng(2).standard_normal((60, 50)).astype(np.float32)
    store = make_store(tmp_path / "s", features, dtype="float32", shard_size=2)
    (tmp_path / "s" / "shards" / "00029.safetensors").unlink()
    shared = FeatureStore(store.path, allow_partial=True, verify=True)
    features[58:] = 0
    wrong: list[Any] = []

    def read(seed: int) -> None:
        try:
            for row in np.random.default_rng(seed).integers(0, 57, 150):
                np.testing.assert_array_equal(shared[row : row + 4], features[row : row + 4])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert len(caught) == len(shared.damaged) == 1


def test_a_link_to_a_shard_elsewhere_is_followed(path: Path, tmp_path: Path) -> None:
    """Caches of downloads and stores over several disks are made of links; a manifest can't make one."""
    os.rename(path / "shards", tmp_path / "elsewhere")
    (path / "shards").mkdir()
    for file in (tmp_path / "elsewhere").iterdir():
        (path / "shards" / file.name).symlink_to(file)
    store = FeatureStore(path, verify=True)
    np.testing.assert_array_equal(store[:], FEATURES)
    (tmp_path / "elsewhere" / "00001.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning, match="is damaged; it will be made again"):
        writer = open_writer(path, N, K)
    write_pending(writer, FEATURES)
    writer.close()
    assert not (path / SHARD_1).is_symlink()
    assert (tmp_path / "elsewhere" / "00001.safetensors").read_bytes() == b"short"  # what is not ours is not written


@pytest.mark.parametrize("name", ["manifest.json", "rows.parquet", SHARD_1])
def test_what_is_no_file_is_not_read(path: Path, name: str) -> None:
    """A pipe blocks who opens it, a device never ends: neither is waited for."""
    for make in (os.mkfifo, lambda place: os.symlink("/dev/zero", place), os.mkdir):
        (path / name).unlink() if not (path / name).is_dir() else (path / name).rmdir()
        make(path / name)
        for verify in (False, True):
            with pytest.raises(LessFastError, match=name):
                store = FeatureStore(path, verify=verify)
                _ = store.rows, store.status
        if name != "manifest.json":
            assert any(name in problem for problem in FeatureStore(path).verify().problems)
