"""The command line: what it prints, what it makes, and its exit statuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from support.cli import SIZES, less_fast, refused, run_arguments
from typer.testing import CliRunner

from less_fast.cli import app
from less_fast.cli.output import named_files
from less_fast.config import RunConfig, settings
from less_fast.errors import LessFastError
from less_fast.store import FeatureStore

# The start


def test_help_comes_without_torch() -> None:
    check = (
        "import sys; from typer.testing import CliRunner; from less_fast.cli import app\n"
        "result = CliRunner().invoke(app, ['run', '--help'])\n"
        "print(result.exit_code, *(name in sys.modules for name in ('torch', 'transformers', 'pyarrow')))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False", "False", "False"]
    assert time.monotonic() - started < 5  # a tenth of that on an idle machine


def test_version_and_bare_command() -> None:
    result = less_fast("--version")
    assert result.exit_code == 0 and re.fullmatch(r"less_fast \d+\.\d+\.\d+\n", result.stdout)
    result = less_fast()
    assert result.exit_code == 0
    for command in ("run", "warmup", "extract", "convert", "score", "select", "info", "doctor", "demo"):
        assert re.search(rf"\b{command}\b", result.stdout)


@pytest.mark.parametrize(
    "command", ["run", "warmup", "extract", "convert", "score", "select", "info", "doctor", "demo"]
)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_every_setting_is_a_flag_with_its_default() -> None:
    result = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    for setting in settings():
        flag = "--target" if setting.name == "targets" else f"--{setting.name.replace('_', '-')}"
        assert re.search(rf"{flag}\s", result.stdout)
        default = getattr(RunConfig(), setting.name)
        if default not in (None, "", (), {}):
            assert f"(default: {str(default).lower()})" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "No such command 'rum'"),
        (["run", "--modle", "x"], "--modle.*'less-fast run --help'"),
        (["run", "--dim", "many"], "'--dim'.* valid int"),
        (["select"], "Missing option '--scores'"),
        (["info"], "Missing argument"),
        (["--nothing"], "No such option: --nothing"),
    ],
)
def test_mistyped_commands_get_one_line(arguments: list[str], message: str) -> None:
    assert re.search(message, refused(*arguments))


# run


def test_run_prints_json_alone_on_stdout(inputs: Path, finished: Path) -> None:
    result = json.loads((inputs / "stdout.json").read_text())
    assert result["out"] == str(finished)
    assert result["selected"] == [str(finished / "selected" / f"{kind}.jsonl") for kind in ("sums", "names")]
    assert result["targets"]["sums"]["selected"] == 8
    assert len(result["made"]) == 11
    messages = (inputs / "stderr.txt").read_text()
    assert "learning rate" in messages and "Traceback" not in messages and "FutureWarning" not in messages


def test_run_again_says_that_nothing_was_made(inputs: Path, finished: Path) -> None:
    result = less_fast(*run_arguments(inputs, finished))
    assert result.exit_code == 0
    assert "everything was there already; nothing was made again" in result.stderr
    assert re.search(r"names +50\.0 % +\d", result.stdout)


def test_run_from_a_file_with_flags_that_win(inputs: Path, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    result = less_fast(*run_arguments(inputs, finished), "--write-config", file)
    assert result.exit_code == 0 and str(file) in result.stdout
    assert RunConfig.load(file) == RunConfig(**tiny.config(inputs, out=str(finished)))
    assert less_fast("run", file, "--no-progress").exit_code == 0
    assert "dim: 128 -> 64" in refused("run", file, "--dim", "64", "--no-progress")


def test_write_config_needs_no_other_setting(tmp_path: Path) -> None:
    assert less_fast("run", "--write-config", tmp_path / "all.yaml").exit_code == 0
    assert RunConfig.load(tmp_path / "all.yaml") == RunConfig()
    assert "setting model is missing" in refused("run", tmp_path / "all.yaml")


def test_targets_by_name_or_stem() -> None:
    assert named_files(["a/x.jsonl", "y.jsonl"]) == ["a/x.jsonl", "y.jsonl"]
    assert named_files(["t=a/x.jsonl", "b=c/y.jsonl"]) == {"t": "a/x.jsonl", "b": "c/y.jsonl"}
    with pytest.raises(LessFastError, match="two targets are named 'x'"):
        named_files(["x=a.jsonl", "b/x.jsonl"])


# extract, info, score, select, warmup


def test_the_steps_by_hand_make_what_run_makes(inputs: Path, finished: Path, tmp_path: Path) -> None:
    steps = [3, 6]
    for step in steps:
        adapter = finished / "warmup" / f"checkpoint-{step}"
        for name, file, options in (
            ("train", "pool.jsonl", ["--precondition", "adam"]),
            ("target", "sums.jsonl", []),
        ):
            result = less_fast(
                "extract",
                inputs / "model",
                inputs / file,
                tmp_path / f"{name}-{step}",
                "--adapter",
                adapter,
                *options,
                *SIZES,
            )
            assert result.exit_code == 0, result.stderr
    stores = [f"--{name}={tmp_path / f'{name}-{step}'}" for name in ("train", "target") for step in steps]
    result = less_fast(
        "score", *stores, "--weights-from", finished / "warmup", "--out", tmp_path / "scores.csv", "--json"
    )
    assert json.loads(result.stdout)["subtasks"] == ["odd", "even"] and "learning rate" in result.stderr
    result = less_fast(
        *("select", "--scores", tmp_path / "scores.csv", "--data", inputs / "pool.jsonl", "--fraction", "0.2"),
        *("--out", tmp_path / "best" / "sums.jsonl", "--json"),
    )
    assert json.loads(result.stdout)["selected"] == 8
    for name in ("train", "target"):
        theirs = "train" if name == "train" else "target-sums"
        ours = FeatureStore(tmp_path / f"{name}-6")
        np.testing.assert_array_equal(ours[:], FeatureStore(finished / "features" / "checkpoint-6" / theirs)[:])
    assert (tmp_path / "best" / "sums.jsonl").read_bytes() == (finished / "selected" / "sums.jsonl").read_bytes()


def test_several_kinds_in_one_pass(inputs: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = less_fast(
        *("extract", inputs / "model", inputs / "sums.jsonl", inputs / "names.jsonl", tmp_path / "all"),
        *("--adapter", checkpoint, "--optimizer", checkpoint, "--precondition", "adam", "--precondition", "sgd"),
        *SIZES,
        *("--dim", "64", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    stores = json.loads(result.stdout)["stores"]
    assert [Path(store["path"]).name for store in stores] == ["adam-dim128", "adam-dim64", "sgd-dim128", "sgd-dim64"]
    assert [(store["rows"], store["dim"]) for store in stores] == [(10, 128), (10, 64), (10, 128), (10, 64)]
    assert [store["precondition"]["kind"] for store in stores] == ["adam", "adam", "sgd", "sgd"]


def test_info(finished: Path) -> None:
    store = finished / "features" / "checkpoint-6" / "train"
    result = less_fast("info", store, "--verify", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert (facts["rows"], facts["dim"], facts["status"]) == (40, 128, {"ok": 40})
    assert facts["shards"] == {"done": 5, "total": 5}
    assert facts["projection"]["kind"] == "srht" and facts["precondition"]["rule"] == "less"
    assert facts["verified"] == {"ok": True, "problems": []}
    text = less_fast("info", store).stdout
    assert "rows: 40" in text and "rule less" in text


def test_warmup_prints_the_weights(inputs: Path, tmp_path: Path) -> None:
    result = less_fast(
        *("warmup", inputs / "model", inputs / "pool.jsonl", tmp_path / "run", "--fraction", "0.2", "--epochs", "2"),
        *(
            "--batch-size",
            "4",
            "--lora-rank",
            "2",
            "--lora-module",
            "q_proj",
            "--device",
            "cpu",
            "--no-progress",
            "--json",
        ),
    )
    assert result.exit_code == 0, result.stderr
    checkpoints = json.loads(result.stdout)["checkpoints"]
    assert [checkpoint["step"] for checkpoint in checkpoints] == [2, 4]
    assert sum(checkpoint["weight"] for checkpoint in checkpoints) == pytest.approx(1)
    adapter = json.loads((tmp_path / "run" / "checkpoint-4" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["q_proj"] and adapter["r"] == 2
