"""``extract`` and ``run`` as several processes: torchrun, ranges of shards, and what a rank does without rank 0."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.children import child_environment
from support.cli import SIZES, less_fast, refused, run_arguments
from support.run_killer import hashes
from support.stores import folder_hashes, refusal
from support.worker_killer import forked

from less_fast import pipeline, shard_job
from less_fast.config import RunConfig
from less_fast.data import load_examples
from less_fast.extraction import extract
from less_fast.features import MultiFeatureExtractor
from less_fast.model import load_model
from less_fast.projection import Projection
from less_fast.store import FeatureStore, StoreWriter, files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork and file locks are POSIX")


def extraction(inputs: Path, out: Path, *more: object) -> list[str]:
    arguments = ["extract", inputs / "model", inputs / "pool.jsonl", out, "--modules", "q_proj", *SIZES, *more]
    return [str(argument) for argument in arguments]


def torchrun(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = child_environment(OMP_NUM_THREADS="1")
    command = [*launcher, "-m", "less_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


def test_ranks_of_torchrun_make_the_store_of_one_process(inputs: Path, tmp_path: Path) -> None:
    assert less_fast(*extraction(inputs, tmp_path / "one")).exit_code == 0
    done = torchrun(*extraction(inputs, tmp_path / "two"), "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert folder_hashes(tmp_path / "two") == folder_hashes(tmp_path / "one")
    (result,) = json.loads(done.stdout)["stores"]  # one rank's
    assert result["rows"] == 40 and result["shards"] == {"done": 5, "total": 5}


def test_ranges_of_shards_add_up(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s"
    assert less_fast(*extraction(inputs, tmp_path / "one")).exit_code == 0
    for shards, status in (("1:3", [3] * 8 + [0] * 16 + [3] * 16), ("3:9", [3] * 8 + [0] * 32)):
        with pytest.warns(UserWarning, match="shards are missing"):
            done = less_fast(*extraction(inputs, out, "--shard-range", shards))
            assert done.exit_code == 0, done.output
            assert FeatureStore(out, allow_partial=True).status.tolist() == status
    assert "not finished: 1 of 5" in refusal(lambda: FeatureStore(out))
    computed: list[int] = []
    original = MultiFeatureExtractor.__call__

    def counted(self: MultiFeatureExtractor, batch: dict[str, Any]) -> object:
        computed.append(len(batch["input_ids"]))
        return original(self, batch)

    monkeypatch.setattr(MultiFeatureExtractor, "__call__", counted)
    assert less_fast(*extraction(inputs, out)).exit_code == 0
    assert sum(computed) == 8
    assert folder_hashes(out) == folder_hashes(tmp_path / "one")
    for wrong in ("3", "a:b", "-1:2", "1:2:3"):
        assert "--shard-range is" in refused(*extraction(inputs, out, f"--shard-range={wrong}"))
    for wrong in ("5:6", "3:3", "3:2"):
        assert f"shard_range is {wrong}; expected ascending" in refused(
            *extraction(inputs, out, f"--shard-range={wrong}")
        )


def test_two_extractions_by_mistake(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("less_fast.store.writer._PATIENCE", 0.05)
    command = extraction(inputs, tmp_path / "s", "--shard-size", 2)
    environment = child_environment(OMP_NUM_THREADS="1")
    first = subprocess.Popen([sys.executable, "-m", "less_fast", *command], env=environment, cwd=tmp_path)
    try:
        while not list((tmp_path / "s").glob("shards/*.safetensors")):
            assert first.poll() is None
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # alive, and so the store is its own
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])  # a signal takes its time
        before = folder_hashes(tmp_path / "s")
        assert "is being written by another process;" in refused(*command)
        assert "is being written by another process alone;" in refused(*command, "--shared")
        assert folder_hashes(tmp_path / "s") == before
    finally:
        first.kill()
        first.wait()
    assert less_fast(*command, "--shared").exit_code == 0  # a dead one's store is anybody's


def test_progress_counts_what_others_do(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(inputs / "model", device="cpu")
    options = {"projection": Projection("srht", 64), "targets": "q_proj", "tokenizer": tokenizer, "shard_size": 4}
    bars, computed = [], []
    bar, write = shard_job.progress_bar, StoreWriter.write
    monkeypatch.setattr(shard_job, "progress_bar", lambda *a, **o: bars.append(bar(*a, **o)) or bars[-1])

    def write_and_let_others(self: StoreWriter, shard: int, *arguments: Any, **more: Any) -> None:
        write(self, shard, *arguments, **more)
        computed.append(shard)
        if shard == 0:
            other = forked(lambda: made_elsewhere(tmp_path / "s", tmp_path / "one", range(6, 9)))
            assert os.waitpid(other, 0)[1] == 0

    pool = load_examples(inputs / "pool.jsonl")
    extract(model, pool, tmp_path / "one", progress=False, **options)
    monkeypatch.setattr(StoreWriter, "write", write_and_let_others)
    extract(model, pool, tmp_path / "s", shared=True, **options)
    assert computed == [0, 1, 2, 3, 4, 5, 9]
    assert bars[-1].n == bars[-1].total == 40
    assert folder_hashes(tmp_path / "s") == folder_hashes(tmp_path / "one")


def made_elsewhere(store: Path, source: Path, shards: range) -> None:
    for shard in shards:
        name = f"shards/{shard:05d}.safetensors"
        (store / (name + ".new")).write_bytes((source / name).read_bytes())
        os.replace(store / (name + ".new"), store / name)


# A whole run


def test_a_run_of_two_ranks_makes_the_files_of_one(inputs: Path, finished: Path, tmp_path: Path) -> None:
    done = torchrun(*run_arguments(inputs, tmp_path / "two"), "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "two") == hashes(finished)
    result, expected = json.loads(done.stdout), json.loads((inputs / "stdout.json").read_text())
    assert result["targets"] == expected["targets"]


def follower(inputs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], pipeline.RunResult]:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pipeline, "_POLL_SECONDS", 0.01)
    config = RunConfig(**tiny.config(inputs, out=str(out)))
    return lambda: pipeline.run(config, progress=False)


def test_a_rank_whose_run_never_begins_or_breaks_off_says_so(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = follower(inputs, tmp_path / "run", monkeypatch)
    monkeypatch.setattr(pipeline, "_START_SECONDS", 0.1)
    assert "did not begin" in refusal(follow)
    monkeypatch.setattr(pipeline, "_START_SECONDS", 60)
    (tmp_path / "run").mkdir()

    def first_rank() -> None:
        files.FolderLock(tmp_path / "run")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    child = forked(first_rank)
    while not files.is_locked(tmp_path / "run"):
        time.sleep(0.01)
    assert "rank 0 of the run ended before it had its checkpoints" in refusal(follow)
    os.waitpid(child, 0)


def test_a_rank_whose_first_rank_dies_late_keeps_what_it_made(
    inputs: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for name in ("features", "scores", "selected"):
        shutil.rmtree(tmp_path / "run" / name)
    follow = follower(inputs, tmp_path / "run", monkeypatch)
    config = RunConfig(**{**tiny.config(inputs), "out": str(tmp_path / "run")}).resolved()

    def first_rank() -> None:
        config.save(tmp_path / "run" / "config.yaml")
        files.FolderLock(tmp_path / "run")
        while not (tmp_path / "run" / "features").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    child = forked(first_rank)
    assert "rank 0 of the run ended before it had made its selection" in refusal(follow)
    os.waitpid(child, 0)
    made = folder_hashes(tmp_path / "run" / "features")
    assert made == folder_hashes(finished / "features") and len(made) > 10
