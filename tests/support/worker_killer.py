"""``worker_killer.py FOLDER SEED MODE=ROUNDS…``: kills processes that make one store together.

In each round two to four processes share a store, and some are killed with SIGKILL: at random times (``store``: a
made-up computation; ``extract``: the real one, of the model and pool in the folder), or before the k-th executed line
of less_fast.store (``lines``). The others go on; what is left in the end is made by one process more.
Prints as JSON, for each mode, how many were killed, and for each round that went wrong what did.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

from less_fast.store import FeatureStore, StoreWriter
from less_fast.store.sharing import claim_shards, missing_shards
from support.store_killer import traced
from support.stores import folder_hashes, make_facts, make_rows

N, K, SHARD = 60, 4, 3
N_SHARDS = N // SHARD
FEATURES = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)


def note(log: Path, what: str, shard: int) -> None:
    """One line in the log; written at once, so that it survives its writer."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{what} {shard}\n".encode())
    os.close(descriptor)


def work(store: Path, log: Path, pause: float, start: float = 0.0, *, shared: bool = True) -> None:
    """Make what nobody else makes, until the store is whole; ``pause`` seconds a shard, of which the log tells."""
    settings = {"dim": K, "dtype": "int8", "shard_size": SHARD, "shared": shared}
    with StoreWriter(store, make_facts(K), make_rows(N), **settings) as writer:  # type: ignore[arg-type]
        while missing := missing_shards([writer]):
            turn = int(start * len(missing))
            for claim in claim_shards([writer], missing[turn:] + missing[:turn]):
                note(log, "begun", claim.shard)
                rows = slice(*writer.bounds(claim.shard))
                n = rows.stop - rows.start
                time.sleep(pause)
                writer.write(claim.shard, FEATURES[rows], [0] * n, [2] * n, [1] * n, {"token_budget": claim.shard})
                note(log, "done", claim.shard)
            time.sleep(0.003)


def forked(job: Callable[[], None]) -> int:
    """The id of a child process that does it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    return child


@dataclass
class Round:
    """One store, its workers and what became of them."""

    folder: Path
    start_worker: Callable[[Path, Path, int, int], int]
    per_worker: int  # shards that a killed worker may have begun
    n_killed: int = 0
    survivors: int = 0

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def play(self, draw: random.Random, duration: float) -> None:
        size = draw.randint(2, 4)
        workers = {self.start_worker(self.store, self.log, rank, size): rank for rank in range(size)}
        for _ in range(draw.randint(1, size)):
            time.sleep(duration * draw.random())
            victim, rank = draw.choice(list(workers.items()))
            os.kill(victim, signal.SIGKILL)
            self.reap(victim)
            del workers[victim]
            if draw.random() < 0.5 or not workers:
                workers[self.start_worker(self.store, self.log, rank, size)] = rank
        for worker in workers:
            self.reap(worker)

    def reap(self, worker: int) -> None:
        _, status = os.waitpid(worker, 0)
        self.n_killed += os.WIFSIGNALED(status)
        self.survivors += not os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{self.folder}: a worker failed"

    def problems(self, finish: Callable[[], None], expected: dict[str, str], n_shards: int) -> list[str]:
        """What is wrong with the store; ``finish`` does what a single process would to finish it."""
        found = []
        if self.survivors and not FeatureStore(self.store, verify=True).verify().ok:
            found.append("it was not whole although a worker came to its end")
        finish()
        counts = Counter(self.log.read_text().splitlines())
        begun = sum(count for line, count in counts.items() if line.startswith("begun"))
        if begun - n_shards > self.per_worker * self.n_killed:
            found.append(f"{begun} shards begun for {n_shards} and {self.n_killed} killed workers")
        if twice := [line for line, count in counts.items() if line.startswith("done") and count > 1]:
            found.append(f"{twice} twice")
        hashes = folder_hashes(self.store)
        found += [f"{name} differs" for name in {**hashes, **expected} if hashes.get(name) != expected.get(name)]
        return found


def kill_stores(folder: Path, seed: int, rounds: int, *, lines: bool) -> dict[str, object]:
    work(folder / "whole", folder / "log", 0, shared=False)
    expected = folder_hashes(folder / "whole")
    total = count_lines(folder / "counted") if lines else 0
    draw = random.Random(seed)
    n_killed, wrong = 0, {}
    for number in range(rounds):
        pauses = [0.002 + 0.01 * draw.random() for _ in range(4)]  # stragglers among them
        victim_line = int(total * (number + draw.random()) / rounds) if lines else 0

        def start(
            store: Path, log: Path, rank: int, size: int, pauses: list[float] = pauses, last: int = victim_line
        ) -> int:
            def job() -> None:
                if lines and rank == 0:
                    kill_at_line(last)
                work(store, log, pauses[rank], rank / size)

            return forked(job)

        this = Round(folder / str(number), start, per_worker=1)
        this.folder.mkdir()
        if lines:
            for worker in [start(this.store, this.log, rank, 2) for rank in range(2)]:
                this.reap(worker)
        else:
            this.play(draw, 0.02)
        finish = lambda this=this: work(this.store, this.log, 0, shared=False)  # noqa: E731
        if found := this.problems(finish, expected, N_SHARDS):
            wrong[number] = found
        n_killed += this.n_killed
        shutil.rmtree(this.folder)
    return {"killed": n_killed, "wrong": wrong}


def count_lines(folder: Path) -> int:
    """Lines of less_fast.store that one worker of two executes, about."""
    lines = [0]

    def count() -> None:
        lines[0] += 1

    other = forked(lambda: work(folder, folder.with_name("log"), 0.003, 0.5))
    traced(count)
    work(folder, folder.with_name("log"), 0.003)
    sys.settrace(None)
    os.waitpid(other, 0)
    return lines[0]


def kill_at_line(last: int) -> None:
    left = [last]

    def count_down() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    traced(count_down)


def kill_extractions(inputs: Path, folder: Path, seed: int, rounds: int) -> dict[str, object]:
    import torch

    from less_fast import shard_job
    from less_fast.data import load_examples
    from less_fast.extraction import extract
    from less_fast.model import load_model
    from less_fast.projection import Projection
    from support.models import adapted

    torch.set_num_threads(1)
    pool = load_examples(inputs / "pool.jsonl")
    model, tokenizer = load_model(inputs / "model", device="cpu")
    model = adapted(model)
    shard_job._POLL_SECONDS = 0.02
    write, plan = StoreWriter.write, shard_job.plan_batches

    def run(store: Path, log: Path, pause: float, rank: int = 0, size: int = 1) -> None:
        def planned(*arguments: object, **options: object) -> object:
            note(log, "begun", 0)
            time.sleep(pause)
            return plan(*arguments, **options)  # type: ignore[arg-type]

        def written(writer: StoreWriter, shard: int, *arguments: object, **options: object) -> None:
            write(writer, shard, *arguments, **options)  # type: ignore[arg-type]
            note(log, "done", shard)

        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        settings = {"projection": Projection("srht", 64), "tokenizer": tokenizer, "progress": False}
        with patch.object(shard_job, "plan_batches", planned), patch.object(StoreWriter, "write", written):
            extract(model, pool, store, shard_size=4, max_length=64, **settings)  # type: ignore[arg-type]

    os.waitpid(forked(lambda: run(folder / "whole", folder / "log", 0)), 0)  # forks go ill with what autograd starts
    expected, n_shards = folder_hashes(folder / "whole"), len(list((folder / "whole/shards").iterdir()))
    draw = random.Random(seed)
    n_killed, wrong = 0, {}
    for number in range(rounds):

        def start(store: Path, log: Path, rank: int, size: int) -> int:
            return forked(lambda: run(store, log, 0.05, rank, size))

        # A killed worker may leave a shard that it computes, one that it writes and one that waits to be written.
        this = Round(folder / str(number), start, per_worker=3)
        this.folder.mkdir()
        this.play(draw, 0.4)
        finish = lambda this=this: os.waitpid(forked(lambda: run(this.store, this.log, 0)), 0)  # noqa: E731
        if found := this.problems(finish, expected, n_shards):  # type: ignore[arg-type]
            wrong[number] = found
        n_killed += this.n_killed
    return {"killed": n_killed, "wrong": wrong}


def main(folder: Path, seed: int, modes: dict[str, int]) -> None:
    results = {}
    with patch("os.fsync"):  # what a killed process wrote is not lost: only a power cut would tell the difference
        for mode, rounds in modes.items():
            (folder / mode).mkdir()
            if mode == "extract":
                results[mode] = kill_extractions(folder, folder / mode, seed, rounds)
            else:
                results[mode] = kill_stores(folder / mode, seed, rounds, lines=mode == "lines")
    print(json.dumps(results))


if __name__ == "__main__":
    pairs = [argument.split("=") for argument in sys.argv[3:]]
    main(Path(sys.argv[1]), int(sys.argv[2]), {mode: int(rounds) for mode, rounds in pairs})
