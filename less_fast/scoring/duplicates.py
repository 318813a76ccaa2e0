"""De-duplication: no two selected rows whose features point in nearly the same direction."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np

from less_fast.errors import LessFastError
from less_fast.scoring.compatible import check_checkpoints
from less_fast.scoring.selection import Ahead
from less_fast.scoring.targets import Stores, open_stores
from less_fast.store import FeatureStore
from less_fast.store.codec import Float32

# Cosines are float32 products of unit rows: this is more than their rounding, so that a pair whose cosine is exactly
# the threshold (common among int8 rows) is never taken for one above it.
_ROUNDING = 1e-6
_HIGHEST_THRESHOLD = 0.9999
_WINDOW_ROWS = 1024  # enough for a matrix product at full speed
_PIECE_ROWS = 256
_LEAST_WINDOW = 64  # a selection that is nearly complete may still meet many duplicates
_LEAST_ROWS = 32  # of features that the memory must hold


@dataclass(frozen=True)
class Duplicates:
    """A filter: no row whose feature cosine with a selected row is above a threshold.

    The cosine is that of the decoded features, which 1bit ones do not keep: such stores are refused. With several
    stores (checkpoints), it is the mean of their cosines. A row of norm 0, or without features, has cosine 0 with every
    row. Every pair of a candidate and a selected row counts: nothing is hashed or sampled.

    Parameters
    ----------
    stores : of the pool, one or several (checkpoints) with the same rows; a path does as well as a store.
    threshold : in [0, 0.9999].
    memory : bytes that it may use at most. Half of them keep the features of selected rows; those that find no room are
        read again for each block of candidates.
    """

    stores: Stores
    threshold: float = 0.95
    memory: int = 1 << 30

    def start(self, n: int, n_rows: int, ahead: Ahead) -> _DuplicatesGate:
        """See :class:`Filter`. Raises LessFastError for stores of other rows, and settings out of range."""
        if not 0 <= self.threshold <= _HIGHEST_THRESHOLD:
            raise LessFastError(
                f"threshold of duplicates is {self.threshold}; expected a cosine from 0 to {_HIGHEST_THRESHOLD}"
            )
        stores = open_stores(self.stores)
        check_checkpoints(stores)
        for store in stores:
            if store.dtype == "1bit":
                raise LessFastError(
                    f"{store.path} holds 1bit features, whose cosines with one another say too little of duplicates; "
                    "give a store of int8 or wider"
                )
        if len(stores[0]) != n_rows:
            raise LessFastError(f"{stores[0].path} has {len(stores[0])} rows, but the scores {n_rows}")
        features = _UnitRows(stores)
        least = _LEAST_ROWS * features.row_bytes
        if self.memory < least:
            raise LessFastError(
                f"memory for duplicates is {self.memory} bytes; expected at least {least} for {features.width} features"
            )
        return _DuplicatesGate(features, self.threshold, self.memory, n, ahead)


class _UnitRows:
    """Rows of several stores, each of norm 1, side by side: their inner product is the mean of the stores' cosines."""

    def __init__(self, stores: list[FeatureStore]) -> None:
        self._stores = stores
        self.width = sum(store.dim for store in stores)
        self.row_bytes = 4 * self.width

    def read(self, rows: list[int], out: Float32) -> None:
        """Fill ``out`` (n, width)."""
        # In ascending order, so that a shard is opened once for all of its rows.
        order = np.argsort(rows, kind="stable")
        column = 0
        for store in self._stores:
            block = store[np.array(rows, np.int64)[order]]
            # Squares of features far below 1 would vanish in float32.
            norms = np.sqrt(np.einsum("nk,nk->n", block, block, dtype=np.float64) * len(self._stores))
            factors = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
            np.multiply(block, factors[:, None], out=block, casting="same_kind")
            out[order, column : column + store.dim] = block
            column += store.dim


class _DuplicatesGate:
    """Decides row by row, computes by the block.

    A *window* holds the rows that are likely to be asked for next, their cosines with one another, and the highest
    cosine of each with a selected row. It is made by matrix products and kept up to date by maxima.
    """

    def __init__(self, features: _UnitRows, threshold: float, memory: int, n: int, ahead: Ahead) -> None:
        fits = memory // features.row_bytes  # rows
        # An eighth for the window, half for selected rows. The rest: a piece, three times while it is decoded (a
        # sixteenth each), its products with the window, and the window's with itself.
        self._window_rows = max(1, min(_WINDOW_ROWS, fits // 8, math.isqrt(memory // 64)))
        self._piece_rows = max(1, min(_PIECE_ROWS, fits // 16))
        self._features, self._limit, self._n, self._ahead = features, threshold + _ROUNDING, n, ahead
        self._place: dict[int, int] = {}  # row -> its number in the window
        self._window = np.empty((self._window_rows, features.width), np.float32)
        self._among = np.empty((0, 0), np.float32)
        self._nearest = np.empty(0, np.float32)
        self._resident = np.empty((min(n, fits // 2), features.width), np.float32)
        self._piece = np.empty((self._piece_rows, features.width), np.float32)
        self._n_selected = 0
        self._n_foreseen = self._window_rows  # rows of the next window
        self._n_asked = 0  # of the rows in the window
        self._outside: list[int] = []  # selected rows that are not resident, ascending: shards are opened in turn

    def accepts(self, row: int) -> bool:
        if row not in self._place:
            self._open_window(row)
        self._n_asked += 1
        return bool(self._nearest[self._place[row]] <= self._limit)

    def keep(self, row: int) -> None:
        place = self._place[row]
        if self._n_selected < len(self._resident):
            self._resident[self._n_selected] = self._window[place]
        else:
            bisect.insort(self._outside, row)
        self._n_selected += 1
        np.maximum(self._nearest, self._among[place], out=self._nearest)

    def copy(self) -> None:
        """Not foreseen: to look ahead it would have to read the features."""

    def _open_window(self, row: int) -> None:
        # Where rejections make the ranking go another way than was foreseen, a large window is work for nothing.
        foreseen = 2 * self._n_asked if 2 * self._n_asked < len(self._place) else 4 * self._n_foreseen
        self._n_foreseen = min(max(1, foreseen), self._window_rows)
        self._n_asked = 0
        wanted = min(max(_LEAST_WINDOW, self._n - self._n_selected), self._n_foreseen)
        rows = list(dict.fromkeys([row, *self._ahead(wanted)]))[: self._window_rows]
        window = self._window[: len(rows)]
        for start in range(0, len(rows), self._piece_rows):
            part = rows[start : start + self._piece_rows]
            self._features.read(part, window[start : start + len(part)])
        self._place = {row: place for place, row in enumerate(rows)}
        self._among = window @ window.T
        self._nearest = np.full(len(rows), -1, np.float32)
        resident = self._resident[: self._n_selected]
        for start in range(0, len(resident), self._piece_rows):
            self._compare(window, resident[start : start + self._piece_rows])
        for start in range(0, len(self._outside), self._piece_rows):
            part = self._outside[start : start + self._piece_rows]
            self._features.read(part, self._piece[: len(part)])
            self._compare(window, self._piece[: len(part)])

    def _compare(self, window: Float32, selected: Float32) -> None:
        np.maximum(self._nearest, (window @ selected.T).max(axis=1), out=self._nearest)
