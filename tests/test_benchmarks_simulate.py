"""The simulation of the shard map gives what closed forms say; docs/scale.md has the sizes that the codec has."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_fast.store.codec import CODECS
from less_fast.store.shard import shard_tensors

ROOT = Path(__file__).parent.parent


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/simulate.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("simulate")


def never() -> Iterator[float]:
    return itertools.repeat(math.inf)


@pytest.mark.parametrize("schedule", ["claims", "ranges"])
@pytest.mark.parametrize(("n_shards", "workers"), [(1, 1), (7, 1), (12, 4), (13, 4), (3, 8)])
def test_equal_shards_take_as_many_rounds_as_they_must(
    simulate: Any, schedule: str, n_shards: int, workers: int
) -> None:
    outcome = simulate.SCHEDULES[schedule](np.full(n_shards, 2.0), np.ones(workers), never(), 9.0)
    assert outcome.makespan == 2.0 * math.ceil(n_shards / workers)
    assert (outcome.lost, outcome.failures) == (0.0, 0)
    np.testing.assert_array_equal(outcome.attempts, np.full(n_shards, 2.0))


def test_one_worker_that_never_fails_loses_nothing(simulate: Any) -> None:
    setting = simulate.Setting(1, 64, examples=10_000, overhead=0.0, mtbf=math.inf)
    assert setting.efficiency(setting.simulate(simulate.ASSUMED, 0)) == pytest.approx(1, rel=1e-12)
    costly = simulate.Setting(1, 64, examples=10_000, overhead=3.0, mtbf=math.inf)
    expected = costly.useful / (costly.useful + 3.0 * 157)
    assert costly.efficiency(costly.simulate(simulate.ASSUMED, 0)) == pytest.approx(expected, rel=1e-12)


def test_workers_beyond_the_shards_are_idle(simulate: Any) -> None:
    for workers in (100, 1000):
        setting = simulate.Setting(workers, 1000, examples=50_000, overhead=0.0, slow_share=0.0, mtbf=math.inf)
        found = setting.simulate(simulate.ASSUMED, 0)
        assert found.makespan == found.attempts.max()
        assert setting.efficiency(found) < 50 / workers
    even = simulate.run_claims(np.ones(50), np.ones(1000), never(), 0.0)
    assert 50 / (1000 * even.makespan) == 50 / 1000


def test_failures_cost_one_worker_what_renewal_theory_says(simulate: Any) -> None:
    # Starting again from nothing until an attempt of d seconds survives: (M + R)(exp(d / M) - 1) seconds on average.
    n, d, mtbf, restart = 20_000, 3.0, 5.0, 2.0
    alive = simulate.lives(mtbf, np.random.default_rng(0))
    outcome = simulate.run_claims(np.full(n, d), np.ones(1), alive, restart)
    each = (mtbf + restart) * math.expm1(d / mtbf)
    assert outcome.makespan / n == pytest.approx(each, rel=0.02)
    assert outcome.makespan == pytest.approx(n * d + outcome.lost)
    assert outcome.failures / n == pytest.approx(math.expm1(d / mtbf), rel=0.03)


def test_a_dead_workers_shard_is_finished_by_another(simulate: Any) -> None:
    # Worker 0 dies at 4 of its 10 seconds. Worker 1 is done with shard 1 at 5 and takes shard 0.
    outcome = simulate.run_claims(np.array([10.0, 5.0]), np.ones(2), iter([4.0, *[math.inf] * 3]), 100.0)
    assert (outcome.makespan, outcome.lost, outcome.failures) == (15.0, 104.0, 1)
    # In ranges it must wait for the worker that died.
    alone = simulate.run_ranges(np.array([10.0, 5.0]), np.ones(2), iter([4.0, *[math.inf] * 3]), 100.0)
    assert (alone.makespan, alone.lost, alone.failures) == (114.0, 104.0, 1)


def test_an_idle_worker_takes_a_shard_the_moment_it_is_free(simulate: Any) -> None:
    # Worker 1 is idle from 5 on; worker 0 dies at 8.
    outcome = simulate.run_claims(np.array([10.0, 5.0]), np.ones(2), iter([8.0, *[math.inf] * 3]), 100.0)
    assert outcome.makespan == 18.0


def test_slow_workers_do_less_of_what_is_claimed_and_end_what_is_not(simulate: Any) -> None:
    speeds = np.array([1.0, 0.5])
    claimed = simulate.run_claims(np.ones(300), speeds, never(), 0.0)
    assert claimed.makespan == 200.0 and (claimed.attempts == 2.0).sum() == 100
    fixed = simulate.run_ranges(np.ones(300), speeds, never(), 0.0)
    assert fixed.makespan == 300.0


@pytest.mark.parametrize(("workers", "shard_size"), [(32, 1024), (128, 1024), (32, 4096)])
def test_the_cost_of_a_shard_size_is_that_of_the_page(simulate: Any, workers: int, shard_size: int) -> None:
    facts = {"examples": 10**7, "overhead": 5.0, "mtbf": 20_000.0, "restart": 200.0}
    setting = simulate.Setting(workers, shard_size, "claims", "shuffled", **facts)
    d, total = shard_size / setting.rate, setting.useful / workers
    cost = 5 / d + d / 40_000 + 200 / 20_000 + (1 / setting.slow_speed - 0.5) * d / total
    runs = [setting.efficiency(setting.simulate(simulate.ASSUMED, seed)) for seed in range(5)]
    assert np.mean(runs) == pytest.approx(setting.speeds.mean() * (1 - cost), abs=0.015)


@pytest.mark.parametrize("seed", range(5))
def test_claims_keep_their_bounds(simulate: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, workers = rng.lognormal(0, 1.5, 90), 8
    least = max(costs.sum() / workers, costs.max())
    spans = [simulate.run_claims(c, np.ones(workers), never(), 0.0).makespan for c in (costs, np.sort(costs)[::-1])]
    # List scheduling in any order (Graham 1966), and the longest first (Graham 1969) against no less than the optimum.
    assert least <= spans[0] * (1 + 1e-12) and spans[0] <= costs.sum() / workers + (1 - 1 / workers) * costs.max()
    assert least <= spans[1] * (1 + 1e-12) and spans[1] <= spans[0] * 4 / 3
    ranges = simulate.run_ranges(costs, np.ones(workers), never(), 0.0)
    assert ranges.makespan == pytest.approx(max(part.sum() for part in np.array_split(costs, workers)))


def test_no_second_of_a_worker_is_counted_twice(simulate: Any) -> None:
    costs, speeds = np.random.default_rng(1).lognormal(0, 0.5, 400), np.repeat([1.0, 0.5], [6, 2])
    for run in simulate.SCHEDULES.values():
        outcome = run(costs, speeds, simulate.lives(4.0, np.random.default_rng(2)), 0.5)
        assert outcome.failures > 20 and (outcome.attempts >= costs).all()
        # The last restarts may be of nobody's concern any more.
        assert outcome.attempts.sum() + outcome.lost <= len(speeds) * (outcome.makespan + 0.5)


def test_equal_seeds_give_equal_rows_and_shards(simulate: Any) -> None:
    few = simulate.Setting(4, 500, examples=20_000)
    many, longest = (
        simulate.Setting(8, 500, examples=20_000),
        simulate.Setting(4, 500, "claims", "longest first", 20_000),
    )
    again, other = few.simulate(simulate.ASSUMED, 0), few.simulate(simulate.ASSUMED, 1)
    np.testing.assert_array_equal(few.simulate(simulate.ASSUMED, 0).attempts, again.attempts)
    assert other.makespan != again.makespan
    fast = [setting.simulate(simulate.ASSUMED, 0).attempts for setting in (few, many, longest)]
    assert all(attempts.min() == pytest.approx(fast[0].min()) for attempts in fast)
    assert (np.diff(fast[2]) <= 1e-9).all() and (np.diff(fast[0]) > 0).any()


def test_moments_and_shards_are_those_of_drawn_examples(simulate: Any) -> None:
    lengths = simulate.Lengths(mu=5.0, between=1.0, within=0.9, longest=700, run=6000)
    rng, z = np.random.default_rng(0), np.array([-1.0, 0.0, 2.0])
    drawn = np.minimum(np.exp(5.0 + z[:, None] + 0.9 * rng.standard_normal((3, 400_000))), 700)
    mean, variance = lengths.moments(z)
    np.testing.assert_allclose(mean, drawn.mean(axis=1), rtol=0.01)
    np.testing.assert_allclose(variance, drawn.var(axis=1), rtol=0.02)


def test_shards_add_up_the_sources_that_they_straddle(simulate: Any) -> None:
    lengths = simulate.Lengths(mu=5.0, between=1.0, within=0.9, longest=700, run=6000)
    draws = [lengths.shard_tokens(20_000, 4096, np.random.default_rng(seed)) for seed in range(4000)]
    sums, (of_one, _) = np.array(draws), lengths.moments(np.random.default_rng(1).standard_normal(100_000))
    counts = np.array([4096, 4096, 4096, 4096, 3616])
    np.testing.assert_allclose(sums.mean(axis=0), counts * of_one.mean(), rtol=0.04)
    # What two sources have in common is nothing: shard 1 has 1,904 examples of one and 2,192 of another.
    expected = of_one.std() * np.array([4096, math.hypot(1904, 2192), math.hypot(3808, 288)])
    np.testing.assert_allclose(sums.std(axis=0)[:3], expected, rtol=0.06)
    assert np.corrcoef(sums[:, 0], sums[:, 1])[0, 1] > 0.5 > abs(np.corrcoef(sums[:, 0], sums[:, 2])[0, 1])


def test_a_shuffled_pool_has_even_shards_of_the_same_examples(simulate: Any) -> None:
    lengths = simulate.Lengths(mu=5.0, between=1.0, within=0.9, longest=700)
    z = np.random.default_rng(0).standard_normal(200_000)
    (mean, variance), (of_one, within) = lengths.shuffled().moments(np.zeros(1)), lengths.moments(z)
    assert mean[0] == pytest.approx(of_one.mean(), rel=0.01)
    assert variance[0] == pytest.approx(of_one.var() + within.mean(), rel=0.02)
    sums = lengths.shuffled().shard_tokens(10**7, 4096, np.random.default_rng(1))[:-1]
    assert sums.std() / sums.mean() == pytest.approx(math.sqrt(variance[0] / 4096) / mean[0], rel=0.1)


def test_a_fit_finds_the_parameters(simulate: Any) -> None:
    rng = np.random.default_rng(3)
    of_source = rng.standard_normal(400)
    sources = rng.integers(0, 400, 200_000)
    tokens = np.exp(4.5 + 0.7 * of_source[sources] + 0.4 * rng.standard_normal(200_000))
    found = simulate.fit(np.ceil(tokens).astype(int).tolist(), [f"source {n}" for n in sources], "made")
    assert (found.mu, found.within, found.origin) == (4.5, 0.4, "made")
    assert found.between == pytest.approx(0.7, abs=0.101)


def test_the_command_writes_rows(simulate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LESS_FAST_DATA", raising=False)
    file = tmp_path / "simulate.json"
    options = ["--examples", "200000", "--workers", "1", "16", "--shard-sizes", "1000", "--seeds", "3"]
    simulate.main([*options, "--mtbf", "inf", "--json", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["implementation"], row["workers"]) for row in rows] == [
        (name, workers)
        for name in ("claims, dataset", "claims, longest first", "claims, shuffled", "ranges, dataset")
        for workers in (1, 16)
    ]
    for row in rows:
        assert (
            row["op"] == "simulation" and row["device"] == "none, simulated" and row["lengths"]["origin"] == "assumed"
        )
        assert row["wasted"] == row["failures"] == 0 and 0 < row["efficiency"] <= row["bound"] <= 1
        assert row["ratio_to_baseline"] == pytest.approx(1 / row["efficiency"])
        assert row["ms_50"] == pytest.approx(1e3 * 200_000 / 6.3 / row["workers"] / row["efficiency"], rel=1e-6)
    assert rows[0]["efficiency"] == pytest.approx(1 / (1 + 200 * 6.3 / 200_000))
    assert rows[1]["bound"] == pytest.approx(1 - 0.5 / 16)
    assert rows[7]["efficiency"] < min(row["efficiency"] for row in rows[1:6:2])  # ranges wait for the slow worker


def test_the_page_has_the_sizes_of_the_codec() -> None:
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+)` \|((?: [\d.]+ [GT]B \|){4})$", text, re.MULTILINE)
    assert [dtype for dtype, _ in found] == [*CODECS]
    for dtype, cells in found:
        for dim, cell in zip((1024, 2048, 4096, 8192), cells.strip(" |").split(" | ")):
            n_bytes = 1e9 / 4096 * sum(spec.nbytes for spec in shard_tensors(CODECS[dtype], 4096, dim).values())
            number, unit = cell.split()
            assert float(number) * {"GB": 1e9, "TB": 1e12}[unit] == pytest.approx(n_bytes, rel=5e-3), (dtype, dim)
