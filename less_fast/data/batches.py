"""Batches of similar length under a budget of tokens, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from less_fast.data.templates import IGNORED, Encoded
from less_fast.errors import LessFastError


def plan_batches(
    lengths: Sequence[int], token_budget: int, max_examples: int | None = None, *, packed: bool = False
) -> list[list[int]]:
    """Cut examples into batches: every index of `lengths` once, shortest first, ties in their given order.

    A batch's size is at most `token_budget` tokens: its longest length × its examples, or the sum of its lengths where
    it is `packed`. It has at most `max_examples` rows; an example longer than the budget is a batch of its own. Depends
    on its arguments only.
    """
    if token_budget < 1:
        raise LessFastError(f"token_budget must be at least 1, found {token_budget}")
    if max_examples is not None and max_examples < 1:
        raise LessFastError(f"max_examples must be at least 1, found {max_examples}")
    batches: list[list[int]] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # The newcomer is the longest so far. An empty example counts as one token, or its batch would have no bound.
        longest = max(lengths[index], 1)
        size = total + longest if packed else longest * (len(batches[-1]) + 1 if batches else 1)
        if batches and size <= token_budget and len(batches[-1]) != max_examples:
            batches[-1].append(index)
            total += longest
        else:
            batches.append([index])
            total = longest
    return batches


def collate(encoded: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `labels` and `attention_mask` of a batch, int64 (N, longest), padded on the right.

    Padding has `pad_id`, the ignored label and attention 0.
    """
    shape = (len(encoded), max((len(example.input_ids) for example in encoded), default=0))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(encoded):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        labels[row, :length] = torch.tensor(example.labels, dtype=torch.int64)
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
