"""What goes wrong with remote stores and files: outages, other writers, odd servers, forks, and URLs that are none."""

from __future__ import annotations

import json
import multiprocessing
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support import flaky_files, tiny
from support.cli import refused
from support.flaky_files import FlakyFileSystem, requests
from support.stores import make_store, open_writer, refusal, write_pending

from less_fast import paths
from less_fast.data import load_examples
from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.paths import RemotePath, to_path
from less_fast.store import FeatureStore, Status
from less_fast.store.read_ahead import ReadAhead

FEATURES = np.random.default_rng(6).standard_normal((22, 32)).astype(np.float32)
whole_file, facts_of = FlakyFileSystem.cat_file, FlakyFileSystem._info


# URLs


def test_urls_that_cannot_be_used_are_told(memory: str, tmp_path: Path) -> None:
    assert to_path("C://data/pool") == Path("C:/data/pool")
    assert to_path((tmp_path / "a b%c").as_uri()) == tmp_path / "a b%c"
    assert "names no bucket or folder" in refusal(lambda: to_path("memory://"))
    assert "is a path within a path" in refusal(lambda: to_path("zip://pool.jsonl::memory://bucket/a.zip"))
    assert refusal(lambda: FeatureStore("github://pool")).startswith("github://pool/manifest.json cannot be reached")
    message = refused("demo", "--out", f"{memory}/demo")
    assert "--out is 'memory:/bucket/folder/demo', a URL; expected a folder of this machine" in message
    assert "OUT is 'memory:/x'" in refused("warmup", "no-model", "no-data", "memory://x")
    weighed = ("score", "--train", memory, "--target", memory, "--out", "x.csv", "--weights-from", "memory://x")
    assert "--weights-from is 'memory:/x', a URL" in refused(*weighed)


@pytest.mark.parametrize("name", ["..", "a\\..\\b", "C:b"])
def test_names_that_lead_out_of_a_folder_are_refused(memory: str, monkeypatch: Any, name: str) -> None:
    import ntpath

    if name != "..":
        monkeypatch.setattr(paths.os, "path", ntpath)
    monkeypatch.setattr(RemotePath, "_entries", lambda self: {name: {"type": "file"}})
    assert "which no local folder can" in refusal(lambda: paths.local_copy(memory).__enter__())


def test_a_folder_is_copied_whatever_its_url_ends_with(flaky: Path) -> None:
    (flaky / "model").mkdir()
    (flaky / "model" / "config.json").write_text("{}")
    with paths.local_copy(f"flaky://{flaky}/model//") as folder:
        assert [str(path.relative_to(folder)) for path in Path(folder).rglob("*")] == ["config.json"]


# Answers


def test_errors_without_a_number_are_those_of_a_file_system(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(error: Exception) -> str:
        def fail(*_: Any, **__: Any) -> bytes:
            raise error

        monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
        return refusal(lambda: FeatureStore(memory))

    assert answer(PermissionError("Forbidden")) == f"cannot read {memory}/manifest.json: Forbidden"
    assert answer(NotImplementedError()).endswith("its file system cannot do that (NotImplementedError)")
    with pytest.raises(OSError) as caught:
        to_path(f"{memory}/x").read_bytes()
    assert caught.value.filename == f"{memory}/x" and caught.value.strerror


def test_a_server_without_ranges_is_read_all_the_same(flaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = make_store(flaky / "s", FEATURES)
    file = tiny.write_jsonl(flaky / "pool.jsonl", tiny.examples("sums", 30))
    monkeypatch.setattr(FlakyFileSystem, "cat_file", lambda self, path, **_: whole_file(self, path))
    monkeypatch.setattr(paths, "_READ_AHEAD", 100)
    np.testing.assert_array_equal(FeatureStore(f"flaky://{flaky}/s").norms, local.norms)
    assert to_path(f"flaky://{flaky}/pool.jsonl").read_bytes(5, 9) == file.read_bytes()[5:9]  # type: ignore[union-attr]
    assert load_examples(f"flaky://{flaky}/pool.jsonl").fingerprint == load_examples(file).fingerprint


def test_examples_that_are_cut_off_or_change_while_they_are_read_are_refused(
    flaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny.write_jsonl(flaky / "pool.jsonl", tiny.examples("sums", 30))
    url = f"flaky://{flaky}/pool.jsonl"
    loaded, text = load_examples(url), file.read_bytes()

    def read_and_replace(self: Any, path: str, **bounds: Any) -> bytes:
        found = whole_file(self, path, **bounds)
        file.write_bytes(text + b"\n")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FlakyFileSystem, "cat_file", read_and_replace)
        assert "changed while it was read" in refusal(lambda: loaded.write_lines([1], flaky / "x.jsonl"))
        file.write_bytes(text)
        assert "changed while it was read" in refusal(lambda: load_examples(url))
    with monkeypatch.context() as patch:
        patch.setattr(FlakyFileSystem, "_info", lambda self, path: {**facts_of(self, path), "size": 10**6})
        assert "it ends at" in refusal(lambda: load_examples(url))
        patch.setattr(FlakyFileSystem, "_info", lambda self, path: {**facts_of(self, path), "size": None})
        with pytest.raises(OSError, match="does not tell its size"):
            to_path(url).open()  # type: ignore[call-arg]


# Reading


def test_a_forked_process_reads_a_store_that_was_read_before(flaky: Path) -> None:
    make_store(flaky / "s", FEATURES)
    store = FeatureStore(f"flaky://{flaky}/s")
    assert store[:].tobytes() == FEATURES.tobytes()
    process = multiprocessing.get_context("fork").Process(
        target=lambda: np.testing.assert_array_equal(store[:], FEATURES)
    )
    process.start()
    process.join(timeout=60)
    process.kill()
    assert process.exitcode == 0


def test_a_store_is_let_go_of_with_what_it_fetched(flaky: Path) -> None:
    make_store(flaky / "s", FEATURES)
    store = FeatureStore(f"flaky://{flaky}/s")
    assert len(store[:]) == 22
    store._read_ahead._threads.shutdown()
    gone = weakref.ref(store)
    del store
    assert gone() is None


def test_what_was_to_be_fetched_ahead_is_dropped_with_another_order() -> None:
    begun, go_on, fetched = threading.Event(), threading.Event(), []

    def fetch(number: int) -> Any:
        fetched.append(number)
        if number == 1:
            begun.set()
            assert go_on.wait(60)
        return number

    ahead = ReadAhead()
    ahead._threads = ThreadPoolExecutor(1)
    assert ahead.take(0, [1, 2], fetch) == 0 and begun.wait(60)
    with ThreadPoolExecutor(1) as other:
        taken = other.submit(ahead.take, 9, [], fetch)
        while set(ahead._fetching) & {1, 2}:
            assert not taken.done()
        go_on.set()
        assert taken.result(60) == 9
    assert fetched == [0, 1, 9]


def test_what_failed_ahead_of_time_is_fetched_again() -> None:
    fetched = []

    def fetch(number: int) -> Any:
        fetched.append(number)
        if fetched.count(1) == 1:
            raise CorruptStoreError("an outage")
        return number

    ahead = ReadAhead()
    assert ahead.take(0, [1], fetch) == 0
    assert isinstance(ahead._fetching[1].exception(60), CorruptStoreError)
    assert ahead.take(1, [], fetch) == 1


def test_columns_of_a_store_that_is_verified_come_with_its_features_once(flaky: Path) -> None:
    local = make_store(flaky / "s", FEATURES)
    store = FeatureStore(f"flaky://{flaky}/s", verify=True)
    for name in ("status", "norms", "n_tokens", "n_labels"):
        np.testing.assert_array_equal(getattr(store, name), getattr(local, name))
    assert sorted(line.split()[1] for line in requests(flaky, "cat") if "safetensors" in line) == ["None:None"] * 6
    data = bytearray((flaky / "s/shards/00003.safetensors").read_bytes())
    data[-100] ^= 1
    (flaky / "s/shards/00003.safetensors").write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"00003\.safetensors: damaged"):
        store[:]


def test_a_shard_that_vanishes_takes_its_columns_along_and_an_outage_does_not(
    flaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(flaky / "s", FEATURES)
    store = FeatureStore(f"flaky://{flaky}/s", allow_partial=True)
    assert (store.status == Status.OK).all()
    with monkeypatch.context() as patch:
        patch.setenv(flaky_files.BROKEN, "cat 00003.safetensors")
        with pytest.raises(CorruptStoreError, match="went astray, 6 times"):
            store[:]
    np.testing.assert_array_equal(store[:16], FEATURES[:16])
    assert not store.damaged
    (flaky / "s/shards/00004.safetensors").unlink()
    with pytest.warns(UserWarning, match="rows 16 to 20 are left out"):
        store[:]
    assert np.flatnonzero(store.status == Status.MISSING).tolist() == [16, 17, 18, 19]


# Writing


def test_a_shard_that_cannot_be_read_now_is_not_removed(flaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(flaky / "s", FEATURES)
    url: Any = f"flaky://{flaky}/s"
    with open_writer(flaky / "s", 22, 32) as writer:
        writer._manifest.shards.pop(1)
        writer._manifest.write(writer.path)
    with monkeypatch.context() as patch:
        patch.setenv(flaky_files.BROKEN, "cat 00001.safetensors")
        assert "went astray, 6 times; nothing that was finished is lost" in refusal(lambda: open_writer(url, 22, 32))
    with open_writer(url, 22, 32) as writer:
        assert writer.pending() == []


def test_no_shard_comes_into_a_store_that_was_begun_anew(flaky: Path) -> None:
    url: Any = f"flaky://{flaky}/s"
    with open_writer(url, 22, 32) as one:
        with open_writer(f"flaky://{flaky}/t", 22, 32, examples="others") as other:  # type: ignore[arg-type]
            other._manifest.write(one.path)  # as one that looked before the first had begun
        assert "was begun with other settings" in refusal(lambda: write_pending(one, FEATURES))
    assert not (flaky / "s" / "shards").exists()


def test_a_store_that_another_process_begins_meanwhile_is_gone_on_with(
    flaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url: Any = f"flaky://{flaky}/s"
    with open_writer(url, 22, 32):
        exists = RemotePath.exists
        monkeypatch.setattr(RemotePath, "exists", lambda path: path.name != "manifest.json" and exists(path))
        with open_writer(url, 22, 32) as writer:  # asked for the manifest just before it was there
            assert len(writer.pending()) == 6


def test_a_store_is_whole_when_it_is_closed_though_another_left_out_its_shards(memory: str) -> None:
    with open_writer(memory, 22, 32) as one, open_writer(memory, 22, 32) as other:  # type: ignore[arg-type]
        empty = other._manifest
        write_pending(one, FEATURES)
        empty.write(other.path)
        one._manifest = empty  # as where all shards were the other's
        np.testing.assert_array_equal(one.close()[:], FEATURES)
    manifest = json.loads(fsspec.filesystem("memory").cat_file(f"{memory}/manifest.json"))
    assert len(manifest["shards"]) == 6


def test_local_folders_with_odd_links_and_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s", FEATURES)
    for name, target in (("00001", "00001.safetensors"), ("00002", "../manifest.json/none")):
        file = tmp_path / "s/shards" / f"{name}.safetensors"
        file.unlink()
        file.symlink_to(target)
    with pytest.warns(UserWarning, match="is missing; it will be made again"), open_writer(tmp_path / "s", 22, 32) as w:
        assert w.pending() == [1, 2]
    (tmp_path / "links").mkdir()
    (tmp_path / "links/photo").symlink_to("nothing")
    assert "holds photo and is not a feature store" in refusal(lambda: open_writer(tmp_path / "links", 22, 32))

    def denied(_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(LessFastError, match=r"cannot write .*: Permission denied"):
        open_writer(tmp_path / "s", 22, 32)
