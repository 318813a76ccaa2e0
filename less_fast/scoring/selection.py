"""From scores to a selection: rows are taken from a ranking, one at a time, where every filter accepts them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from less_fast.errors import LessFastError
from less_fast.progress import progress_bar
from less_fast.scoring.ranking import Ranking, best, row_scores, top_rows
from less_fast.scoring.scores import Scores

Ahead = Callable[[int], list[int]]


class Gate(Protocol):
    """A filter at work in one selection.

    A row that is not accepted now never will be, whatever is selected next: rejected rows are not asked for again, and
    the order in which gates are asked does not change the selection.
    """

    def accepts(self, row: int) -> bool:
        """Whether the row may be selected next to those that are."""

    def keep(self, row: int) -> None:
        """The row was selected; it has just been accepted."""

    def copy(self) -> Gate | None:
        """One with the same state for looking ahead, or None where that costs too much to be foreseen."""


class Filter(Protocol):
    """What may be selected: a value, which :meth:`start` sets to work."""

    def start(self, n: int, n_rows: int, ahead: Ahead) -> Gate:
        """For a selection of ``n`` of ``n_rows`` rows.

        ``ahead(count)``: the next rows, ``count`` at most, that would be selected from here on if it accepted all.
        """


@dataclass(frozen=True)
class Selection:
    """What :func:`pick` selected.

    ``rows`` int64 (n,): in the order they were taken. ``columns`` int64 (n,): the column of the ranking that took each
    (its name is ``ranking.names[column]``). ``n_rejected``: rows that each filter rejected, in the order of the
    filters; a row counts for the first that does.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    n_rejected: list[int]


def select(
    scores: Scores | ArrayLike | Ranking,
    *,
    fraction: float | None = None,
    n: int | None = None,
    how: str = "max",
    filters: Sequence[Filter] = (),
) -> NDArray[np.int64]:
    """The rows with the highest scores, best first, as int64 indices; equal scores in row order.

    ``scores``: what :func:`influence` returns, aggregated over subtasks as ``how`` says; or one score per row (N,); or
    a ranking of another kind, such as :func:`round_robin`. Rows that are not finite are never selected. Either
    ``fraction``, in (0, 1]: int(fraction · N) rows, as in LESS, where N counts the invalid rows too; or ``n`` rows; a
    ranking that ends by itself (:func:`quotas`) needs neither. ``filters``: :class:`Caps`, :class:`Duplicates`; rows
    that one rejects are passed over.

    Raises LessFastError for a fraction or n out of range. With fewer valid rows than asked for, warns and gives those.
    """
    if isinstance(scores, Ranking) or filters:
        ranking = scores if isinstance(scores, Ranking) else best(scores, how=how)
        n = n if fraction is not None or n is not None else ranking.size
        return pick(ranking, n_selected(ranking.n_rows, fraction, n), filters).rows
    values = row_scores(scores, how)
    count = n_selected(len(values), fraction, n)
    candidates = np.flatnonzero(np.isfinite(values))
    if count > len(candidates):
        _warn_of_invalid(count, len(candidates), len(values))
    return candidates[top_rows(values[candidates], min(count, len(candidates)))]


def pick(ranking: Ranking, n: int, filters: Sequence[Filter] = (), *, progress: bool = False) -> Selection:
    """Take rows from a ranking until there are ``n``, passing over those that a filter rejects.

    The ranking itself is left as it is. ``progress``: show a bar. Warns if the ranking ends before. Filters are asked
    in their order, so the cheap ones should come first.
    """
    walk = _Walk(ranking.copy(), n, [])
    for number, filter_ in enumerate(filters):
        walk.gates.append(filter_.start(n, ranking.n_rows, _looks_ahead(walk, number)))
    rejected = [0] * len(filters)
    rows, columns = [], []
    with progress_bar(n, unit="row", desc="selecting", show=progress) as bar:
        for row, column in walk.steps(rejected):
            rows.append(row)
            columns.append(column)
            bar.update()
    if len(rows) < n and not filters and ranking.size is None:
        _warn_of_invalid(n, len(rows), ranking.n_rows)
    elif len(rows) < n:
        warnings.warn(
            f"{n} rows asked for, but only {len(rows)} of {ranking.n_rows} could be selected: the ranking ended, or "
            "filters rejected the rest",
            stacklevel=2,
        )
    return Selection(np.array(rows, np.int64), np.array(columns, np.int64), rejected)


@dataclass
class _Walk:
    """A selection under way: ``n`` more rows of ``ranking`` are to be taken."""

    ranking: Ranking
    n: int
    gates: list[Gate]

    def steps(self, rejected: list[int]) -> Iterator[tuple[int, int]]:
        """Rows as they are taken, each with the column that took it."""
        while self.n and (offer := self.ranking.offer()) is not None:
            row, column = offer
            refusing = next((number for number, gate in enumerate(self.gates) if not gate.accepts(row)), None)
            if refusing is not None:
                rejected[refusing] += 1
                self.ranking.drop(row)
                continue
            for gate in self.gates:
                gate.keep(row)
            self.ranking.keep(row, column)
            self.n -= 1
            yield row, column


def _looks_ahead(walk: _Walk, n_gates: int) -> Ahead:
    """Looks ahead with a copy of the walk that has its first gates only."""

    def ahead(count: int) -> list[int]:
        copies = [gate.copy() for gate in walk.gates[:n_gates]]
        gates = [gate for gate in copies if gate is not None]
        scout = _Walk(walk.ranking.copy(), count, gates)
        return [row for row, _ in scout.steps([0] * len(gates))]

    return ahead


def _warn_of_invalid(asked: int, valid: int, n_rows: int) -> None:
    warnings.warn(f"{asked} rows asked for, but only {valid} of {n_rows} are valid", stacklevel=3)


def n_selected(n_rows: int, fraction: float | None, n: int | None) -> int:
    """How many of ``n_rows`` to select: int(fraction · n_rows), or n; raises LessFastError for either out of range."""
    if (fraction is None) == (n is None):
        raise LessFastError("select needs either a fraction or a number of rows, and not both")
    if fraction is not None:
        if not (math.isfinite(fraction) and 0 < fraction <= 1):
            raise LessFastError(f"fraction is {fraction}; expected more than 0 and at most 1")
        count = int(fraction * n_rows)
        if not count:
            raise LessFastError(f"fraction {fraction} of {n_rows} rows is less than one row; choose a larger one")
        return count
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise LessFastError(f"number of rows to select is {n!r}; expected an integer of at least 1")
    return int(n)
