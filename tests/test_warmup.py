"""Warm-up: what is trained, what lies in its checkpoints, going on after an interruption, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.data_tokenizers import small_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from less_fast.checkpoints import discover_checkpoints
from less_fast.data import encode, load_examples
from less_fast.errors import LessFastError
from less_fast.model.lora import LoraSettings
from less_fast.warmup import draw_subset, warmup

LORA = LoraSettings(rank=4, alpha=8, dropout=0.1)
N_EXAMPLES = 40


def _example(number: int) -> dict:
    answer = " ".join(["well"] * (1 + number % 5))
    return {
        "dataset": "small",
        "id": f"small_{number}",
        "messages": [{"role": "user", "content": f"How is {number}?"}, {"role": "assistant", "content": answer}],
    }


@pytest.fixture(scope="module")
def examples():
    return load_examples([_example(number) for number in range(N_EXAMPLES)])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = small_tokenizer("words")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _warmup(base, examples, out, **changes):
    settings = {"fraction": 0.3, "epochs": 3, "learning_rate": 1e-2, "batch_size": 5, "lora": LORA, "progress": False}
    return warmup(base, examples, out, **{**settings, **changes})


@pytest.fixture(scope="module")
def run(base, examples, tmp_path_factory) -> Path:
    """A finished warm-up: 12 examples in batches of 5, so 3 steps in each of 3 epochs."""
    out = tmp_path_factory.mktemp("warmup") / "run"
    _warmup(base, examples, out)
    return out


def _files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def test_subset_is_the_one_less_draws():
    np.random.seed(42)
    expected = np.random.permutation(1000)[: int(1000 * 0.05)]
    np.testing.assert_array_equal(draw_subset(1000, 0.05, 42), expected)
    np.testing.assert_array_equal(draw_subset(7, 1.0, 42), np.arange(7))


def test_drawing_a_subset_leaves_numpys_generator_alone():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    draw_subset(100, 0.5, 42)
    assert np.random.rand() == expected


def test_there_is_one_checkpoint_per_epoch_with_all_its_files(run):
    checkpoints = discover_checkpoints(run)
    assert [(c.step, c.epoch) for c in checkpoints] == [(3, 1.0), (6, 2.0), (9, 3.0)]
    for checkpoint in checkpoints:
        names = {path.name for path in checkpoint.path.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"} <= names
        assert AutoTokenizer.from_pretrained(checkpoint.path).vocab_size == small_tokenizer("words").vocab_size
        state = torch.load(checkpoint.path / "optimizer.pt", weights_only=True)["state"]
        assert sorted(state) == list(range(2 * 4 * 2))  # layers x projections x (A, B)
        assert {int(entry["step"]) for entry in state.values()} == {checkpoint.step}
        assert any(torch.any(value) for name, value in _adapter(checkpoint.path).items() if "lora_B" in name)


def test_learning_rate_is_the_mean_over_the_epochs_steps_of_the_linear_schedule(run):
    n_steps, n_warm, peak = 9, 1, 1e-2  # ceil(0.03 x 9) steps of warm-up
    rates = [peak * min(step / n_warm, (n_steps - step) / (n_steps - n_warm)) for step in range(n_steps)]
    expected = [sum(rates[start : start + 3]) / 3 for start in (0, 3, 6)]
    assert [c.learning_rate for c in discover_checkpoints(run)] == pytest.approx(expected, rel=1e-6)


def test_every_example_counts_alike_in_the_trained_loss(base, examples, tmp_path):
    """After one step Adam's first moment is 0.1 g, g the clipped mean of the examples' own mean-loss gradients."""
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0)
    (checkpoint,) = _warmup(base, examples, tmp_path / "run", epochs=1, batch_size=12, lora=lora)
    # The adapter before the step: B is zero, so A has had no gradient and is still what it was.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), checkpoint.path, is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter.data)
    tokenizer = AutoTokenizer.from_pretrained(base)
    n_labels = set()
    for row in draw_subset(len(examples), 0.3, 42):
        encoded = encode(examples[row], tokenizer)
        n_labels.add(encoded.n_labels)
        logits = model(input_ids=torch.tensor([encoded.input_ids])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(encoded.labels[1:]), ignore_index=-100)
        (loss / 12).backward()
    assert len(n_labels) > 2
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    state = torch.load(checkpoint.path / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(gradients)
    for index, gradient in enumerate(gradients):
        torch.testing.assert_close(state[index]["exp_avg"], 0.1 * gradient, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(state[index]["exp_avg_sq"], 0.001 * gradient**2, rtol=1e-4, atol=1e-12)


def test_same_settings_give_the_same_weights_and_another_seed_others(base, examples, run, tmp_path):
    _warmup(base, examples, tmp_path / "again")
    _warmup(base, examples, tmp_path / "other", seed=1)
    ours, again, other = (_adapter(folder / "checkpoint-9") for folder in (run, tmp_path / "again", tmp_path / "other"))
    for name, value in ours.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])


def test_complete_run_is_not_run_again(base, examples, run):
    before = _files(run)
    found = _warmup(base, examples, run)
    assert found == discover_checkpoints(run)
    assert _files(run) == before


def test_interrupted_run_goes_on_and_ends_the_same(base, examples, run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoint-9")
    # Killed while checkpoint-6 was written: the Trainer's state, its last file, is cut off.
    state = out / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    (out / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    untouched = _files(out / "checkpoint-3")
    assert _warmup(base, examples, out) == [
        type(c)(out / c.path.name, c.step, c.epoch, c.learning_rate) for c in discover_checkpoints(run)
    ]
    assert _files(out / "checkpoint-3") == untouched
    for name in ("checkpoint-6", "checkpoint-9"):
        resumed, straight = _adapter(out / name), _adapter(run / name)
        assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
        states = [torch.load(f / name / "optimizer.pt", weights_only=True)["state"] for f in (out, run)]
        for index, entry in states[1].items():
            assert torch.equal(entry["exp_avg"], states[0][index]["exp_avg"])
            assert torch.equal(entry["exp_avg_sq"], states[0][index]["exp_avg_sq"])


def test_run_interrupted_before_its_first_checkpoint_may_change_its_settings(base, examples, run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(run / "warmup.json", out)
    assert len(_warmup(base, examples, out, epochs=1)) == 1
    assert json.loads((out / "warmup.json").read_text())["epochs"] == 1


def test_other_settings_are_refused_by_name(base, examples, run):
    before = _files(run)
    with pytest.raises(LessFastError) as error:
        _warmup(base, examples, run, epochs=2, lora=LoraSettings(rank=4, alpha=16))
    assert "epochs 3 -> 2; lora.alpha 8 -> 16)" in str(error.value)
    with pytest.raises(LessFastError, match=r"\(examples \w{12} -> \w{12}; tokens \w{12} -> \w{12}\)"):
        _warmup(base, load_examples([_example(number) for number in range(1, N_EXAMPLES + 1)]), run)
    assert _files(run) == before


def test_folder_of_another_run_is_refused(base, examples, run, tmp_path):
    shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(LessFastError, match="holds checkpoints of another run"):
        _warmup(base, examples, tmp_path)


def test_examples_without_labels_are_left_out_and_reported(base, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(base)
    long = _example(0)
    long["messages"][0]["content"] = "How is it? " * 40
    max_length = len(encode(_example(4), tokenizer).input_ids) + 5
    mixed = load_examples([_example(4), long, _example(9)])
    with caplog.at_level(logging.WARNING, logger="less_fast"):
        (checkpoint,) = _warmup(
            base, mixed, tmp_path / "run", fraction=1.0, epochs=1, max_length=max_length, batch_size=1
        )
    assert "1 of 3 warm-up examples have no label" in caplog.text
    assert checkpoint.step == 2
    assert all(torch.isfinite(value).all() for value in _adapter(checkpoint.path).values())
    with pytest.raises(LessFastError, match="none of the 1 warm-up examples has a label within 60 tokens"):
        _warmup(base, load_examples([long]), tmp_path / "none", fraction=1.0, max_length=60)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"fraction": 0.01}, "leaves none of 40 examples"),
        ({"batch_size": 5, "micro_batch_size": 2}, "batch_size is 5; expected a multiple of 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lora": LoraSettings(target_modules=["q_proj", "w_proj"])}, "no module named w_proj"),
        ({"lora": LoraSettings(target_modules="q_proj")}, "target_modules is 'q_proj'"),
        ({"lora": LoraSettings(rank=0)}, "PEFT refuses the adapter"),
    ],
)
def test_bad_settings_are_refused_in_one_line_and_leave_nothing(base, examples, tmp_path, changes, message):
    with pytest.raises(LessFastError, match=message) as error:
        _warmup(base, examples, tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_adapter_is_no_base_model(examples, run, tmp_path):
    with pytest.raises(LessFastError, match="already a LoRA adapter"):
        _warmup(run / "checkpoint-3", examples, tmp_path / "run")


def test_gpt2_gets_an_adapter_without_being_told_where(examples, tmp_path):
    tokenizer = small_tokenizer("words")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        (checkpoint,) = _warmup(tmp_path / "gpt2", examples, tmp_path / "run", epochs=1)
    config = json.loads((checkpoint.path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn"]
    assert set(_adapter(checkpoint.path)) == {
        f"base_model.model.transformer.h.0.attn.c_attn.lora_{side}.weight" for side in "AB"
    }


def test_progress_says_what_is_going_on(base, examples, tmp_path, capsys):
    _warmup(base, examples, tmp_path / "run", epochs=1, progress=True)
    captured = capsys.readouterr()
    assert (
        "warm-up: 12 of 40 examples, 3 steps of 5, epochs: 1; LoRA of rank 4 on q_proj" in captured.out + captured.err
    )
    assert "3/3" in captured.err


def _write_state(run_dir: Path, step: int, epoch: float, log: list[dict]) -> Path:
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "global_step": step, "log_history": log}))
    return folder


def _log(last: int, every: int, steps_per_epoch: int) -> list[dict]:
    """Learning rate = step, so that means are easily foretold; some entries without one, as the Trainer writes."""
    log = [{"step": k, "epoch": k / steps_per_epoch, "learning_rate": float(k)} for k in range(every, last + 1, every)]
    return [*log, {"step": last, "epoch": last / steps_per_epoch, "train_loss": 1.0}]


def test_discovers_epoch_checkpoints_of_a_sparsely_logged_run_in_order_of_steps(tmp_path):
    for epoch in (1, 2, 3):
        _write_state(tmp_path, 60 * epoch, float(epoch), _log(60 * epoch, every=25, steps_per_epoch=60))
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "runs").mkdir()
    found = discover_checkpoints(tmp_path)
    assert [c.path.name for c in found] == ["checkpoint-60", "checkpoint-120", "checkpoint-180"]
    assert [c.learning_rate for c in found] == [(25 + 50) / 2, (75 + 100) / 2, (125 + 150 + 175) / 3]


def test_epoch_checkpoint_has_its_own_epoch_where_earlier_ones_were_deleted(tmp_path):
    _write_state(tmp_path, 180, 3.0, _log(180, every=1, steps_per_epoch=60))
    assert discover_checkpoints(tmp_path)[0].learning_rate == pytest.approx(np.mean(np.arange(121, 181)))


def test_step_saved_checkpoints_have_the_interval_since_the_one_before(tmp_path):
    for step in (40, 80, 100):
        _write_state(tmp_path, step, step / 60, _log(step, every=10, steps_per_epoch=60))
    found = discover_checkpoints(tmp_path)
    assert [c.learning_rate for c in found] == [25.0, 65.0, 95.0]
    assert [c.epoch for c in found] == pytest.approx([2 / 3, 4 / 3, 5 / 3])


def test_discovery_errors_name_the_cause(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(LessFastError, match="no checkpoint found"):
            discover_checkpoints(folder)
    _write_state(tmp_path / "silent", 10, 1.0, [{"step": 10, "epoch": 1.0, "loss": 2.0}])
    with pytest.raises(LessFastError, match="no learning_rate for steps 1 to 10"):
        discover_checkpoints(tmp_path / "silent")
    state = _write_state(tmp_path / "cut", 10, 1.0, _log(10, 1, 10)) / "trainer_state.json"
    state.write_text(state.read_text()[:20])
    with pytest.raises(LessFastError, match=r"trainer_state\.json is missing or cut off"):
        discover_checkpoints(tmp_path / "cut")
