"""``Rows``: what is known of every row besides its features (id, dataset, subtask), and its parquet file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.paths import AnyPath, RemotePath
from less_fast.store.files import open_regular, size_of_open

_NAMES = ("id", "dataset", "subtask")
_BATCH_ROWS = 1 << 16
# What a table of any size may hold, and what it may hold more for each of its bytes.
_FREE_ROWS, _ROWS_PER_BYTE = 1 << 20, 64


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
    def read(cls, path: AnyPath, n_rows: int | None = None) -> Rows:
        """The inverse of :meth:`to_parquet`, from a file.

        Raises CorruptStoreError if it is missing or damaged, or if ``n_rows`` is given and it has another number.
        """
        columns: dict[str, list[Any]] = {name: [] for name in _NAMES}
        for batch in row_batches(path, _NAMES, n_rows):
            for name in _NAMES:
                columns[name] += batch.column(name).to_pylist()
        return cls(*columns.values())


def check_rows(path: AnyPath, n_rows: int) -> None:
    """Raise CorruptStoreError if the table is missing or damaged, or has another number of rows; reads none of them."""
    with _opened(path, _NAMES, n_rows):
        pass


def row_batches(path: AnyPath, columns: tuple[str, ...], n_rows: int | None = None) -> Iterator[Any]:
    """The table in order, as pyarrow record batches of the named columns; raises as :meth:`Rows.read` does."""
    with _opened(path, columns, n_rows) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns), use_threads=False):
            batch.validate(full=True)
            if any(batch.column(name).null_count for name in columns if name != "subtask"):
                raise ValueError("a row has no id or no dataset")
            yield batch


@contextlib.contextmanager
def _opened(path: AnyPath, columns: tuple[str, ...], n_rows: int | None) -> Iterator[Any]:
    """The pyarrow file at ``path``, found to be plausible; what goes wrong with it becomes a CorruptStoreError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(path) as opened:
            size = size_of_open(opened)
            source = pa.BufferReader(opened.read()) if isinstance(path, RemotePath) else path
        # Not through a Python file object, and without threads: one may outlive the interpreter and abort it.
        with pq.ParquetFile(source, pre_buffer=False) as file:
            found, schema = file.metadata.num_rows, file.schema_arrow
            if n_rows is not None and found != n_rows:
                raise ValueError(f"it has {found} rows, but the manifest says {n_rows}")
            # A few bytes of parquet can stand for any number of equal rows.
            if not 0 <= found <= _FREE_ROWS + _ROWS_PER_BYTE * size:
                raise ValueError(f"it claims to hold {found} rows in {size} bytes")
            for name in columns:
                if schema.names.count(name) != 1 or schema.field(name).type not in (pa.string(), pa.large_string()):
                    raise ValueError(f"expected one column of strings named {name}")
            yield file
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptStoreError(f"{path} is missing or damaged: {reason[:200]}") from None
