"""How does a map over shards scale? An event simulation of claims, uneven shards, and slow and failing workers.

Nothing of it is measured: times follow from the stated speed of one worker, and say nothing of a device. Lengths are
log-normal around the mean of their source; the parameters are fitted to real examples where LESS_FAST_DATA is set.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append_rows, data_folder, row
from numpy.typing import NDArray

from less_fast.data import encode_all, load_examples
from less_fast.model.load import load_tokenizer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Lengths:
    """Tokens of the examples of a pool: exp(mu + between·z + within·z'), at most ``longest``.

    z is normal, one for each source, and z' for each example. ``run``: consecutive examples of one source, which are
    what makes some shards far longer than others. ``origin``: where the parameters come from.
    """

    mu: float
    between: float
    within: float
    longest: int = 2048
    run: int = 100_000
    origin: str = "assumed"

    def shuffled(self) -> Lengths:
        """The same examples without runs: what was between sources is within one."""
        return replace(self, between=0.0, within=math.hypot(self.between, self.within))

    def moments(self, z: Floats) -> tuple[Floats, Floats]:
        """Mean and variance of an example's tokens in sources of these z."""
        mu, limit = self.mu + self.between * z, math.log(self.longest)
        above = 1 - _normal_cdf((limit - mu) / self.within)
        first, second = (
            np.exp(power * mu + (power * self.within) ** 2 / 2)
            * _normal_cdf((limit - mu) / self.within - power * self.within)
            + self.longest**power * above
            for power in (1, 2)
        )
        return first, np.maximum(second - first**2, 0)

    def shard_tokens(self, n: int, shard_size: int, rng: np.random.Generator) -> Floats:
        """Tokens of each shard of a pool of ``n`` examples, whose sums are taken as normal."""
        z = rng.standard_normal(-(-n // self.run))
        starts = np.union1d(np.arange(0, n, shard_size), np.arange(0, n, self.run))  # of pieces of one shard and source
        sizes = np.diff(starts, append=n)
        mean, variance = (moment[starts // self.run] for moment in self.moments(z))
        pieces = sizes * mean + np.sqrt(sizes * variance) * rng.standard_normal(len(starts))
        shards: Floats = np.add.reduceat(np.maximum(pieces, sizes), np.flatnonzero(starts % shard_size == 0))
        return shards


def _normal_cdf(x: Floats) -> Floats:
    return np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x])


# As fitted to an instruction pool of 33 sources; rounded, so that whoever has that data gets the same rows.
ASSUMED = Lengths(mu=5.0, between=0.8, within=0.4)


def fit(lengths: Sequence[int], sources: Sequence[str], origin: str) -> Lengths:
    """The parameters of real examples: log lengths' mean, and their variance between and within sources."""
    logs = np.log(np.maximum(np.asarray(lengths, np.float64), 1))
    _, numbers = np.unique(np.asarray(sources), return_inverse=True)
    means = (np.bincount(numbers, logs) / np.bincount(numbers))[numbers]
    return replace(
        ASSUMED,
        mu=round(float(logs.mean()), 1),
        between=round(float(means.std()), 1),
        within=round(float((logs - means).std()), 1),
        origin=origin,
    )


def real_lengths(folder: Path) -> Lengths:
    """Fitted to 2,000 real examples."""
    examples = load_examples(folder / "pool_2k.jsonl.gz")
    encoded = encode_all(list(examples), load_tokenizer(folder / "models/tiny-llama-2.4m"), "tulu", ASSUMED.longest)
    return fit([len(e.input_ids) for e in encoded], examples.datasets, "pool_2k")


@dataclass(frozen=True)
class Outcome:
    """One map: seconds from the start to the last shard, and where the workers' time went.

    ``lost``: worker seconds of attempts that ended in a failure, and of the restarts after them. ``attempts``: seconds
    of the attempt that finished each shard.
    """

    makespan: float
    lost: float
    failures: int
    attempts: Floats


def run_claims(costs: Floats, speeds: Floats, lives: Iterator[float], restart: float) -> Outcome:
    """Workers claim the next shard when they have finished one; one that fails loses its shard, which is next again.

    ``costs``: seconds of each shard, in the order of claims, on a worker of speed 1. ``lives``: seconds that an attempt
    would take to fail. A worker that failed is back after ``restart`` seconds; its shard is free at once.
    """
    waiting, idle = deque(range(len(costs))), list[int]()
    seconds, of_speed = costs.tolist(), speeds.tolist()
    attempts = np.zeros(len(costs))
    makespan, lost, failures = 0.0, 0.0, 0
    events = [(0.0, worker, -1) for worker in range(len(speeds))]  # time, worker, the shard that it loses or -1
    while events:
        now, worker, failed = heapq.heappop(events)
        if failed >= 0:
            waiting.appendleft(failed)
            heapq.heappush(events, (now + restart, worker, -1))
            if idle:
                heapq.heappush(events, (now, idle.pop(), -1))
        elif not waiting:
            idle.append(worker)
        else:
            shard = waiting.popleft()
            needed, life = seconds[shard] / of_speed[worker], next(lives)
            if life < needed:
                lost, failures = lost + life + restart, failures + 1
                heapq.heappush(events, (now + life, worker, shard))
            else:
                attempts[shard], makespan = needed, max(makespan, now + needed)
                heapq.heappush(events, (now + needed, worker, -1))
    return Outcome(makespan, lost, failures, attempts)


def run_ranges(costs: Floats, speeds: Floats, lives: Iterator[float], restart: float) -> Outcome:
    """As :func:`run_claims`, but each worker has a fixed range of the shards, and nobody else finishes it."""
    parts = np.array_split(costs, len(speeds))
    alone = [run_claims(part, speeds[[worker]], lives, restart) for worker, part in enumerate(parts)]
    return Outcome(
        max(outcome.makespan for outcome in alone),
        sum(outcome.lost for outcome in alone),
        sum(outcome.failures for outcome in alone),
        np.concatenate([outcome.attempts for outcome in alone]),
    )


SCHEDULES = {"claims": run_claims, "ranges": run_ranges}
CASES = [("claims", order) for order in ("dataset", "longest first", "shuffled")] + [("ranges", "dataset")]


@dataclass(frozen=True)
class Setting:
    """A job and its workers. Times are in seconds, of a worker of speed 1.

    ``schedule``: one of SCHEDULES. ``order``: ``dataset``, where sources follow one another; ``longest first``, of its
    shards; ``shuffled``, before it was cut into shards. ``rate``: examples of the mean length that a worker does a
    second; ``overhead``: of a shard, whatever its length. ``slow_share`` of the workers have ``slow_speed``. ``mtbf``:
    mean seconds of work before a worker fails; ``restart``: until it claims again.
    """

    workers: int
    shard_size: int
    schedule: str = "claims"
    order: str = "dataset"
    examples: int = 10**9
    rate: float = 6.3
    overhead: float = 1.0
    slow_share: float = 0.05
    slow_speed: float = 0.5
    mtbf: float = 24 * 3600.0
    restart: float = 300.0

    @property
    def n_shards(self) -> int:
        return -(-self.examples // self.shard_size)

    @property
    def speeds(self) -> Floats:
        """Of the workers; slow ones are spread evenly among the ranges."""
        slow = round(self.slow_share * self.workers)
        speeds = np.ones(self.workers)
        speeds[(np.arange(slow) * self.workers) // max(1, slow)] = self.slow_speed
        return speeds

    @property
    def useful(self) -> float:
        """Worker seconds that the examples alone take."""
        return self.examples / self.rate

    def simulate(self, lengths: Lengths, seed: int) -> Outcome:
        """One run; equal seeds have equal shards, whatever the workers are."""
        rng = np.random.default_rng([seed, self.shard_size])
        drawn = lengths.shuffled() if self.order == "shuffled" else lengths
        tokens = drawn.shard_tokens(self.examples, self.shard_size, rng)
        costs = tokens * (self.useful / tokens.sum()) + self.overhead
        if self.order == "longest first":
            costs = np.sort(costs)[::-1]
        return SCHEDULES[self.schedule](costs, self.speeds, lives(self.mtbf, rng), self.restart)

    def efficiency(self, outcome: Outcome) -> float:
        """Useful work over what the workers could have done in that time if all of them had speed 1."""
        return self.useful / (self.workers * outcome.makespan)


def lives(mtbf: float, rng: np.random.Generator) -> Iterator[float]:
    """Exponential times; a mean of infinity never fails."""
    if math.isinf(mtbf):
        return itertools.repeat(math.inf)
    return itertools.chain.from_iterable(rng.exponential(mtbf, 4096).tolist() for _ in itertools.count())


def measure(setting: Setting, lengths: Lengths, seeds: int) -> dict[str, Any]:
    """The JSON row of a setting; its baseline is the work split evenly over workers of speed 1."""
    outcomes = [setting.simulate(lengths, seed) for seed in range(seeds)]

    def median(values: Iterator[float]) -> float:
        return float(statistics.median(values))

    efficiency = median(map(setting.efficiency, outcomes))
    made = row(
        "simulation",
        f"{setting.schedule}, {setting.order}",
        [outcome.makespan for outcome in outcomes],
        device=torch.device("cpu"),
        shape=f"{setting.n_shards} shards of {setting.shard_size}, {setting.workers} workers",
        dtype=None,
        **asdict(setting),
        lengths=asdict(lengths),
        seeds=seeds,
        baseline="an even split",
        ratio_to_baseline=1 / efficiency,
        efficiency=efficiency,
        bound=float(setting.speeds.mean()),
        wasted=median(outcome.lost / (setting.workers * outcome.makespan) for outcome in outcomes),
        failures=median(float(outcome.failures) for outcome in outcomes),
        shard_s_50=median(float(np.median(outcome.attempts)) for outcome in outcomes),
        shard_s_99=median(float(np.quantile(outcome.attempts, 0.99)) for outcome in outcomes),
    )
    return {**made, "device": "none, simulated"}


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate every setting, print a line for each and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to FILE as JSON lines")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 64, 512, 4096])
    parser.add_argument("--shard-sizes", type=int, nargs="+", default=[1024, 4096, 16384])
    given = ("examples", "rate", "overhead", "slow_share", "slow_speed", "mtbf", "restart")
    for name in given:
        default = getattr(Setting, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="see Setting")
    options = parser.parse_args(argv)
    folder = data_folder()
    lengths = ASSUMED if folder is None else real_lengths(folder)
    print(f"lengths: {lengths}")
    facts = {name: getattr(options, name) for name in given}
    rows = []
    for schedule, order in CASES:
        for shard_size, workers in itertools.product(options.shard_sizes, options.workers):
            made = measure(Setting(workers, shard_size, schedule, order, **facts), lengths, options.seeds)
            print(
                f"{made['implementation']:<22} {made['shape']:<42} efficiency {made['efficiency']:.4f}  "
                f"wasted {made['wasted']:.4f}  99 % of shards under {made['shard_s_99']:,.0f} s"
            )
            rows.append(made)
    append_rows(rows, options.json)


if __name__ == "__main__":
    main()
