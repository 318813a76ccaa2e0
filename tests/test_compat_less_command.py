"""``get_info`` as a command: its flags, checkpoints of several kinds, other settings, tasks, and being killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.children import child_environment
from support.less_info import LENGTH, ROWS, info, load, make_inputs
from support.less_loop import cosines, save_checkpoint
from support.stores import folder_hashes
from support.tiny import examples, write_jsonl
from transformers import AutoModelForCausalLM

from less_fast import LessFastError
from less_fast.compat.less import collect_grad_reps, get_info, job
from less_fast.compat.less.loading import load_less_model
from less_fast.shard_job import ShardJob
from less_fast.store.files import FolderLock


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("less"))


# Checkpoints


def padless_tokenizer() -> Any:
    """A tokenizer without ``<pad>`` in its vocabulary, as Llama 2's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of as many embedding rows as its tokenizer has tokens, none of them ``<pad>``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("llama")
    tokenizer = padless_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_jsonl(root / "pool.jsonl", ROWS[:4])
    return root


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("with_embedding", [True, False])
def test_checkpoints_with_a_resized_embedding_load(
    llama_like: Path, tmp_path: Path, padded: bool, with_embedding: bool
) -> None:
    tokenizer = padless_tokenizer()
    n = len(tokenizer)
    if padded:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    checkpoint = save_checkpoint(tmp_path / "ck", llama_like / "model", tokenizer, save_embedding_layers=with_embedding)
    if with_embedding:  # values that can be told from those of the base model
        from safetensors.torch import load_file, save_file

        weights = load_file(checkpoint / "adapter_model.safetensors")
        name = "base_model.model.model.embed_tokens.weight"
        weights[name] = torch.arange(weights[name].numel()).reshape(weights[name].shape) / 1e4
        save_file(weights, checkpoint / "adapter_model.safetensors")
    model, loaded = load_less_model(checkpoint, dtype="float32", device="cpu")
    embedding = model.get_input_embeddings().weight
    assert loaded.pad_token == "<pad>" and len(loaded) == embedding.shape[0] == n + 1
    base = AutoModelForCausalLM.from_pretrained(llama_like / "model").get_input_embeddings().weight
    if with_embedding:
        assert torch.equal(embedding[: n + padded], weights[name])
    else:
        assert torch.equal(embedding[:n], base)
    first, second = (load_less_model(checkpoint, dtype="float32", device="cpu")[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not model.training and {"lora_" in k for k, p in model.named_parameters() if p.requires_grad} == {True}
    info(llama_like, tmp_path / "out", "--model_path", checkpoint, "--gradient_projection_dimension", 64)
    assert (load(tmp_path / "out" / "dim64" / "all_orig.pt").norm(dim=1) - 1).abs().max() < 1e-5


def test_a_new_adapter_is_the_same_every_time_and_without_dropout(llama_like: Path, tmp_path: Path) -> None:
    flags = [
        "--initialize_lora",
        "--gradient_type",
        "sgd",
        "--gradient_projection_dimension",
        64,
        "--lora_dropout",
        0.5,
    ]
    outs = [info(llama_like, tmp_path / name, *flags, model="model") / "dim64/all_orig.pt" for name in "ab"]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert (load(outs[0]).norm(dim=1) - 1).abs().max() < 1e-5
    facts = json.loads(outs[0].with_name("less_fast.json").read_text())["facts"]
    assert facts["numerics"]["model_dtype"] == "bfloat16"
    with pytest.raises(LessFastError, match="no LoRA weights"):
        info(llama_like, tmp_path / "c", "--gradient_type", "sgd", model="model")
    with pytest.raises(LessFastError, match="is an adapter already"):
        save_checkpoint(tmp_path / "ck", llama_like / "model", padless_tokenizer())
        info(llama_like, tmp_path / "c", *flags, "--model_path", tmp_path / "ck")


def test_the_optimizer_state_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "checkpoint" / "optimizer.bin", weights_only=True)
    flags = ["--gradient_projection_dimension", 64]
    here = info(folder, tmp_path / "here", *flags) / "dim64/all_orig.pt"
    torch.save(state, tmp_path / "elsewhere.bin")
    there = (
        info(folder, tmp_path / "there", *flags, "--optimizer_state", tmp_path / "elsewhere.bin") / "dim64/all_orig.pt"
    )
    assert here.read_bytes() == there.read_bytes()
    for entry in state["state"].values():
        entry["exp_avg"] *= -1
    torch.save(state, tmp_path / "elsewhere.bin")
    other = (
        info(folder, tmp_path / "other", *flags, "--optimizer_state", tmp_path / "elsewhere.bin") / "dim64/all_orig.pt"
    )
    assert cosines(load(here), load(other)).min() < 0.9


# Other settings, other folders, other programs


def test_a_finished_folder_stays_and_other_settings_are_refused(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--gradient_type", "sgd", "--gradient_projection_dimension"]
    info(folder, tmp_path, *flags, 64)
    file = tmp_path / "dim64" / "all_orig.pt"
    before = file.stat()
    info(folder, tmp_path, *flags, 64)
    assert "made already" in caplog.text and file.stat() == before
    info(folder, tmp_path, *flags, 64, 128)  # one more dim: the other is not made again
    assert file.stat() == before and (tmp_path / "dim128" / "all_orig.pt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"dim64", "dim128"}
    for change, name in (
        (["--gradient_type", "sign"], "precondition.kind"),
        (["--max_length", 32], "max_length: 64 -> 32"),
        (["--max_samples", 3], "examples"),
        (["--torch_dtype", "float32"], 'model_dtype: "bfloat16" -> "float32"'),
        (["--projection", "rademacher"], 'projection.kind: "srht" -> "rademacher"'),
    ):
        with pytest.raises(LessFastError, match=f"dim64: was made with other settings .*{name}"):
            info(folder, tmp_path, *flags, 64, *change)
    assert file.stat() == before and {path.name for path in tmp_path.iterdir()} == {"dim64", "dim128"}


def test_unfinished_work_of_another_command_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other dims or another kind, in whatever order: only its own command ends it, without computing it again."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    grads = ["--gradient_type", "sgd", "--gradient_projection_dimension"]
    work = tmp_path / ".less_fast"
    info(folder, tmp_path, *grads, 64)
    with monkeypatch.context() as patched:
        patched.setattr(job, "write_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            info(folder, tmp_path, *grads, 128)
    rows = folder_hashes(work)
    assert any(name.startswith("dim128/shards/") for name in rows)
    info(folder, tmp_path, *grads, 64)  # made already
    assert folder_hashes(work) == rows
    info(folder, tmp_path, *grads, 32)
    info(folder, tmp_path, kind="loss")
    assert folder_hashes(work) == rows and (tmp_path / "loss.txt").exists()
    with monkeypatch.context() as patched:
        patched.setattr(collect_grad_reps, "atomic_file", killed)
        with pytest.raises(KeyboardInterrupt):
            info(folder, tmp_path, kind="loss")
    losses = {name: value for name, value in folder_hashes(work).items() if name.startswith("loss/")}
    with monkeypatch.context() as patched:
        patched.setattr(ShardJob, "_attempt", killed)
        info(folder, tmp_path, *grads, 128)
        assert folder_hashes(work) == losses and (tmp_path / "dim128" / "all_orig.pt").exists()
        info(folder, tmp_path, kind="loss")
    assert not work.exists()


def test_what_was_begun_together_waits_for_its_own_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = ["--gradient_type", "sgd", "--gradient_projection_dimension"]
    write = job.write_folder

    def killed_at_dim64(path: Path, *args: Any, **options: Any) -> None:
        if path.name == "dim64":
            raise KeyboardInterrupt
        write(path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(job, "write_folder", killed_at_dim64)
        with pytest.raises(KeyboardInterrupt):
            info(folder, tmp_path, *grads, 128, 64)
    rows = folder_hashes(tmp_path / ".less_fast")
    info(folder, tmp_path, *grads, 128)  # made already
    assert folder_hashes(tmp_path / ".less_fast") == rows
    info(folder, tmp_path, *grads, 128, 64)
    assert {path.name for path in tmp_path.iterdir()} == {"dim64", "dim128"}


def test_a_second_run_is_refused_until_the_first_has_removed_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.rmtree
    removed = []

    def second_run(path: Path, **options: Any) -> None:
        removed.append(path)
        refused = pytest.raises(LessFastError, match=r"\.less_fast is being written by another process; wait")
        with refused, job.working_folder(tmp_path):
            pass
        real(path, **options)

    with job.working_folder(tmp_path) as work:
        (work.path / "loss").mkdir()
        work.used.append("loss")
        monkeypatch.setattr(shutil, "rmtree", second_run)
    assert removed and not list(tmp_path.iterdir())


def test_a_run_that_begins_while_another_ends_makes_its_folder_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []

    def lock(path: Path) -> FolderLock:
        folders.append(path)
        if len(folders) == 1:
            path.rmdir()
        return FolderLock(path)

    monkeypatch.setattr(job, "FolderLock", lock)
    with job.working_folder(tmp_path) as work:
        assert work.path.is_dir()
    assert len(folders) == 2 and not work.path.exists()


def test_rows_of_another_program_are_not_mixed_with_ours(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dim64").mkdir()
    torch.save(torch.zeros(3, 64), tmp_path / "dim64" / "grads-3.pt")
    with pytest.raises(LessFastError, match=r"holds grads-3\.pt, which less_fast did not write"):
        info(folder, tmp_path, "--gradient_type", "sgd", "--gradient_projection_dimension", 64)
    assert {path.name for path in tmp_path.iterdir()} == {"dim64"}


def test_tasks_come_first_and_name_their_subtasks(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "subtask": "abc"[i % 3]} for i, row in enumerate(examples("sums", 5))]
    write_jsonl(tmp_path / "target.jsonl", rows)
    flags = ["--gradient_type", "sgd", "--gradient_projection_dimension", 64, "--train_file", folder / "pool.jsonl"]
    out = info(folder, tmp_path / "a", "--task", tmp_path / "target.jsonl", *flags)
    named = info(folder, tmp_path / "b", "--task", "mine", "--task_file", tmp_path / "target.jsonl", *flags)
    files = [path / "dim64" / "all_orig.pt" for path in (out, named)]
    assert files[0].read_bytes() == files[1].read_bytes() and load(files[0]).shape == (5, 64)
    import pyarrow.parquet as pq

    assert pq.read_table(out / "dim64" / "rows.parquet")["subtask"].to_pylist() == ["a", "b", "c", "a", "b"]
    assert "were cut" not in caplog.text
    info(folder, tmp_path / "cut", "--task", tmp_path / "target.jsonl", *flags, "--max_length", 15)
    assert "5 of 5 examples were cut to their first tokens" in caplog.text
    with pytest.raises(LessFastError, match="task mine: no such file, and none of the tasks bbh, tydiqa, mmlu"):
        info(folder, tmp_path / "c", "--task", "mine", *flags)
    with pytest.raises(LessFastError, match="mmlu needs data_dir"):
        info(folder, tmp_path / "c", "--task", "mmlu", *flags)


# The command


def test_flags_and_defaults_are_less_s() -> None:
    args = get_info.parser().parse_args(["--info_type", "grads", "--model_path", "m", "--output_path", "o"])
    assert vars(args) == {
        "task": None, "train_file": None, "info_type": "grads", "model_path": "m", "max_samples": None,
        "torch_dtype": "bfloat16", "output_path": "o", "data_dir": None, "gradient_projection_dimension": [8192],
        "gradient_type": "adam", "chat_format": "tulu", "use_chat_format": True, "max_length": 2048, "zh": False,
        "initialize_lora": False, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "task_file": None, "projection": "srht", "token_budget": "auto", "device": "auto", "optimizer_state": None,
    }  # fmt: skip


def test_the_module_is_a_command(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "less_fast.compat.less.get_info", "--info_type", "loss", "--device", "cpu"]
    paths = ["--model_path", str(folder / "checkpoint"), "--output_path", str(tmp_path / "out")]
    failed = subprocess.run([*command, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr == "error: nothing to read: give --train_file, or --task (with --data_dir or --task_file)\n"
    done = subprocess.run(
        [*command, *paths, "--train_file", str(folder / "pool.jsonl")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "24 examples, loss to" in done.stdout and "Traceback" not in done.stderr
    assert "ex/s" in done.stderr and "tokens/s" in done.stderr  # a rate, and the time left
    assert (tmp_path / "out" / "loss.txt").exists()


def test_a_killed_run_goes_on_to_the_same_files(folder: Path, tmp_path: Path) -> None:
    killer = Path(__file__).parent / "support" / "less_killer.py"
    arguments = [
        "--info_type", "grads", "--model_path", folder / "checkpoint", "--train_file", tmp_path / "pool.jsonl",
        "--gradient_projection_dimension", 128, 64, "--max_length", LENGTH, "--device", "cpu",
    ]  # fmt: skip
    write_jsonl(tmp_path / "pool.jsonl", [*examples("sums", 24), *examples("names", 24)])
    done = subprocess.run(
        [sys.executable, str(killer), str(tmp_path), "10", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=child_environment(TOKENIZERS_PARALLELISM="false"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["unlike"] == []
    assert report["killed"] >= 12 and report["changes"] > 40
    assert {name.split("/")[0] for name in report["files"]} == {"dim64", "dim128"}
