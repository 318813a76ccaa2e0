"""A small Hugging Face training that can be watched by the callback that makes features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from less_fast import Projection
from less_fast.compat.trainer import GradientFeaturesCallback
from less_fast.data import Encoded, collate
from support.live_training import BETAS, EPS
from support.models import adapted, batch, causal_lm

N, STEPS = 11, 3  # examples, and steps of 2 x 2 of them per epoch
PROJECTION = Projection("srht", 96, seed=5, block=32)
LENGTHS = (9, 5, 12, 7, 6, 15, 8, 5, 11, 10, 13)


def examples() -> list[dict[str, Any]]:
    rows = batch(LENGTHS, seed=7)
    return [
        {"note": f"number {i}", **{name: rows[name][i, :length].tolist() for name in rows}}
        for i, length in enumerate(LENGTHS)
    ]


def pad(features: list[Any]) -> dict[str, Tensor]:
    """Of dictionaries without what the model does not take, or of objects."""
    if isinstance(features[0], dict):
        assert set(features[0]) == {"input_ids", "labels", "attention_mask"}
        features = [Encoded(item["input_ids"], item["labels"], False) for item in features]
    return collate(features, 0)


class Failing(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


def make_trainer(folder: Path, dataset: Any = None, *, collator: Any = pad, cls: Any = Trainer, **changes: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return cls(
        model=adapted(causal_lm()),
        args=TrainingArguments(output_dir=str(folder / "run"), **settings),
        train_dataset=examples() if dataset is None else dataset,
        data_collator=collator,
    )


def trained(folder: Path, callback: GradientFeaturesCallback | None = None, *args: Any, **changes: Any) -> Any:
    trainer = make_trainer(folder, *args, **changes)
    if callback is not None:
        callback.attach(trainer)
    torch.manual_seed(11)
    trainer.train()
    return trainer


def callback_in(folder: Path, *args: Any, **changes: Any) -> GradientFeaturesCallback:
    return GradientFeaturesCallback(folder / "features", PROJECTION, *args, **changes)
