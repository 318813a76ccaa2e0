"""Stores, examples and scores at a URL: the bytes of local ones, through requests that fail, from several processes."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support import flaky_files, tiny
from support.cli import SIZES, less_fast, refused
from support.stores import DTYPES, folder_hashes, make_facts, make_rows, make_store, open_writer, refusal, write_pending

from less_fast import paths
from less_fast.data import load_examples
from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.paths import RemotePath, to_path
from less_fast.scoring import influence
from less_fast.store import FeatureStore, Status, StoreWriter, convert_store
from less_fast.store.sharing import missing_shards

RNG = np.random.default_rng(5)
FEATURES = RNG.standard_normal((22, 32)).astype(np.float32)
STATUS = np.array([Status.OK] * 20 + [Status.NO_LABELS, Status.OK], np.uint8)


def downloaded(url: str) -> dict[str, bytes]:
    files = fsspec.filesystem("memory")
    root = url.removeprefix("memory:/")
    return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Paths


def test_what_is_a_url(tmp_path: Path) -> None:
    assert to_path("a/b") == Path("a/b") and to_path(Path("/x")) == Path("/x") and to_path("C:/x") == Path("C:/x")
    assert to_path(f"file://{tmp_path}/x") == tmp_path / "x"
    url = to_path("memory://bucket/pool/")
    assert (
        url == RemotePath("memory://bucket/pool/")
        and str(url / "a" / "b.parquet") == "memory://bucket/pool/a/b.parquet"
    )
    assert (url.name, (url / "b.parquet").suffix, str((url / "b").parent)) == (
        "pool",
        ".parquet",
        "memory://bucket/pool",
    )
    assert pickle.loads(pickle.dumps(url)) == url
    assert "has lost a slash" in refusal(lambda: to_path(Path("memory://bucket/pool")))
    assert "nowhere://x cannot be reached: Protocol not known" in refusal(lambda: FeatureStore("nowhere://x"))


def test_a_request_that_fails_for_good_is_not_repeated(flaky: Path) -> None:
    assert not (to_path(f"flaky://{flaky}") / "none").exists()
    with pytest.raises(FileNotFoundError):
        to_path(f"flaky://{flaky}/none").read_bytes()
    assert len(flaky_files.requests(flaky, "")) == 2


def test_what_goes_on_failing_ends_as_an_os_error(flaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flaky_files.BROKEN, "cat /file")
    with pytest.raises(OSError, match="cat None:None went astray, 6 times"):
        to_path(f"flaky://{flaky}/file").read_bytes()
    assert len(flaky_files.requests(flaky, "cat")) == 6


def test_folders_are_made_with_the_first_file_but_no_bucket(flaky: Path) -> None:
    (to_path(f"flaky://{flaky}") / "a" / "b" / "file").write_bytes(b"x")
    assert (flaky / "a" / "b" / "file").read_bytes() == b"x"
    assert "cannot write flaky:///no-such-bucket/s" in refusal(
        lambda: open_writer("flaky:///no-such-bucket/s", 22, 32)  # type: ignore[arg-type]
    )
    assert not Path("/no-such-bucket").exists()


# Stores


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_remote_store_has_the_bytes_of_a_local_one_and_reads_the_same(
    memory: str, tmp_path: Path, dtype: str
) -> None:
    local = make_store(tmp_path / "s", FEATURES, status=STATUS, dtype=dtype)
    with open_writer(memory, 22, 32, dtype=dtype) as writer:  # type: ignore[arg-type]
        write_pending(writer, FEATURES, STATUS)
        remote = writer.close()
    assert downloaded(memory) == contents(tmp_path / "s")
    assert remote.path == RemotePath(memory) and repr(remote).startswith(f"FeatureStore('{memory}'")
    for opened in (remote, FeatureStore(memory, verify=True), pickle.loads(pickle.dumps(remote))):
        for name in ("status", "norms", "n_tokens", "n_labels"):
            np.testing.assert_array_equal(getattr(opened, name), getattr(local, name))
        np.testing.assert_array_equal(opened[:], local[:])
        np.testing.assert_array_equal(opened[[21, 3, 3, 9]], local[[21, 3, 3, 9]])
        assert opened.rows == local.rows and opened.verify().ok


def test_a_remote_store_is_resumed_and_other_settings_are_refused(memory: str, tmp_path: Path) -> None:
    make_store(tmp_path / "s", FEATURES)
    with open_writer(memory, 22, 32) as writer:  # type: ignore[arg-type]
        rows = slice(*writer.bounds(2))
        writer.write(2, FEATURES[rows], np.zeros(4), np.arange(8, 12) + 2, np.arange(8, 12) + 1, {"token_budget": 102})
    assert "5 of 6 shards are missing" in refusal(lambda: FeatureStore(memory))
    assert "was begun with other settings (old -> new): examples" in refusal(
        lambda: open_writer(memory, 22, 32, examples="others")  # type: ignore[arg-type]
    )
    with open_writer(memory, 22, 32) as writer:  # type: ignore[arg-type]
        assert writer.pending() == [0, 1, 3, 4, 5]
        write_pending(writer, FEATURES)
    assert downloaded(memory) == contents(tmp_path / "s")
    fsspec.filesystem("memory").pipe_file("/elsewhere/note.txt", b"hello")
    assert "holds note.txt and is not a feature store" in refusal(
        lambda: open_writer("memory://elsewhere", 22, 32)  # type: ignore[arg-type]
    )


def test_shards_that_another_writer_left_unlisted_are_taken_and_damaged_ones_made_again(
    memory: str, tmp_path: Path
) -> None:
    make_store(tmp_path / "s", FEATURES)
    whole = contents(tmp_path / "s")
    with open_writer(memory, 22, 32) as one, open_writer(memory, 22, 32) as other:  # type: ignore[arg-type]
        write_pending(one, FEATURES)
        # As if this one had read the manifest before all of that, and written it after.
        other._list(other._manifest, {})
        other._manifest.write(other.path)  # type: ignore[arg-type]
        assert missing_shards([other]) == []
    assert downloaded(memory) == whole
    files = fsspec.filesystem("memory")
    manifest = json.loads(whole["manifest.json"])
    files.pipe_file(f"{memory}/shards/00001.safetensors", b"short")
    manifest["shards"] = [entry for entry in manifest["shards"] if entry["start"] != 4]
    files.pipe_file(f"{memory}/manifest.json", json.dumps(manifest).encode())
    with pytest.warns(UserWarning, match="00001.safetensors is damaged; it will be made again"):
        writer = open_writer(memory, 22, 32)  # type: ignore[arg-type]
    with writer:
        assert writer.pending() == [1]
        write_pending(writer, FEATURES)
    assert downloaded(memory) == whole


def test_damage_is_found_and_the_rest_is_read(memory: str) -> None:
    with open_writer(memory, 22, 32) as writer:  # type: ignore[arg-type]
        write_pending(writer, FEATURES)
    files, name = fsspec.filesystem("memory"), f"{memory}/shards/00003.safetensors"
    data = bytearray(files.cat_file(name))
    data[-100] ^= 1
    files.pipe_file(name, bytes(data))
    store = FeatureStore(memory, verify=True)
    np.testing.assert_array_equal(store[:12], FEATURES[:12])
    with pytest.raises(CorruptStoreError, match=r"00003\.safetensors: damaged"):
        store[12:16]
    assert [problem.split(":")[0] for problem in store.verify().problems] == ["memory"]
    with pytest.warns(UserWarning, match="rows 12 to 16 are left out"):
        partial = FeatureStore(memory, verify=True, allow_partial=True)[:]
    np.testing.assert_array_equal(partial, np.where(np.isin(np.arange(22), range(12, 16))[:, None], 0.0, FEATURES))


def test_columns_are_read_without_features_and_shards_ahead(flaky: Path) -> None:
    n, dim = 400, 4096
    features = np.zeros((n, dim), np.float32)
    features[:, 7] = np.arange(n) + 1
    make_store(flaky / "s", features, shard_size=100)
    store = FeatureStore(f"flaky://{flaky}/s")
    np.testing.assert_array_equal(store.norms, np.arange(n) + 1)
    assert store.n_tokens.sum() and store.status.sum() == 0
    ranges = [line.split()[1].split(":") for line in flaky_files.requests(flaky, "cat") if "safetensors" in line]
    assert 4 <= len(ranges) <= 8 and sum(int(stop) - int(start) for start, stop in ranges) < 4 * 3 * (1 << 17)
    assert [int(block[0, 7]) for _, block in store.blocks(50)] == [1, 51, 101, 151, 201, 251, 301, 351]
    whole = [line for line in flaky_files.requests(flaky, "cat None:None") if "safetensors" in line]
    assert sorted(whole) == [f"cat None:None {flaky}/s/shards/{i:05}.safetensors" for i in range(4)]


def test_scores_of_remote_stores_are_those_of_local_ones_whatever_requests_fail(
    flaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_store(flaky / "pool", FEATURES, status=STATUS, dtype="int8")
    target = make_store(flaky / "target", FEATURES[3:9] + 1)
    monkeypatch.setenv(flaky_files.RATE, "0.2")
    url = f"flaky://{flaky}"
    found = influence(f"{url}/pool", f"{url}/target")
    assert found.matrix.tobytes() == influence(local, target).matrix.tobytes()
    convert_store(f"{url}/pool", f"{url}/bits", dtype="1bit", progress=False)
    monkeypatch.setenv(flaky_files.RATE, "0")
    convert_store(flaky / "pool", flaky / "the same", dtype="1bit", progress=False)
    assert contents(flaky / "bits") == contents(flaky / "the same")


@pytest.mark.parametrize("seed", range(5))
def test_a_store_is_written_through_requests_that_fail(flaky: Path, monkeypatch: Any, seed: int) -> None:
    make_store(flaky / "local", FEATURES, shard_size=2)
    monkeypatch.setenv(flaky_files.RATE, "0.25")
    url = f"flaky://{flaky}/s"
    for _ in range(200):
        try:
            writer = StoreWriter(url, make_facts(32), make_rows(22), dim=32, dtype="float32", shard_size=2)
            with writer:
                write_pending(writer, FEATURES)
                writer.close()
            break
        except LessFastError as error:  # a request may fail six times
            assert "went astray" in str(error)
    assert contents(flaky / "s") == contents(flaky / "local")


def test_a_shard_that_cannot_be_written_ends_the_job_and_the_finished_ones_stay(
    flaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flaky_files.BROKEN, "pipe 00002.safetensors")
    with open_writer(f"flaky://{flaky}/s", 22, 32) as writer:  # type: ignore[arg-type]
        message = refusal(lambda: write_pending(writer, FEATURES))
    assert "00002.safetensors: pipe went astray, 6 times; 2 of 6 shards are finished and stay" in message
    monkeypatch.delenv(flaky_files.BROKEN)
    with open_writer(f"flaky://{flaky}/s", 22, 32) as writer:  # type: ignore[arg-type]
        assert writer.pending() == [2, 3, 4, 5]


def test_a_folder_at_a_url_is_there_as_long_as_it_is_used(flaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "deep/er/file", "empty"):
        (flaky / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (flaky / "model" / name).write_bytes(b"" if name == "empty" else name.encode() * 3)
    monkeypatch.setenv(flaky_files.RATE, "0.2")
    with paths.local_copy(f"flaky://{flaky}/model/") as folder:
        assert contents(Path(folder)) == contents(flaky / "model")
    assert not Path(folder).exists()
    with paths.local_copy("owner/name") as same:
        assert same == "owner/name"
    assert "there is no such folder" in refusal(lambda: paths.local_copy(f"flaky://{flaky}/none").__enter__())


# Examples


def test_examples_are_read_from_urls(memory: str, tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "pool.jsonl", tiny.examples("sums", 30))
    local = load_examples(file)
    local.write_parquet(range(30), tmp_path / "pool.parquet")
    files = fsspec.filesystem("memory")
    files.pipe_file(f"{memory}/pool.jsonl", file.read_bytes())
    files.pipe_file(f"{memory}/pool.jsonl.gz", gzip.compress(file.read_bytes()))
    files.pipe_file(f"{memory}/pool.parquet", (tmp_path / "pool.parquet").read_bytes())
    for name in ("pool.jsonl", "pool.jsonl.gz", "pool.parquet"):
        remote = load_examples(f"{memory}/{name}")
        assert remote.fingerprint == local.fingerprint and list(remote) == list(local)
        remote.write_lines([4, 2], f"{memory}/chosen.jsonl")
        chosen = files.cat_file(f"{memory}/chosen.jsonl")
        assert [json.loads(line)["id"] for line in chosen.splitlines()] == ["sums_4", "sums_2"]
    assert "is a source of these examples" in refusal(
        lambda: load_examples(f"{memory}/pool.jsonl").write_lines([1], f"{memory}/pool.jsonl")
    )
    read_before = load_examples(f"{memory}/pool.jsonl")
    files.pipe_file(f"{memory}/pool.jsonl", file.read_bytes()[:-1] + b" \n")
    assert "changed since it was loaded" in refusal(lambda: read_before.write_lines([1], tmp_path / "x.jsonl"))
    assert f"{memory}/none.jsonl: no such file" in refusal(lambda: load_examples(f"{memory}/none.jsonl"))


# The command


def test_the_commands_work_on_urls_as_on_folders(inputs: Path, flaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pool.jsonl", "sums.jsonl"):
        (flaky / name).write_bytes((inputs / name).read_bytes())
    (flaky / "groups.json").write_text("{}")
    outputs = []
    for place, rate in ((str(flaky / "local"), "0"), (f"flaky://{flaky}/remote", "0.1")):
        monkeypatch.setenv(flaky_files.RATE, rate)
        data = f"flaky://{flaky}" if rate != "0" else str(flaky)
        commands = [
            ["extract", inputs / "model", f"{data}/pool.jsonl", f"{place}/pool", *SIZES, "--modules", "q_proj"],
            ["extract", inputs / "model", f"{data}/sums.jsonl", f"{place}/sums", *SIZES, "--modules", "q_proj"],
            ["score", "--train", f"{place}/pool", "--target", f"sums={place}/sums", "--out", f"{place}/scores"],
            ["select", "--scores", f"{place}/scores/sums.parquet", "--data", f"{data}/pool.jsonl", "-n", "5"],
            ["info", f"{place}/pool", "--verify"],
            ["convert", f"{place}/pool", f"{place}/codes", "--dtype", "int8"],
        ]
        commands[3] += ["--groups", f"{data}/groups.json", "--report", f"{data}/report-{rate}.json"]
        commands[3] += ["--dedupe", f"{place}/pool", "--out", f"{place}/chosen.jsonl"]
        for command in commands:
            done = less_fast(*command)
            assert done.exit_code == 0, (command, done.output)
            outputs.append(done.stdout.replace(place, "PLACE"))
    assert outputs[: len(commands)] == outputs[len(commands) :]
    assert contents(flaky / "local") == contents(flaky / "remote")
    reports = [json.loads((flaky / f"report-{rate}.json").read_text()) for rate in ("0", "0.1")]
    assert [report["selected"] for report in reports] == [5, 5]
    assert "is read; choose another" in refused(
        *("score", "--train", f"{place}/pool", "--target", f"{place}/sums", "--out", f"{place}/pool/scores.csv")
    )


def test_a_run_reads_from_urls_and_writes_to_a_folder(inputs: Path, flaky: Path) -> None:
    pool, target = inputs / "pool.jsonl", inputs / "sums.jsonl"
    message = refused("run", "--model", inputs / "model", "--train", pool, "--target", target, "--out", "flaky:///x")
    assert "setting out is 'flaky:///x'; expected a folder" in message


def test_two_commands_on_one_url_by_mistake_make_one_store(inputs: Path, tmp_path: Path) -> None:
    requests = tmp_path / "requests.txt"
    environment = flaky_files.environment(tmp_path / "installed", FLAKY_RATE="0.02", FLAKY_LOG=str(requests))
    pool = tiny.write_pool(tmp_path, 100)
    arguments = [inputs / "model", pool, "OUT", "--dim", "128", "--block", "32", "--shard-size", "4", "--device", "cpu"]
    arguments += ["--modules", "q_proj"]

    def started(out: object) -> subprocess.Popen[str]:
        code = "from less_fast.cli import main; main()"
        command = [sys.executable, "-c", code, "extract", *(str(out if a == "OUT" else a) for a in arguments)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    both = [started(f"flaky://{tmp_path}/bucket/s") for _ in range(2)]
    for process in both:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert less_fast("extract", *(tmp_path / "alone" if a == "OUT" else a for a in arguments)).exit_code == 0
    assert folder_hashes(tmp_path / "bucket" / "s") == folder_hashes(tmp_path / "alone")
    written = [line for line in requests.read_text().splitlines() if re.match(r"pipe .*\.safetensors$", line)]
    n_shards = 50
    assert n_shards <= len(written) < 1.5 * n_shards
