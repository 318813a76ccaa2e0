"""Batches of a Hugging Face Trainer that carry their examples' numbers, for :mod:`less_fast.compat.trainer`."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from less_fast.errors import LessFastError

# Where a batch carries its examples' numbers, from the collator to the step.
_NUMBERS = "less_fast_rows"


class _Numbered(torch.utils.data.Dataset[Any]):
    """A dataset whose items come with their numbers: (number, item)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        """The dataset's own: accelerate tells it the epoch by ``set_epoch``, where it has that."""
        if name == "dataset" or name.startswith("__"):  # unpickling asks for these before there is a dataset
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.dataset[number]

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[int, Any]]:
        several = getattr(self.dataset, "__getitems__", None)
        return list(zip(numbers, several(numbers) if several else [self.dataset[number] for number in numbers]))


@dataclass(frozen=True)
class _NumberedCollator:
    """The collator's batch with the numbers of its examples added."""

    collator: Any

    def __call__(self, items: Sequence[tuple[int, Any]]) -> MutableMapping[str, Any]:
        batch = self.collator([item for _, item in items])
        if not isinstance(batch, MutableMapping):
            raise LessFastError(
                f"the data collator makes a {type(batch).__name__}; expected a dictionary with input_ids and labels"
            )
        batch[_NUMBERS] = torch.tensor([number for number, _ in items])
        return batch


def with_numbers(trainer: Any, make_loader: Any) -> Any:
    """The trainer's own loader over a numbered dataset; samplers get the dataset that they would have got."""
    import datasets

    dataset, collator, make_sampler = trainer.train_dataset, trainer.data_collator, trainer._get_train_sampler
    plain = dataset
    if isinstance(dataset, datasets.Dataset):
        plain = trainer._remove_unused_columns(dataset, description="Training")
    trainer.train_dataset = _Numbered(plain)
    # The Trainer's own wrapper that drops unused columns leaves items alone that are no dictionaries.
    inner = trainer._get_collator_with_removed_columns(collator, description="Training")
    trainer.data_collator = _NumberedCollator(inner)
    trainer._get_train_sampler = lambda numbered=None: make_sampler(plain)
    try:
        return make_loader()
    finally:
        trainer.train_dataset, trainer.data_collator = dataset, collator
        trainer._get_train_sampler = make_sampler


def take_numbers(batch: Any) -> tuple[NDArray[np.int64], dict[str, Tensor]]:
    """The numbers of a batch's examples, which the model is not to see, and the batch as it is now."""
    numbers = batch.pop(_NUMBERS, None)
    if numbers is None:
        raise LessFastError(
            "a training batch does not carry its examples' numbers; expected a loader of trainer.train_dataset and "
            "trainer.data_collator: attach the callback after changing either, and before training"
        )
    return numbers.cpu().numpy(), dict(batch)
