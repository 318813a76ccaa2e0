"""``extract --engine ray``: the bytes of a single process, one-line errors, and kills of actors and drivers."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import flaky_files
from support.children import child_environment
from support.cli import SIZES, less_fast, refused
from support.ray_killer import MadeUpJob, alive, noted, start_driver, wait_gone
from support.stores import folder_hashes, refusal
from support.worker_killer import forked, work

from less_fast.errors import LessFastError
from less_fast.extract_job import ExtractJob
from less_fast.on_ray import actor as actors
from less_fast.on_ray import extract_on_ray
from less_fast.on_ray import pool as pools
from less_fast.on_ray.actor import ShardActor
from less_fast.on_ray.engine import make_missing
from less_fast.on_ray.pool import Pool
from less_fast.on_ray.stores import Stores
from less_fast.store import StoreWriter

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Ray is tested on Linux")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray that others have started, of which the calls below are but one job each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
        patch.setenv("PYTHONPATH", flaky_files.environment(tmp_path_factory.mktemp("installed"))["PYTHONPATH"])
        patch.setenv(flaky_files.RATE, "0.05")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            object_store_memory=100 << 20,
        )
        yield
        ray.shutdown()


def extraction(inputs: Path, out: Path, *more: object) -> list[str]:
    kinds = ["--modules", "q_proj", "--precondition", "sgd", "--precondition", "sign", "--dim", "64"]
    arguments = ["extract", inputs / "model", inputs / "pool.jsonl", out, *kinds, *SIZES, *more]
    return [str(argument) for argument in arguments]


def made_up(folder: Path, pause: float = 0.0) -> Any:
    return MadeUpJob(str(folder / "store"), str(folder / "log"), pause)


def whole(path: Path) -> dict[str, str]:
    work(path, path.with_name("log of " + path.name), 0, shared=False)
    return folder_hashes(path)


def test_actors_make_the_stores_of_one_process(inputs: Path, tmp_path: Path, cluster: None) -> None:
    assert less_fast(*extraction(inputs, tmp_path / "one")).exit_code == 0
    with pytest.warns(UserWarning, match="shards are missing"):
        assert less_fast(*extraction(inputs, tmp_path / "two", "--shard-range", "1:3")).exit_code == 0
    done = less_fast(*extraction(inputs, tmp_path / "two", "--engine", "ray", "--actors", 2, "--json"))
    assert done.exit_code == 0, done.output
    assert folder_hashes(tmp_path / "two") == folder_hashes(tmp_path / "one")
    names = [f"{kind}-dim{dim}" for kind in ("sgd", "sign") for dim in (64, 128)]
    assert [result["path"] for result in json.loads(done.stdout)["stores"]] == [
        str(tmp_path / "two" / name) for name in names
    ]


def test_actors_make_a_remote_store_whatever_requests_fail(
    inputs: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky_files.register()
    monkeypatch.setenv(flaky_files.RATE, "0.05")
    (tmp_path / "pool.jsonl").write_bytes((inputs / "pool.jsonl").read_bytes())
    command = extraction(inputs, tmp_path / "one")
    assert less_fast(*command).exit_code == 0
    url = f"flaky://{tmp_path}"
    command[1:4] = [str(inputs / "model"), f"{url}/pool.jsonl", f"{url}/bucket/two"]
    done = less_fast(*command, "--engine", "ray", "--actors", 2)
    assert done.exit_code == 0, done.output
    assert folder_hashes(tmp_path / "bucket" / "two") == folder_hashes(tmp_path / "one")


def test_two_runs_share_the_work(tmp_path: Path, cluster: None) -> None:
    expected = whole(tmp_path / "whole")
    other = forked(lambda: work(tmp_path / "store", tmp_path / "log", 0.3))
    while not noted(tmp_path / "log", "done"):
        time.sleep(0.01)
    made = extract_on_ray(made_up(tmp_path, 0.2), actors=(1, 2), progress=False)
    assert os.waitpid(other, 0)[1] == 0
    assert list(made) == [str(tmp_path / "store")]
    assert folder_hashes(tmp_path / "store") == expected
    begun = noted(tmp_path / "log", "begun")
    assert len(begun) == len(set(begun)) == 20
    assert noted(tmp_path / "log", "actor")


def test_a_range_of_shards_is_made_and_other_settings_are_refused(tmp_path: Path, cluster: None) -> None:
    with pytest.warns(UserWarning, match="17 of 20 shards are missing"):
        extract_on_ray(made_up(tmp_path), actors=1, shard_range=(4, 7), progress=False)
    assert sorted(noted(tmp_path / "log", "done")) == [4, 5, 6]
    assert sorted(entry.name for entry in (tmp_path / "store").iterdir()) == ["manifest.json", "rows.parquet", "shards"]
    text = (tmp_path / "store/manifest.json").read_text()
    (tmp_path / "store/manifest.json").write_text(text.replace('"examples": "e"', '"examples": "f"'))
    message = refusal(lambda: extract_on_ray(made_up(tmp_path), actors=1, shard_range=(4, 7), progress=False))
    assert 'begun with other settings (old -> new): examples: "f" -> "e"' in message  # although nothing is missing


def test_an_actors_errors_are_the_callers(tmp_path: Path, cluster: None) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("x")
    assert "holds thesis.tex" in refusal(lambda: extract_on_ray(made_up(tmp_path), actors=1, progress=False))
    assert wait_gone(noted(tmp_path / "log", "actor"), 10) == []
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    with pytest.raises(RuntimeError, match=r"an actor failed:\n(.|\n)*IsADirectoryError"):
        extract_on_ray(made_up(tmp_path), actors=1, progress=False)


class FailingJob:
    """Raises, once each, what it is given."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.job = self

    def prepare(self) -> FailingJob:
        return self

    def open(self, stack: ExitStack, *, shared: bool) -> list[StoreWriter]:
        return []

    def put(self, writers: list[StoreWriter], shards: list[int]) -> list[dict[int, Any]]:
        if self.errors:
            raise self.errors.pop(0)
        return []


def wrapped(number: int) -> LessFastError:
    error = LessFastError("cannot write")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


def test_what_may_pass_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pauses: list[float] = []
    monkeypatch.setattr(actors.time, "sleep", pauses.append)

    def result(*errors: Exception) -> dict[str, Any]:
        pauses.clear()
        actor = ShardActor(FailingJob(*errors), str(tmp_path))  # type: ignore[arg-type]
        answer = actor({"shard": np.array([7])})
        assert answer["shard"].tolist() == [7]
        return json.loads(answer["result"][0])

    assert result(wrapped(errno.EIO), ConnectionResetError("gone"), TimeoutError()) == {"entries": []}
    assert pauses == [1, 2, 4]
    assert result(*[wrapped(errno.EIO)] * 4) == {"refusal": "cannot write"}
    assert result(wrapped(errno.ENOSPC)) == {"refusal": "cannot write"} and not pauses
    assert result(LessFastError("no")) == {"refusal": "no"} and not pauses
    assert "ZeroDivisionError: never" in result(ZeroDivisionError("never"))["failure"] and not pauses


def test_refusals(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(*more: object) -> str:
        return refused(*extraction(inputs, tmp_path / "s", *more))

    on_ray = ("--engine", "ray")
    assert "--engine is 'dask'; expected one of process, ray" in message("--engine", "dask")
    assert "--actors is for --engine ray" in message("--actors", 2)
    assert "--no-shared does not go with" in message(*on_ray, "--no-shared")
    assert "--actors is '1:x'" in message(*on_ray, "--actors", "1:x")
    assert "Ray gives each actor its GPUs" in message(*on_ray, "--device", "cuda:1")
    assert "shard_range is 9:10" in message(*on_ray, "--shard-range", "9:10")
    data = [inputs / "model", tmp_path / "no.jsonl", tmp_path / "s", *on_ray]
    assert "no.jsonl: no such file" in refused("extract", *data)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        assert "no Ray cluster at '127.0.0.1:1'" in message(*on_ray, "--ray-address", "127.0.0.1:1")
        imported = builtins.__import__

        def without_ray(name: str, *arguments: Any) -> Any:
            if name.split(".")[0] == "ray":
                raise ImportError(name)
            return imported(name, *arguments)

        patch.setattr(builtins, "__import__", without_ray)
        assert "pip install 'less_fast[ray]'" in message(*on_ray)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run it without torchrun" in message(*on_ray)
    assert not (tmp_path / "s").exists()


def test_a_pool_that_cannot_be(tmp_path: Path, cluster: None) -> None:
    def message(**options: Any) -> str:
        return refusal(lambda: extract_on_ray(made_up(tmp_path), progress=False, **options))

    assert "actors are 3:2; expected ascending" in message(actors=(3, 2))
    assert "actors are 0:0; expected ascending" in message(actors=0)


def test_a_pool_follows_the_machines_that_have_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 16.0}, {"memory": 1.0}, {"CPU": 8.0, "GPU": 2.0}]  # the second one is a head without CPUs
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources} for resources in nodes])

    def pool(actors: int | None = None, gpus: float | None = None, **settings: Any) -> Pool:
        return Pool.of(ExtractJob("m", ("d",), "o", **settings), actors, gpus, alone=False)

    assert pool(device="cpu") == Pool(2, 2, cpus=8.0, gpus=0)
    assert pool(actors=4, device="cpu") == Pool(4, 4, cpus=4.0, gpus=0)
    assert pool() == Pool(2, 2, cpus=1, gpus=1)
    for gpus, device in ((0, "cuda"), (-1, "auto"), (1.5, "auto")):
        assert f"gpus_per_actor is {gpus:g} with device {device};" in refusal(partial(pool, gpus=gpus, device=device))
    job = ExtractJob("m", ("d",), "o")
    assert pool().told(job) is job and pool(gpus=0).told(job).device == "cpu"
    spread = ExtractJob("m", ("d",), "o", device_map="auto")
    assert pool(gpus=0).told(spread) is spread  # which says itself where layers go


def test_an_actor_that_dies_each_time_ends_the_run(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "_RESTARTS", 1)
    job: Any = MadeUpJob(str(tmp_path / "store"), str(tmp_path / "log"), 0.0, fatal=7)
    message = refusal(lambda: extract_on_ray(job, actors=1, shard_range=(6, 8), progress=False))
    assert "Ray gave up" in message and "everything that was finished is kept" in message
    assert noted(tmp_path / "log", "done") == [6]
    assert 2 <= len(noted(tmp_path / "log", "actor")) <= 4


def test_a_folder_that_is_another_one_on_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work(tmp_path / "theirs", tmp_path / "log", 0, shared=False)
    entries = json.loads((tmp_path / "theirs/manifest.json").read_text())["shards"]
    job, runs = made_up(tmp_path), []

    class Pool:
        """Shards but the first are where the driver does not see them."""

        def run(self, job: Any, shards: list[int], stores: Any, bar: Any) -> int:
            runs.append(list(shards))
            job.prepare().open(ExitStack(), shared=True)[0].release()
            if 0 in shards:
                shutil.copy(tmp_path / "theirs" / entries[0]["file"], tmp_path / "store/shards")
            stores.open()
            for shard in shards:
                stores.add(shard, [entries[shard] if len(runs) == 1 else None])
            return len(shards) if len(runs) == 1 else 0

    with ExitStack() as stack:
        stores = Stores(stack, list(job.stores), job.examples(), job.shard_size, range(3))
        pool: Any = Pool()
        message = refusal(lambda: make_missing(job, pool, stores, progress=False))
    assert message.startswith("2 shards (the first: 1) are there where actors look for them, but not in")
    assert runs == [[0, 1, 2], *[[1, 2]] * 3]
    listed = json.loads((tmp_path / "store/manifest.json").read_text())["shards"]
    assert [entry["file"] for entry in listed] == [entries[0]["file"]]


def test_interrupting_a_run_ends_its_actors(tmp_path: Path) -> None:
    driver = start_driver(made_up(tmp_path, 0.3))
    while not noted(tmp_path / "log", "done"):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(30) != 0
    actors = noted(tmp_path / "log", "actor")
    assert actors and wait_gone(actors, 10) == []
    assert not any(map(alive, actors))
    there = len(list((tmp_path / "store/shards").glob("*.safetensors")))
    assert 0 < there < 20


ROUNDS = [{"actors": 2, "drivers": 1}, {"actors": 25, "drivers": 25}]


@pytest.mark.parametrize("rounds", [ROUNDS[0], pytest.param(ROUNDS[1], marks=pytest.mark.heavy)], ids=["3", "50"])
@pytest.mark.timeout(3600)
def test_killed_actors_and_drivers_lose_nothing_and_nothing_is_made_twice(
    tmp_path: Path, rounds: dict[str, int]
) -> None:
    modes = [f"{mode}={number}" for mode, number in rounds.items()]
    output = subprocess.run(
        [sys.executable, "-m", "support.ray_killer", str(tmp_path), str(rounds["actors"]), *modes],
        stdout=subprocess.PIPE,
        env=child_environment(OMP_NUM_THREADS="1"),
        cwd=tmp_path,
        check=True,
    )
    results = json.loads(output.stdout.splitlines()[-1])
    assert {mode: result["wrong"] for mode, result in results.items()} == {mode: {} for mode in rounds}
    assert results["actors"]["killed"] >= rounds["actors"]
    assert results["drivers"]["killed"] >= max(1, rounds["drivers"] // 2)
