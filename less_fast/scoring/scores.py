"""The LESS influence score: how well each training example's gradient points along each target subtask's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import LessFastError
from less_fast.scoring.stream import MEMORY, ScoreStream
from less_fast.scoring.targets import Stores


@dataclass(frozen=True)
class Scores:
    """Influence of N training rows on each subtask of one target.

    ``matrix`` float32 (N, number of subtasks), free of NaN: the weighted sum over checkpoints of the mean cosine, in
    [-1, 1] (1bit features estimate it, and may go beyond); -inf in rows that are not valid. ``subtasks``: names of the
    columns. ``valid`` bool (N,): rows that are OK in every checkpoint.
    """

    matrix: NDArray[np.float32]
    subtasks: list[str]
    valid: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.matrix)

    def aggregate(self, how: str = "max") -> NDArray[np.float32]:
        """One score per row, float32 (N,): ``max`` over subtasks (LESS) or their ``mean``; -inf for invalid rows."""
        return aggregate(self.matrix, how)


def aggregate(matrix: NDArray[np.float32], how: str) -> NDArray[np.float32]:
    """One score per row of (n, subtasks): ``max`` or ``mean``; raises LessFastError for anything else."""
    if how == "max":
        return matrix.max(axis=1)
    if how == "mean":
        return matrix.mean(axis=1, dtype=np.float64).astype(np.float32)
    raise LessFastError(f"aggregate is {how!r}; expected 'max' or 'mean'")


@dataclass(frozen=True)
class Best:
    """The rows with the highest aggregate scores, best first: ``rows`` int64 (k,), ``scores`` float32 (k,)."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


@overload
def influence(
    train_stores: Stores,
    target_stores: Mapping[str, Stores],
    weights: Sequence[float] | None = None,
    *,
    queries: str = "float32",
    memory: int = MEMORY,
    device: str = "cpu",
) -> dict[str, Scores]: ...
@overload
def influence(
    train_stores: Stores,
    target_stores: Stores,
    weights: Sequence[float] | None = None,
    *,
    queries: str = "float32",
    memory: int = MEMORY,
    device: str = "cpu",
) -> Scores: ...
def influence(
    train_stores: Stores,
    target_stores: Stores | Mapping[str, Stores],
    weights: Sequence[float] | None = None,
    *,
    queries: str = "float32",
    memory: int = MEMORY,
    device: str = "cpu",
) -> Scores | dict[str, Scores]:
    """Score every training row against every subtask of the target, or of each target of a mapping.

    score = sum_c w_c · mean over the subtask's rows t of cos(train_c, target_c[t])   (Xia et al. 2024, section 3)

    ``train_stores`` and ``target_stores``: one store, or one per checkpoint in the same order; a path does as well as a
    store. The training stores are read once, however many targets there are. ``weights``: one per checkpoint, such as
    its mean learning rate; made to sum to 1, equal where not given. ``queries``, ``memory`` and ``device``: as in
    :class:`less_fast.scoring.ScoreStream`; the result itself takes 4 bytes for each score.

    Target rows that are not OK in every checkpoint are left out of their subtask's mean, with a warning. Rows without a
    subtask form the subtask ``all``. A row of norm 0 has cosine 0 with everything.

    Raises LessFastError if stores cannot be compared (the message names both and what differs), if there is not one
    target store and one weight per training store, if a target has no rows, or a subtask has none left.
    """
    named = target_stores if isinstance(target_stores, Mapping) else {"": target_stores}
    stream = ScoreStream(train_stores, named, weights, queries=queries, memory=memory, device=device)
    matrix = np.empty((stream.n_rows, stream.n_columns), np.float32)
    valid = np.empty(stream.n_rows, np.bool_)
    for block in stream.blocks(matrix):
        valid[block.start : block.stop] = block.valid
    scores = {
        name: Scores(np.ascontiguousarray(matrix[:, stream.columns(name)]), subtasks, valid)
        for name, subtasks in stream.subtasks.items()
    }
    return scores if isinstance(target_stores, Mapping) else scores[""]


def best_rows(stream: ScoreStream, n: int, *, how: str = "max") -> dict[str, Best]:
    """The ``n`` best valid rows for each target in one pass that holds no more than they and a block take.

    Exact: the rows that :func:`less_fast.select` would choose, equal scores in row order. ``how``: as there.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise LessFastError(f"number of rows is {n!r}; expected an integer of at least 1")
    best = {name: Best(np.empty(0, np.int64), np.empty(0, np.float32)) for name in stream.subtasks}
    for block in stream.blocks():
        for name, known in best.items():
            values = aggregate(block.matrix[:, stream.columns(name)], how)
            # Rows come in order, so that one equal to the worst of a full list comes after it.
            enters = block.valid & (values > known.scores[-1]) if len(known.rows) == n else block.valid
            rows = np.concatenate([known.rows, block.start + np.flatnonzero(enters)])
            scores = np.concatenate([known.scores, values[enters]])
            order = np.argsort(-scores, kind="stable")[:n]
            best[name] = Best(rows[order], scores[order])
    return best
