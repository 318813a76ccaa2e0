"""Features during training: training is the same bit for bit, rows are those of the step's own state, none is lost."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.live_training import close, exact_features, moments
from support.models import adapted, batch, causal_lm
from support.stores import make_store
from support.watched_training import LENGTHS, PROJECTION, STEPS, N, callback_in, examples, make_trainer, pad, trained
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from less_fast import LessFastError, influence, select
from less_fast.compat.backend import LessFastBackend
from less_fast.data import Encoded
from less_fast.store import Rows, Status


class Recorder(TrainerCallback):
    """Model and moments before every step."""

    def __init__(self) -> None:
        self.states: list[tuple[Any, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        zeros = {n: (torch.zeros_like(p), torch.zeros_like(p), 0) for n, p in model.named_parameters()}
        self.states.append((copy.deepcopy(model), moments(model, kwargs["optimizer"]) or zeros))


def hugging_face_dataset() -> Any:
    import datasets

    return datasets.Dataset.from_list([{**item, "length": 100 - i} for i, item in enumerate(examples())])


class Epochs(Dataset[Any]):
    """Other tokens in every epoch, of which accelerate tells it."""

    def __init__(self) -> None:
        self.items, self.epochs = examples(), [0]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        tokens = [(token + 7 * self.epochs[-1]) % 50 + 1 for token in self.items[number]["input_ids"]]
        return {**self.items[number], "input_ids": tokens, "labels": tokens}


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dictionaries": (examples, {}),
    "grouped by length": (hugging_face_dataset, {"train_sampling_strategy": "group_by_length"}),
    "bf16": (examples, {"bf16": True}),
    "set_epoch": (Epochs, {}),
    "objects, workers": (
        lambda: [Encoded(item["input_ids"], item["labels"], False) for item in examples()],
        {"dataloader_num_workers": 2, "gradient_accumulation_steps": 3},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    make, changes = KINDS[kind]
    told = [make(), make()]
    plain = trained(tmp_path / "plain", None, told[0], **changes)
    state = torch.get_rng_state()
    callback = callback_in(tmp_path)
    watched = trained(tmp_path / "watched", callback, told[1], **changes)
    if kind == "set_epoch":
        assert told[0].epochs == told[1].epochs and told[1].epochs[-1] == 1
    assert torch.equal(torch.get_rng_state(), state)
    untrained = adapted(causal_lm()).state_dict()
    assert any(not torch.equal(value, untrained[name]) for name, value in plain.model.state_dict().items())
    torch.testing.assert_close(watched.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(watched.optimizer.state_dict(), plain.optimizer.state_dict(), rtol=0, atol=0)
    for ours, theirs in zip(watched.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert ours == theirs
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad and ours.grad is None
    assert [store.rows.ids for store in callback.stores] == [[str(i) for i in range(N)]] * 2


@pytest.mark.parametrize(("precondition", "rule"), [("adam", "less"), ("adam", "torch"), ("sgd", "less")])
def test_rows_are_those_of_the_state_before_their_step(precondition: str, rule: str, tmp_path: Path) -> None:
    """Against float64 autograd at copies of a training without the callback, whose collator tells the order."""
    order: list[int] = []

    def watching(features: list[Any]) -> dict[str, Tensor]:
        order.extend(LENGTHS.index(len(item["input_ids"])) for item in features)
        return pad(features)

    # Examples are known by their length, so there are fewer of them.
    unique = [item for i, item in enumerate(examples()) if LENGTHS.index(LENGTHS[i]) == i]
    recorder, reference = Recorder(), make_trainer(tmp_path / "plain", unique, collator=watching)
    reference.add_callback(recorder)
    torch.manual_seed(11)
    reference.train()
    numbers = {LENGTHS.index(len(item["input_ids"])): i for i, item in enumerate(unique)}
    seen = [numbers[i] for i in order]

    callback = callback_in(tmp_path, precondition, rule=rule)
    trained(tmp_path / "watched", callback, unique)
    per_epoch = len(unique)
    tables = [np.load(tmp_path / f"features/epoch-{epoch}.npy") for epoch in (1, 2)]
    assert len(recorder.states) == 2 * STEPS and len(seen) == 2 * per_epoch
    layout = LessFastBackend(callback._trainer.model, PROJECTION).layout()
    for step, (model, state) in enumerate(recorder.states):
        epoch, first = step // STEPS, 4 * (step % STEPS)
        store, table = callback.stores[epoch], tables[epoch]
        at = seen[epoch * per_epoch :][first : min(first + 4, per_epoch)]
        assert table["example"].tolist() == list(range(per_epoch)) and (table["step"][at] == step + 1).all()
        names = ("input_ids", "labels", "attention_mask")
        data = pad([{name: unique[number][name] for name in names} for number in at])
        exact = exact_features(model, layout, data, PROJECTION, state if precondition == "adam" else None, rule)
        found = store[at]
        if precondition == "adam" and rule == "torch" and step == 0:
            # The first update is nearly a sign, which turns where a gradient is no larger than its rounding.
            norms = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
            assert ((found * exact).sum(1) > 0.999 * norms).all()
        else:
            assert close(found, exact, 1e-4), step
        wide = copy.deepcopy(model).double().eval()
        for number in at:
            alone = pad([{name: unique[number][name] for name in names}])
            assert table["loss"][number] == pytest.approx(wide(**alone).loss.item(), rel=1e-5)
    for store in callback.stores:
        assert store.n_tokens.tolist() == [len(item["input_ids"]) for item in unique]
        assert store.facts["precondition"]["kind"] == precondition


def test_scores_and_selections_read_the_stores(tmp_path: Path) -> None:
    dataset = examples()
    dataset[3]["labels"] = [-100] * len(dataset[3]["labels"])
    rows = Rows([f"example {i}" for i in range(N)], ["mine"] * N, ["a", "b"] * 5 + ["a"])
    callback = callback_in(tmp_path, rows=rows, dtype="float16", shard_size=4)
    trainer = trained(tmp_path, callback, dataset)
    stores = callback.stores
    assert [store.status[3] for store in stores] == [Status.NO_LABELS] * 2
    assert stores[0].rows == rows and stores[0].dtype == "float16"
    backend = LessFastBackend(trainer.model, PROJECTION)
    target = backend.features(batch((9, 12), seed=8))
    facts = {"projection": PROJECTION.to_dict(), "layout_hash": backend.layout().hash}
    written = make_store(tmp_path / "target", target.numpy(), **facts)
    scores = influence(stores, [written, written], [2.0, 1.0])
    expected = sum(
        weight * backend.scores(torch.from_numpy(store[:]), target).numpy().mean(1)
        for weight, store in zip((2 / 3, 1 / 3), stores)
    )
    np.testing.assert_allclose(scores.matrix[:, 0], expected, atol=5e-4)
    assert 3 not in select(scores, n=N - 1)


def test_examples_that_no_batch_has_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = callback_in(tmp_path, "sgd")
    with caplog.at_level(logging.WARNING, "less_fast"):
        trained(tmp_path, callback, dataloader_drop_last=True, num_train_epochs=1)
    (store,) = callback.stores
    assert len(store) == N - 1 and "epoch 1 saw 10 of 11 examples" in caplog.text
    assert store.rows.ids == [str(i) for i in np.load(tmp_path / "features/epoch-1.npy")["example"]]
    assert store.facts["training"] == {"epoch": 1, "examples_not_seen": 1}


class Diverging(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            next(iter(kwargs["optimizer"].state.values()))["exp_avg"][0, 0] = float("nan")


def test_a_training_that_diverges_goes_on_and_its_rows_say_so(tmp_path: Path) -> None:
    callback, trainer = callback_in(tmp_path), make_trainer(tmp_path)
    trainer.add_callback(Diverging())
    callback.attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 * STEPS
    for store, epoch in zip(callback.stores, (1, 2), strict=True):
        table = np.load(tmp_path / f"features/epoch-{epoch}.npy")
        assert np.array_equal(store.status == Status.NON_FINITE, table["step"] > 2)
        assert np.isfinite(table["loss"][table["step"] <= 3]).all() and (store[table["step"] > 2] == 0).all()


def test_a_matrix_that_the_user_froze_is_named(tmp_path: Path) -> None:
    def frozen(folder: Path) -> Any:
        trainer = make_trainer(folder)
        for name, parameter in trainer.model.named_parameters():
            if "layers.0.self_attn.q_proj.lora_A" in name:
                parameter.requires_grad_(False)
        return trainer

    trainer = frozen(tmp_path / "adam")
    callback_in(tmp_path / "adam").attach(trainer)
    with pytest.raises(LessFastError, match=r"live optimizer has no moments of .*q_proj.lora_A.*does not train it"):
        trainer.train()
    trainer, callback = frozen(tmp_path / "sgd"), callback_in(tmp_path / "sgd", "sgd")
    callback.attach(trainer)
    trainer.train()
    assert [len(store) for store in callback.stores] == [N, N]


def test_what_the_model_does_not_read_is_left_out_of_a_batch(tmp_path: Path) -> None:
    def typed(features: list[Any]) -> dict[str, Tensor]:
        made = pad(features)
        return {**made, "token_type_ids": torch.zeros_like(made["input_ids"])}

    callbacks = [callback_in(tmp_path / name) for name in ("plain", "typed")]
    for callback, collator in zip(callbacks, (pad, typed)):
        trained(callback.out.parent, callback, collator=collator)
    for plain, other in zip(*(callback.stores for callback in callbacks), strict=True):
        np.testing.assert_array_equal(other[:], plain[:])


@pytest.mark.parametrize("size", [N, N + 3])
def test_another_dataset_after_attach_is_refused(size: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    callback_in(tmp_path).attach(trainer)
    trainer.train_dataset = (examples() * 2)[:size]
    with pytest.raises(LessFastError, match=r"another than at callback.attach\(trainer\)"):
        trainer.train()


def test_a_loader_gets_its_arguments_and_numbered_datasets_travel(tmp_path: Path) -> None:
    given: list[Any] = []

    class Own(Trainer):
        def get_train_dataloader(self, first: Any = None, *, second: Any = None) -> Any:
            given.append((first, second))
            return super().get_train_dataloader()

    trainer = make_trainer(tmp_path, cls=Own)
    callback_in(tmp_path).attach(trainer)
    loader = trainer.get_train_dataloader(1, second=2)
    assert given == [(1, 2)]
    copied = pickle.loads(pickle.dumps(loader.dataset))
    assert copied[3] == loader.dataset[3] and copied[3][0] == 3
    assert not hasattr(copied, "set_epoch")


def test_batches_that_are_not_one_row_per_example_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LessFastError, match="position_ids"):
        trained(tmp_path / "a", callback_in(tmp_path / "a"), collator=DataCollatorWithFlattening())

    def joined(features: list[Any]) -> dict[str, Tensor]:
        names = ("input_ids", "labels")
        return {name: torch.tensor([[token for item in features for token in item[name]]]) for name in names}

    with pytest.raises(LessFastError, match=r"makes 1 rows of 2 examples.*packed"):
        trained(tmp_path / "b", callback_in(tmp_path / "b"), collator=joined)
    with pytest.raises(LessFastError, match="the data collator makes a tuple"):
        trained(tmp_path / "c", callback_in(tmp_path / "c"), collator=lambda features: tuple(pad(features).values()))


def test_a_trainer_with_a_loader_of_its_own_is_refused(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            kept = [{name: item[name] for name in item if name != "note"} for item in examples()]
            return DataLoader(kept, batch_size=2, collate_fn=pad)

    with pytest.raises(LessFastError, match="does not carry its examples' numbers"):
        trained(tmp_path, callback_in(tmp_path), cls=Own)


def test_a_callback_belongs_to_one_trainer(tmp_path: Path) -> None:
    callback = callback_in(tmp_path)
    trainer = make_trainer(tmp_path)
    trainer.add_callback(callback)
    with pytest.raises(LessFastError, match=r"call callback.attach\(trainer\) before"):
        trainer.train()
    callback.attach(make_trainer(tmp_path))
    with pytest.raises(LessFastError, match="attached to a trainer already"):
        callback.attach(make_trainer(tmp_path))
    with pytest.raises(LessFastError, match="rows describe 2 examples, but the training dataset has 11"):
        callback_in(tmp_path, rows=Rows(["a", "b"], ["x"] * 2, [None] * 2)).attach(make_trainer(tmp_path))
    with pytest.raises(LessFastError, match="precondition is 'lion'"):
        callback_in(tmp_path, "lion")


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("several processes", {"args": {"world_size": 2}}),
        ("several processes or GPUs", {"args": {"n_gpu": 2}}),
        ("DeepSpeed", {"is_deepspeed_enabled": True}),
        ("FSDP", {"is_fsdp_enabled": True}),
        ("fp16", {"args": {"fp16": True}}),
        ("torch_compile", {"args": {"torch_compile": True}}),
        ("auto_find_batch_size", {"args": {"auto_find_batch_size": True}}),
        ("a trainer without train_dataset", {"train_dataset": None}),
        ("a dataset without length", {"train_dataset": iter([])}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(named: str, changed: dict[str, Any], tmp_path: Path) -> None:
    args = {"world_size": 1, "n_gpu": 0, "fp16": False, "torch_compile": False, "auto_find_batch_size": False}
    facts = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "train_dataset": [], **changed}
    trainer = SimpleNamespace(**{**facts, "args": SimpleNamespace(**{**args, **changed.get("args", {})})})
    with pytest.raises(LessFastError, match=f"cannot be made during training with {named}"):
        callback_in(tmp_path).attach(trainer)


def test_the_benchmark_measures_both_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    monkeypatch.delenv("LESS_FAST_DATA", raising=False)
    for name in ("callback", "common"):  # so that both go again
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]
    importlib.import_module("callback").main(["--tiny", "--repeats", "1", "--json", str(tmp_path / "rows.json")])
    plain, watched = map(json.loads, (tmp_path / "rows.json").read_text().splitlines())
    assert (plain["implementation"], watched["implementation"]) == ("train", "train + features")
    assert plain["ratio_to_baseline"] == 1.0 and watched["ratio_to_baseline"] > 0
    for row in (plain, watched):
        assert (row["op"], row["examples"], row["k"]) == ("callback", 16, 256)
        assert row["ms_20"] <= row["ms_50"] <= row["ms_80"] and row["examples_per_s"] > 0
        assert row["p"] == 2 * 4 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32)
    assert "callback" in capsys.readouterr().out
