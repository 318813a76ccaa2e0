"""matching, and the selection made of its scores, against a plain re-implementation of LESS's; paths and weights."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.less_selection import less_matching, less_write, select
from support.stores import make_store

from less_fast.checkpoints import discover_checkpoints
from less_fast.compat.less import matching
from less_fast.compat.less.files import write_store
from less_fast.compat.less.matching import find_paths, influence_scores, normalised_weights
from less_fast.errors import LessFastError
from less_fast.store import Status

DATA = os.environ.get("LESS_FAST_DATA")
CKPTS = (105, 211)
WEIGHTS = [1.6877e-05, 1.2859e-05]
TRAIN = {"dolly": 700, "flan_v2": 500}
TARGETS = {"mmlu": 285, "bbh": 81}
DIM = 64


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


# Folders and files as LESS leaves them


def save_folder(folder: Path, rows: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    torch.save(torch.nn.functional.normalize(rows, dim=1), folder / "all_orig.pt")


def random_rows(n: int, seed: int, dim: int = DIM) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gradients of two files and two tasks at two checkpoints, in the layout of LESS's README."""
    folder = tmp_path_factory.mktemp("less")
    for seed, ckpt in enumerate(CKPTS):
        for k, (name, n) in enumerate({**TRAIN, **TARGETS}.items()):
            kind = "adam" if name in TRAIN else "sgd"
            save_folder(folder / f"grads/job/{name}-ckpt{ckpt}-{kind}/dim{DIM}", random_rows(n, 10 * k + seed))
    return folder


def invented_lines(n: int, start: int) -> list[str]:
    words = ("naïve", "日本語", "tab\there", 'a "quoted" word', "plain")
    return [json.dumps({"id": start + k, "text": words[k % 5] * (k % 7)}, ensure_ascii=k % 2 == 0) for k in range(n)]


@pytest.fixture(scope="module", params=["invented", "real"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A JSON Lines file of each name."""
    folder = tmp_path_factory.mktemp("files")
    if request.param == "real":
        if DATA is None:
            pytest.skip("LESS_FAST_DATA is not set")
        lines = gzip.decompress((Path(DATA) / "pool_2k.jsonl.gz").read_bytes()).decode().split("\n")
    else:
        lines = invented_lines(sum(TRAIN.values()), 0)
    paths, start = {}, 0
    for name, n in TRAIN.items():
        paths[name] = folder / f"{name}_data.jsonl"
        paths[name].write_text("\n".join(lines[start : start + n]) + "\n", encoding="utf-8")
        start += n
    return paths


def match(job: Path, out: Path, *flags: str) -> None:
    template = f"{job}/grads/job/{{}}-ckpt{{}}-KIND/dim{DIM}"
    flags += ("--gradient_path", template.replace("KIND", "adam"), "--train_file_names", *TRAIN)
    flags += ("--validation_gradient_path", template.replace("KIND", "sgd"), "--target_task_names", *TARGETS)
    matching.main([*flags, "--ckpts", *map(str, CKPTS), "--output_path", str(out)])


@pytest.fixture(scope="module", params=[("--percentage", "0.05"), ("--max_samples", "33")], ids=" ".join)
def theirs(request, job, files, tmp_path_factory) -> tuple[tuple[str, str], Path]:
    """What LESS writes, and the flag it is told."""
    flag, amount = request.param
    out = tmp_path_factory.mktemp("theirs")
    train, targets = (
        {name: [job / f"grads/job/{name}-ckpt{ckpt}-{kind}/dim{DIM}" for ckpt in CKPTS] for name in names}
        for names, kind in ((TRAIN, "adam"), (TARGETS, "sgd"))
    )
    less_matching(train, targets, WEIGHTS, out)
    percentage, max_samples = (float(amount), None) if flag == "--percentage" else (None, int(amount))
    for task in TARGETS:
        less_write(out / task, files, percentage, max_samples)
    return request.param, out


def test_every_output_file_is_equal_to_less(job, files, theirs, tmp_path):
    amount, less = theirs
    match(job, tmp_path, "--checkpoint_weights", *map(str, WEIGHTS))
    select(tmp_path, files, *amount, tasks=TARGETS)
    names = sorted(str(path.relative_to(less)) for path in less.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    top = f"top_{'p' if amount[0] == '--percentage' else 'num'}{amount[1]}.jsonl"
    assert len(names) == 8 and f"bbh/{top}" in names
    for name in names:
        if name.endswith(".pt"):
            ours = torch.load(tmp_path / name)
            assert torch.equal(ours, torch.load(less / name)), name
            assert ours.dtype == torch.float32 and ours.device.type == "cpu"
        else:
            assert (tmp_path / name).read_bytes() == (less / name).read_bytes(), name
    assert len((tmp_path / "bbh" / top).read_text().splitlines()) == (60 if amount[1] == "0.05" else 33)


def test_blocks_of_any_size_select_the_same_rows(job, files, theirs, tmp_path, monkeypatch):
    """A matrix product may round otherwise where it has fewer rows."""
    amount, less = theirs
    monkeypatch.setattr(matching, "_BLOCK_BYTES", 7 * 4 * DIM)
    match(job, tmp_path, "--checkpoint_weights", *map(str, WEIGHTS))
    select(tmp_path, files, *amount, tasks=TARGETS)
    for path in less.rglob("*.jsonl"):
        assert (tmp_path / path.relative_to(less)).read_bytes() == path.read_bytes()
    for path in less.rglob("*.pt"):
        ours = torch.load(tmp_path / path.relative_to(less))
        torch.testing.assert_close(ours, torch.load(path), rtol=0, atol=1e-6)


# Where paths and weights come from


@pytest.mark.parametrize(
    ("on_disk", "template", "reading"),
    [
        ("{name}-ckpt{ckpt}", "{}-ckpt{}", "name first"),
        ("{ckpt}-of-{name}", "{}-of-{}", "checkpoint first"),
        ("{ckpt}/{name}", "{ckpt}/{name}", "by name"),
        ("{name}/{ckpt}", "{1}/{0}", "checkpoint first"),
    ],
)
def test_templates_are_read_in_both_orders_and_by_name(tmp_path, on_disk, template, reading):
    for name in ("a", "b"):
        for ckpt in (5, 10):
            save_folder(tmp_path / on_disk.format(name=name, ckpt=ckpt), random_rows(2, 0))
    paths, found = find_paths(f"{tmp_path}/{template}", ["a", "b"], [5, 10])
    assert found == reading
    assert paths["b"] == [tmp_path / on_disk.format(name="b", ckpt=ckpt) for ckpt in (5, 10)]
    files, _ = find_paths(f"{tmp_path}/{template}/all_orig.pt", ["a"], [5])
    by_file, by_folder = (influence_scores(one, {"t": one}, [1])["t"] for one in (files["a"], paths["a"][:1]))
    assert torch.equal(by_file, by_folder)


def test_the_reading_and_the_weights_are_printed_before_use(job, tmp_path, capsys):
    match(job, tmp_path, "--checkpoint_weights", *map(str, WEIGHTS))
    printed = capsys.readouterr().out.splitlines()
    assert "read name first, such as" in printed[0] and f"dolly-ckpt105-adam/dim{DIM}" in printed[0]
    assert printed[2:4] == ["checkpoint 105: weight 0.5676", "checkpoint 211: weight 0.4324"]
    assert "scores of 700 examples" in printed[4]


def test_errors_of_templates(tmp_path):
    save_folder(tmp_path / "a-5", random_rows(2, 0))
    with pytest.raises(LessFastError, match=rf"there is no {tmp_path}/5-a nor {tmp_path}/a-10"):
        find_paths(f"{tmp_path}/{{}}-{{}}", ["a"], [5, 10])
    with pytest.raises(LessFastError, match="the same path twice"):
        find_paths(f"{tmp_path}/a-5", ["a"], [5, 10])
    for bad in ("{}-{}-{}", "{task}-{}", "{name}-{}", "{"):
        with pytest.raises(LessFastError, match="cannot be filled in"):
            find_paths(bad, ["a"], [5])


def write_states(run: Path) -> None:
    """Two epochs of 10 steps; the learning rate falls by 1 a step, so epochs have means of 15.5 and 5.5."""
    for step in (10, 20):
        log = [{"step": k, "epoch": k / 10, "learning_rate": 21.0 - k} for k in range(1, step + 1)]
        (run / f"checkpoint-{step}").mkdir(parents=True)
        state = {"epoch": step / 10, "global_step": step, "log_history": log}
        (run / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("flags", [["--ckpts", "10", "20"], ["--ckpts", "10", "20", "--run_dir"], ["--run_dir"]])
def test_weights_that_are_not_given_are_the_learning_rates_of_the_run(tmp_path, capsys, flags):
    run = tmp_path / ("elsewhere" if "--run_dir" in flags else "out/job")
    write_states(run)
    train = {ckpt: random_rows(6, ckpt) for ckpt in (10, 20)}
    for ckpt, rows in train.items():
        save_folder(tmp_path / f"grads/job/a-ckpt{ckpt}/dim{DIM}", rows)
        save_folder(tmp_path / f"grads/job/t-ckpt{ckpt}/dim{DIM}", random_rows(3, ckpt + 1))
    template = f"{tmp_path}/grads/job/{{}}-ckpt{{}}/dim{DIM}"
    flags = [*flags, *([str(run)] if "--run_dir" in flags else []), "--output_path", str(tmp_path / "selected")]
    flags += ["--gradient_path", template, "--validation_gradient_path", template]
    matching.main([*flags, "--train_file_names", "a", "--target_task_names", "t"])
    paths = {name: [f"{tmp_path}/grads/job/{name}-ckpt{ckpt}/dim{DIM}" for ckpt in train] for name in "at"}
    expected = influence_scores(paths["a"], {"t": paths["t"]}, [15.5, 5.5])["t"]
    assert torch.equal(torch.load(tmp_path / "selected/t/a_influence_score.pt"), expected)
    printed = capsys.readouterr().out
    assert str(run) in printed and "0.7381" in printed and "0.2619" in printed
    assert printed.index("0.7381") < printed.index("scores of 6 examples")


def test_weights_that_cannot_be_had_or_make_no_sense_are_errors(job, tmp_path):
    with pytest.raises(LessFastError, match="give --checkpoint_weights, or --run_dir"):
        match(job, tmp_path)
    with pytest.raises(LessFastError, match="1 checkpoint weights for 2 checkpoints"):
        match(job, tmp_path, "--checkpoint_weights", "1")
    write_states(tmp_path / "run")
    with pytest.raises(LessFastError, match="has no checkpoint-105; there are 10, 20"):
        match(job, tmp_path, "--run_dir", str(tmp_path / "run"))
    with pytest.raises(LessFastError, match="give --ckpts, or --run_dir"):
        matching.main(["--train_file_names", "a", "--target_task_names", "t"])
    for bad in ([0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0]):
        with pytest.raises(LessFastError, match="checkpoint weights are"):
            normalised_weights(bad)
    assert normalised_weights([0.25, 0.75]) == [0.25, 0.75]
    assert normalised_weights([1, 3]) == [0.25, 0.75]


def test_a_checkpoint_is_weighed_by_its_own_interval_whichever_others_are_wanted(tmp_path):
    write_states(tmp_path / "epochs")
    assert [c.learning_rate for c in discover_checkpoints(tmp_path / "epochs", [20, 10])] == [5.5, 15.5]
    for step in (4, 8):  # 0.4 and 0.8 of an epoch: saved by steps
        log = [{"step": k, "epoch": k / 10, "learning_rate": float(k)} for k in range(1, step + 1)]
        (tmp_path / f"steps/checkpoint-{step}").mkdir(parents=True)
        state = {"epoch": step / 10, "global_step": step, "log_history": log}
        (tmp_path / f"steps/checkpoint-{step}/trainer_state.json").write_text(json.dumps(state))
    (last,) = discover_checkpoints(tmp_path / "steps", [8])
    assert last.learning_rate == (5 + 6 + 7 + 8) / 4 and last == discover_checkpoints(tmp_path / "steps")[1]


# Subtasks


@pytest.mark.parametrize(
    "names",
    [
        ["x", "y", "x", None, "z", "x", "y"],
        ["x", "x", "y", "z", "z", "z"],  # in order, and the first as long as the average
        ["x", "y", "y"],
    ],
    ids=["mixed", "in-order", "growing"],
)
def test_custom_tasks_have_the_subtasks_that_their_examples_name(tmp_path, names):
    targets = random_rows(len(names), 1).numpy()
    train = random_rows(20, 2).numpy()
    write_store(make_store(tmp_path / "ts", targets, subtasks=names), tmp_path / "mmlu")
    write_store(make_store(tmp_path / "as", train), tmp_path / "a")
    found = influence_scores([tmp_path / "a"], {"mmlu": [tmp_path / "mmlu"]}, [2.0])["mmlu"]
    unit = [rows / np.linalg.norm(rows.astype(float), axis=1, keepdims=True) for rows in (train, targets)]
    cosines = unit[0] @ unit[1].T
    groups = {name: [row for row, other in enumerate(names) if other == name] for name in names}
    expected = np.max([cosines[:, rows].mean(1) for rows in groups.values()], axis=0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def test_checkpoints_of_other_examples_are_not_added_up(tmp_path):
    rows = random_rows(6, 1).numpy()
    for name, examples in (("a", "one file"), ("b", "one file"), ("c", "another")):
        write_store(make_store(tmp_path / f"{name}-store", rows, examples=examples), tmp_path / name)
    target = tmp_path / "a"
    influence_scores([tmp_path / "a", tmp_path / "b"], {"t": [target, tmp_path / "b"]}, [1, 1])
    with pytest.raises(LessFastError, match="different examples"):
        influence_scores([tmp_path / "a", tmp_path / "c"], {"t": [target, target]}, [1, 1])
    with pytest.raises(LessFastError, match="different examples"):
        influence_scores([target, target], {"t": [tmp_path / "a", tmp_path / "c"]}, [1, 1])


def test_rows_of_different_checkpoints_are_compared_with_a_warning(tmp_path):
    rows = random_rows(6, 1).numpy()
    for name, adapter in (("a", "checkpoint-12"), ("b", "checkpoint-24")):
        write_store(make_store(tmp_path / f"{name}-store", rows, adapter=adapter), tmp_path / name)
    with pytest.warns(UserWarning, match="were made with different adapters"):
        influence_scores([tmp_path / "a"], {"t": [tmp_path / "b"]}, [1])


def test_subtasks_of_equal_size_by_name_are_those_of_less_by_number(tmp_path):
    targets, train = random_rows(81, 1).numpy(), random_rows(50, 2).numpy()
    for task, names in (("named", [f"s{row // 3}" for row in range(81)]), ("bbh", [None] * 81)):
        write_store(make_store(tmp_path / f"{task}-store", targets, subtasks=names), tmp_path / task)
    write_store(make_store(tmp_path / "as", train), tmp_path / "a")
    found = influence_scores([tmp_path / "a"], {task: [tmp_path / task] for task in ("named", "bbh")}, [1])
    assert torch.equal(found["named"], found["bbh"])


def test_a_task_that_names_no_subtask_is_one_and_counts_of_less_are_checked(tmp_path):
    save_folder(tmp_path / "a", random_rows(20, 0))
    save_folder(tmp_path / "t", random_rows(10, 1))
    a, t = (torch.load(tmp_path / name / "all_orig.pt") for name in "at")
    found = influence_scores([tmp_path / "a"], {"t": [tmp_path / "t"]}, [1])["t"]
    torch.testing.assert_close(found, (a @ t.T).mean(1), rtol=0, atol=1e-6)
    with pytest.raises(LessFastError, match="tydiqa has 10 rows, which are not 9 subtasks"):
        influence_scores([tmp_path / "a"], {"tydiqa": [tmp_path / "t"]}, [1])


# Rows without a gradient, and folders that cannot be compared


def test_training_rows_that_are_nan_have_no_score_and_are_never_selected(tmp_path):
    rows = [random_rows(30, seed) for seed in (0, 1)]
    target = random_rows(5, 2)
    for ckpt in (0, 1):
        save_folder(tmp_path / f"t{ckpt}", target)
        save_folder(tmp_path / f"clean{ckpt}", rows[ckpt])
        dirty = rows[ckpt].clone()
        dirty[[4, 9][ckpt]] = float("nan")  # each at one checkpoint only
        save_folder(tmp_path / f"a{ckpt}", dirty)
    scores = {}
    for name in ("a", "clean"):
        paths = [tmp_path / f"{name}{ckpt}" for ckpt in (0, 1)]
        scores[name] = influence_scores(paths, {"t": [tmp_path / "t0", tmp_path / "t1"]}, [0.5, 0.5])["t"]
    assert scores["a"].isneginf().nonzero().flatten().tolist() == [4, 9]
    kept = [row for row in range(30) if row not in (4, 9)]
    assert torch.equal(scores["a"][kept], scores["clean"][kept])
    (tmp_path / "sel/t").mkdir(parents=True)
    torch.save(scores["a"], tmp_path / "sel/t/a_influence_score.pt")
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": {k}}}\n' for k in range(30)))
    with pytest.warns(UserWarning, match="only 28 of 30 are usable"):
        select(tmp_path / "sel", {"a": tmp_path / "a.jsonl"}, "--percentage", "1.0")
    chosen = [json.loads(line)["id"] for line in (tmp_path / "sel/t/top_p1.0.jsonl").read_text().splitlines()]
    assert sorted(chosen) == kept
    assert (tmp_path / "sel/t/sorted.csv").read_text().splitlines()[-2:] == ["a, 4, -inf", "a, 9, -inf"]


def test_excluded_rows_of_a_folder_that_we_wrote_have_no_score(tmp_path):
    status = np.zeros(10, np.uint8)
    status[[2, 7]] = Status.NO_LABELS, Status.NON_FINITE
    write_store(make_store(tmp_path / "as", random_rows(10, 0).numpy(), status=status), tmp_path / "a")
    write_store(make_store(tmp_path / "ts", random_rows(3, 1).numpy()), tmp_path / "t")
    found = influence_scores([tmp_path / "a"], {"t": [tmp_path / "t"]}, [1])["t"]
    assert found.isneginf().nonzero().flatten().tolist() == [2, 7] and found.isfinite().sum() == 8


def test_a_target_row_without_gradient_is_refused_by_name(tmp_path):
    save_folder(tmp_path / "a", random_rows(10, 0))
    rows = random_rows(9, 1)
    rows[[4, 6]] = float("nan")
    save_folder(tmp_path / "t", rows)
    with pytest.raises(LessFastError, match=r"t: row 4 of task tydiqa is unusable \(not finite\), and so are 1 more"):
        influence_scores([tmp_path / "a"], {"tydiqa": [tmp_path / "t"]}, [1])
    status = np.zeros(9, np.uint8)
    status[4] = Status.NO_LABELS
    write_store(make_store(tmp_path / "as", random_rows(10, 0).numpy()), tmp_path / "ours")
    write_store(make_store(tmp_path / "ts", random_rows(9, 1).numpy(), status=status), tmp_path / "theirs")
    with pytest.raises(
        LessFastError, match=r"theirs: row 4 \(id-4\) of task t is unusable \(no labels\), so that scores"
    ):
        influence_scores([tmp_path / "ours"], {"t": [tmp_path / "theirs"]}, [1])


def test_folders_whose_features_mean_different_things_are_refused(tmp_path):
    rows = random_rows(10, 0)
    save_folder(tmp_path / "less", rows)
    save_folder(tmp_path / "wide", random_rows(10, 0, dim=2 * DIM))
    save_folder(tmp_path / "short", rows[:9])
    write_store(make_store(tmp_path / "s", rows.numpy()), tmp_path / "ours")
    write_store(make_store(tmp_path / "s2", rows.numpy(), layout_hash="b" * 64), tmp_path / "other")

    def score(train: list[str], target: list[str]) -> None:
        influence_scores([tmp_path / t for t in train], {"t": [tmp_path / t for t in target]}, [1] * len(train))

    for train, target in (("less", "ours"), ("ours", "less")):
        with pytest.raises(LessFastError, match=r"less_fast made \S+/ours and not \S+/less"):
            score([train], [target])
    with pytest.raises(LessFastError, match=r"layout_hash is a{64} in the first and b{64}"):
        score(["ours"], ["other"])
    with pytest.raises(LessFastError, match=r"rows of 64 features and .* of 128"):
        score(["less"], ["wide"])
    with pytest.raises(LessFastError, match=r"10 rows and .*short 9"):
        score(["less", "short"], ["less", "less"])
    with pytest.raises(LessFastError, match=r"10 rows and .*short 9"):
        score(["less", "less"], ["less", "short"])
    with pytest.raises(LessFastError, match="1 folders for 2 checkpoints"):
        score(["less", "less"], ["less"])
    score(["ours"], ["ours"])


def test_training_rows_are_brought_to_memory_a_block_at_a_time(job, monkeypatch):
    monkeypatch.setattr(matching, "_BLOCK_BYTES", 100 * 4 * DIM)
    sizes = []
    scores_of = matching._Target.scores

    def watched(self, blocks, weights):
        sizes.append([len(block) for block in blocks])
        return scores_of(self, blocks, weights)

    monkeypatch.setattr(matching._Target, "scores", watched)
    paths = {name: [job / f"grads/job/{name}-sgd/dim{DIM}"] for name in ("mmlu-ckpt105", "bbh-ckpt105")}
    influence_scores([job / f"grads/job/flan_v2-ckpt105-adam/dim{DIM}"], paths, [1])
    assert sizes == [[100]] * 10  # 5 blocks of a file, each for both tasks


def test_as_a_command_an_error_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "less_fast.compat.less.matching", "--train_file_names", "dolly", "--ckpts", "105"]
    command += ["--checkpoint_weights", "1", "--target_task_names", "bbh", "--gradient_path", "{}-ckpt{}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: path template '{}-ckpt{}': there is no 105-ckptdolly nor dolly-ckpt105")
