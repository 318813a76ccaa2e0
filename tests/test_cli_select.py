"""``less-fast select``: what its strategies and filters write and report, and what they refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import less_fast, refused
from support.stores import make_rows, make_store

from less_fast.data import load_examples
from less_fast.score_table import read_scores
from less_fast.scoring import (
    Caps,
    Duplicates,
    Scores,
    balanced,
    best,
    composition,
    quotas,
    round_robin,
    select,
    write_scores,
)
from less_fast.store import FeatureStore

N, DIM = 60, 12


@dataclass
class Pool:
    folder: Path
    lines: list[bytes]
    scores: dict[str, Scores]
    features: np.ndarray
    datasets: list[str]

    @property
    def aggregates(self) -> dict[str, np.ndarray]:
        return {task: scores.aggregate() for task, scores in self.scores.items()}

    def arguments(self, *tasks: str, out: str = "best.jsonl") -> list[Any]:
        files = [f"--scores={self.folder / task}.parquet" for task in tasks]
        return ["select", *files, "--data", self.folder / "pool.jsonl", "--out", self.folder / out]

    def select(self, *tasks: str, options: Sequence[object] = ()) -> tuple[dict[str, Any], list[int]]:
        """The printed result, and the rows whose lines were written."""
        result = less_fast(*self.arguments(*tasks), *options, "--json")
        assert result.exit_code == 0, result.output
        lines = (self.folder / "best.jsonl").read_bytes().splitlines(keepends=True)
        return json.loads(result.stdout), [self.lines.index(line) for line in lines]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder, draw, rows = tmp_path_factory.mktemp("pool"), np.random.default_rng(0), make_rows(N)
    lines = []
    for row, (id_, dataset) in enumerate(zip(rows.ids, rows.datasets)):
        text = {"dataset": dataset, "id": id_, "prompt": f"{row}?", "completion": "é" * row}
        spaces = " " * (row % 3)  # which a parser and a writer would lose
        lines.append((json.dumps(text, ensure_ascii=False) + spaces + "\n").encode())
    (folder / "pool.jsonl").write_bytes(b"".join(lines))
    valid = np.arange(N) != 7
    scores = {}
    for task, width in (("sums", 2), ("names", 1)):
        matrix = np.where(valid[:, None], draw.uniform(-1, 1, (N, width)), -np.inf).astype(np.float32)
        scores[task] = Scores(matrix, [f"s{j}" for j in range(width)], valid)
        for suffix in ("parquet", "csv"):
            write_scores(folder / f"{task}.{suffix}", rows, scores[task])
    features = draw.standard_normal((N, DIM)).astype(np.float32)
    features[N // 2 :] = 2 * features[: N // 2]  # the second half are copies
    make_store(folder / "store", features)
    make_store(folder / "signs", features, dtype="1bit")
    return Pool(folder, lines, scores, features, rows.datasets)


def test_one_task_alone(pool: Pool) -> None:
    result, rows = pool.select("sums", options=["--fraction", "0.2"])
    assert rows == select(pool.scores["sums"], n=12).tolist()
    assert list(result) == ["out", "selected", "datasets"] and result["selected"] == 12
    shares = composition(pool.datasets, rows, {"sums": pool.aggregates["sums"]})
    expected = {share.dataset: share for share in shares}
    for share in result["datasets"]:
        ours = expected[share["dataset"]]
        assert share["n_selected"] == ours.n_selected and share["selected_share"] == ours.selected_share
        assert share["lift"] == ours.lift
        assert share["selected_mean"]["sums"] == pytest.approx(ours.selected_mean["sums"])
    text = less_fast(*pool.arguments("sums"), "-n", 12)
    assert "selecting" not in text.stderr
    header, _, *lines = text.stdout.splitlines()
    assert re.split(r"  +", header) == ["dataset", "pool", "selected", "lift", "mean in pool", "mean in selected"]
    for line in lines[:3]:
        name, in_pool, in_selected, lift, *means = re.split(r"  +", line)
        share = expected[name]
        assert in_pool == f"{100 * share.pool_share:.1f} %" and in_selected == f"{100 * share.selected_share:.1f} %"
        assert lift == f"{share.lift:.2f} x"
        assert means == [f"{share.pool_mean['sums']:.4f}", f"{share.selected_mean['sums']:.4f}"]
    assert lines[3].split() == ["examples", "60", "12"]


def test_selecting_does_without_torch(pool: Pool) -> None:
    check = (
        "import sys; from typer.testing import CliRunner; from less_fast.cli import app\n"
        "result = CliRunner().invoke(app, sys.argv[1:])\n"
        "print(result.exit_code, 'torch' in sys.modules)"
    )
    arguments = [str(argument) for argument in pool.arguments("sums", out="other.jsonl")]
    command = [sys.executable, "-c", check, *arguments, "-n", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


def test_strategies(pool: Pool) -> None:
    tasks, n = pool.aggregates, ["-n", 20]
    columns = {"sums:s0": pool.scores["sums"].matrix[:, 0], "sums:s1": pool.scores["sums"].matrix[:, 1]}
    columns["names:s0"] = pool.scores["names"].matrix[:, 0]
    for options, ranking in (
        (["--strategy", "round-robin", *n], round_robin(tasks)),
        (["--strategy", "balanced", *n], balanced(columns)),
        (["--strategy", "quotas", "--quota", "sums=15", "--quota", "names=5"], quotas(tasks, {"sums": 15, "names": 5})),
        (
            ["--strategy", "quotas", "--quota", "sums=0.25", "--quota", "names=0.75", *n],
            quotas(tasks, {"sums": 0.25, "names": 0.75}, n=20),
        ),
    ):
        result, rows = pool.select("sums", "names", options=options)
        assert rows == select(ranking, n=20).tolist() and len(rows) == 20
        assert list(result["taken_by"]) == ranking.names and sum(result["taken_by"].values()) == 20
        assert set(result["datasets"][0]["pool_mean"]) == {"sums", "names"}
    assert result["taken_by"] == {"sums": 5, "names": 15}
    result = less_fast(*pool.arguments("sums", "names"), "--strategy", "round-robin", *n)
    assert "names: mean in selected" in result.stdout and "taken by sums: 10, names: 10" in result.stdout


def test_csv_and_names_of_tasks(pool: Pool) -> None:
    files = [f"--scores=first={pool.folder / 'sums.csv'}", f"--scores=second={pool.folder / 'names.csv'}"]
    arguments = [*files, *pool.arguments()[1:], "--strategy", "balanced", "-n", 9, "--json"]
    result = json.loads(less_fast("select", *arguments).stdout)
    assert list(result["taken_by"]) == ["first:s0", "first:s1", "second:s0"]
    text = (pool.folder / "best.jsonl").read_bytes()
    pool.select("sums", "names", options=["--strategy", "balanced", "-n", 9])
    assert (pool.folder / "best.jsonl").read_bytes() == text
    csv, parquet = (read_scores(pool.folder / f"sums.{suffix}", with_subtasks=True) for suffix in ("csv", "parquet"))
    for name, column in zip(("s0", "s1"), pool.scores["sums"].matrix.T):
        np.testing.assert_array_equal(csv.subtasks[name], column)
        np.testing.assert_array_equal(parquet.subtasks[name], column)
    assert read_scores(pool.folder / "sums.csv").subtasks == {}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_with_any_text_are_read_back(tmp_path: Path, suffix: str) -> None:
    rows = make_rows(3)
    rows.ids[1] = 'with "quotes", commas\nand lines'
    matrix = np.array([[0.1, 0.3], [-np.inf, -np.inf], [-0.25, -0.5]], np.float32)
    scores = Scores(matrix, ["x,y", "z"], np.array([True, False, True]))
    write_scores(tmp_path / f"s.{suffix}", rows, scores)
    table = read_scores(tmp_path / f"s.{suffix}", with_subtasks=True)
    assert table.ids == rows.ids and list(table.subtasks) == ["x,y", "z"]
    np.testing.assert_array_equal(table.scores, scores.aggregate())
    np.testing.assert_array_equal(np.stack(list(table.subtasks.values()), axis=1), matrix)


def test_caps_and_groups(pool: Pool) -> None:
    result, rows = pool.select("sums", options=["-n", 20, "--cap", "set-0=3", "--cap", "0.5"])
    expected = select(pool.scores["sums"], n=20, filters=[Caps(pool.datasets, {"set-0": 3}, 0.5)])
    assert rows == expected.tolist() and len(rows) == 20
    counts = {share["dataset"]: share["n_selected"] for share in result["datasets"]}
    assert counts["set-0"] == 3 and max(counts.values()) <= 10 and result["rejected"]["caps"] > 0
    (pool.folder / "groups.json").write_text(json.dumps({"set-0": "even", "set-2": "even"}))
    grouped = ["-n", 20, "--groups", pool.folder / "groups.json", "--cap", "even=0.1"]
    result, rows = pool.select("sums", options=grouped)
    assert {share["dataset"]: share["n_selected"] for share in result["groups"]} == {"even": 2, "set-1": 18}


def test_duplicates_and_the_report(pool: Pool) -> None:
    store, report = pool.folder / "store", pool.folder / "new" / "report.json"
    options = ["-n", 25, "--dedupe", store, "--threshold", "0.98", "--memory", "1M", "--report", report]
    result, rows = pool.select("sums", options=options)
    expected = select(pool.scores["sums"], n=25, filters=[Duplicates(FeatureStore(store), 0.98)])
    assert rows == expected.tolist() and result["selected"] == 25
    assert len({row % (N // 2) for row in rows}) == 25, "no row is selected with its copy"
    assert result["rejected"]["duplicates"] > 0
    assert json.loads(report.read_text()) == result
    both = less_fast(*pool.arguments("sums"), *options, "--cap", "0.4", "--dedupe", store, "--strategy", "best")
    assert both.exit_code == 0 and re.search(r"passed over \d+ \(caps\), \d+ \(duplicates\)", both.stdout)
    assert "selecting" in both.stderr
    quiet = less_fast(*pool.arguments("sums"), *options, "--no-progress")
    assert quiet.stderr == ""


def test_parquet_holds_the_same_examples(pool: Pool) -> None:
    _, rows = pool.select("sums", options=["-n", 9])
    assert less_fast(*pool.arguments("sums", out="best.parquet"), "-n", 9).exit_code == 0
    again = load_examples(pool.folder / "best.parquet")
    assert again.fingerprint == load_examples(pool.folder / "pool.jsonl").take(rows).fingerprint


def test_a_selection_that_ends_early_warns(pool: Pool) -> None:
    with pytest.warns(UserWarning, match="20 rows asked for, but only 15 of 60 could be selected"):
        result, _ = pool.select("sums", options=["-n", 20, "--cap", "5"])
    assert result["selected"] == 15
    with pytest.warns(UserWarning, match="60 rows asked for, but only 59 of 60 are valid"):
        pool.select("sums", options=["-n", 60])


def test_what_is_refused(pool: Pool, tmp_path: Path) -> None:
    make_store(tmp_path / "short", np.ones((3, DIM), np.float32))
    two, n = ["sums", "names"], ["-n", 5]
    quotas_ = ["--strategy", "quotas"]
    for tasks, options, message in (
        (two, n, r"given for 2 tasks \(sums, names\); choose --strategy round-robin"),
        (two, [*n, "--strategy", "best"], "choose --strategy round-robin"),
        (two, [*n, "--strategy", "fair"], "'fair'; expected one of best, round-robin, quotas, balanced"),
        (two, [*n, *quotas_], "--quota and --strategy quotas go together"),
        (two, [*n, "--strategy", "round-robin", "--quota", "sums=3"], "--quota and --strategy quotas go together"),
        (two, [*n, *quotas_, "--quota", "sums=3"], "quotas are given for 'sums', but the tasks are 'sums', 'names'"),
        (two, [*n, *quotas_, "--quota", "3"], "of no task"),
        (two, [*quotas_, "--quota", "sums=0.5", "--quota", "names=0.5"], "is a share"),
        (two, ["--strategy", "round-robin"], "give either --fraction or -n"),
        (["sums"], [*n, "--fraction", "0.1"], "give either --fraction or -n"),
        (["sums", "sums"], [*n, "--strategy", "balanced"], "two tasks are named 'sums'"),
        (["sums"], [*n, "--cap", "set-0=much"], "--cap is 'set-0=much'; expected NAME=500"),
        (["sums"], [*n, "--cap", "3", "--cap", "0.2"], "--cap was given twice for all"),
        (["sums"], [*n, "--cap", "a=3", "--cap", "a=0.2"], "--cap was given twice for a"),
        (["sums"], [*n, "--cap", "a=3"], "cap of 'a': the pool has no such dataset; it has set-0, set-1, set-2"),
        (["sums"], [*n, "--cap", "2.5"], "--cap is '2.5'; expected NAME=500"),
        (["sums"], [*n, "--cap", "-1"], "--cap is '-1'; expected NAME=500"),
        (["sums"], [*n, "--out", pool.folder / "x.csv"], "expected a name that ends in .jsonl or .parquet"),
        (["sums"], [*n, "--report", pool.folder / "sums.parquet"], "is a file that is read"),
        (
            ["sums"],
            [*n, "--dedupe", pool.folder / "store", "--report", pool.folder / "store/r.json"],
            "lies in .*store",
        ),
        (["sums"], [*n, "--dedupe", pool.folder / "signs"], "signs holds 1bit features"),
        (["sums"], [*n, "--dedupe", tmp_path / "none"], "none"),
        (["sums"], [*n, "--dedupe", tmp_path / "short"], "has scores of 60 examples, but .*short has 3; give stores"),
        (["sums"], [*n, "--dedupe", pool.folder / "store", "--threshold", "1"], "threshold of duplicates is 1.0"),
        (["sums"], [*n, "--dedupe", pool.folder / "store", "--memory", "1K"], "memory for duplicates is 1024 bytes"),
        (["sums"], [*n, "--dedupe", pool.folder / "store", "--memory", "much"], "much"),
        (["sums"], [*n, "--report", pool.folder / "x.jsonl", "--out", pool.folder / "x.jsonl"], "both --out and --rep"),
    ):
        error = refused(*pool.arguments(*tasks, out="x.jsonl"), *options)
        assert re.search(message, error), error
    assert not (pool.folder / "x.jsonl").exists()
    bare = tmp_path / "bare.csv"
    bare.write_text("id,score\n" + "".join(f"id-{row},0.5\n" for row in range(N)))
    arguments = ["select", "--scores", bare, *pool.arguments(out="x.jsonl")[1:], *n]
    assert "no columns 'score:<subtask>'" in refused(*arguments, "--strategy", "balanced")
    assert best(read_scores(bare).scores).n_valid == N
