"""Scores on the disk, written as they are computed: a table (csv or parquet), and the full matrix (npy)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import LessFastError
from less_fast.paths import AnyPath, PathOrUrl, to_path
from less_fast.progress import progress_bar
from less_fast.scoring.scores import Scores, aggregate
from less_fast.scoring.stream import ScoreStream
from less_fast.store import Rows, atomic_file
from less_fast.store.files import check_free_space, failed_write
from less_fast.store.manifest import ROWS_NAME
from less_fast.store.rows import row_batches

# A part of a table is converted at a time, and so much of it becomes a row group of a parquet file.
_PART_BYTES = 1 << 20
_GROUP_BYTES = 4 << 20


class ScoreWriter:
    """A ``.csv`` or ``.parquet`` file with one line per training row, which appears whole or not at all.

    Columns: ``id``, ``dataset``, ``index`` (row), ``score:<subtask>`` float32 for each subtask, ``score`` float32 (the
    aggregate that :func:`less_fast.select` ranks by). Scores of invalid rows are null.
    """

    def __init__(self, path: AnyPath, file: BinaryIO, subtasks: Sequence[str], how: str) -> None:
        import pyarrow as pa
        import pyarrow.csv as csv
        import pyarrow.parquet as pq

        self._how = how
        names = [*(f"score:{name}" for name in subtasks), "score"]
        self._schema = pa.schema(
            [("id", pa.string()), ("dataset", pa.string()), ("index", pa.int64()), *((n, pa.float32()) for n in names)]
        )
        writer = csv.CSVWriter if path.suffix == ".csv" else pq.ParquetWriter
        self._writer = writer(file, self._schema)
        self._waiting: list[Any] = []  # blocks may be small, and a group for each would make a large file
        self._waiting_bytes = 0
        self._rows = max(1, _PART_BYTES // (4 * (len(names) + 16)))

    def write(self, ids: Any, datasets: Any, start: int, matrix: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
        """The next rows: ids and datasets of n rows, scores float32 (n, subtasks), bool (n,)."""
        for first in range(0, len(valid), self._rows):
            part = slice(first, first + self._rows)
            self._write(ids[part], datasets[part], start + first, matrix[part], valid[part])

    def _write(
        self, ids: Any, datasets: Any, start: int, matrix: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> None:
        import pyarrow as pa

        values = [np.ascontiguousarray(column) for column in matrix.T] + [aggregate(matrix, self._how)]
        names = [
            column if isinstance(column, pa.Array) else pa.array(column, pa.string()) for column in (ids, datasets)
        ]
        index = pa.array(np.arange(start, start + len(valid)))
        columns = [*names, index, *(pa.array(column, mask=~valid) for column in values)]
        self._waiting.append(pa.table(columns, schema=self._schema))
        self._waiting_bytes += self._waiting[-1].nbytes
        if self._waiting_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        table = pa.concat_tables(self._waiting)
        self._writer.write_table(table, max(1, table.num_rows))
        self._waiting, self._waiting_bytes = [], 0

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()


@contextlib.contextmanager
def score_table(path: PathOrUrl, subtasks: Sequence[str], how: str) -> Iterator[ScoreWriter]:
    """Open a :class:`ScoreWriter`; raises LessFastError for another file type, or where it cannot be written."""
    path = to_path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise LessFastError(f"cannot write scores to {path}: expected a name that ends in .csv or .parquet")
    with _output(path) as file:
        table = ScoreWriter(path, file, subtasks, how)
        try:
            yield table
        finally:
            table.close()


@contextlib.contextmanager
def _output(path: AnyPath) -> Iterator[BinaryIO]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        raise failed_write(path, error, "the stores are as they were") from error


def write_scores(path: PathOrUrl, rows: Rows, scores: Scores, *, how: str = "max") -> None:
    """Write scores as a :class:`ScoreWriter`.

    Raises LessFastError for another file type, or if there are not as many rows as scores.
    """
    if len(rows) != len(scores):
        raise LessFastError(f"{len(rows)} rows, but scores of {len(scores)}; expected the rows that were scored")
    with score_table(path, scores.subtasks, how) as table:
        table.write(rows.ids, rows.datasets, 0, scores.matrix, scores.valid)


def stream_scores(
    stream: ScoreStream,
    tables: Mapping[str, Sequence[PathOrUrl]],
    *,
    how: str = "max",
    matrix: PathOrUrl | None = None,
    progress: bool = False,
) -> int:
    """Score the pool and write the result as it comes, so that memory does not grow with the pool.

    ``tables``: target -> ``.csv`` and ``.parquet`` files, see :class:`ScoreWriter`. ``matrix``: where the scores of all
    subtasks of all targets go as well, a ``.npy`` file of float32 (N, subtasks). Files appear whole or not at all.
    Returns the number of valid rows.
    """
    n_valid = 0
    with contextlib.ExitStack() as open_files:
        opened = [
            (stream.columns(name), open_files.enter_context(score_table(path, stream.subtasks[name], how)))
            for name, paths in tables.items()
            for path in paths
        ]
        array = open_files.enter_context(_matrix(to_path(matrix), stream)) if matrix is not None else None
        names = _Names(stream.train[0].path / ROWS_NAME, stream.n_rows)
        bar = open_files.enter_context(progress_bar(stream.n_rows, unit="row", desc="score", show=progress))
        for block in stream.blocks():
            ids, datasets = names.take(len(block.valid))
            for columns, table in opened:
                table.write(ids, datasets, block.start, block.matrix[:, columns], block.valid)
            if array is not None:
                array.write(block.matrix.data)
            n_valid += int(block.valid.sum())
            bar.update(len(block.valid))
        if not n_valid:
            raise LessFastError(f"no row of {stream.train[0].path} has a usable gradient; there is nothing to score")
    return n_valid


class _Names:
    """Ids and datasets of consecutive rows, read from a store's table of rows a part at a time."""

    def __init__(self, path: AnyPath, n_rows: int) -> None:
        self._batches = row_batches(path, ("id", "dataset"), n_rows)
        self._waiting: list[Any] = []

    def take(self, n: int) -> tuple[Any, Any]:
        """Ids and datasets of the next ``n`` rows, as pyarrow arrays."""
        import pyarrow as pa

        while sum(batch.num_rows for batch in self._waiting) < n:
            self._waiting.append(next(self._batches))
        table = pa.Table.from_batches(self._waiting)
        self._waiting = table.slice(n).to_batches()
        return tuple(table.slice(0, n).column(name).combine_chunks() for name in ("id", "dataset"))


@contextlib.contextmanager
def _matrix(path: AnyPath, stream: ScoreStream) -> Iterator[BinaryIO]:
    if path.suffix != ".npy":
        raise LessFastError(f"cannot write the matrix of scores to {path}: expected a name that ends in .npy")
    shape = stream.n_rows, stream.n_columns
    check_free_space(path, 4 * shape[0] * shape[1])
    with _output(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        yield file
