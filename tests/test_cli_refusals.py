"""Bad input on the command line: one line that names the cause, and nothing finished is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.cli import SIZES, less_fast, refused, run_arguments

from less_fast.cli.output import disk_is_full

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
        patch.setattr("less_fast.pipeline.stream_scores", interrupt)
        line = refused(*command, status=130)
    assert "repeat the command to go on" in line
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
