"""The mixture of sources: what share of a selection each may have, and what share it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from less_fast.errors import LessFastError
from less_fast.scoring.ranking import rows_of
from less_fast.scoring.selection import Ahead


@dataclass(frozen=True)
class Share:
    """One dataset in the pool and in the selection.

    ``n_pool``, ``n_selected``: rows. ``pool_share``, ``selected_share``: of all rows. ``lift``: the second share over
    the first. ``pool_mean``, ``selected_mean``: task -> mean of the dataset's finite scores, None where there are none.
    """

    dataset: str
    n_pool: int
    n_selected: int
    pool_share: float
    selected_share: float
    lift: float
    pool_mean: dict[str, float | None] = field(default_factory=dict)
    selected_mean: dict[str, float | None] = field(default_factory=dict)


def composition(
    datasets: Sequence[str], selected: Iterable[int], scores: Mapping[str, ArrayLike] | None = None
) -> list[Share]:
    """What a selection is made of: one :class:`Share` per dataset of the pool, the most selected first, then by name.

    ``datasets``: of every row of the pool; ``selected``: row indices; ``scores``: task -> one score per row (N,), for
    the means.
    """
    names, codes = _codes(datasets)
    rows = np.fromiter(selected, np.int64)
    pool = np.bincount(codes, minlength=len(names))
    chosen = np.bincount(codes[rows], minlength=len(names))
    means = {}
    for task, values in (scores or {}).items():
        of_rows = np.asarray(values, np.float64)
        means[task] = _means(codes, of_rows, len(names)), _means(codes[rows], of_rows[rows], len(names))
    shares = []
    for code, name in enumerate(names):
        pool_share, selected_share = float(pool[code] / len(codes)), float(chosen[code] / max(1, len(rows)))
        shares.append(
            Share(
                name,
                int(pool[code]),
                int(chosen[code]),
                pool_share,
                selected_share,
                selected_share / pool_share,
                {task: of_pool[code] for task, (of_pool, _) in means.items()},
                {task: of_selected[code] for task, (_, of_selected) in means.items()},
            )
        )
    return sorted(shares, key=lambda share: (-share.n_selected, share.dataset))


def _codes(datasets: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The names, and the number of each row's."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(datasets))}
    return list(numbers), np.fromiter((numbers[name] for name in datasets), np.int64, len(datasets))


def _means(codes: NDArray[np.int64], values: NDArray[np.float64], n_codes: int) -> list[float | None]:
    finite = np.isfinite(values)
    counts = np.bincount(codes[finite], minlength=n_codes)
    sums = np.bincount(codes[finite], values[finite], minlength=n_codes)
    return [float(total / count) if count else None for total, count in zip(sums, counts)]


@dataclass(frozen=True)
class Caps:
    """A filter: at most so many rows of each dataset.

    ``datasets``: of every row of the pool (or its group). ``caps``: dataset -> a number of rows (int; 0 leaves it out),
    or a share (float in (0, 1]) of the rows asked for, rounded down. ``default``: for datasets that ``caps`` does not
    name; None: no cap.
    """

    datasets: Sequence[str]
    caps: Mapping[str, int | float] = field(default_factory=dict)
    default: int | float | None = None

    def start(self, n: int, n_rows: int, ahead: Ahead) -> _CapsGate:
        """See :class:`Filter`. Raises LessFastError for a cap out of range or of a dataset that the pool has not."""
        if len(self.datasets) != n_rows:
            raise LessFastError(f"caps have the datasets of {len(self.datasets)} rows, but the scores {n_rows}")
        names, codes = _codes(self.datasets)
        if unknown := [name for name in self.caps if name not in names]:
            raise LessFastError(f"cap of {unknown[0]!r}: the pool has no such dataset; it has {', '.join(names)}")
        caps = {**dict.fromkeys(names, self.default), **self.caps}
        left = [n_rows if cap is None else rows_of(cap, n, f"cap of {name!r}") for name, cap in caps.items()]
        return _CapsGate(codes, left)


@dataclass
class _CapsGate:
    codes: NDArray[np.int64]
    left: list[int]  # rows that each dataset may still have

    def accepts(self, row: int) -> bool:
        return self.left[self.codes[row]] > 0

    def keep(self, row: int) -> None:
        self.left[self.codes[row]] -= 1

    def copy(self) -> _CapsGate:
        return _CapsGate(self.codes, self.left.copy())
