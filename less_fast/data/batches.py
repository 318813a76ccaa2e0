"""Batches of similar length under a budget of tokens, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from less_fast.data.templates import IGNORED, Encoded
from less_fast.errors import LessFastError

# Tokens that could be computed in the time that a batch takes beside its tokens, on a CPU: 32 to 128 measure alike.
CPU_BATCH_COST = 64


def plan_batches(
    lengths: Sequence[int],
    token_budget: int,
    max_examples: int | None = None,
    *,
    packed: bool = False,
    batch_cost: int | None = None,
) -> list[list[int]]:
    """Cut examples into batches: every index of `lengths` once, shortest first, ties in their given order.

    A batch's size is at most `token_budget` tokens: its longest length × its examples, or the sum of its lengths where
    it is `packed`. It has at most `max_examples` rows; an example longer than the budget is a batch of its own.
    Of all ways to cut the sorted examples, the one with the smallest sum of sizes is taken, where every batch costs
    `batch_cost` tokens more; where that is None, the fewest batches and, among those, the least padding. Depends on
    its arguments only.
    """
    if token_budget < 1:
        raise LessFastError(f"token_budget must be at least 1, found {token_budget}")
    if max_examples is not None and max_examples < 1:
        raise LessFastError(f"max_examples must be at least 1, found {max_examples}")
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    # An empty example counts as one token, or its batch would have no bound.
    sizes = np.maximum(np.asarray([lengths[index] for index in order], np.int64), 1)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    # A padded batch of n examples is n of its last one; all of them together are less than this for each batch.
    cost = int(sizes[-1:].sum()) * len(order) if batch_cost is None else batch_cost
    least = np.zeros(len(order) + 1, np.int64)  # cost of the first so many examples
    first = [0] * (len(order) + 1)  # where the last batch of the first so many begins
    for stop, longest in enumerate(sizes, start=1):
        most = np.searchsorted(ends, ends[stop] - token_budget) if packed else stop - token_budget // longest
        begin = max(min(int(most), stop - 1), 0, stop - (max_examples or stop))
        begins = np.arange(begin, stop)
        total = least[begins] + cost + (ends[stop] - ends[begins] if packed else (stop - begins) * longest)
        best = int(np.argmin(total))
        least[stop], first[stop] = total[best], begin + best
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[first[stop] : stop])
        stop = first[stop]
    return batches[::-1]


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
