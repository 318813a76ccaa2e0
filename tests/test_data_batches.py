"""Batches: the plan's promises over random lengths, and padding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from less_fast.data import IGNORED, Encoded, collate, plan_batches
from less_fast.errors import LessFastError

LENGTHS = st.lists(st.integers(0, 300), max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 1000), most=st.none() | st.integers(1, 8))
def test_plan_covers_every_example_once_within_its_budget(lengths, budget, most):
    batches = plan_batches(lengths, budget, most)
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    for batch in batches:
        assert batch
        assert most is None or len(batch) <= most
        assert max(lengths[index] for index in batch) * len(batch) <= budget or len(batch) == 1
    assert plan_batches(tuple(lengths), budget, most) == batches


def padded(lengths, batches):
    return sum(max(1, *(lengths[index] for index in batch)) * len(batch) for batch in batches)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=9),
    budget=st.integers(1, 90),
    most=st.none() | st.integers(1, 4),
    cost=st.none() | st.integers(0, 40),
)
def test_no_other_cut_of_the_sorted_examples_costs_less(lengths, budget, most, cost):
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    best = None
    for cuts in range(1 << (len(order) - 1)):  # every way to cut
        ends = [stop for stop in range(1, len(order)) if cuts >> (stop - 1) & 1]
        batches = [order[begin:end] for begin, end in pairwise([0, *ends, len(order)])]
        if all((padded(lengths, [b]) <= budget and len(b) <= (most or len(b))) or len(b) == 1 for b in batches):
            paid = (
                (len(batches), padded(lengths, batches))
                if cost is None
                else padded(lengths, batches) + cost * len(batches)
            )
            best = paid if best is None else min(best, paid)
    found = plan_batches(lengths, budget, most, batch_cost=cost)
    size = padded(lengths, found)
    assert ((len(found), size) if cost is None else size + cost * len(found)) == best


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 1000), most=st.none() | st.integers(1, 8))
def test_a_packed_plan_counts_real_tokens(lengths, budget, most):
    batches = plan_batches(lengths, budget, most, packed=True)
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    for batch in batches:
        assert sum(lengths[index] for index in batch) <= budget or len(batch) == 1
        assert len(batch) <= (most or len(lengths))
    n_filled, size = 0, budget  # batches filled in turn are the fewest
    n_in_batch = 0
    for index in order:
        length = max(lengths[index], 1)
        if n_filled and size + length <= budget and n_in_batch != most:
            size, n_in_batch = size + length, n_in_batch + 1
        else:
            n_filled, size, n_in_batch = n_filled + 1, length, 1
    assert len(batches) == n_filled


def test_plan_of_known_lengths():
    assert plan_batches([], 10) == []
    assert plan_batches([5, 2, 2, 9, 30, 3], 10) == [[1, 2], [5, 0], [3], [4]]
    assert plan_batches([5, 5, 5], 100, max_examples=2) == [[0], [1, 2]]
    assert plan_batches([0] * 7, 3) == [[0], [1, 2, 3], [4, 5, 6]]
    assert plan_batches([5, 2, 2, 9, 30, 3], 12, packed=True) == [[1, 2, 5, 0], [3], [4]]
    assert plan_batches([10, 11, 20, 21, 22], 100) == [[0, 1], [2, 3, 4]]
    assert plan_batches([10, 11, 20, 21, 22], 100, batch_cost=0) == [[0], [1], [2], [3], [4]]
    assert plan_batches([10, 11, 20, 21, 22], 100, batch_cost=5) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(("budget", "most", "name"), [(0, None, "token_budget"), (5, 0, "max_examples")])
def test_plan_refuses_empty_bounds(budget, most, name):
    with pytest.raises(LessFastError, match=f"^{name} must be at least 1, found 0$"):
        plan_batches([1], budget, most)


def test_collate_pads_on_the_right():
    batch = collate([Encoded([5, 6, 7], [IGNORED, 6, 7], False), Encoded([8], [8], True), Encoded([], [], False)], 9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9], [9, 9, 9]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED], [IGNORED] * 3],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [0, 0, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert collate([], 0)["input_ids"].shape == (0, 0)
