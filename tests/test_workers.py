"""Several processes make one store: shared correctly, refused clearly, and the bytes of a single process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.children import child_environment
from support.stores import folder_hashes, make_facts, make_rows, open_writer, refusal
from support.worker_killer import FEATURES, N_SHARDS, K, N, forked, work

from less_fast.store import FeatureStore, Status, StoreWriter, claims, files
from less_fast.store.claims import Claims
from less_fast.store.sharing import claim_shards, missing_shards
from less_fast.store.writer import StoreWriter as Writer
from less_fast.workers import Worker, alone

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork and file locks are POSIX")

SCRIPT = Path(__file__).parent / "support" / "worker_killer.py"


def shared_writer(path: Path, **changes: Any) -> Writer:
    return StoreWriter(path, make_facts(K, **changes), make_rows(N), dim=K, dtype="int8", shard_size=3, shared=True)


def ended_well(worker: int) -> bool:
    _, status = os.waitpid(worker, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def whole(path: Path) -> dict[str, str]:
    """The files of the store that a single process makes."""
    work(path, path.with_name("log of " + path.name), 0, shared=False)
    return folder_hashes(path)


# Which process this is


def test_a_worker_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def worker(**variables: str) -> Worker:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return Worker.from_environment()

    assert worker() == worker(WORLD_SIZE="4") == worker(RANK="0", WORLD_SIZE="1") == Worker(0, 0, 1)
    assert worker(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8") == Worker(5, 1, 8)
    assert Worker(5, 1, 8).start == 5 / 8
    for wrong in ({"RANK": "one", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}):
        assert "expected numbers" in refusal(lambda wrong=wrong: worker(**wrong))  # type: ignore[misc]
    assert "RANK=2, WORLD_SIZE=2; expected a RANK below" in refusal(lambda: worker(RANK="2", WORLD_SIZE="2"))
    worker(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    before = dict(os.environ)
    with alone():
        assert Worker.from_environment() == Worker() and "MASTER_ADDR" not in os.environ
    assert dict(os.environ) == before


def test_each_worker_of_a_machine_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Worker(i, i, 3).device("auto") for i in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert Worker().device("auto") == "auto" and Worker(1, 1, 2).device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Worker(1, 1, 2).device("auto") == "auto"


# Claims


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    ready, told = os.pipe()

    def hold() -> None:
        mine = Claims(tmp_path)
        assert mine.take(3) and not mine.take(3) and mine.take(4)
        mine.drop(4)
        os.write(told, b"x")
        time.sleep(60)

    holder = forked(hold)
    assert os.read(ready, 1) == b"x"
    mine = Claims(tmp_path)
    assert not mine.take(3) and mine.take(4) and mine.take(5)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert mine.take(3)
    mine.close()
    mine.close()


def test_several_processes_make_the_store_of_one(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    workers = [
        forked(lambda i=i: work(tmp_path / "s", tmp_path / "log", 0.004, i / 3))  # type: ignore[misc]
        for i in range(3)
    ]
    assert all(map(ended_well, workers))
    assert folder_hashes(tmp_path / "s") == expected
    done = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("begun")]
    assert len(done) == len(set(done)) == N_SHARDS


def test_a_slow_or_stuck_workers_shards_are_made_by_the_others_once_it_is_gone(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    stuck = forked(lambda: work(tmp_path / "s", tmp_path / "log", 60))
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    other = forked(lambda: work(tmp_path / "s", tmp_path / "log", 0))
    while len(json.loads((tmp_path / "s/manifest.json").read_text())["shards"]) < N_SHARDS - 1:
        time.sleep(0.01)
    time.sleep(0.05)
    assert os.waitpid(other, os.WNOHANG) == (0, 0), "it did not wait for the shard in the making"
    with pytest.warns(UserWarning, match="1 of 20 shards are missing"):
        store = FeatureStore(tmp_path / "s", allow_partial=True)
    np.testing.assert_array_equal(store.status, [Status.MISSING] * 3 + [Status.OK] * (N - 3))
    os.kill(stuck, signal.SIGKILL)
    os.waitpid(stuck, 0)
    assert ended_well(other)
    assert folder_hashes(tmp_path / "s") == expected


def test_writers_that_do_not_share_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("less_fast.store.writer._PATIENCE", 0.05)
    path = tmp_path / "s"
    first, second = shared_writer(path), shared_writer(path)
    options = {"dtype": "int8", "shard_size": 3}
    assert "is being written by another process;" in refusal(lambda: open_writer(path, N, K, **options))
    assert 'examples: "e" -> "f"' in refusal(lambda: shared_writer(path, examples="f"))
    first.release()
    assert "is being written by another process;" in refusal(lambda: open_writer(path, N, K, **options))
    assert (path / ".claims").exists()
    second.release()
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rows.parquet", "shards"]
    with open_writer(path, N, K, **options):
        assert "is being written by another process alone" in refusal(lambda: shared_writer(path))
    assert "another process" not in str(list(path.iterdir()))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    assert "holds thesis.tex" in refusal(lambda: shared_writer(tmp_path / "other"))
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_a_store_that_becomes_another_one_is_not_written_to(tmp_path: Path) -> None:
    writer = shared_writer(tmp_path / "s")
    work(tmp_path / "other", tmp_path / "log", 0, shared=False)
    text = (tmp_path / "other" / "manifest.json").read_text().replace('"examples": "e"', '"examples": "f"')
    (tmp_path / "s" / "manifest.json").write_text(text)
    rows = (FEATURES[:3], [0] * 3, [2] * 3, [1] * 3)
    assert "begun with other settings" in refusal(lambda: writer.write(0, *rows))
    assert (tmp_path / "s" / "manifest.json").read_text() == text
    writer.release()


def test_what_a_killed_worker_did_not_list_is_not_made_again(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    with shared_writer(tmp_path / "s") as writer:
        for name in ("00002", "00005"):
            data = (tmp_path / f"whole/shards/{name}.safetensors").read_bytes()
            (tmp_path / f"s/shards/{name}.safetensors").write_bytes(data if name == "00002" else data[:-1])
        assert not writer.claim(2)
        with pytest.warns(UserWarning, match="00005.safetensors is damaged; it will be made again"):
            missing = missing_shards([writer])
        assert 2 not in missing and 5 in missing and len(missing) == N_SHARDS - 1
        assert missing_shards([writer], range(2, 4)) == [3]
    work(tmp_path / "s", tmp_path / "log", 0)
    assert folder_hashes(tmp_path / "s") == expected


def test_a_shard_is_claimed_in_all_stores_or_in_none(tmp_path: Path) -> None:
    ready, told = os.pipe()

    def hold() -> None:
        with shared_writer(tmp_path / "b") as writer:
            assert writer.claim(1)
            os.write(told, b"x")
            time.sleep(60)

    holder = forked(hold)
    assert os.read(ready, 1) == b"x"
    with shared_writer(tmp_path / "a") as a, shared_writer(tmp_path / "b") as b:
        a.claim(0)
        a.write(0, FEATURES[:3], [0] * 3, [2] * 3, [1] * 3)
        claimed = [(claim.shard, claim.writers) for claim in claim_shards([a, b], range(4))]
        assert claimed == [(0, [b]), (2, [a, b]), (3, [a, b])]
        assert a.claim(1), "the claim was kept although the shard can't be made for both"
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)


def test_without_locks_work_is_done_twice_but_right(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")

    def without_locks(start: float) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        files.fcntl.flock = claims.fcntl.lockf = refuse  # type: ignore[union-attr]
        work(tmp_path / "s", tmp_path / "log", 0.004, start)

    workers = [forked(lambda i=i: without_locks(i / 2)) for i in range(2)]  # type: ignore[misc]
    assert all(map(ended_well, workers))
    assert folder_hashes(tmp_path / "s") == expected
    begun = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("begun")]
    assert N_SHARDS <= len(begun) < 2 * N_SHARDS and len(set(begun)) == N_SHARDS


def test_a_disk_that_is_full_for_one_ends_that_one(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")

    def full() -> None:
        def fail(descriptor: int) -> None:
            if (tmp_path / "full").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = fail
        with shared_writer(tmp_path / "s") as writer:
            (tmp_path / "full").touch()
            rows = (FEATURES[12:15], [0] * 3, [2] * 3, [1] * 3)
            assert writer.claim(4)
            message = refusal(lambda: writer.write(4, *rows, {"token_budget": 4}))
            assert "the disk is full" in message and "0 of 20 shards are finished and stay; make room" in message
            assert writer.claim(4), "the claim on a shard that can't be written was kept"

    first = forked(full)
    assert ended_well(first)
    assert not list((tmp_path / "s" / "shards").iterdir())
    work(tmp_path / "s", tmp_path / "log", 0)
    assert folder_hashes(tmp_path / "s") == expected


# Killed at any instant


ROUNDS = [{"store": 27, "lines": 20, "extract": 3}, {"store": 200, "lines": 150, "extract": 40}]


@pytest.mark.parametrize("rounds", [ROUNDS[0], pytest.param(ROUNDS[1], marks=pytest.mark.heavy)], ids=["50", "390"])
def test_killed_workers_lose_nothing_and_nothing_is_made_twice(
    inputs: Path, tmp_path: Path, rounds: dict[str, int]
) -> None:
    for name in ("model", "pool.jsonl"):
        (tmp_path / name).symlink_to(inputs / name)
    modes = [f"{mode}={number}" for mode, number in rounds.items()]
    output = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(rounds["store"]), *modes],
        stdout=subprocess.PIPE,
        env=child_environment(OMP_NUM_THREADS="1"),
        cwd=tmp_path,
        check=True,
    )
    results = json.loads(output.stdout.splitlines()[-1])
    assert {mode: result["wrong"] for mode, result in results.items()} == {mode: {} for mode in rounds}
    for mode, number in rounds.items():
        assert results[mode]["killed"] >= number // 2
