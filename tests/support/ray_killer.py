"""``ray_killer.py FOLDER SEED MODE=ROUNDS…``: kills what makes stores on Ray, with SIGKILL at random times.

``actors``: processes of the pool, while the run goes on, all runs on one Ray; ``drivers``: the process that started
Ray, which the next one goes on from. What they compute is made up and cheap; a log tells what was begun and done.
Prints as JSON, for each mode, how many were killed, and for each round that went wrong what did.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from less_fast.on_ray import extract_on_ray
from less_fast.store import Rows, StoreWriter
from less_fast.store.manifest import ShardEntry
from less_fast.store.sharing import claim_shards
from support.children import child_environment
from support.stores import folder_hashes, make_facts, make_rows
from support.worker_killer import FEATURES, N_SHARDS, SHARD, K, N, note, work


@dataclass(frozen=True)
class MadeUpJob:
    """Stands for an ``ExtractJob`` with one store, of the features of ``worker_killer``."""

    out: str
    log: str
    pause: float
    fatal: int = -1  # the shard that kills who makes it
    device_map: None = None
    device: str = "cpu"
    shard_size: int = SHARD

    @property
    def stores(self) -> dict[str, None]:
        return {self.out: None}

    def examples(self) -> Rows:
        return make_rows(N)

    def prepare(self) -> MadeUpExtraction:
        note(Path(self.log), "actor", os.getpid())
        return MadeUpExtraction(self)


@dataclass(frozen=True)
class MadeUpExtraction:
    made_up: MadeUpJob

    @property
    def job(self) -> MadeUpExtraction:
        return self

    def open(self, stack: ExitStack, *, shared: bool) -> list[StoreWriter]:
        settings: dict[str, Any] = {"dim": K, "dtype": "int8", "shard_size": SHARD, "shared": shared}
        return [stack.enter_context(StoreWriter(self.made_up.out, make_facts(K), make_rows(N), **settings))]

    def put(self, writers: list[StoreWriter], shards: list[int]) -> list[dict[int, ShardEntry]]:
        entries, log = {}, Path(self.made_up.log)
        if self.made_up.fatal in shards:
            os.kill(os.getpid(), signal.SIGKILL)
        for claim in claim_shards(writers, shards):
            note(log, "begun", claim.shard)
            time.sleep(self.made_up.pause)
            rows = slice(*writers[0].bounds(claim.shard))
            n = rows.stop - rows.start
            facts = {"token_budget": claim.shard}
            entry = writers[0].put(claim.shard, FEATURES[rows], [0] * n, [2] * n, [1] * n, facts)
            note(log, "done", claim.shard)
            assert entry is not None
            entries[claim.shard] = entry
        return [entries]


def noted(log: Path, what: str) -> list[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith(what + " ")]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pids: list[int], seconds: float) -> list[int]:
    """Those that are still there when the time is over."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def problems(folder: Path, expected: dict[str, str], n_killed: int) -> list[str]:
    """What is wrong with a store that is said to be whole, and with the work that it took."""
    found = []
    begun, done = noted(folder / "log", "begun"), noted(folder / "log", "done")
    if len(begun) - N_SHARDS > n_killed:  # each makes one shard at a time
        found.append(f"{len(begun)} shards begun for {N_SHARDS} and {n_killed} killed processes")
    if twice := [shard for shard, count in Counter(done).items() if count > 1]:
        found.append(f"{twice} made twice")
    hashes = folder_hashes(folder / "store")
    return found + [f"{name} differs" for name in {**hashes, **expected} if hashes.get(name) != expected.get(name)]


def kill_actors(folder: Path, expected: dict[str, str], draw: random.Random, rounds: int) -> dict[str, Any]:
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    killed, wrong = 0, {}
    for number in range(rounds):
        this = folder / str(number)
        this.mkdir()
        over = threading.Event()
        victims: list[int] = []

        def kill(this: Path = this, over: threading.Event = over, victims: list[int] = victims) -> None:
            wanted = draw.randint(1, 2)
            while len(victims) < wanted and not over.wait(0.3 + 1.2 * draw.random() if victims else 0.01):
                there = [pid for pid in noted(this / "log", "actor") if alive(pid)]
                if not there or (not victims and over.wait(draw.random())):
                    continue
                victim = draw.choice(there)
                if alive(victim):
                    os.kill(victim, signal.SIGKILL)
                    victims.append(victim)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            extract_on_ray(job_in(this, 0.1), actors=2, progress=False)  # type: ignore[arg-type]  # a stand-in
        finally:
            over.set()
            killer.join()
        if found := problems(this, expected, len(victims)):
            wrong[number] = found
        killed += len(victims)
    ray.shutdown()
    return {"killed": killed, "wrong": wrong}


def kill_drivers(folder: Path, expected: dict[str, str], draw: random.Random, rounds: int) -> dict[str, Any]:
    killed, wrong, left = 0, {}, rounds
    number = 0
    while left > 0:
        this = folder / str(number)
        this.mkdir()
        victims = 0
        for _ in range(min(left, 4)):
            driver = start_driver(job_in(this, 0.25))
            begin = time.monotonic()
            before = len(noted(this / "log", "actor"))
            while driver.poll() is None and len(noted(this / "log", "actor")) == before:
                time.sleep(0.02)
            try:
                driver.wait(3 * draw.random() - 0.5 if draw.random() < 0.8 else 0.0)
            except subprocess.TimeoutExpired:
                driver.kill()
                driver.wait()
                victims += 1
                if stayed := wait_gone(noted(this / "log", "actor"), 20):
                    wrong[number] = [f"{len(stayed)} actors outlive their driver"]
            assert driver.returncode in (0, -signal.SIGKILL), f"a driver failed after {time.monotonic() - begin:.0f} s"
            left -= 1
        final = start_driver(job_in(this, 0.0))
        assert final.wait() == 0
        # A killed driver takes two actors with it.
        if found := problems(this, expected, 2 * victims):
            wrong[number] = wrong.get(number, []) + found
        killed += victims
        number += 1
    return {"killed": killed, "wrong": wrong}


def job_in(folder: Path, pause: float) -> MadeUpJob:
    return MadeUpJob(str(folder / "store"), str(folder / "log"), pause)


def start_driver(job: MadeUpJob) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "support.ray_killer", "driver", json.dumps(asdict(job))]
    return subprocess.Popen(command, env=child_environment(OMP_NUM_THREADS="1"), stdout=sys.stderr)


def main(folder: Path, seed: int, modes: dict[str, int]) -> None:
    work(folder / "whole", folder / "whole.log", 0, shared=False)
    expected = folder_hashes(folder / "whole")
    results = {}
    for mode, rounds in modes.items():
        (folder / mode).mkdir()
        kill = {"actors": kill_actors, "drivers": kill_drivers}[mode]
        results[mode] = kill(folder / mode, expected, random.Random(seed), rounds)
    print(json.dumps(results))


if __name__ == "__main__":
    from support import ray_killer  # the class that actors find by its name

    if sys.argv[1] == "driver":
        made_up = ray_killer.MadeUpJob(**json.loads(sys.argv[2]))
        extract_on_ray(made_up, actors=2, progress=False)  # type: ignore[arg-type]  # a stand-in
    else:
        pairs = [argument.split("=") for argument in sys.argv[3:]]
        ray_killer.main(Path(sys.argv[1]), int(sys.argv[2]), {mode: int(rounds) for mode, rounds in pairs})
