"""Read back the table of scores that ``scoring.write_scores`` writes."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from less_fast.data import Examples
from less_fast.errors import LessFastError


@dataclass(frozen=True)
class ScoreTable:
    """``ids``: of every row. ``scores``: float32 (N,), -inf where a row has none, so that it is never selected."""

    path: Path
    ids: list[str]
    scores: NDArray[np.float32]

    def check_rows(self, examples: Examples) -> None:
        """Raise LessFastError unless these are the examples that were scored, in their order."""
        if len(examples) != len(self.ids):
            raise LessFastError(
                f"{self.path}: has scores of {len(self.ids)} examples, but the data has {len(examples)}; "
                "give the files that were scored, in the same order"
            )
        for row, (ours, theirs) in enumerate(zip(self.ids, examples.ids)):
            if ours != theirs:
                raise LessFastError(
                    f"{self.path}: row {row} is the score of {ours!r}, but the data has {theirs!r} there; "
                    "give the files that were scored, in the same order"
                )


def read_scores(path: str | PathLike[str]) -> ScoreTable:
    """Read a ``.parquet`` or ``.csv`` file of scores; raises LessFastError where it is none or cannot be read."""
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    path = Path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise LessFastError(f"{path}: expected a table of scores whose name ends in .csv or .parquet")
    types = {"id": pa.string(), "score": pa.float32()}
    try:
        if path.suffix == ".csv":
            table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=types, include_columns=[*types]))
        else:
            table = pq.read_table(path, columns=[*types])
        ids, scores = table["id"].to_pylist(), table["score"].fill_null(-np.inf)
    except FileNotFoundError:
        raise LessFastError(f"{path}: no such file") from None
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LessFastError(f"{path}: not a table of scores ({reason})") from None
    return ScoreTable(path, ids, scores.to_numpy().astype(np.float32))
