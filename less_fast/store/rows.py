"""``Rows``: what is known of every row besides its features (id, dataset, subtask), and its parquet file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from less_fast.errors import CorruptStoreError, LessFastError


@dataclass(frozen=True)
class Rows:
    """Three lists of one length, in dataset order; ``subtasks`` holds None where an example names none."""

    ids: list[str]
    datasets: list[str]
    subtasks: list[str | None]

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.datasets) == len(self.subtasks):
            raise LessFastError(
                f"rows have {len(self.ids)} ids, {len(self.datasets)} datasets and {len(self.subtasks)} subtasks; "
                "expected as many of each"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def hash(self) -> str:
        """SHA-256 of the content, whatever version of parquet it is stored in."""
        text = json.dumps([self.ids, self.datasets, self.subtasks], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_parquet(self) -> bytes:
        """The table as a parquet file; raises LessFastError for text that is not valid Unicode."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"id": self.ids, "dataset": self.datasets, "subtask": self.subtasks}
        try:
            table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        except UnicodeEncodeError as error:
            raise LessFastError(f"an id, dataset or subtask is not valid Unicode: {error.object!r}") from None
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        return buffer.getvalue().to_pybytes()

    @classmethod
    def read(cls, path: Path) -> Rows:
        """The inverse of :meth:`to_parquet`, from a file; raises CorruptStoreError if it is missing or damaged."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Not through a Python file object, and without threads: one may outlive the interpreter and abort it.
            with pq.ParquetFile(path, pre_buffer=False) as file:
                table = file.read(columns=["id", "dataset", "subtask"], use_threads=False)
            return cls(*(table.column(name).to_pylist() for name in ("id", "dataset", "subtask")))
        except (OSError, KeyError, pa.ArrowException, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CorruptStoreError(f"{path} is missing or damaged: {reason}") from None
