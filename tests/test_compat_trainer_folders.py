"""Features during training, and what is on the disk: going on, starting over, ending early, being interrupted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.watched_training import STEPS, Failing, N, callback_in, make_trainer, trained
from transformers import TrainerCallback

from less_fast import LessFastError


def test_an_interrupted_training_keeps_what_its_checkpoint_has_and_makes_the_rest_again(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = callback_in(tmp_path / "whole", shard_size=4)
    trained(tmp_path / "whole", whole, **saving)

    first = callback_in(tmp_path, shard_size=4)
    trainer = make_trainer(tmp_path, **saving)
    trainer.add_callback(Failing(5))
    first.attach(trainer)
    torch.manual_seed(11)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert first.stores == []
    steps = np.load(tmp_path / "features/epoch-2.partial/rows.npy")["step"]
    arrays = np.load(tmp_path / "features/epoch-2.partial/features.npy", mmap_mode="r+")
    kept, again = (int(np.flatnonzero(steps == step)[0]) for step in (4, 5))
    arrays[kept], arrays[again] = 7.0, 8.0
    arrays.flush()

    second = callback_in(tmp_path, shard_size=4)
    resumed = make_trainer(tmp_path, **saving)
    second.attach(resumed)
    torch.manual_seed(11)  # of the order of the examples, which a checkpoint does not hold
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert (second.stores[1][kept] == 7.0).all()
    for epoch in (0, 1):
        ours, expected = second.stores[epoch], whole.stores[epoch]
        others = [i for i in range(N) if (epoch, i) != (1, kept)]
        np.testing.assert_array_equal(ours[others], expected[others])
        tables = [np.load(tmp_path / name / f"features/epoch-{epoch + 1}.npy") for name in ("", "whole")]
        np.testing.assert_array_equal(*tables)
    assert not list((tmp_path / "features").glob("*.partial"))
    assert second.stores[0].verify().ok


def test_finishing_may_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = callback_in(tmp_path, shard_size=4)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            trained(tmp_path, callback, save_strategy="epoch")
    again = callback_in(tmp_path, shard_size=4)
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    again.attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{2 * STEPS}"))
    assert [len(store) for store in again.stores] == [N, N]
    assert not list((tmp_path / "features").glob("*.partial"))


def test_folders_of_other_trainings_are_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, callback_in(tmp_path, "sgd"), **saving)

    def resumed(step: int, *args: Any, **changes: Any) -> None:
        trainer = make_trainer(tmp_path, **saving)
        callback_in(tmp_path, *args, **changes).attach(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}") if step else None)

    with pytest.raises(LessFastError, match=r"features of another training; choose another folder, or resume"):
        resumed(0, "sgd")
    with pytest.raises(LessFastError, match="finished features of epoch 2, but the training resumes in epoch 2;"):
        resumed(4, "sgd")
    with pytest.raises(LessFastError, match=r'precondition.kind: "sgd" -> "sign"'):
        resumed(6, "sign")
    resumed(6, "sgd")


class EpochStop(TrainerCallback):
    """Ends the epoch, or the training, after a step."""

    def __init__(self, step: int, flag: str = "should_epoch_stop") -> None:
        self.step, self.flag = step, flag

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.flag, True)


def test_an_epoch_that_is_stopped_has_a_store_of_its_own(tmp_path: Path) -> None:
    callback, trainer = callback_in(tmp_path, "sgd"), make_trainer(tmp_path)
    trainer.add_callback(EpochStop(2))
    callback.attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 + STEPS
    assert [len(store) for store in callback.stores] == [8, N]
    tables = [np.load(tmp_path / f"features/epoch-{epoch}.npy")["step"] for epoch in (1, 2)]
    assert [sorted(set(table)) for table in tables] == [[1, 2], [3, 4, 5]]
    assert not list((tmp_path / "features").glob("*.partial"))


@pytest.mark.parametrize("reason", ["max_steps", "should_training_stop"])
def test_a_training_that_ended_within_an_epoch_goes_on(reason: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    whole = callback_in(tmp_path / "whole")
    trained(tmp_path / "whole", whole, **saving)
    first = callback_in(tmp_path)
    trainer = make_trainer(tmp_path, **saving, **({"max_steps": 4} if reason == "max_steps" else {}))
    if reason != "max_steps":
        trainer.add_callback(EpochStop(4, reason))
    first.attach(trainer)
    torch.manual_seed(11)
    trainer.train()
    assert [len(store) for store in first.stores] == [N, 4]
    assert [path.name for path in (tmp_path / "features").glob("*.partial")] == ["epoch-2.partial"]

    again = make_trainer(tmp_path, **saving)
    callback_in(tmp_path).attach(again)
    with pytest.raises(LessFastError, match="epoch 1, but the training resumes in epoch 1; choose another folder"):
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    second, resumed = callback_in(tmp_path), make_trainer(tmp_path, **saving)
    second.attach(resumed)
    torch.manual_seed(11)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    for epoch in (0, 1):
        np.testing.assert_array_equal(second.stores[epoch][:], whole.stores[epoch][:])
        tables = [np.load(tmp_path / name / f"features/epoch-{epoch + 1}.npy") for name in ("", "whole")]
        np.testing.assert_array_equal(*tables)
    assert not list((tmp_path / "features").glob("*.partial"))


def test_rows_of_a_training_without_a_checkpoint_are_made_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_callback(Failing(1))
    callback_in(tmp_path).attach(trainer)
    with pytest.raises(InterruptedError):
        trainer.train()
    np.lib.format.open_memmap(tmp_path / "features/epoch-1.partial/rows.npy", "r+")["step"] = 99
    callback = callback_in(tmp_path, "sgd")
    with caplog.at_level(logging.WARNING, "less_fast"):
        trained(tmp_path, callback, num_train_epochs=1, dataloader_drop_last=True)
    assert "starts over" in caplog.text
    assert [len(store) for store in callback.stores] == [N - 1]
    assert callback.stores[0].facts["precondition"]["kind"] == "sgd"
