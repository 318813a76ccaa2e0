"""Examples: an immutable table of instruction data, read from files, folders, the hub or memory."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import IO, Any

import numpy as np

from less_fast.data.parquet import write_table
from less_fast.data.rows import COLUMNS, EXPECTED_FIELDS, TableBuilder
from less_fast.data.sources import RowTable, Source, read_jsonl, read_rows
from less_fast.errors import LessFastError
from less_fast.paths import AnyPath, PathOrUrl, RemotePath, is_same_file, to_path
from less_fast.store.files import atomic_file

_JSONL_NAME = re.compile(r"(.+)\.(?:jsonl|jsonlines|json-lines|ndjson|json)(?:\.gz)?", re.IGNORECASE)
_PARQUET_NAME = re.compile(r"(.+)\.(?:parquet|pq)", re.IGNORECASE)
_PATHS = (str, os.PathLike, RemotePath)
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


@dataclass(frozen=True, eq=False)
class Examples:
    """An immutable table of N examples; made by `load_examples`.

    A row is a dict with `dataset`, `id`, `subtask` where given, and `messages` (dicts of `role` and `content`) or
    `prompt` and `completion`. Text is held in Arrow; of JSON Lines sources only the lines' places are kept besides.
    """

    _table: Any  # datasets.Dataset of the fixed schema, N rows
    _digests: np.ndarray  # uint8 (N, 32), SHA-256 of each row's content
    _sources: tuple[Source, ...]
    _source_of: np.ndarray  # int32 (N,), which source a row is from
    _row_of: np.ndarray  # int64 (N,), its number there

    def __len__(self) -> int:
        return len(self._digests)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _present(self._table[int(index)])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_present, self._table)

    @cached_property
    def ids(self) -> list[str]:
        """The `id` of every row."""
        return self._column("id")

    @cached_property
    def datasets(self) -> list[str]:
        """The `dataset` of every row."""
        return self._column("dataset")

    @cached_property
    def subtasks(self) -> list[str | None]:
        """The `subtask` of every row, None where it has none."""
        return self._column("subtask")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all rows in order; the same content has the same fingerprint in every file format."""
        return _digest(self._digests)

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """The rows with these numbers, in this order; repeats are allowed."""
        rows = self._check_indices(indices)
        return Examples(
            self._table.select(rows), self._digests[rows], self._sources, self._source_of[rows], self._row_of[rows]
        )

    def write_lines(self, indices: Sequence[int] | np.ndarray, path: PathOrUrl) -> None:
        """Write these rows, in this order, as JSON Lines; the file appears whole or not at all.

        Rows of JSON Lines sources are the source's bytes, each ended by one newline; others are serialised anew.
        Raises LessFastError for a row number outside [0, N), a source file that has changed, a disk that is full, and a
        path that is a folder or one of the sources.
        """
        rows = self._check_indices(indices)
        with self._whole_file(path, ".jsonl") as file:
            file.writelines(line + b"\n" for line in self._of_sources(rows, lambda source, at: source.lines(at)))

    def write_parquet(self, indices: Sequence[int] | np.ndarray, path: PathOrUrl) -> None:
        """Write these rows, in this order, as parquet; :func:`load_examples` reads them as the same examples.

        The source's other fields are kept: with the type that holds all of their values, or else as JSON text.
        Missing names are written as their defaults. Raises LessFastError as :meth:`write_lines` does.
        """
        rows = self._check_indices(indices)
        with self._whole_file(path, ".parquet") as file:
            raw = self._of_sources(rows, lambda source, at: source.records(at))
            write_table(list(self.take(rows)), raw, file)

    @contextlib.contextmanager
    def _whole_file(self, path: PathOrUrl, kind: str) -> Iterator[IO[bytes]]:
        """A file that becomes ``path`` when the block ends well; not a folder, and none of the sources."""
        path = to_path(path)
        if path.is_dir():
            raise LessFastError(f"{path}: is a folder; expected the name of a {kind} file")
        for source in self._sources:
            if source.path is not None and is_same_file(path, source.path):
                raise LessFastError(
                    f"{path}: is a source of these examples and would be overwritten; choose another file"
                )
        try:
            with atomic_file(path) as file:
                yield file
        except OSError as error:
            raise LessFastError(f"{path}: cannot be written ({error.strerror or error})") from error

    def _of_sources(self, rows: np.ndarray, read: Callable[[Source, np.ndarray], list[Any]]) -> list[Any]:
        """What ``read`` has of these rows, each from its source, in this order."""
        found: list[Any] = [None] * len(rows)
        for number, source in enumerate(self._sources):
            places = np.flatnonzero(self._source_of[rows] == number)
            if len(places):
                for place, item in zip(places.tolist(), read(source, self._row_of[rows[places]])):
                    found[place] = item
        return found

    def _column(self, name: str) -> list[Any]:
        return self._table[name][:]

    def _check_indices(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(indices)
        if rows.size == 0:
            return np.zeros(0, dtype=np.int64)
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise LessFastError(f"row numbers must be a list of integers, found {rows.dtype} of shape {rows.shape}")
        if rows.min() < 0 or rows.max() >= len(self):
            worst = rows.min() if rows.min() < 0 else rows.max()
            raise LessFastError(f"row {worst} is not one of the {len(self)} examples (0 to {len(self) - 1})")
        return rows.astype(np.int64)


def load_examples(source: Any, *, limit: int | None = None) -> Examples:
    """Read examples, all of them or the first `limit`.

    `source`: a path or URL of .jsonl (also .json, .ndjson; gzip or not) or .parquet, a folder of
    `datasets.save_to_disk`, the name of a dataset on the hub, a `datasets.Dataset`, a list of dicts, `Examples`, or a
    list of such paths, which are joined in order. `dataset` and `id` default to the file's stem and the row's number in
    its file (0 is the first). Raises LessFastError that names the file and the line or row.
    """
    if limit is not None and limit < 1:
        raise LessFastError(f"limit must be at least 1, found {limit}")
    if isinstance(source, Examples):
        return source if limit is None or limit >= len(source) else source.take(np.arange(limit))
    table = TableBuilder()
    sources: list[Source] = []
    counts: list[int] = []
    for part in _parts(source):
        left = None if limit is None else limit - len(table)
        if left == 0:
            break
        before = len(table)
        sources.append(_read(part, left, table))
        counts.append(len(table) - before)
        if not counts[-1]:
            raise LessFastError(f"{_name(part)}: holds no examples; expected rows with {EXPECTED_FIELDS}")
    return _examples(table, sources, counts)


def _examples(table: TableBuilder, sources: list[Source], counts: list[int]) -> Examples:
    import datasets

    arrow, digests = table.finish()
    return Examples(
        datasets.Dataset(arrow, fingerprint=_digest(digests)),  # without one it pickles and hashes the whole table
        digests,
        tuple(sources),
        np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        np.concatenate([np.arange(count, dtype=np.int64) for count in counts]),
    )


def _digest(digests: np.ndarray) -> str:
    return hashlib.sha256(digests.tobytes()).hexdigest()


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _parts(source: Any) -> list[Any]:
    """The single sources of a list of paths; anything else is one source."""
    if not isinstance(source, list | tuple):
        return [source]
    if source and all(isinstance(item, _PATHS) for item in source):
        return list(source)
    if any(isinstance(item, _PATHS) for item in source):
        raise LessFastError("a list of examples must hold either paths or rows, found both")
    return [list(source)]


def _name(part: Any) -> str:
    return str(part) if isinstance(part, _PATHS) else f"the given {type(part).__name__}"


def _read(part: Any, limit: int | None, table: TableBuilder) -> Source:
    """Add the rows of one source to the table."""
    if isinstance(part, list):
        return read_rows(part, part, _name(part), "examples", limit, table)
    if not isinstance(part, _PATHS):
        return _read_dataset(part, _name(part), "examples", limit, table)
    path = to_path(part).expanduser()
    if path.is_dir():
        return _read_dataset(_load_folder(path), str(path), path.resolve().name, limit, table)
    if match := _JSONL_NAME.fullmatch(path.name):
        _check_exists(path)
        return read_jsonl(path, match[1], limit, table)
    if match := _PARQUET_NAME.fullmatch(path.name):
        _check_exists(path)
        return replace(_read_dataset(_load_parquet(path), str(path), match[1], limit, table), path=path)
    if path.exists():
        raise LessFastError(
            f"{path}: unknown kind of file; expected .jsonl, .jsonl.gz, .parquet or a saved dataset's folder"
        )
    if not isinstance(part, str) or not _HUB_NAME.fullmatch(part):
        _check_exists(path)
    return _read_dataset(_load_hub(str(part)), str(part), str(part), limit, table)


def _read_dataset(data: Any, name: str, dataset: str, limit: int | None, table: TableBuilder) -> RowTable:
    """Add the rows of a `datasets.Dataset`, or of the one split that a `DatasetDict` stands for."""
    import datasets

    if isinstance(data, datasets.DatasetDict):
        if "train" not in data and len(data) != 1:
            splits = ", ".join(data) or "none"
            raise LessFastError(f"{name}: which split? It has {splits}; load the one you mean and pass that Dataset")
        data = data["train"] if "train" in data else next(iter(data.values()))
    if not isinstance(data, datasets.Dataset):
        raise LessFastError(
            f"cannot read examples from a {type(data).__name__}; expected a path, a Dataset or a list of dicts"
        )
    present = [column for column in COLUMNS if column in data.column_names]
    if "messages" not in present and not {"prompt", "completion"} <= set(present):
        found = ", ".join(data.column_names) or "none"
        raise LessFastError(f"{name}: expected the columns {EXPECTED_FIELDS}, found {found}")
    return read_rows(data.select_columns(present), data, name, dataset, limit, table)


def _load_folder(path: AnyPath) -> Any:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise LessFastError(f"{path}: a folder, but not one that Dataset.save_to_disk wrote; give its files by name")
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises its own, pyarrow's and the system's errors here
        raise LessFastError(f"{path}: the saved dataset cannot be read ({_first_line(error)})") from error


def _load_parquet(path: AnyPath) -> Any:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source: Any = io.BytesIO(path.read_bytes()) if isinstance(path, RemotePath) else path
        return datasets.Dataset(pq.read_table(source), fingerprint=hashlib.sha256(str(path).encode()).hexdigest())
    except (OSError, pa.ArrowException) as error:
        raise LessFastError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _load_hub(name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name)
    except Exception as error:  # as in _load_folder, and the network's errors
        raise LessFastError(
            f"{name}: no such file or folder, and no such dataset could be had from the hub ({_first_line(error)})"
        ) from error


def _check_exists(path: AnyPath) -> None:
    if not path.is_file():
        raise LessFastError(f"{path}: no such file")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
