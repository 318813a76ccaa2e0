"""Rankings: in which order rows are offered for selection, for one task or several (turns, quotas, balanced gains)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from less_fast.errors import LessFastError
from less_fast.scoring.scores import Scores

Rows = NDArray[np.int64]
Tasks = Mapping[str, Scores | ArrayLike]

_FIRST_PREFIX = 4096  # rows of a column that are sorted at first; four times as many whenever they run out


def top_rows(values: NDArray[np.float64], k: int) -> Rows:
    """The k rows with the highest values, best first, equal ones in row order, in O(N + k log k).

    ``values``: (N,) without NaN; 0 <= k <= N.
    """
    if k == 0:
        return np.empty(0, np.int64)
    kth = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > kth)
    ties = np.flatnonzero(values == kth)[: k - len(above)]
    rows = np.sort(np.concatenate([above, ties]))
    return rows[np.argsort(-values[rows], kind="stable")].astype(np.int64)


class _Column:
    """The rows of one column of scores, best first, sorted as far as they are asked for; rows not finite are none."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        finite = np.isfinite(values)
        self._values = np.where(finite, values, -np.inf)
        self._order = np.empty(0, np.int64)
        self.finite = finite
        self.length = int(finite.sum())

    def row(self, place: int) -> int:
        """The row at a place below ``length``."""
        if place >= len(self._order):
            self._order = top_rows(self._values, min(self.length, max(_FIRST_PREFIX, 4 * (place + 1))))
        return int(self._order[place])


class _Rule(Protocol):
    """Whose turn it is."""

    def turn(self, heads: Rows) -> int | None:
        """The column that takes its head next, or None where the ranking ends. ``heads``: its best row left, or -1."""

    def took(self, column: int, row: int) -> None:
        """The column's head was selected."""

    def copy(self) -> _Rule:
        """One with the same state that goes its own way."""


class Ranking:
    """Offers rows one at a time, and is told of each whether it was selected, since the next may depend on it.

    Made by :func:`best`, :func:`round_robin`, :func:`quotas` or :func:`balanced`, for :func:`select` or :func:`pick`.
    Every column keeps its rows best first and offers the first that is neither selected nor dropped, its *head*; a rule
    says which column's turn it is. So an offer costs O(columns), whatever N is.

    ``n_rows``: N. ``n_valid``: rows that can be offered at all. ``names``: of the columns. ``size``: the number of rows
    after which it ends by itself, or None.
    """

    def __init__(
        self, columns: Sequence[NDArray[np.float64]], names: Sequence[str], rule: _Rule, size: int | None = None
    ) -> None:
        self._columns = [_Column(values) for values in columns]
        self._rule = rule
        self._gone = np.zeros(len(columns[0]), np.bool_)
        self._places = np.zeros(len(columns), np.int64)
        self._heads = np.array([column.row(0) if column.length else -1 for column in self._columns], np.int64)
        self.names = list(names)
        self.size = size
        self.n_rows = len(self._gone)
        self.n_valid = int(np.logical_or.reduce([column.finite for column in self._columns]).sum())

    def offer(self) -> tuple[int, int] | None:
        """The next row and the column that offers it, or None at the end; the same until it is kept or dropped."""
        column = self._rule.turn(self._heads)
        return None if column is None else (int(self._heads[column]), column)

    def keep(self, row: int, column: int) -> None:
        """The row that was offered is selected."""
        self._rule.took(column, row)
        self.drop(row)

    def drop(self, row: int) -> None:
        """The row that was offered is never to be offered again; its column keeps its turn."""
        self._gone[row] = True
        for number in np.flatnonzero(self._heads == row):
            column, place = self._columns[number], int(self._places[number])
            while place < column.length and self._gone[column.row(place)]:
                place += 1
            self._places[number] = place
            self._heads[number] = column.row(place) if place < column.length else -1

    def copy(self) -> Ranking:
        """One in the same state that goes its own way; the sorted columns are shared."""
        other = copy.copy(self)
        other._rule = self._rule.copy()
        other._gone, other._places, other._heads = self._gone.copy(), self._places.copy(), self._heads.copy()
        return other


class _Turns:
    """The column that has the smallest share of its quota so far; equal ones in their order."""

    def __init__(self, quotas: NDArray[np.int64] | None, n_columns: int) -> None:
        # Without quotas the one with the fewest rows is next: columns take turns.
        self._weights = np.ones(n_columns) if quotas is None else quotas.astype(np.float64)
        self._limits = np.full(n_columns, np.inf) if quotas is None else self._weights
        self._taken = np.zeros(n_columns)

    def turn(self, heads: Rows) -> int | None:
        open_ = (heads >= 0) & (self._taken < self._limits)
        if not open_.any():
            return None
        # Quotients of integers below 2^26 are equal as floats exactly where they are equal.
        return int(np.argmin(np.where(open_, self._taken / self._weights, np.inf)))

    def took(self, column: int, row: int) -> None:
        self._taken[column] += 1

    def copy(self) -> _Turns:
        other = copy.copy(self)
        other._taken = self._taken.copy()
        return other


class _Gains:
    """The column whose head is furthest above the mean of the selected rows in that column."""

    def __init__(self, columns: NDArray[np.float64]) -> None:
        self._columns = columns  # (columns, N), normalised
        self._sums = np.zeros(len(columns))  # over the selected rows
        self._n_selected = 0

    def turn(self, heads: Rows) -> int | None:
        # The definition maximises A[t, j] - mean[j] over all rows t left and all columns j. The mean of a column is the
        # same for all rows, so the best row of column j is its head, and the best of J heads is the best of N x J.
        if (heads < 0).all():
            return None
        at_heads = self._columns[np.arange(len(heads)), heads]
        gains = np.where(heads >= 0, at_heads - self._sums / max(1, self._n_selected), -np.inf)
        ties = np.flatnonzero(gains == gains.max())
        return int(ties[np.argmin(heads[ties])])

    def took(self, column: int, row: int) -> None:
        self._sums += self._columns[:, row]
        self._n_selected += 1

    def copy(self) -> _Gains:
        other = copy.copy(self)
        other._sums = self._sums.copy()
        return other


def best(scores: Scores | ArrayLike, *, how: str = "max") -> Ranking:
    """Rows by descending score, as :func:`select` takes them; ``scores`` and ``how`` as there."""
    return Ranking([row_scores(scores, how)], ["score"], _Turns(None, 1))


def round_robin(tasks: Tasks, *, how: str = "max") -> Ranking:
    """Tasks take turns in the order given; in its turn a task takes the best of its rows that is not taken yet.

    ``tasks``: name -> :class:`Scores`, aggregated over subtasks as ``how`` says, or one score per row (N,). A task
    whose rows are all taken has no more turns. Raises LessFastError if tasks differ in N, or there are none.
    """
    names, columns = _task_columns(tasks, how)
    return Ranking(columns, names, _Turns(None, len(names)))


def quotas(tasks: Tasks, sizes: Mapping[str, int | float], *, n: int | None = None, how: str = "max") -> Ranking:
    """Every task takes as many rows as its quota says, the best of its own that no other task has taken.

    Next is always the task with the smallest part of its quota so far (equal ones in the order of ``tasks``), so that
    the quotas hold in proportion for the first rows of the selection too. ``tasks``, ``how``: as in
    :func:`round_robin`. ``sizes``: task -> a number of rows (int), or a share of ``n`` (float in (0, 1], rounded down).

    Raises LessFastError if a task has no quota, a quota no task, or one is out of range; if shares are given without
    ``n``, or quotas come to more than ``n``.
    """
    names, columns = _task_columns(tasks, how)
    if list(sizes) != names and set(sizes) != set(names):
        raise LessFastError(f"quotas are given for {_listed(sizes)}, but the tasks are {_listed(names)}")
    counts = [rows_of(sizes[name], n, f"quota of task {name!r}") for name in names]
    if not all(counts):
        raise LessFastError(f"quota of task {names[counts.index(0)]!r} is 0; expected at least one row")
    if n is not None and sum(counts) > n:
        raise LessFastError(f"quotas come to {sum(counts)} rows, but {n} are to be selected")
    return Ranking(columns, names, _Turns(np.array(counts, np.int64), len(names)), sum(counts))


def balanced(tasks: Scores | Tasks) -> Ranking:
    """The greedy selection of BIDS: next is the row that most exceeds, in some column, what is selected so far.

    argmax over rows t not selected of max over columns j of (A[t, j] - mean over selected s of A[s, j])

    A holds all columns of all tasks (subtasks of :class:`Scores`, or arrays (N,) or (N, J)), each brought to mean 0 and
    standard deviation 1 (divisor N) over the rows that are finite in all columns; others are never selected. A constant
    column is 0. The mean over no rows is 0. Equal gains: the lowest row. Source: Dai et al. 2025 (arXiv 2501.12147),
    whose columns are single target examples.

    Raises LessFastError if tasks differ in N, or there are none.
    """
    named = {"": tasks} if isinstance(tasks, Scores) else tasks
    names, parts = [], []
    for task, scores in named.items():
        matrix = scores.matrix if isinstance(scores, Scores) else np.asarray(scores)
        if matrix.ndim not in (1, 2):
            raise LessFastError(f"scores of task {task!r} have shape {matrix.shape}; expected (N,) or (N, columns)")
        parts.append(matrix.reshape(len(matrix), -1).T)
        if matrix.ndim == 1:
            names.append(task)
            continue
        subtasks = scores.subtasks if isinstance(scores, Scores) else map(str, range(matrix.shape[1]))
        names += [f"{task}:{subtask}" if task else subtask for subtask in subtasks]
    _check_same_rows({task: part.shape[1] for task, part in zip(named, parts)})
    columns = _normalised(np.concatenate(parts).astype(np.float64))
    return Ranking(list(columns), names, _Gains(columns))


def _normalised(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """z-scores of each column (J, N) over the rows finite in all; -inf in the other rows."""
    valid = np.isfinite(columns).all(axis=0)
    out = np.full_like(columns, -np.inf)
    for values, scores in zip(columns, out):
        finite = values[valid]
        # Not by the deviation: that of a constant column is rounding error, and not always 0.
        constant = not len(finite) or finite.min() == finite.max()
        scores[valid] = 0.0 if constant else (finite - finite.mean()) / finite.std()
    return out


def row_scores(scores: Scores | ArrayLike, how: str) -> NDArray[np.float64]:
    """One score per row, float64 (N,); raises LessFastError for another shape."""
    values = np.asarray(scores.aggregate(how) if isinstance(scores, Scores) else scores, np.float64)
    if values.ndim != 1:
        raise LessFastError(f"scores have shape {values.shape}; expected one per row, (N,)")
    return values


def rows_of(amount: int | float, n: int | None, what: str) -> int:
    """A number of rows (int), or a share of n (float in (0, 1], rounded down), as a number of rows.

    Raises LessFastError, which begins with ``what``, for anything else, and for a share of less than one row.
    """
    if isinstance(amount, (int, np.integer)) and not isinstance(amount, bool) and amount >= 0:
        return int(amount)
    if not isinstance(amount, float) or not 0 < amount <= 1:
        raise LessFastError(f"{what} is {amount!r}; expected a number of rows, or a share above 0 and up to 1.0")
    if n is None:
        raise LessFastError(f"{what} is a share ({amount}); say of how many rows, or give a number of rows")
    # A share such as 0.29 is a little less than it looks, and is not to cost a row of 100.
    count = math.floor(amount * n + 1e-9)
    if not count:
        raise LessFastError(f"{what} is {amount} of {n} rows, less than one; choose a larger one")
    return count


def _task_columns(tasks: Tasks, how: str) -> tuple[list[str], list[NDArray[np.float64]]]:
    columns = {task: row_scores(scores, how) for task, scores in tasks.items()}
    _check_same_rows({task: len(values) for task, values in columns.items()})
    return list(columns), list(columns.values())


def _check_same_rows(lengths: Mapping[str, int]) -> None:
    if not lengths:
        raise LessFastError("no tasks were given; expected scores of at least one")
    first = next(iter(lengths))
    for task, length in lengths.items():
        if length != lengths[first]:
            raise LessFastError(
                f"task {first!r} has scores of {lengths[first]} rows, but task {task!r} of {length}; "
                "expected scores of the same pool"
            )


def _listed(names: Mapping[str, object] | Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
