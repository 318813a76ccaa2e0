"""One pass over the pool: every shard is read once, in order, and scored against all subtasks of all targets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from less_fast.ahead import ahead
from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.scoring.compatible import check_checkpoints
from less_fast.scoring.products import Products, prepare
from less_fast.scoring.targets import Stores, open_stores, open_target
from less_fast.store import Status, StoredRows

MEMORY = 256 << 20  # bytes
LEAST_MEMORY = 1 << 20


@dataclass(frozen=True)
class ScoreBlock:
    """Scores of the training rows from ``start`` on.

    ``matrix`` float32 (n, subtasks of all targets): -inf in rows that are not valid, free of NaN. ``valid`` bool (n,).
    """

    start: int
    matrix: NDArray[np.float32]
    valid: NDArray[np.bool_]

    @property
    def stop(self) -> int:
        return self.start + len(self.valid)


class ScoreStream:
    """The training stores and the folded targets, checked and ready for :meth:`blocks`.

    Parameters
    ----------
    train_stores : one store or path, or one per checkpoint, of the same examples. Rows of shards that a store opened
        with ``allow_partial`` does without are invalid.
    targets : the target's store, or one per checkpoint; or name -> that, for several targets.
    weights : one per checkpoint; made to sum to 1, equal where not given.
    queries : ``float32``, or ``1bit``: every target row is rounded to a sign per feature and compared with the pool's
        signs by counting bits, which needs 1bit training stores.
    memory : bytes that a pass may hold beside the queries, whatever the number of training rows is.
    device : ``cpu``, ``cuda`` or ``cuda:N``: where the products are computed.

    Raises
    ------
    LessFastError
        as :func:`less_fast.influence` does.
    """

    def __init__(
        self,
        train_stores: Stores,
        targets: Stores | Mapping[str, Stores],
        weights: Sequence[float] | None = None,
        *,
        queries: str = "float32",
        memory: int = MEMORY,
        device: str = "cpu",
    ) -> None:
        self.train = open_stores(train_stores)
        check_checkpoints(self.train)
        for store in self.train:
            store.check_n_rows()  # before memory is asked for by what a manifest says
        named = targets if isinstance(targets, Mapping) else {"": targets}
        if not named:
            raise LessFastError("no targets were given; expected at least one")
        self.shares = _shares(weights, len(self.train))
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < LEAST_MEMORY:
            raise LessFastError(f"memory is {memory!r}; expected a number of bytes, at least {LEAST_MEMORY} (1 MiB)")
        opened = {name: open_target(self.train, open_stores(stores)) for name, stores in named.items()}
        self.subtasks = {name: target.subtasks for name, target in opened.items()}
        self._products: list[Products] = prepare(self.train, list(opened.values()), queries, memory, device)
        row_bytes = max(4 * self.n_columns + products.row_bytes for products in self._products)
        self._block_rows = max(1, memory // (2 * row_bytes))

    @property
    def n_rows(self) -> int:
        """N, the number of training rows."""
        return len(self.train[0])

    @property
    def n_columns(self) -> int:
        """Subtasks of all targets."""
        return sum(map(len, self.subtasks.values()))

    def columns(self, target: str) -> slice:
        """Where a target's subtasks lie among the columns of a block; raises LessFastError for an unknown target."""
        names = list(self.subtasks)
        if target not in names:
            raise LessFastError(f"target {target!r} is none of those of this pass: {', '.join(map(repr, names))}")
        first = sum(len(self.subtasks[name]) for name in names[: names.index(target)])
        return slice(first, first + len(self.subtasks[target]))

    def blocks(self, into: NDArray[np.float32] | None = None) -> Iterator[ScoreBlock]:
        """The scores of all rows, in order; ``into`` float32 (N, n_columns): where the matrices are to be written."""
        for start, stop, pieces in self._pieces():
            matrix = np.empty((stop - start, self.n_columns), np.float32) if into is None else into[start:stop]
            yield self._score(start, stop, pieces, matrix)

    def _pieces(self) -> Iterator[tuple[int, int, list[StoredRows | None]]]:
        """The rows of every window, by store; checksums are computed beside the scores of the window before."""

        def load(window: tuple[int, int]) -> tuple[int, int, list[StoredRows | None]]:
            return *window, [store.stored(*window) for store in self.train]

        if any(store.verifies for store in self.train):
            with ThreadPoolExecutor(1, "less_fast-verify") as thread:
                yield from ahead(thread, load, self._windows())
        else:
            yield from map(load, self._windows())

    def _windows(self) -> Iterator[tuple[int, int]]:
        """Row ranges of at most ``_block_rows`` that lie in one shard of every store."""
        start = 0
        while start < self.n_rows:
            ends = [(start // store.shard_size + 1) * store.shard_size for store in self.train]
            stop = min(self.n_rows, start + self._block_rows, *ends)
            yield start, stop
            start = stop

    def _score(self, start: int, stop: int, pieces: list[StoredRows | None], matrix: NDArray[np.float32]) -> ScoreBlock:
        if any(piece is None for piece in pieces):
            matrix[:] = -np.inf
            return ScoreBlock(start, matrix, np.zeros(stop - start, np.bool_))
        whole = [piece for piece in pieces if piece is not None]
        valid = whole[0].status == Status.OK
        for piece in whole[1:]:
            valid &= piece.status == Status.OK
        for checkpoint, (piece, share) in enumerate(zip(whole, self.shares)):
            self._products[checkpoint].add(piece, share, matrix, accumulate=checkpoint > 0)
        # A float32 sum of scores, which are about 1 at most and 0 in rows that are not OK, is finite where they are.
        with np.errstate(invalid="ignore"):
            if not np.isfinite(matrix.sum()) and (odd := np.flatnonzero(~np.isfinite(matrix.sum(axis=1)) & valid)).size:
                raise self._not_finite(start + int(odd[0]))
        if not valid.all():
            matrix[~valid] = -np.inf
        return ScoreBlock(start, matrix, valid)

    def _not_finite(self, row: int) -> CorruptStoreError:
        for store in self.train:
            if not np.isfinite(store[row]).all():
                return CorruptStoreError(
                    f"{store.path}: row {row} (shard {row // store.shard_size}) holds a non-finite feature; "
                    "'less-fast info STORE --verify' finds damaged files"
                )
        return CorruptStoreError(f"{self.train[0].path}: the score of row {row} is not finite")


def _shares(weights: Sequence[float] | None, n_checkpoints: int) -> list[float]:
    if weights is None:
        weights = [1.0] * n_checkpoints
    try:
        values = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise LessFastError(f"checkpoint weights are {weights!r}; expected a list of numbers") from None
    if len(values) != n_checkpoints:
        raise LessFastError(f"{len(values)} checkpoint weights for {n_checkpoints} training stores; expected one each")
    total = math.fsum(values)
    if not all(math.isfinite(value) and value >= 0 for value in values) or not 0 < total < math.inf:
        raise LessFastError(f"checkpoint weights are {values}; expected numbers of at least 0, not all of them 0")
    return [value / total for value in values]
