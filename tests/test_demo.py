"""The demo from end to end: in miniature, and as users see it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from less_fast.cli import app
from less_fast.demo import DemoSettings, run_demo, summary_table
from less_fast.errors import LessFastError

MINIATURE = DemoSettings(
    pool_sizes={"dates": 15, "logic": 15, "code": 15, "sorting": 30, "units": 45},
    n_target=4,
    n_pretraining=40,
    vocab_size=400,
    steps=15,
    hidden_size=32,
    layers=2,
    run={
        **DemoSettings().run,
        "warmup_fraction": 0.2,
        "warmup_epochs": 2,
        "warmup_batch_size": 8,
        "lora_rank": 4,
        "dim": 256,
        "fraction": 0.1,
    },
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    run_demo(folder, MINIATURE, progress=False)
    return folder


def check(summary: dict[str, Any], out: Path) -> None:
    """The summary against a count of the files."""
    pool = [json.loads(line)["dataset"] for line in (out / "pool.jsonl").read_text().splitlines()]
    assert set(summary["targets"]) == {"dates", "logic", "code"}
    for skill, entry in summary["targets"].items():
        lines = (out / "run" / "selected" / f"{skill}.jsonl").read_text().splitlines()
        chosen = [json.loads(line)["dataset"] for line in lines]
        assert entry["selected"] == len(chosen)
        assert entry["selected_share"] == pytest.approx(chosen.count(skill) / len(chosen))
        assert entry["base_rate"] == pytest.approx(pool.count(skill) / len(pool))
    assert summary["seconds"] > 0
    assert json.loads((out / "summary.json").read_text()) == summary


def test_miniature(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    check(summary, out)
    assert [entry["selected"] for entry in summary["targets"].values()] == [12, 12, 12]
    # Even after 15 steps on five dozen words, gradients tell the skills apart.
    assert sum(entry["selected_share"] > 2 * entry["base_rate"] for entry in summary["targets"].values()) >= 2
    shown = summary_table(summary)
    for skill, entry in summary["targets"].items():
        assert f"{100 * entry['selected_share']:.1f} %" in next(line for line in shown.splitlines() if skill in line)


def test_a_second_time_nothing_is_made(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    run_demo(out, MINIATURE, progress=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_an_interrupted_demo_goes_on(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_again(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was trained twice")

    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").unlink()
    monkeypatch.setattr("less_fast.demo.train_model", not_again)
    again = run_demo(out, MINIATURE, progress=False)
    assert again["targets"] == summary["targets"]


def test_other_settings_and_other_folders_are_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(LessFastError, match=r"other settings \(old -> new\): seed: 0 -> 1"):
        run_demo(out, replace(MINIATURE, seed=1), progress=False)
    (tmp_path / "letter.txt").touch()
    with pytest.raises(LessFastError, match=r"holds letter\.txt and is not a demo's folder"):
        run_demo(tmp_path, MINIATURE, progress=False)


@pytest.mark.timeout(900)
def test_as_users_see_it(tmp_path: Path) -> None:
    started = time.process_time()
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo"), "--json"])
    seconds = time.process_time() - started  # those of an idle machine: it computes in one thread
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    check(summary, tmp_path / "demo")
    assert seconds <= 150
    for entry in summary["targets"].values():
        assert entry["selected"] == 120
        assert entry["selected_share"] >= 3 * entry["base_rate"]
