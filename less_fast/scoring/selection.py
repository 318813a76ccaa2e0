"""From scores to a selection: the best rows, and what they are made of."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from less_fast.errors import LessFastError
from less_fast.scoring.scores import Scores


def select(
    scores: Scores | ArrayLike, *, fraction: float | None = None, n: int | None = None, how: str = "max"
) -> NDArray[np.int64]:
    """The rows with the highest scores, best first, as int64 indices; equal scores in row order.

    ``scores``: what :func:`influence` returns, aggregated over subtasks as ``how`` says, or one score per row (N,);
    rows that are not finite are never selected. Either ``fraction``, in (0, 1]: int(fraction · N) rows, as in LESS,
    where N counts the invalid rows too; or ``n`` rows.

    Raises LessFastError for a fraction or n out of range. With fewer valid rows than asked for, warns and gives those.
    """
    values = np.asarray(scores.aggregate(how) if isinstance(scores, Scores) else scores, np.float64)
    if values.ndim != 1:
        raise LessFastError(f"scores have shape {values.shape}; expected one per row, (N,)")
    count = _count(len(values), fraction, n)
    candidates = np.flatnonzero(np.isfinite(values))
    if count > len(candidates):
        warnings.warn(f"{count} rows asked for, but only {len(candidates)} of {len(values)} are valid", stacklevel=2)
    best = np.argsort(-values[candidates], kind="stable")[:count]
    return candidates[best].astype(np.int64)


def _count(n_rows: int, fraction: float | None, n: int | None) -> int:
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


@dataclass(frozen=True)
class Share:
    """How often one dataset occurs in the pool and in the selection: counts of rows, and shares of all rows."""

    dataset: str
    n_pool: int
    n_selected: int
    pool_share: float
    selected_share: float


def composition(datasets: Sequence[str], selected: Iterable[int]) -> list[Share]:
    """What a selection is made of: one :class:`Share` per dataset of the pool, the most selected first, then by name.

    ``datasets``: of every row of the pool; ``selected``: row indices.
    """
    pool = Counter(datasets)
    chosen = Counter(datasets[index] for index in selected)
    n_chosen = max(1, sum(chosen.values()))
    shares = [
        Share(name, count, chosen[name], count / len(datasets), chosen[name] / n_chosen) for name, count in pool.items()
    ]
    return sorted(shares, key=lambda share: (-share.n_selected, share.dataset))
