"""The LESS influence score: how well each training example's gradient points along each target subtask's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import LessFastError
from less_fast.scoring.compatible import check_checkpoints, check_pair
from less_fast.store import FeatureStore, Status

Store = FeatureStore | str | PathLike[str]
Stores = Store | Sequence[Store]

WHOLE_TARGET = "all"  # the subtask of target rows that name none
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Scores:
    """Influence of N training rows on each subtask of one target.

    ``matrix`` float32 (N, number of subtasks), free of NaN: the weighted sum over checkpoints of the mean cosine, in
    [-1, 1]; -inf in rows that are not valid. ``subtasks``: names of the columns. ``valid`` bool (N,): rows that are OK
    in every checkpoint.
    """

    matrix: NDArray[np.float32]
    subtasks: list[str]
    valid: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.matrix)

    def aggregate(self, how: str = "max") -> NDArray[np.float32]:
        """One score per row, float32 (N,): ``max`` over subtasks (LESS) or their ``mean``; -inf for invalid rows."""
        if how == "max":
            return self.matrix.max(axis=1)
        if how == "mean":
            return self.matrix.mean(axis=1, dtype=np.float64).astype(np.float32)
        raise LessFastError(f"aggregate is {how!r}; expected 'max' or 'mean'")


@dataclass(frozen=True)
class _Target:
    """A target folded for the pass over the training rows: one query (K, subtasks) per checkpoint."""

    subtasks: list[str]
    queries: list[NDArray[np.float32]]


@overload
def influence(
    train_stores: Stores, target_stores: Mapping[str, Stores], weights: Sequence[float] | None = None
) -> dict[str, Scores]: ...
@overload
def influence(train_stores: Stores, target_stores: Stores, weights: Sequence[float] | None = None) -> Scores: ...
def influence(
    train_stores: Stores, target_stores: Stores | Mapping[str, Stores], weights: Sequence[float] | None = None
) -> Scores | dict[str, Scores]:
    """Score every training row against every subtask of the target, or of each target of a mapping.

    score = sum_c w_c · mean over the subtask's rows t of cos(train_c, target_c[t])   (Xia et al. 2024, section 3)

    ``train_stores`` and ``target_stores``: one store, or one per checkpoint in the same order; a path does as well as a
    store. The training stores are read once, however many targets there are. ``weights``: one per checkpoint, such as
    its mean learning rate; made to sum to 1, equal where not given.

    Target rows that are not OK in every checkpoint are left out of their subtask's mean, with a warning. Rows without a
    subtask form the subtask ``all``. A row of norm 0 has cosine 0 with everything.

    Raises LessFastError if stores cannot be compared (the message names both and what differs), if there is not one
    target store and one weight per training store, if a target has no rows, or a subtask has none left.
    """
    train = _open(train_stores)
    check_checkpoints(train)
    shares = _shares(weights, len(train))
    named = target_stores if isinstance(target_stores, Mapping) else {"": target_stores}
    targets = {name: _fold(train, _open(stores)) for name, stores in named.items()}
    matrix, valid = _stream(train, list(targets.values()), shares)
    scores, column = {}, 0
    for name, target in targets.items():
        width = len(target.subtasks)
        scores[name] = Scores(np.ascontiguousarray(matrix[:, column : column + width]), target.subtasks, valid)
        column += width
    return scores if isinstance(target_stores, Mapping) else scores[""]


def _open(stores: Stores) -> list[FeatureStore]:
    several = [stores] if isinstance(stores, (FeatureStore, str, PathLike)) else list(stores)
    if not several:
        raise LessFastError("no feature stores were given; expected one per checkpoint")
    return [store if isinstance(store, FeatureStore) else FeatureStore(fspath(store)) for store in several]


def _shares(weights: Sequence[float] | None, n_checkpoints: int) -> list[float]:
    if weights is None:
        weights = [1.0] * n_checkpoints
    values = [float(weight) for weight in weights]
    if len(values) != n_checkpoints:
        raise LessFastError(f"{len(values)} checkpoint weights for {n_checkpoints} training stores; expected one each")
    total = math.fsum(values)
    if not all(math.isfinite(value) and value >= 0 for value in values) or not 0 < total < math.inf:
        raise LessFastError(f"checkpoint weights are {values}; expected numbers of at least 0, not all of them 0")
    return [value / total for value in values]


def _fold(train: list[FeatureStore], target: list[FeatureStore]) -> _Target:
    """Mean of the subtask's unit rows, per checkpoint: the mean is linear, so it is taken before the training rows."""
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
    valid = _valid(target)
    if not valid.all():
        count = int((~valid).sum())
        warnings.warn(f"{count} of {len(valid)} rows of target {path} have no usable gradient; left out", stacklevel=3)
    column = {name: i for i, name in enumerate(subtasks)}
    members = np.zeros((len(names), len(subtasks)))  # (rows, subtasks): 1 / size of the subtask where the row is in it
    members[np.arange(len(names)), [column[name] for name in names]] = valid
    sizes = members.sum(axis=0)
    for name, size in zip(subtasks, sizes):
        if not size:
            raise LessFastError(f"subtask {name!r} of target {path} has no row with a usable gradient")
    members /= sizes
    return _Target(subtasks, [_query(store, members) for store in target])


def _query(store: FeatureStore, members: NDArray[np.float64]) -> NDArray[np.float32]:
    query = np.zeros((store.dim, members.shape[1]))
    for start, block in store.blocks(_block_rows(store)):
        rows = slice(start, start + len(block))
        query += block.T.astype(np.float64) @ (members[rows] * _inverse(store.norms[rows])[:, None])
    return query.astype(np.float32)


def _stream(
    train: list[FeatureStore], targets: list[_Target], shares: list[float]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """All subtasks of all targets side by side: (N, their number), and which rows are valid."""
    queries = [np.concatenate(parts, axis=1) for parts in zip(*(target.queries for target in targets))]
    valid = _valid(train)
    matrix = np.full((len(valid), queries[0].shape[1] if queries else 0), -np.inf, np.float32)
    step = min(_block_rows(store) for store in train)
    for start in range(0, len(valid), step):
        rows = slice(start, start + step)
        total = np.zeros((len(valid[rows]), matrix.shape[1]))
        for store, query, share in zip(train, queries, shares):
            total += (store[rows] @ query) * (share * _inverse(store.norms[rows]))[:, None]
        matrix[rows][valid[rows]] = total[valid[rows]]
    return matrix, valid


def _valid(stores: list[FeatureStore]) -> NDArray[np.bool_]:
    return np.logical_and.reduce([store.status == Status.OK for store in stores])


def _inverse(norms: NDArray[Any]) -> NDArray[np.float64]:
    """1 / norm, and 0 for a norm of 0."""
    wide = norms.astype(np.float64)
    return np.divide(1.0, wide, out=np.zeros_like(wide), where=wide > 0)


def _block_rows(store: FeatureStore) -> int:
    return max(1, _BLOCK_BYTES // (4 * store.dim))
