"""Damaged, foreign, locked and full: every trouble a store can meet is told in one line, and nothing sound is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.stores import (
    DTYPES,
    change_manifest,
    flip_bit,
    folder_hashes,
    make_rows,
    make_store,
    open_writer,
    refusal,
    write_pending,
)

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.store import FeatureStore, StoreWriter, atomic_file, files
from less_fast.store.files import FolderLock, remove_temporaries

N, K = 11, 8
FEATURES = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_store(tmp_path / "s", FEATURES)
    return tmp_path / "s"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip_a_feature_bit(file: Path) -> None:
    flip_bit(file, 8 * (file.stat().st_size - 10) + 6)


def grow_the_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[5] = 0x10
    file.write_bytes(data)


def claim_a_larger_shape(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"shape":[4,8]', b'"shape":[9,8]'))


@pytest.mark.parametrize("damage", [truncate, flip_a_feature_bit, grow_the_header, claim_a_larger_shape, Path.unlink])
def test_a_damaged_shard_is_named_and_the_others_stay(path: Path, damage: Any) -> None:
    damage(path / "shards" / "00001.safetensors")
    store = FeatureStore(path)
    report = store.verify()
    assert not report.ok and len(report.problems) == 1 and "00001.safetensors" in report.problems[0]
    np.testing.assert_array_equal(store[:4], FEATURES[:4])
    np.testing.assert_array_equal(store[[10, 8]], FEATURES[[10, 8]])
    if damage is not flip_a_feature_bit:  # which only the checksum can tell
        for ask in (lambda: store[3:6], lambda: store[[5]], lambda: store.status):
            with pytest.raises(CorruptStoreError, match="00001"):
                ask()


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_shard_is_made_again(path: Path, damage: Any) -> None:
    before = folder_hashes(path)
    damage(path / "shards" / "00001.safetensors")
    with pytest.warns(UserWarning, match=r"00001.safetensors is (damaged|missing); it will be made again"):
        writer = open_writer(path, N, K)
    assert writer.pending() == [1]
    write_pending(writer, FEATURES)
    writer.close()
    assert folder_hashes(path) == before


def test_shards_not_listed_yet_are_adopted_if_whole(path: Path) -> None:
    before = folder_hashes(path)
    entries = json.loads((path / "manifest.json").read_text())["shards"]
    change_manifest(path, shards=entries[:1])
    truncate(path / "shards" / "00002.safetensors")
    (path / "shards" / "00002.safetensors.tmp").write_bytes(b"half a shard")
    (path / "manifest.json.tmp").write_bytes(b"{")
    with pytest.warns(UserWarning, match="00002"):
        writer = open_writer(path, N, K)
    assert writer.pending() == [2]
    write_pending(writer, FEATURES)
    writer.close()
    assert folder_hashes(path) == before


def test_a_shard_of_other_rows_is_not_adopted(path: Path) -> None:
    entries = json.loads((path / "manifest.json").read_text())["shards"]
    change_manifest(path, shards=entries[:1])
    os.replace(path / "shards" / "00000.safetensors", path / "shards" / "00001.safetensors")
    with pytest.warns(UserWarning) as caught:
        writer = open_writer(path, N, K)
    assert ["00000.safetensors is missing" in str(w.message) for w in caught] == [True, False]
    assert "00001.safetensors is damaged" in str(caught[1].message)
    assert writer.pending() == [0, 1]
    writer.release()


def test_damaged_rows(path: Path) -> None:
    before = folder_hashes(path)
    flip_a_feature_bit(path / "rows.parquet")
    problems = FeatureStore(path).verify().problems
    assert len(problems) == 1 and "rows.parquet: damaged" in problems[0]
    (path / "rows.parquet").write_bytes(b"no parquet")
    store = FeatureStore(path)
    np.testing.assert_array_equal(store[:], FEATURES)
    with pytest.raises(CorruptStoreError, match="is missing or damaged"):
        _ = store.rows
    (path / "rows.parquet").write_bytes(make_rows(3).to_parquet())
    with pytest.raises(CorruptStoreError, match="has 3 rows, but the manifest says 11"):
        _ = FeatureStore(path).rows
    (path / "rows.parquet").unlink()
    assert "No such file" in FeatureStore(path).verify().problems[0]
    open_writer(path, N, K).close()
    assert folder_hashes(path) == before


def test_what_is_not_a_store_is_refused(tmp_path: Path, path: Path) -> None:
    assert "nowhere is not a feature store: there is no such folder" in refusal(
        lambda: FeatureStore(tmp_path / "nowhere")
    )
    assert "has no manifest.json" in refusal(lambda: FeatureStore(tmp_path))
    file = path / "rows.parquet"
    assert "is not a feature store" in refusal(lambda: FeatureStore(file))
    assert "cannot write" in refusal(lambda: open_writer(file, N, K))
    assert "holds s and is not a feature store; choose another folder" in refusal(lambda: open_writer(tmp_path, N, K))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 3}, "schema version 3, but this less_fast reads up to 2"),
        ({"schema_version": "1"}, "schema_version is '1'"),
        ({"n_rows": -1}, "n_rows is -1"),
        ({"n_rows": 11.0}, "n_rows is 11.0"),
        ({"n_rows": True}, "n_rows is True"),
        ({"dtype": ["float32"]}, "not a valid manifest"),
        ({"dtype": "pickle"}, "dtype is 'pickle'"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"shards": 3}, "not a valid manifest"),
        ({"shards": [{"file": "x"}]}, "not a valid manifest"),
        ({"rows": {}}, "'content_sha256' is missing"),
    ],
)
def test_a_wrong_manifest_is_refused(path: Path, fields: dict[str, Any], message: str) -> None:
    change_manifest(path, **fields)
    assert message in refusal(lambda: FeatureStore(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"file": "../other/00001.safetensors"}, "outside of the store"),
        ({"file": "/etc/passwd"}, "outside of the store"),
        ({"file": "C:\\x"}, "outside of the store"),
        ({"file": 7}, "expected a string"),
        ({"start": "4"}, "expected an integer"),
        ({"start": 3}, "not a window of the store"),
        ({"start": 0, "stop": 4}, "there twice"),
        ({"start": 40, "stop": 44}, "not a window of the store"),
        ({"extra": 1}, "not a valid manifest"),
    ],
)
def test_a_wrong_shard_table_is_refused(path: Path, fields: dict[str, Any], message: str) -> None:
    entries = json.loads((path / "manifest.json").read_text())["shards"]
    change_manifest(path, shards=[entries[0], {**entries[1], **fields}, entries[2]])
    assert message in refusal(lambda: FeatureStore(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00\xff"])
def test_a_manifest_that_is_no_json_object_is_refused(path: Path, text: str) -> None:
    (path / "manifest.json").write_bytes(text.encode("latin1"))
    assert str(path / "manifest.json") in refusal(lambda: FeatureStore(path))


def test_an_altered_manifest_is_found_by_verify(path: Path) -> None:
    change_manifest(path, model="another")
    problems = FeatureStore(path).verify().problems
    assert len(problems) == 1 and "manifest.json: altered" in problems[0]


def test_impossible_sizes_are_refused_before_memory_is_asked_for(path: Path) -> None:
    change_manifest(path, dim=10**9)
    store = FeatureStore(path)
    for ask in (lambda: store[0:1], lambda: store[0], lambda: store.norms):
        with pytest.raises(CorruptStoreError, match="00000"):
            ask()
    change_manifest(path, dim=K, n_rows=10**15, shard_size=10**14, shards=[])
    with pytest.raises(CorruptStoreError, match="11 rows, but the manifest says 1000000000000000"):
        FeatureStore(path, allow_partial=True)


def test_two_writers_at_once(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "s", N, K)
    assert "is being written by another process" in refusal(lambda: open_writer(tmp_path / "s", N, K))
    code = (
        "import sys; from less_fast.store import *\n"
        "try: StoreWriter(sys.argv[1], {}, Rows([], [], []), dim=8, dtype='float32', shard_size=4)\n"
        "except ValueError as error: print(error)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "s")]
    assert "another process" in subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    writer.release()
    writer.release()
    second = open_writer(tmp_path / "s", N, K)
    write_pending(second, FEATURES)
    second.close()
    assert not (tmp_path / "s" / ".lock").exists()


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 10**6}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=free["bytes"]))
    big = {"dim": 10**6, "dtype": "float32", "shard_size": 400}
    store = tmp_path / "a" / "s"
    message = refusal(lambda: StoreWriter(store, {}, make_rows(1000), **big))
    assert "needs 4 GB more on the disk, but only 1 MB is free" in message
    assert not (tmp_path / "a").exists()
    free["bytes"] = 5 * 10**9
    StoreWriter(store, {}, make_rows(1000), **big).release()
    # What is there already is not asked for again.
    make_store(tmp_path / "s", np.ones((50, 1000), np.float32), shard_size=50)
    free["bytes"] = 100_000
    rows_facts = (make_rows(50), {"dim": 1000, "dtype": "float32", "shard_size": 50})
    facts = FeatureStore(tmp_path / "s").facts
    StoreWriter(tmp_path / "s", facts, rows_facts[0], **rows_facts[1]).release()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    make_store(tmp_path / "whole", FEATURES, dtype=dtype)
    writer = open_writer(tmp_path / "s", N, K, dtype=dtype)
    write = writer.write

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_up_at_shard_1(shard: int, *arrays: Any) -> None:
        if shard == 1:
            monkeypatch.setattr(os, "fsync", full)
        write(shard, *arrays)

    monkeypatch.setattr(writer, "write", fill_up_at_shard_1)
    message = refusal(lambda: write_pending(writer, FEATURES))
    assert "00001.safetensors: the disk is full" in message
    assert "1 of 3 shards are finished and stay; make room and repeat the command" in message
    monkeypatch.undo()
    writer.release()
    assert [p.name for p in (tmp_path / "s" / "shards").iterdir()] == ["00000.safetensors"]
    reader = FeatureStore(tmp_path / "s", allow_partial=True, verify=True)
    np.testing.assert_array_equal(reader[:4], FeatureStore(tmp_path / "whole")[:4])
    again = open_writer(tmp_path / "s", N, K, dtype=dtype)
    assert again.pending() == [1, 2]
    write_pending(again, FEATURES)
    again.close()
    assert folder_hashes(tmp_path / "s") == folder_hashes(tmp_path / "whole")


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """A real refusal, half-way through the file: the process may not write files of more than 8 kB."""
    writer = open_writer(tmp_path / "s", 4, 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        message = refusal(lambda: writer.write(0, np.ones((4, 1000)), [0] * 4, [1] * 4, [1] * 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "00000.safetensors: File too large; 0 of 1 shards are finished" in message
    assert list((tmp_path / "s" / "shards").iterdir()) == []
    writer.write(0, np.ones((4, 1000)), [0] * 4, [1] * 4, [1] * 4)
    assert writer.close().verify().ok


def test_bytes_are_on_the_disk_before_their_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, then name, then the folder that holds the name; first the shard, then the manifest that lists it."""
    writer = open_writer(tmp_path / "s", 3, K)
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def log_replace(old: Path, new: Path) -> None:
        events.append("name " + new.name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    writer.write(0, FEATURES[:3], [0] * 3, [1] * 3, [1] * 3)
    assert events == [
        "sync 00000.safetensors.tmp",
        "name 00000.safetensors",
        "sync shards",
        "sync manifest.json.tmp",
        "name manifest.json",
        "sync s",
    ]
    writer.release()


# Two writers


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Each writes to its own; the last to end wins, whole."""
    path = tmp_path / "file"
    with atomic_file(path) as first:
        first.write(b"first" * 5000)
        with atomic_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        with pytest.raises(KeyboardInterrupt), atomic_file(path) as third:
            third.write(b"third")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"first" * 5000
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_is_taken_over_or_removed(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").write_bytes(b"left, and longer than what is written now")
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"new")]
    killed = []
    with atomic_file(tmp_path / "file"):
        child = os.fork()
        if not child:
            with atomic_file(tmp_path / "file"):
                os._exit(0)
        os.waitpid(child, 0)
        killed = [entry.name for entry in tmp_path.iterdir() if entry.name not in ("file", "file.tmp")]
    assert len(killed) == 1
    remove_temporaries(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_lock_of_a_folder_that_was_moved_away_is_not_that_of_its_successor(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    first = FolderLock(folder)
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    second = FolderLock(folder)
    first.release()
    with pytest.raises(LessFastError, match="being written by another process"):
        FolderLock(folder)
    second.release()
    assert not list(folder.iterdir())
