"""Where rows come from: JSON Lines files, whose bytes can be had back exactly, and rows that are serialised anew."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, Protocol

import numpy as np

from less_fast.data.rows import TableBuilder, check_row
from less_fast.errors import LessFastError
from less_fast.paths import AnyPath, RemotePath

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


class Source(Protocol):
    """One origin of rows; ``path`` is the file it reads, if it is one."""

    @property
    def path(self) -> AnyPath | None: ...

    def lines(self, rows: np.ndarray) -> list[bytes]:
        """The JSON text of the rows with these numbers (int64), in this order, without line ends."""
        ...

    def records(self, rows: np.ndarray) -> list[Mapping[str, Any]]:
        """The same rows with all of their fields."""
        ...


@dataclass(frozen=True, eq=False)
class JsonlFile:
    """A JSON Lines file, plain or gzip; only the place of each row's line is kept in memory."""

    path: AnyPath
    stamp: tuple[int, int]  # size in bytes, and time in ns of the last change (or a checksum), when it was read
    starts: np.ndarray  # int64 (N,), byte offsets in the decompressed text
    lengths: np.ndarray  # int64 (N,), in bytes, without the line end

    def lines(self, rows: np.ndarray) -> list[bytes]:
        """The source's own bytes of each row's line; raises LessFastError if the file has changed since it was read."""
        try:
            if _stamp(self.path) != self.stamp:
                raise LessFastError(f"{self.path}: changed since it was loaded; load it again")
            found: dict[int, bytes] = {}
            with _open(self.path) as file:
                for row in np.unique(rows).tolist():  # ascending, so that a gzip stream is decompressed once
                    file.seek(int(self.starts[row]))
                    found[row] = file.read(int(self.lengths[row]))
            _require_unchanged(self.path, self.stamp)
        except OSError as error:
            raise LessFastError(f"{self.path}: cannot be read again ({error.strerror or error})") from error
        return [found[row] for row in rows.tolist()]

    def records(self, rows: np.ndarray) -> list[Mapping[str, Any]]:
        """Each row's line, parsed."""
        return [json.loads(line) for line in self.lines(rows)]


@dataclass(frozen=True, eq=False)
class RowTable:
    """Rows held as mappings: a list of dicts or a `datasets.Dataset`."""

    rows: Any  # indexed by int
    path: AnyPath | None = None

    def lines(self, rows: np.ndarray) -> list[bytes]:
        """Each row as JSON, all of its fields, non-ASCII text as itself; values that JSON lacks are written as text."""
        return [json.dumps(row, ensure_ascii=False, default=str).encode() for row in self.records(rows)]

    def records(self, rows: np.ndarray) -> list[Mapping[str, Any]]:
        """Each row as it was given."""
        return [self.rows[row] for row in rows.tolist()]


def read_jsonl(path: AnyPath, dataset: str, limit: int | None, table: TableBuilder) -> JsonlFile:
    """Check and add the rows of a JSON Lines file (gzip is told by its first bytes, not by its name).

    Blank lines are skipped but counted; a byte-order mark at the start is not part of the first line.
    Raises LessFastError that names the line (1 is the first).
    """
    starts, lengths = array("q"), array("q")
    offset = number = 0
    try:
        stamp = _stamp(path)
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                start, offset = offset, offset + len(line)
                line = line.removesuffix(b"\n")
                if number == 1 and line.startswith(_BYTE_ORDER_MARK):
                    start, line = start + len(_BYTE_ORDER_MARK), line.removeprefix(_BYTE_ORDER_MARK)
                if not line or line.isspace():
                    continue
                try:
                    table.add(check_row(_parse(line), dataset, str(len(starts))))
                except LessFastError as error:
                    raise LessFastError(f"{path} line {number}: {error}; fix or remove the line") from None
                starts.append(start)
                lengths.append(len(line))
                if len(starts) == limit:
                    break
        _require_unchanged(path, stamp)
    except _GZIP_ERRORS as error:
        raise LessFastError(
            f"{path} after line {number}: the gzip file is truncated or corrupt ({error}); fetch or write it again"
        ) from error
    except OSError as error:
        raise LessFastError(f"{path}: cannot be read ({error.strerror or error})") from error
    return JsonlFile(path, stamp, np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64))


def read_rows(
    rows: Iterable[Mapping[str, Any]],
    raw: Sequence[Any],
    name: str,
    dataset: str,
    limit: int | None,
    table: TableBuilder,
) -> RowTable:
    """Check and add rows that are mappings; `raw` gives them back whole. Errors name the row (0 is the first)."""
    for number, row in enumerate(islice(rows, limit)):
        try:
            table.add(check_row(row, dataset, str(number)))
        except LessFastError as error:
            raise LessFastError(f"{name} row {number}: {error}; fix or remove the row") from None
    return RowTable(raw)


def _parse(line: bytes) -> object:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise LessFastError(f"not valid UTF-8 (byte 0x{bad:02x} at byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        hint = ", and a JSON array is not JSON Lines: one object per line is expected" if line.strip() == b"[" else ""
        raise LessFastError(f"not valid JSON ({error.msg} at column {error.colno}){hint}") from None
    except (RecursionError, ValueError) as error:
        raise LessFastError(f"JSON that cannot be read ({error})") from None
    return row


def _open(path: AnyPath) -> IO[bytes]:
    file = path.open() if isinstance(path, RemotePath) else open(path, "rb")  # noqa: SIM115  # the caller closes it
    is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    file.seek(0)
    if not is_gzip:
        return file
    if isinstance(path, RemotePath):
        return gzip.open(file, "rb")  # type: ignore[return-value]  # a GzipFile reads as an IO[bytes] does
    file.close()  # gzip would leave it open
    return gzip.open(path, "rb")  # type: ignore[return-value]  # as above


def _require_unchanged(path: AnyPath, stamp: tuple[int, int]) -> None:
    """Raise LessFastError where a remote file, which is read by ranges, has been replaced while it was read."""
    if isinstance(path, RemotePath) and _stamp(path) != stamp:
        raise LessFastError(f"{path}: changed while it was read; load it again")


def _stamp(path: AnyPath) -> tuple[int, int]:
    if isinstance(path, RemotePath):
        return int(path.info()["size"]), path.checksum()
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns
