"""Scores as a table on the disk: csv or parquet."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from less_fast.errors import LessFastError
from less_fast.scoring.scores import Scores
from less_fast.store import Rows, atomic_file
from less_fast.store.files import failed_write


def write_scores(path: str | PathLike[str], rows: Rows, scores: Scores, *, how: str = "max") -> None:
    """Write one line per training row to a ``.csv`` or ``.parquet`` file, which appears whole or not at all.

    Columns: ``id``, ``dataset``, ``index`` (row), ``score:<subtask>`` float32 for each subtask, ``score`` float32 (the
    aggregate that :func:`select` ranks by). Scores of invalid rows are null. Raises LessFastError for another file
    type, or if there are not as many rows as scores.
    """
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    path = Path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise LessFastError(f"cannot write scores to {path}: expected a name that ends in .csv or .parquet")
    if len(rows) != len(scores):
        raise LessFastError(f"{len(rows)} rows, but scores of {len(scores)}; expected the rows that were scored")
    columns = {
        "id": pa.array(rows.ids, pa.string()),
        "dataset": pa.array(rows.datasets, pa.string()),
        "index": pa.array(np.arange(len(rows))),
    }
    for name, values in zip(scores.subtasks, scores.matrix.T):
        columns[f"score:{name}"] = pa.array(np.ascontiguousarray(values), mask=~scores.valid)
    columns["score"] = pa.array(scores.aggregate(how), mask=~scores.valid)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            (csv.write_csv if path.suffix == ".csv" else pq.write_table)(pa.table(columns), file)
    except OSError as error:
        raise failed_write(path, error, "the stores are as they were") from error
