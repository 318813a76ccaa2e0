"""Read back the table of scores that ``scoring.write_scores`` writes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from less_fast.data import Examples
from less_fast.errors import LessFastError
from less_fast.paths import AnyPath, PathOrUrl, RemotePath, to_path
from less_fast.store.files import open_regular

_SUBTASK = "score:"


@dataclass(frozen=True)
class ScoreTable:
    """``ids``: of every row. ``scores``: float32 (N,), -inf where a row has none, so that it is never selected.

    ``subtasks``: the same for each subtask, where they were read.
    """

    path: AnyPath
    ids: list[str]
    scores: NDArray[np.float32]
    subtasks: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def check_rows(self, examples: Examples) -> None:
        """Raise LessFastError unless these are the examples that were scored, in their order."""
        self.check_ids(examples.ids, "the data", "give the files that were scored, in the same order")

    def check_ids(self, ids: Sequence[str], owner: str, advice: str) -> None:
        """Raise LessFastError unless these ids, which ``owner`` has, are those of the rows, in their order."""
        if len(ids) != len(self.ids):
            raise LessFastError(
                f"{self.path}: has scores of {len(self.ids)} examples, but {owner} has {len(ids)}; {advice}"
            )
        for row, (ours, theirs) in enumerate(zip(self.ids, ids)):
            if ours != theirs:
                raise LessFastError(
                    f"{self.path}: row {row} is the score of {ours!r}, but {owner} has {theirs!r} there; {advice}"
                )


def read_scores(path: PathOrUrl, *, with_subtasks: bool = False) -> ScoreTable:
    """Read a ``.parquet`` or ``.csv`` file of scores; raises LessFastError where it is none or cannot be read."""
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    path = to_path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise LessFastError(f"{path}: expected a table of scores whose name ends in .csv or .parquet")
    is_csv = path.suffix == ".csv"
    types = {"id": pa.string(), "score": pa.float32()}
    lines = csv.ParseOptions(newlines_in_values=True)  # ids are any text
    try:
        source: Any = io.BytesIO(path.read_bytes()) if isinstance(path, RemotePath) else path
        if with_subtasks:
            with open_regular(path) as file:
                names = (csv.open_csv(file, parse_options=lines).schema if is_csv else pq.read_schema(file)).names
            types |= {name: pa.float32() for name in names if name.startswith(_SUBTASK)}
        if is_csv:
            convert = csv.ConvertOptions(column_types=types, include_columns=[*types])
            table = csv.read_csv(source, parse_options=lines, convert_options=convert)
        else:
            table = pq.read_table(source, columns=[*types])
        columns = {name: _filled(table[name]) for name in types if name != "id"}
        ids = table["id"].to_pylist()
    except FileNotFoundError:
        raise LessFastError(f"{path}: no such file") from None
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LessFastError(f"{path}: not a table of scores ({reason})") from None
    scores = columns.pop("score")
    return ScoreTable(path, ids, scores, {name.removeprefix(_SUBTASK): values for name, values in columns.items()})


def _filled(column: Any) -> NDArray[np.float32]:
    return column.fill_null(-np.inf).to_numpy().astype(np.float32)
