"""The run from settings to selections: settings files, what a run makes, going on after a stop, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support import tiny
from support.children import child_environment

from less_fast.config import RunConfig, settings, task_name
from less_fast.data import TEMPLATES, load_examples
from less_fast.errors import LessFastError
from less_fast.ops.accumulate import BACKENDS
from less_fast.optim.adam import RULES
from less_fast.pipeline import run
from less_fast.projection import KINDS
from less_fast.score_table import read_scores
from less_fast.store import FeatureStore
from less_fast.store.codec import CODECS

KILLER = Path(__file__).parent / "support" / "run_killer.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    """The folder of a finished run."""
    quiet_run(inputs)
    return inputs / "run"


def quiet_run(inputs: Path, **changes: Any) -> Any:
    lines: list[str] = []
    result = run(RunConfig(**tiny.config(inputs, **changes)), progress=False, say=lines.append)
    return result, lines


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


# Settings


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".toml"])
def test_settings_survive_a_file(tmp_path: Path, suffix: str) -> None:
    config = RunConfig(
        model='m "quoted" \\ é',
        train=("a.jsonl", "b.jsonl"),
        targets={"x.y": "t.jsonl", "z": "u.jsonl"},
        checkpoint_weights=(0.5, 2e-5),
        warmup_epochs=2,
        lora_modules=("q_proj",),
        token_budget=512,
        n=7,
        scores_csv=True,
    )
    file = tmp_path / f"all{suffix}"
    config.save(file)
    assert RunConfig.load(file) == config
    text = file.read_text()
    for setting in settings():
        assert f"# {setting.meaning}\n" in text
        assert f"{setting.name}" in text


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
def test_written_file_shows_every_default(tmp_path: Path, suffix: str) -> None:
    RunConfig().save(tmp_path / f"defaults{suffix}")
    text = (tmp_path / f"defaults{suffix}").read_text()
    assert re.search(r"2(\.0)?e-05", text) and "8192" in text and "srht" in text
    assert RunConfig.load(tmp_path / f"defaults{suffix}") == RunConfig()
    if suffix == ".yaml":
        assert set(yaml.safe_load(text)) == {setting.name for setting in settings()}


def test_choices_are_those_of_their_owners() -> None:
    types = {setting.name: get_args(setting.type) for setting in settings()}
    assert set(types["template"]) == set(TEMPLATES)
    assert set(types["projection"]) == set(KINDS)
    assert set(types["adam_rule"]) == set(RULES)
    assert set(types["store_dtype"]) == set(CODECS)
    assert set(types["backend"]) == {"auto", *BACKENDS}


def test_what_people_write_is_understood(tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text(
        "model: m\ntrain: pool.jsonl\ntargets: [a/gsm8k_val.jsonl.gz, mmlu.parquet]\n"
        "warmup_learning_rate: 2e-4\nlora_modules: q_proj\nfraction: 1\n"
    )
    with pytest.raises(LessFastError, match=r"lora_modules is 'q_proj'; expected a list of strings or 'auto'"):
        RunConfig.load(file)
    file.write_text(file.read_text().replace("lora_modules: q_proj", "lora_modules: [q_proj]"))
    config = RunConfig.load(file)
    assert config.train == ("pool.jsonl",)
    assert config.targets == {"gsm8k_val": "a/gsm8k_val.jsonl.gz", "mmlu": "mmlu.parquet"}
    assert config.warmup_learning_rate == 2e-4
    assert config.fraction == 1
    assert task_name("x/bbh.v2.jsonl") == "bbh.v2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warmup_epoch: 3", "unknown setting 'warmup_epoch'; did you mean 'warmup_epochs'"),
        ("dim: many", "setting dim is 'many'; expected an integer"),
        ("dim: 12.5", "setting dim is 12.5; expected an integer"),
        ("dim: true", "setting dim is True; expected an integer"),
        ("template: tullu", "setting template is 'tullu'; expected one of 'tulu', 'chat', 'raw'"),
        ("token_budget: lots", "setting token_budget is 'lots'; expected an integer or 'auto'"),
        ("targets: {a/b: c.jsonl}", "target name 'a/b' cannot name a file"),
        ("targets: [x/a.jsonl, y/a.jsonl]", "two targets are named 'a'"),
        ("targets: {a: [1]}", "expected a table of names and files"),
        ("dim: [", "not valid YAML .*line 1"),
        ("- 1", "expected 'setting: value' lines, found list"),
    ],
)
def test_wrong_settings_are_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(LessFastError, match=message) as caught:
        RunConfig.load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_settings_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LessFastError, match="cannot be read"):
        RunConfig.load(tmp_path / "none.yaml")
    with pytest.raises(LessFastError, match=r"\.yaml, \.yml or \.toml"):
        RunConfig.load(tmp_path / "none.txt")
    (tmp_path / "bad.toml").write_text("dim = = 3")
    with pytest.raises(LessFastError, match=r"bad\.toml: not valid TOML .*line 1"):
        RunConfig.load(tmp_path / "bad.toml")


# A whole run


def test_a_run_selects_what_the_target_is_made_of(inputs: Path, finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["examples"] == 40
    weights = [checkpoint["weight"] for checkpoint in report["checkpoints"]]
    rates = [checkpoint["learning_rate"] for checkpoint in report["checkpoints"]]
    assert weights == pytest.approx(np.array(rates) / sum(rates)) and rates[0] > rates[1] > 0
    for kind in ("sums", "names"):
        shares = {share["dataset"]: share for share in report["targets"][kind]["datasets"]}
        assert report["targets"][kind]["selected"] == 8  # a fifth
        assert shares[kind]["pool_share"] == 0.5
        # Random weights or not, the gradients of equal kinds of text are alike.
        assert shares[kind]["selected_share"] >= 0.75


def test_selected_lines_are_the_best_lines_byte_for_byte(inputs: Path, finished: Path) -> None:
    lines = (inputs / "pool.jsonl").read_bytes().splitlines(keepends=True)
    for kind in ("sums", "names"):
        table = pq.read_table(finished / "scores" / f"{kind}.parquet").to_pydict()
        best = sorted(range(40), key=lambda row: (-table["score"][row], row))[:8]
        assert (finished / "selected" / f"{kind}.jsonl").read_bytes() == b"".join(lines[row] for row in best)


def test_scores_are_weighted_cosines_of_the_stores(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    expected = np.zeros((40, 2))
    for checkpoint in report["checkpoints"]:
        folder = finished / "features" / f"checkpoint-{checkpoint['step']}"
        train, target = (FeatureStore(folder / name) for name in ("train", "target-sums"))
        assert train.facts["precondition"]["kind"] == "adam" and target.facts["precondition"] == {"kind": "sgd"}
        unit = [store[:].astype(float) / np.linalg.norm(store[:], axis=1, keepdims=True) for store in (train, target)]
        cosines = unit[0] @ unit[1].T
        for column, subtask in enumerate(("odd", "even")):
            rows = [row for row, name in enumerate(target.rows.subtasks) if name == subtask]
            expected[:, column] += checkpoint["weight"] * cosines[:, rows].mean(axis=1)
    np.testing.assert_allclose(
        read_scores(finished / "scores" / "sums.parquet").scores, expected.max(axis=1), rtol=0, atol=1e-5
    )


def test_a_second_run_makes_nothing(inputs: Path, finished: Path) -> None:
    before = stamps(finished)
    result, lines = quiet_run(inputs)
    assert result.made == []
    assert any("nothing was made again" in line for line in lines)
    assert stamps(finished) == before


def test_a_finished_run_needs_no_model_to_be_looked_at(inputs: Path, finished: Path, monkeypatch: Any) -> None:
    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("less_fast.pipeline.load_model", no_model)
    monkeypatch.setattr("less_fast.warmup.load_model", no_model)
    result, _ = quiet_run(inputs)
    assert sorted(result.selected) == ["names", "sums"]


def test_only_what_is_missing_is_made(inputs: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    step = json.loads((out / "report.json").read_text())["checkpoints"][0]["step"]
    shard = out / "features" / f"checkpoint-{step}" / "train" / "shards" / "00001.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    (out / "selected" / "names.jsonl").unlink()
    with pytest.warns(UserWarning, match="is missing; it will be made again"):
        result, _ = quiet_run(inputs, out=str(out))
    assert result.made == [f"features of checkpoint {step}, train", "selection of 8 examples for names"]
    assert shard.read_bytes() == content
    for name in ("sums", "names"):
        assert (out / "selected" / f"{name}.jsonl").read_bytes() == (
            finished / "selected" / f"{name}.jsonl"
        ).read_bytes()


def test_targets_may_be_added(inputs: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    targets = {**tiny.config(inputs)["targets"], "more": str(tiny.write_target(tmp_path, "sums", 3))}
    result, lines = quiet_run(inputs, out=str(out), targets=targets)
    assert any("new targets: more" in line for line in lines)
    assert [part for part in result.made if "train" in part or "for sums" in part] == []
    assert len(result.selected["more"]) == 8
    again, _ = quiet_run(inputs, out=str(out), targets=targets)
    assert again.made == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 64}, "dim: 128 -> 64"),
        ({"fraction": 0.1, "warmup_seed": 3}, "warmup_seed: 0 -> 3; fraction: 0.2 -> 0.1"),
        ({"lora_rank": 2}, "lora_rank: 4 -> 2"),
    ],
)
def test_other_settings_are_refused(inputs: Path, finished: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LessFastError, match=named.replace("->", r"->")):
        quiet_run(inputs, **changes)


def test_a_target_that_changed_its_file_is_refused(inputs: Path, finished: Path) -> None:
    swapped = {"sums": str(inputs / "names.jsonl"), "names": str(inputs / "sums.jsonl")}
    with pytest.raises(LessFastError, match=r"targets\.sums: \S+sums\.jsonl -> \S+names\.jsonl"):
        quiet_run(inputs, targets=swapped)


def test_a_pool_that_changed_under_its_name_is_refused(inputs: Path, finished: Path, tmp_path: Path) -> None:
    for name in ("model", "run"):
        shutil.copytree(inputs / name, tmp_path / name)
    for kind in ("sums", "names"):
        shutil.copy(inputs / f"{kind}.jsonl", tmp_path)
    tiny.write_pool(tmp_path, 19)
    (tmp_path / "run" / "config.yaml").unlink()
    RunConfig(**tiny.config(tmp_path)).resolved().save(tmp_path / "run" / "config.yaml")
    with pytest.raises(LessFastError, match=r"warmup: holds a warm-up with other settings \(examples"):
        quiet_run(tmp_path)


def test_checkpoints_of_another_run_csv_n_and_groups(inputs: Path, finished: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({"sums": "numbers"}))
    result, _ = quiet_run(
        inputs,
        out=str(tmp_path / "run"),
        checkpoints=str(finished / "warmup"),
        checkpoint_weights=[1, 3],
        n=3,
        groups=str(groups),
        scores_csv=True,
        aggregate="mean",
        store_dtype="1bit",
    )
    stores = [FeatureStore(path) for path in (tmp_path / "run" / "features").glob("*/*")]
    dtypes = {(store.path.name.startswith("target-"), store.dtype) for store in stores}
    assert dtypes == {(False, "1bit"), (True, "float32")}
    assert not (tmp_path / "run" / "warmup").exists()
    assert result.weights == [0.25, 0.75]
    assert [len(rows) for rows in result.selected.values()] == [3, 3]
    assert {share["dataset"] for share in result.report["targets"]["sums"]["groups"]} == {"numbers", "names"}
    assert "numbers" in result.table
    csv, parquet = (read_scores(tmp_path / "run" / "scores" / f"sums{suffix}") for suffix in (".csv", ".parquet"))
    assert csv.ids == parquet.ids
    np.testing.assert_allclose(csv.scores, parquet.scores, rtol=1e-6)
    columns = pq.read_table(tmp_path / "run" / "scores" / "sums.parquet").to_pydict()
    mean = (np.array(columns["score:odd"]) + np.array(columns["score:even"])) / 2
    np.testing.assert_allclose(parquet.scores, mean, atol=1e-6)


def test_linear_layers_by_name_need_no_adapter(inputs: Path, tmp_path: Path) -> None:
    """A full fine-tune's checkpoint: the model itself with an optimizer state."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    optimizer.step()
    checkpoint = tmp_path / "full" / "checkpoint-1"
    shutil.copytree(inputs / "model", checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    result, _ = quiet_run(
        inputs,
        out=str(tmp_path / "run"),
        checkpoints=str(tmp_path / "full"),
        checkpoint_weights=[1],
        modules="q_proj|v_proj",
    )
    store = FeatureStore(tmp_path / "run" / "features" / "checkpoint-1" / "train")
    names = [parameter["name"] for parameter in store.facts["layout"]]
    assert len(names) == 4 and all("q_proj" in name or "v_proj" in name for name in names)
    assert len(result.selected["sums"]) == 8


# What a run refuses before it makes anything


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "setting model is missing; give --model"),
        ({"targets": {}}, "setting targets is missing; give --target"),
        ({"train": ["nowhere/pool.jsonl"]}, "pool.jsonl: no such file"),
        ({"fraction": 0.01}, "fraction 0.01 of 40 rows is less than one row"),
        ({"n": 0}, "setting n is 0; expected at least 1"),
        ({"block": 48}, "projection block is 48; expected a power of two"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"groups": "nowhere.json"}, "nowhere.json: cannot be read"),
        ({"model": "/nowhere/model"}, "/nowhere/model: no such folder"),
        ({"checkpoints": "/nowhere/run"}, "/nowhere/run: no checkpoint found"),
    ],
)
def test_wrong_input_is_refused(inputs: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(LessFastError, match=message):
        quiet_run(inputs, out=str(out), **changes)
    assert not (out / "features").exists()


def test_weights_must_fit_the_checkpoints(inputs: Path, finished: Path, tmp_path: Path) -> None:
    changes = {"out": str(tmp_path / "run"), "checkpoints": str(finished / "warmup")}
    with pytest.raises(LessFastError, match="checkpoint_weights has 3 weights for 2 checkpoints"):
        quiet_run(inputs, **changes, checkpoint_weights=[1, 1, 1])


def test_a_folder_of_something_else_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(LessFastError, match=r"holds thesis\.tex and is not a run's folder"):
        quiet_run(inputs, out=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_do_not_share_a_folder(inputs: Path, finished: Path) -> None:
    from less_fast.store.files import FolderLock

    lock = FolderLock(finished)
    try:
        with pytest.raises(LessFastError, match="is being written by another process"):
            quiet_run(inputs)
    finally:
        lock.release()


def test_a_disk_too_small_is_known_before_warm_up(inputs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("less_fast.store.files._free_bytes", lambda path: 50_000)  # the stores need 51,200 bytes
    with pytest.raises(LessFastError, match="is free there"):
        quiet_run(inputs, out=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "warmup").exists()


def test_relative_paths_hold_from_every_folder(inputs: Path, finished: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(inputs)
    relative = replace(
        RunConfig(**tiny.config(inputs)),
        model="model",
        train=("pool.jsonl",),
        targets={kind: f"{kind}.jsonl" for kind in ("sums", "names")},
        out="run",
    )
    assert run(relative, progress=False, say=lambda line: None).made == []


# The table of scores


def test_a_table_of_scores_knows_its_examples(inputs: Path, finished: Path) -> None:
    table = read_scores(finished / "scores" / "sums.parquet")
    pool = load_examples(inputs / "pool.jsonl")
    table.check_rows(pool)
    with pytest.raises(LessFastError, match="has scores of 40 examples, but the data has 39"):
        table.check_rows(pool.take(range(39)))
    with pytest.raises(LessFastError, match="row 0 is the score of 'sums_0', but the data has 'names_0' there"):
        table.check_rows(pool.take([1, 0, *range(2, 40)]))


def test_what_is_no_table_of_scores(tmp_path: Path, inputs: Path) -> None:
    with pytest.raises(LessFastError, match="no such file"):
        read_scores(tmp_path / "none.parquet")
    with pytest.raises(LessFastError, match=r"ends in \.csv or \.parquet"):
        read_scores(inputs / "pool.jsonl")
    for name in ("bad.parquet", "bad.csv"):
        (tmp_path / name).write_text("a,b\n1,2\n")
        with pytest.raises(LessFastError, match="not a table of scores"):
            read_scores(tmp_path / name)


# Killed at any instant


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")
def test_killed_runs_end_with_the_same_files(inputs: Path) -> None:
    folder = inputs / "kills"
    folder.mkdir()
    for name in ("model", "pool.jsonl", "sums.jsonl", "names.jsonl"):
        (folder / name).symlink_to(inputs / name)
    environment = child_environment(OMP_NUM_THREADS="1")
    output = subprocess.run(
        [sys.executable, str(KILLER), str(folder), "5"], stdout=subprocess.PIPE, env=environment, cwd=folder, check=True
    )
    result = json.loads(output.stdout)
    assert result["files"] > 30
    assert result["killed"] >= 5
    assert result["unlike"] == []
