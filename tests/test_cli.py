"""The command line: what it prints, what it refuses and how, and its exit statuses."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from typer.testing import CliRunner

from less_fast.cli import app
from less_fast.cli.output import disk_is_full, named_files
from less_fast.config import RunConfig, settings
from less_fast.errors import LessFastError
from less_fast.store import FeatureStore

SIZES = [
    "--dim",
    "128",
    "--block",
    "32",
    "--max-length",
    "128",
    "--shard-size",
    "8",
    "--device",
    "cpu",
    "--no-progress",
]


def less_fast(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object, status: int = 2) -> str:
    """The one line that a refused command prints."""
    result = less_fast(*arguments)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error", "interrupted"))]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return lines[0]


def shell(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    command = [sys.executable, "-c", "from less_fast.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


def run_arguments(inputs: Path, out: Path, **changes: Any) -> list[str]:
    """``less-fast run`` with every setting given as a flag."""
    arguments = ["run", "--no-progress"]
    for name, value in tiny.config(inputs, out=str(out), **changes).items():
        flag = "--target" if name == "targets" else f"--{name.replace('_', '-')}"
        values = [f"{task}={file}" for task, file in value.items()] if isinstance(value, dict) else value
        for item in values if isinstance(values, list) else [values]:
            arguments += [flag, str(item)]
    return arguments


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    """The folder of a run that the installed command made."""
    out = inputs / "run"
    done = shell(*run_arguments(inputs, out), "--json", cwd=inputs)
    assert done.returncode == 0, done.stderr
    (inputs / "stdout.json").write_text(done.stdout)
    (inputs / "stderr.txt").write_text(done.stderr)
    return out


@pytest.fixture(scope="module")
def checkpoint(finished: Path) -> Path:
    return finished / "warmup" / "checkpoint-6"


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
    for command in ("run", "warmup", "extract", "score", "select", "info", "doctor", "demo"):
        assert re.search(rf"\b{command}\b", result.stdout)


@pytest.mark.parametrize("command", ["run", "warmup", "extract", "score", "select", "info", "doctor", "demo"])
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


# Bad input: one line that names the cause


BAD_LINES = {
    "malformed": ('{"messages": [}', "pool.jsonl, line 3|pool.jsonl:3|line 3"),
    "role": ('{"messages": [{"role": "wizard", "content": "x"}]}', "line 3.*unknown role 'wizard'"),
    "fields": ('{"text": "x"}', "line 3.*expected 'messages'"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines_are_named(inputs: Path, tmp_path: Path, kind: str) -> None:
    line, message = BAD_LINES[kind]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("\n".join([*(inputs / "pool.jsonl").read_text().splitlines()[:2], line]) + "\n")
    error = refused(*run_arguments(inputs, tmp_path / "run", train=[str(pool)]))
    assert "pool.jsonl" in error and re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_missing_file_and_empty_target(inputs: Path, tmp_path: Path) -> None:
    error = refused(*run_arguments(inputs, tmp_path / "run", train=["nowhere/pool.jsonl"]))
    assert error == "error: nowhere/pool.jsonl: no such file"
    (tmp_path / "empty.jsonl").touch()
    error = refused(*run_arguments(inputs, tmp_path / "run", targets={"sums": str(tmp_path / "empty.jsonl")}))
    assert "empty.jsonl: holds no examples" in error
    assert not (tmp_path / "run").exists()


def test_tokenizer_larger_than_the_embedding(inputs: Path, tmp_path: Path) -> None:
    tiny.save_tiny_llama(tmp_path / "model", vocab_size=200)
    for command in (
        run_arguments(inputs, tmp_path / "run", model=str(tmp_path / "model")),
        ["extract", tmp_path / "model", inputs / "pool.jsonl", tmp_path / "store", "--modules", "q_proj", *SIZES],
    ):
        assert re.search(r"tokenizer has \d+ tokens but the model's embedding has 200 rows", refused(*command))


def test_optimizer_of_another_adapter(inputs: Path, checkpoint: Path, tmp_path: Path) -> None:
    import torch

    other = tmp_path / "optimizer.pt"
    content = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for entry in content["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name] = torch.cat([entry[name]] * 2, dim=0)
    torch.save(content, other)
    command = ["extract", inputs / "model", inputs / "pool.jsonl", tmp_path / "store", "--adapter", checkpoint]
    error = refused(*command, "--optimizer", other, *SIZES)
    assert "optimizer.pt" in error and "lora_A" in error and "shape" in error
    error = refused(*command, "--precondition", "adam", "--optimizer", inputs / "model", *SIZES)
    assert "no optimizer.pt or optimizer.bin there" in error


def test_adapter_of_another_model(inputs: Path, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=500, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "model")
    error = refused(
        "extract", tmp_path / "model", inputs / "pool.jsonl", tmp_path / "s", "--adapter", checkpoint, *SIZES
    )
    assert f"{checkpoint}: the adapter does not fit" in error


def test_store_of_another_projection(inputs: Path, finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    less_fast(
        "extract", inputs / "model", inputs / "sums.jsonl", tmp_path / "t", "--adapter", checkpoint, *SIZES, "--seed", 9
    )
    train = finished / "features" / "checkpoint-6" / "train"
    error = refused("score", "--train", train, "--target", tmp_path / "t", "--out", tmp_path / "s.parquet")
    assert "projection" in error and "seed=0" in error and "seed=9" in error
    assert not (tmp_path / "s.parquet").exists()


def test_resumed_with_another_projection(inputs: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = ["extract", inputs / "model", inputs / "sums.jsonl", tmp_path / "t", "--adapter", checkpoint, *SIZES]
    assert less_fast(*command).exit_code == 0
    assert "projection.seed: 0 -> 1" in refused(*command, "--seed", 1)


@pytest.mark.parametrize("damage", ["flipped", "cut off", "missing"])
def test_corrupt_shard(finished: Path, tmp_path: Path, damage: str) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished / "features" / "checkpoint-6" / "train", store)
    shard = store / "shards" / "00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flipped" else content[:-9])
    result = less_fast("info", store, "--verify", "--json")
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["verified"]["problems"]
    assert len(problems) == 1 and str(shard) in problems[0]
    assert str(shard) in less_fast("info", store, "--verify").stdout
    if damage != "flipped":  # which reading alone can't tell
        target = finished / "features" / "checkpoint-6" / "target-sums"
        error = refused("score", "--train", store, "--target", target, "--out", tmp_path / "s.parquet")
        assert str(shard) in error and not (tmp_path / "s.parquet").exists()


def test_not_a_store(inputs: Path) -> None:
    assert "is not a feature store" in refused("info", inputs)


def test_full_disk(inputs: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the features: what is finished stays, and the same command finishes the run."""
    out = tmp_path / "run"
    command = run_arguments(inputs, out, checkpoints=str(finished / "warmup"))
    real, left = os.replace, [8]

    def replace(source: Any, destination: Any) -> None:
        left[0] -= "safetensors" in str(destination)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr("less_fast.store.files.os.replace", replace)
        error = refused(*command)
    assert "disk is full" in error and str(out) in error
    shards = list(out.rglob("*.safetensors"))
    assert len(shards) == 8
    stamps = [shard.stat().st_mtime_ns for shard in shards]
    assert less_fast(*command).exit_code == 0
    assert [shard.stat().st_mtime_ns for shard in shards] == stamps
    assert (out / "selected" / "sums.jsonl").read_bytes() == (finished / "selected" / "sums.jsonl").read_bytes()


def test_full_disk_in_the_words_of_libraries(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        try:
            raise RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter: file write failed")
        except RuntimeError as error:
            raise ValueError("checkpoint not saved") from error

    monkeypatch.setattr("less_fast.pipeline.warmup", fail)
    assert "the disk is full" in refused(*run_arguments(inputs, tmp_path / "run"))
    assert disk_is_full(OSError(errno.ENOSPC, "x")) and not disk_is_full(OSError(errno.ENOENT, "x"))


def test_interrupted(inputs: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    command = run_arguments(inputs, tmp_path / "run", checkpoints=str(finished / "warmup"))
    with monkeypatch.context() as patch:
        patch.setattr("less_fast.pipeline.influence", interrupt)
        line = refused(*command, status=130)
    assert "the same command goes on" in line
    with_other_settings = run_arguments(inputs, tmp_path / "run", checkpoints=str(finished / "warmup"), shard_size=16)
    assert "shard_size: 8 -> 16" in refused(*with_other_settings)
    result = less_fast(*command, "--json")
    assert json.loads(result.stdout)["made"][0] == "scores for sums"


def test_a_bug_is_not_hidden(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("less_fast.pipeline.warmup", fail)
    assert isinstance(less_fast(*run_arguments(inputs, tmp_path / "run")).exception, ZeroDivisionError)


def test_selecting_from_other_data(inputs: Path, finished: Path, tmp_path: Path) -> None:
    scores, out = finished / "scores" / "sums.parquet", tmp_path / "best.jsonl"
    error = refused("select", "--scores", scores, "--data", inputs / "sums.jsonl", "-n", 3, "--out", out)
    assert "has scores of 40 examples, but the data has 5" in error
    assert "either --fraction or -n" in refused("select", "--scores", scores, "--data", "x", "--out", out)
    error = refused("score", "--train", "a", "--target", "b", "--weights", "1;2", "--out", tmp_path / "s.csv")
    assert "--weights is '1;2'" in error


@pytest.mark.parametrize(
    "setting, value",
    [
        ("max_length", 0),
        ("warmup_seed", -1),
        ("warmup_learning_rate", "inf"),
        ("warmup_fraction", "nan"),
        ("shard_size", 0),
        ("lora_dropout", 2),
        ("modules", "("),
        ("backend", "triton"),
        ("checkpoint_weights", "1"),
    ],
)
def test_a_refused_setting_costs_nothing_and_may_be_corrected(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: object
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("the warm-up began")

    monkeypatch.setattr("less_fast.pipeline.warmup", started)
    refused(*run_arguments(inputs, tmp_path / "run", **{setting: value}))
    with pytest.raises(AssertionError, match="the warm-up began"):
        result = less_fast(*run_arguments(inputs, tmp_path / "run"))
        raise result.exception


def test_a_target_without_answers_is_refused_before_warm_up(inputs: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "far " * 500}, {"role": "assistant", "content": "too late"}]}
    target = tiny.write_jsonl(tmp_path / "late.jsonl", [long])
    line = refused(*run_arguments(inputs, tmp_path / "run", targets={"late": str(target)}))
    assert "late.jsonl" in line and "within 128 tokens" in line
    assert not (tmp_path / "run" / "warmup").exists()


def test_a_selection_never_overwrites_what_it_is_made_from(inputs: Path, finished: Path, tmp_path: Path) -> None:
    pool = Path(shutil.copy(inputs / "pool.jsonl", tmp_path / "pool.jsonl"))
    before = pool.read_bytes()
    arguments = ["select", "--scores", finished / "scores/sums.parquet", "--data", pool, "-n", 3, "--out"]
    assert "would be overwritten" in refused(*arguments, pool)
    assert "is a folder" in refused(*arguments, tmp_path)
    assert pool.read_bytes() == before


def test_a_flipped_bit_is_found_before_scoring(finished: Path, tmp_path: Path) -> None:
    (checkpoint, *_) = sorted((finished / "features").iterdir())
    shutil.copytree(checkpoint / "train", tmp_path / "train")
    shard = sorted((tmp_path / "train" / "shards").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    arguments = [
        "score",
        "--train",
        tmp_path / "train",
        "--target",
        checkpoint / "target-sums",
        "--out",
        tmp_path / "s.csv",
    ]
    assert shard.name in refused(*arguments)
    assert less_fast(*arguments, "--no-verify").exit_code == 0
