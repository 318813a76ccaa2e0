"""``get_info`` and LESS's functions against its published loop; their files, and rows that have no features."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.less_info import LENGTH, ROWS, encoded, info, load, make_inputs
from support.less_loop import cosines, published_updates, save_checkpoint
from support.oracle import matrix
from support.tiny import examples, write_jsonl
from transformers import AutoTokenizer

from less_fast import AdamState, LessFastError, Projection
from less_fast.compat.less import (
    collect_grads,
    collect_reps,
    get_dataloader,
    get_loss,
    job,
    matching,
    merge_and_normalize_info,
    merge_info,
    prepare_optimizer_state,
    write_selected_data,
)
from less_fast.compat.less.get_training_dataset import get_training_dataset
from less_fast.compat.less.loading import load_less_model
from less_fast.data import load_examples

DATA = os.environ.get("LESS_FAST_DATA")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("less"))


# Numbers


@pytest.mark.parametrize("gradient_type", ["adam", "sgd", "sign"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_those_of_the_published_loop(folder: Path, tmp_path: Path, dtype: str, gradient_type: str) -> None:
    flags = ["--torch_dtype", dtype, "--gradient_type", gradient_type, "--gradient_projection_dimension", 256, 128]
    info(folder, tmp_path, *flags, "--token_budget", 300)
    vectors, layout = published_updates(folder / "checkpoint", encoded(ROWS), gradient_type, DTYPES[dtype])
    for dim in (256, 128):
        expected = vectors.numpy() @ matrix(Projection("srht", dim), layout).T
        found = load(tmp_path / f"dim{dim}" / "all_unormalized.pt")
        worst = 1 - cosines(found, expected).min()
        # A sign is not continuous: of an entry whose gradient is rounding alone it is chance.
        chance = 1000 if gradient_type == "sign" else 1
        assert worst < chance * {"float32": 1e-6, "bfloat16": 1e-4}[dtype]
        scale = np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        np.testing.assert_allclose(scale, 1, rtol={"float32": 1e-5, "bfloat16": 0.05}[dtype])
    # The rows are told apart: the agreement is not that of everything with everything.
    shuffled = cosines(
        load(tmp_path / "dim256" / "all_orig.pt"),
        np.roll(vectors.numpy() @ matrix(Projection("srht", 256), layout).T, 1, 0),
    )
    assert shuffled.min() < 0.99


def test_rademacher_is_less_s_projection(folder: Path, tmp_path: Path) -> None:
    info(
        folder,
        tmp_path,
        "--torch_dtype",
        "float32",
        "--gradient_projection_dimension",
        96,
        "--projection",
        "rademacher",
    )
    vectors, layout = published_updates(folder / "checkpoint", encoded(ROWS), "adam", torch.float32)
    signs = matrix(Projection("rademacher", 96), layout) * np.sqrt(96)
    assert set(np.unique(np.round(signs))) == {-1, 1}
    assert cosines(load(tmp_path / "dim96" / "all_orig.pt"), vectors.numpy() @ signs.T).min() > 1 - 1e-6


@pytest.mark.skipif(DATA is None, reason="LESS_FAST_DATA is not set")
def test_real_model_and_examples_agree_with_the_published_loop(tmp_path: Path) -> None:
    data = Path(str(DATA))
    base, pool = data / "models" / "tiny-llama-2.4m", data / "pool_2k.jsonl.gz"
    tokenizer = AutoTokenizer.from_pretrained(base)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, tokenizer)
    tokens = encoded(list(load_examples(pool, limit=24)), 160, tokenizer)
    usable = [i for i, (_, labels) in enumerate(tokens) if any(label != -100 for label in labels[1:])]
    assert 12 < len(usable) < 24  # some are cut before their answer
    labelled = [tokens[i] for i in usable]
    published, layout = published_updates(checkpoint, labelled, "adam", torch.bfloat16)
    exact, _ = published_updates(checkpoint, labelled, "adam", torch.float32)
    pi = matrix(Projection("srht", 512), layout)
    expected = published.numpy() @ pi.T
    apart = {}
    for name, budget in (("alone", 1), ("batched", 4096)):
        flags = ["--train_file", pool, "--max_samples", 24, "--max_length", 160, "--token_budget", budget]
        out = info(tmp_path, tmp_path / name, *flags, "--gradient_projection_dimension", 512) / "dim512"
        apart[name] = 1 - cosines(load(out / "all_orig.pt")[usable], expected)
        sidecar = json.loads((out / "less_fast.json").read_text())
        assert sorted(map(int, sidecar["excluded"])) == sorted(set(range(24)) - set(usable))
    assert apart["alone"].max() < 1e-5
    # In bfloat16 a matrix product rounds otherwise in a batch; that is less than what bfloat16 itself does to LESS.
    rounding = 1 - cosines(expected, exact.numpy() @ pi.T)
    assert apart["batched"].median() < 1e-4
    assert (apart["batched"] ** 2).mean() <= (rounding**2).mean()


# Files


def test_files_are_less_s_and_come_again_from_python(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "pool.jsonl", examples("sums", 165))
    flags = ["--train_file", tmp_path / "pool.jsonl", "--gradient_projection_dimension", 64, "--gradient_type", "sgd"]
    out = info(folder, tmp_path / "out", "--max_samples", 163, *flags)
    names = {"grads-160.pt", "grads-163.pt", "all_orig.pt", "all_unormalized.pt", "less_fast.json", "rows.parquet"}
    assert {path.name for path in out.iterdir()} == {"dim64"}
    assert {path.name for path in (out / "dim64").iterdir()} == names
    parts = [load(out / "dim64" / name) for name in ("grads-160.pt", "grads-163.pt")]
    assert [tuple(part.shape) for part in parts] == [(160, 64), (3, 64)]
    raw, unit = (load(out / "dim64" / name) for name in ("all_unormalized.pt", "all_orig.pt"))
    assert raw.dtype == unit.dtype == torch.float32
    assert torch.equal(raw, torch.cat(parts))
    assert torch.equal(unit, torch.nn.functional.normalize(raw, dim=1))
    for merge, name in ((merge_info, "all_unormalized.pt"), (merge_and_normalize_info, "all_orig.pt")):
        before = (out / "dim64" / name).read_bytes()
        (out / "dim64" / name).unlink()
        merge(out / "dim64", prefix="grads")
        assert (out / "dim64" / name).read_bytes() == before
    # The function of LESS, on tokens, with another batching.
    monkeypatch.setattr(job, "SHARD_SIZE", 50)
    model, tokenizer = load_less_model(folder / "checkpoint", device="cpu")
    dataset = get_training_dataset([str(tmp_path / "pool.jsonl")], tokenizer, LENGTH)
    loader = get_dataloader(dataset.remove_columns(["dataset", "id", "messages"]), tokenizer)
    collect_grads(loader, model, tmp_path / "python", [64], None, "sgd", 163, progress=False)
    again = load(tmp_path / "python" / "dim64" / "all_orig.pt")
    assert cosines(again, unit).min() > 1 - 1e-4


def test_python_functions_take_less_s_optimizer_state(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_less_model(folder / "checkpoint", dtype="float32", device="cpu")
    state = torch.load(folder / "checkpoint" / "optimizer.bin", weights_only=True)["state"]
    loader = get_dataloader(get_training_dataset(folder / "pool.jsonl", tokenizer, LENGTH), tokenizer, batch_size=5)
    collect_grads(loader, model, tmp_path / "a", [64], state, progress=False)
    collect_grads(
        loader, model, tmp_path / "b", [64], AdamState.from_checkpoint(folder / "checkpoint", model), progress=False
    )
    assert torch.equal(load(tmp_path / "a/dim64/all_orig.pt"), load(tmp_path / "b/dim64/all_orig.pt"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for vector, key in zip(prepare_optimizer_state(model, state, "cpu"), ("exp_avg", "exp_avg_sq")):
        assert torch.equal(vector, torch.cat([state[name][key].view(-1) for name in names]))
    rows = json.loads((tmp_path / "a/dim64/less_fast.json").read_text())
    assert rows["facts"]["precondition"]["rule"] == "less"
    with pytest.raises(LessFastError, match="needs adam_optimizer_state"):
        collect_grads(loader, model, tmp_path / "c", [64])
    with pytest.raises(LessFastError, match=r"no exp_avg.*layers\.0\.self_attn\.q_proj.*from_checkpoint"):
        collect_grads(loader, model, tmp_path / "c", [64], {0: state[names[0]]})
    del state[names[3]]["exp_avg_sq"]
    with pytest.raises(LessFastError, match=r"no exp_avg and exp_avg_sq of .*k_proj\.lora_B"):
        collect_grads(loader, model, tmp_path / "c", [64], state)


def test_hidden_states_and_losses_are_those_of_one_example_a_batch(folder: Path, tmp_path: Path) -> None:
    info(folder, tmp_path / "reps", "--torch_dtype", "float32", kind="reps")
    info(folder, tmp_path / "loss", "--torch_dtype", "float32", kind="loss")
    model, tokenizer = load_less_model(folder / "checkpoint", dtype="float32", device="cpu")
    states, losses, counts = [], [], []
    for ids, labels in encoded(ROWS):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), output_hidden_states=True)
        states.append(output.hidden_states[-1][0, len(ids) - 1])
        losses.append(float(output.loss))
        counts.append(sum(label != -100 for label in labels))
    assert {p.name for p in (tmp_path / "reps").iterdir()} == {
        "reps-24.pt",
        "all_orig.pt",
        "less_fast.json",
        "rows.parquet",
    }
    torch.testing.assert_close(load(tmp_path / "reps" / "reps-24.pt"), torch.stack(states), rtol=1e-4, atol=1e-5)
    unit = torch.nn.functional.normalize(torch.stack(states), dim=1)
    torch.testing.assert_close(load(tmp_path / "reps" / "all_orig.pt"), unit, rtol=1e-4, atol=1e-5)
    assert {p.name for p in (tmp_path / "loss").iterdir()} == {"loss.txt", "losses.json"}
    result = json.loads((tmp_path / "loss" / "loss.txt").read_text())
    assert result == {"num_tokens": sum(counts), "loss": pytest.approx(np.average(losses, weights=counts), rel=1e-5)}
    assert json.loads((tmp_path / "loss" / "losses.json").read_text()) == pytest.approx(losses, rel=1e-5)
    loader = get_dataloader(get_training_dataset(folder / "pool.jsonl", tokenizer, LENGTH), tokenizer, batch_size=7)
    collect_reps(loader, model, tmp_path / "python", max_samples=9, progress=False)
    torch.testing.assert_close(load(tmp_path / "python" / "reps-9.pt"), torch.stack(states[:9]), rtol=1e-4, atol=1e-5)
    get_loss(loader, model, tmp_path / "python-loss", progress=False)
    assert json.loads((tmp_path / "python-loss" / "loss.txt").read_text())["num_tokens"] == sum(counts)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2"])
def test_hidden_states_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    from support.models import batch, causal_lm

    model = causal_lm(architecture).eval()
    tokens = batch((9, 3, 12))
    collect_reps([tokens], model, tmp_path, progress=False)
    with torch.no_grad():
        states = model(input_ids=tokens["input_ids"], output_hidden_states=True).hidden_states[-1]
    expected = states[torch.arange(3), torch.tensor([8, 2, 11])]
    torch.testing.assert_close(load(tmp_path / "reps-3.pt"), expected, rtol=1e-4, atol=1e-5)


# Rows without features


def test_rows_without_features_are_zeros_and_listed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    question = {"role": "user", "content": "word " * 200}
    rows = [
        ROWS[0],
        {"id": "long question", "messages": [question, {"role": "assistant", "content": "never seen"}]},
        {"id": "no answer", "messages": [{"role": "user", "content": "Well?"}]},
        {
            "id": "long answer",
            "messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "on " * 300}],
        },
        {"id": "nothing at all", "messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]},
        ROWS[1],
    ]
    write_jsonl(tmp_path / "pool.jsonl", rows)
    flags = ["--train_file", tmp_path / "pool.jsonl", "--gradient_projection_dimension", 64, "--token_budget", 40]
    out = info(folder, tmp_path / "out", *flags) / "dim64"
    for name in ("grads-6.pt", "all_unormalized.pt", "all_orig.pt"):
        found = load(out / name)
        assert found.isfinite().all()
        assert (found != 0).any(1).tolist() == [True, False, False, True, True, True]
    sidecar = json.loads((out / "less_fast.json").read_text())
    assert sidecar["excluded"] == {"1": "no labels", "2": "no labels"}
    assert "2 of 6 examples: no labels" in caplog.text and "long question, no answer" in caplog.text
    assert "2 of 6 examples were cut" in caplog.text
    info(folder, tmp_path / "loss", *flags[:2], kind="loss")
    losses = json.loads((tmp_path / "loss" / "losses.json").read_text())
    assert [loss is None for loss in losses] == [False, True, True, False, False, False]
    assert np.isfinite(json.loads((tmp_path / "loss" / "loss.txt").read_text())["loss"])
    reps = load(info(folder, tmp_path / "reps", *flags[:2], kind="reps") / "reps-6.pt")
    assert reps.isfinite().all() and (reps != 0).any(1).all()  # a hidden state needs no label


def test_rows_without_features_are_never_selected(folder: Path, tmp_path: Path) -> None:
    masked = [{"id": f"masked {i}", "messages": [{"role": "user", "content": f"Well, {i}?"}]} for i in range(6)]
    write_jsonl(tmp_path / "pool.jsonl", [*masked[:3], *ROWS[:6], *masked[3:]])
    write_jsonl(
        tmp_path / "target.jsonl", [{**row, "subtask": "ab"[i % 2]} for i, row in enumerate(examples("sums", 4, 50))]
    )
    small = ["--gradient_projection_dimension", 64]
    info(folder, tmp_path / "pool-ckpt7-adam", "--train_file", tmp_path / "pool.jsonl", *small)
    info(folder, tmp_path / "sums-ckpt7-sgd", "--task", tmp_path / "target.jsonl", "--gradient_type", "sgd", *small)
    out = str(tmp_path / "selected")
    names = ["--train_file_names", "pool", "--target_task_names", "sums", "--output_path", out]
    paths = [
        f"{tmp_path}/{{}}-ckpt{{}}-adam/dim64",
        "--validation_gradient_path",
        f"{tmp_path}/{{}}-ckpt{{}}-sgd/dim64",
    ]
    matching.main(["--gradient_path", *paths, "--ckpts", "7", "--checkpoint_weights", "1", *names])
    write_selected_data.main([*names, "--train_files", str(tmp_path / "pool.jsonl"), "--max_samples", "12"])
    lines = (tmp_path / "selected" / "sums" / "top_num12.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(row["id"] for row in ROWS[:6])


def test_empty_rows_and_values_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    model, _ = load_less_model(folder / "checkpoint", dtype="float32", device="cpu")
    good = torch.tensor([[5, 6, 7, 8]])
    empty = {"input_ids": torch.zeros(1, 0, dtype=torch.long), "labels": torch.zeros(1, 0, dtype=torch.long)}
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = torch.inf
    bad = torch.tensor([[5, 9, 7, 8]])
    batches = [{"input_ids": x, "labels": x} for x in (good, bad)] + [empty, {"input_ids": good, "labels": good}]
    collect_grads(batches, model, tmp_path, [64], gradient_type="sgd", progress=False)
    rows = load(tmp_path / "dim64" / "all_orig.pt")
    assert rows.isfinite().all() and (rows != 0).any(1).tolist() == [True, False, False, True]
    sidecar = json.loads((tmp_path / "dim64" / "less_fast.json").read_text())
    assert sidecar["excluded"] == {"1": "not finite", "2": "no labels"}
    collect_reps(batches, model, tmp_path / "reps", progress=False)
    assert json.loads((tmp_path / "reps" / "less_fast.json").read_text())["excluded"].keys() == {"1", "2"}
    get_loss(batches, model, tmp_path / "loss", progress=False)
    assert [x is None for x in json.loads((tmp_path / "loss/losses.json").read_text())] == [False, True, True, False]
    with pytest.raises(LessFastError, match="none of 1 examples has a label"):
        get_loss([empty], model, tmp_path / "none", progress=False)
    with pytest.raises(LessFastError, match="no examples"):
        collect_grads([], model, tmp_path / "none", [64], gradient_type="sgd")
