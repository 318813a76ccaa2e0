"""Targets, folded before the pool is read: the mean over a subtask is linear, so it is taken of the queries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import LessFastError
from less_fast.paths import PathOrUrl, RemotePath
from less_fast.scoring.compatible import check_checkpoints, check_pair
from less_fast.store import FeatureStore, Status

Store = FeatureStore | PathOrUrl
Stores = Store | Sequence[Store]

WHOLE_TARGET = "all"  # the subtask of target rows that name none


@dataclass(frozen=True)
class Target:
    """The stores of one target, one per checkpoint, with each row's subtask and weight in its mean.

    ``columns`` int64 (rows,): the number of the row's subtask. ``weights`` float64 (rows,): 1 / usable rows of that
    subtask, 0 for a row that is not usable.
    """

    stores: list[FeatureStore]
    subtasks: list[str]
    columns: NDArray[np.int64]
    weights: NDArray[np.float64]

    def queries(self, checkpoint: int, block_bytes: int) -> NDArray[np.float32]:
        """Mean of each subtask's unit rows at one checkpoint: float32 (subtasks, K)."""
        store = self.stores[checkpoint]
        query = np.zeros((len(self.subtasks), store.dim))
        for start, rows in unit_rows(store, block_bytes):
            for row, column, weight in zip(rows, self.columns[start:], self.weights[start:]):
                query[column] += weight * row
        return query.astype(np.float32)


def open_stores(stores: Stores) -> list[FeatureStore]:
    """One store, or one per checkpoint, opened where they are paths."""
    several = [stores] if isinstance(stores, (FeatureStore, str, PathLike, RemotePath)) else list(stores)
    if not several:
        raise LessFastError("no feature stores were given; expected one per checkpoint")
    return [store if isinstance(store, FeatureStore) else FeatureStore(store) for store in several]


def open_target(train: list[FeatureStore], target: list[FeatureStore]) -> Target:
    """A target that fits the training stores; see :func:`less_fast.influence` for the errors and warnings."""
    if len(target) != len(train):
        raise LessFastError(
            f"{len(train)} training stores but {len(target)} target stores ({target[0].path} ...); "
            "expected one of each per checkpoint"
        )
    for ours, theirs in zip(train, target):
        check_pair(ours, theirs)
    check_checkpoints(target)
    path = target[0].path
    if not len(target[0]):
        raise LessFastError(f"target {path} has no rows")
    names = [WHOLE_TARGET if name is None else name for name in target[0].rows.subtasks]
    subtasks = list(dict.fromkeys(names))
    valid = np.logical_and.reduce([store.status == Status.OK for store in target])
    if not valid.all():
        count = int((~valid).sum())
        warnings.warn(f"{count} of {len(valid)} rows of target {path} have no usable gradient; left out", stacklevel=4)
    number = {name: i for i, name in enumerate(subtasks)}
    columns = np.array([number[name] for name in names], np.int64)
    sizes = np.bincount(columns[valid], minlength=len(subtasks))
    for name, size in zip(subtasks, sizes):
        if not size:
            raise LessFastError(f"subtask {name!r} of target {path} has no row with a usable gradient")
    return Target(target, subtasks, columns, valid / sizes[columns])


def unit_rows(store: FeatureStore, block_bytes: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(first row, rows divided by their norms, float64 (n, K)) of a whole store, in blocks of ``block_bytes``."""
    # Rows, their float64 quotients, and what becomes of those take some 40 bytes an entry.
    for start, block in store.blocks(max(1, block_bytes // (40 * store.dim))):
        yield start, block * inverse(store.norms[start : start + len(block)])[:, None]


def inverse(norms: NDArray[Any]) -> NDArray[np.float64]:
    """1 / norm, and 0 for a norm of 0."""
    wide = norms.astype(np.float64)
    return np.divide(1.0, wide, out=np.zeros_like(wide), where=wide > 0)
