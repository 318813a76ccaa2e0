"""``FeatureStore``: reads a store's features, norms, statuses and rows, and checks its files."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.paths import AnyPath, PathOrUrl, RemotePath, to_path
from less_fast.projection import Projection
from less_fast.store import manifest as manifests
from less_fast.store.codec import Array, Float32
from less_fast.store.files import sha256_of
from less_fast.store.manifest import Manifest, ShardEntry
from less_fast.store.read_ahead import ReadAhead
from less_fast.store.rows import Rows, check_rows
from less_fast.store.shard import Shard, Status, open_shard, shard_tensors
from less_fast.store.strict_json import shown

_OPEN_SHARDS, _FETCHED_SHARDS = 16, 2  # those on the disk are maps, remote ones are memory
_REQUESTS, _FETCHES = 8, 3  # for columns of remote shards, and for whole ones, at a time
_CACHED = ("rows", "status", "norms", "n_tokens", "n_labels")
_MAKE_AGAIN = "repeat the command that made it to have it made again"


@dataclass(frozen=True)
class Verification:
    """What :meth:`FeatureStore.verify` found: one line per problem, each naming the file."""

    path: AnyPath
    n_shards: int
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class StoredRows:
    """Rows [start, stop) of a store as they lie in one shard: read-only views of its file.

    ``codes`` (stop - start, see the store's dtype), ``scale`` float32 or None, ``norms`` float32, ``status`` uint8.
    ``center`` float32 (K,), of all rows of the shard, in 1bit stores; else None.
    """

    start: int
    stop: int
    codes: Array
    scale: Float32 | None
    norms: Float32
    status: NDArray[np.uint8]
    center: Float32 | None


class FeatureStore:
    """The features of N examples, in dataset order, read from the disk as they are asked for.

    Parameters
    ----------
    path : the store's folder, or its URL (``s3://…``). Of a remote store a few shards are in memory at a time; reading
        one after the other fetches the next ones meanwhile.
    allow_partial : open it although shards are missing; their rows read as zeros with status ``MISSING``. So do those
        of shards that turn out to be damaged, each of which is named in a warning.
    verify : compare each shard with its checksum before the first of its rows is read, and the manifest and the table
        of rows when the store is opened.

    Threads may share it; it may be pickled, for worker processes, which open the files for themselves.

    Raises
    ------
    LessFastError
        if the folder is not a store, a newer less_fast wrote it, or shards are missing.
    CorruptStoreError
        if the manifest is damaged; later, if a shard that is asked for is. Other shards stay readable.
    """

    def __init__(self, path: PathOrUrl, *, allow_partial: bool = False, verify: bool = False) -> None:
        self.path = to_path(path)
        self.manifest: dict[str, Any] = manifests.load_json(self.path)
        self._manifest = Manifest.from_dict(self.manifest, self.path / manifests.FILE_NAME)
        self._open: dict[int, Shard] = {}
        self._columns: dict[int, Shard] = {}  # of remote shards, without features
        self._lock = threading.Lock()  # of what is known of shards: the dicts and sets here
        self._allow_partial = allow_partial
        self._verify = verify
        self._n_rows_checked = False
        self._sound: set[int] = set()  # shards that were open once
        self._damaged: dict[int, str] = {}
        if verify and (problems := self._table_problems()):
            raise CorruptStoreError(problems[0])
        missing = self._manifest.n_shards - len(self._manifest.shards)
        if missing and not allow_partial:
            raise LessFastError(
                f"{self.path} is not finished: {missing} of {self._manifest.n_shards} shards are missing; "
                "repeat the command that makes it to resume, or go on without (allow_partial=True, --allow-partial)"
            )
        if missing:
            self.check_n_rows()
            warnings.warn(
                f"{self.path}: {missing} of {self._manifest.n_shards} shards are missing; their rows are left out",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return self._manifest.n_rows

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in (*_CACHED, "_lock", "_read_ahead")}
        return {**kept, "_open": {}, "_columns": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}: {len(self)} x {self.dim}, {self.dtype})"

    @property
    def dim(self) -> int:
        """K, the number of features of a row."""
        return self._manifest.dim

    @property
    def dtype(self) -> str:
        """The type that the features are stored in; they are always read as float32."""
        return self._manifest.dtype

    @property
    def facts(self) -> dict[str, Any]:
        """What the features were made with, as the writer was told."""
        return self._manifest.facts

    @property
    def projection(self) -> Projection:
        """The projection the features were made with; raises LessFastError if the store names none that is."""
        if not isinstance(self.facts.get("projection"), dict):
            raise LessFastError(f"{self.path} does not say which projection its features were made with")
        try:
            return Projection.from_dict(self.facts["projection"])
        except LessFastError as error:
            raise LessFastError(f"{self.path}: {str(error)[:300]}") from None

    @cached_property
    def rows(self) -> Rows:
        """Ids, datasets and subtasks, in row order."""
        return Rows.read(self.path / manifests.ROWS_NAME, len(self))

    @property
    def rows_hash(self) -> str:
        """SHA-256 of :attr:`rows`; equal hashes mean the same ids, datasets and subtasks in the same order."""
        return self._manifest.rows_hash

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """:class:`Status` of every row, uint8 (N,)."""
        return self._column("status")

    @cached_property
    def norms(self) -> Float32:
        """Euclidean norm of every row before it was rounded to the store's dtype, float32 (N,); 0 unless OK."""
        return self._column("norms")

    @cached_property
    def n_tokens(self) -> NDArray[np.int32]:
        """Tokens of every example, int32 (N,)."""
        return self._column("n_tokens")

    @cached_property
    def n_labels(self) -> NDArray[np.int32]:
        """Labels that count in every example's loss, int32 (N,)."""
        return self._column("n_labels")

    def __getitem__(self, index: int | slice | NDArray[Any] | list[int]) -> Float32:
        """Features as a new float32 array: (K,) for an integer, (n, K) for a slice, an integer array or a mask (N,)."""
        if isinstance(index, (int, np.integer)):
            return self[np.array([index])][0]
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._range(start, max(start, stop)) if step == 1 else self._gather(np.arange(start, stop, step))
        indices = np.asarray(index)
        if indices.dtype == bool:
            if indices.shape != (len(self),):
                raise IndexError(f"mask has shape {indices.shape}, expected {(len(self),)}")
            return self._gather(np.flatnonzero(indices))
        if indices.ndim != 1 or not (np.issubdtype(indices.dtype, np.integer) or indices.size == 0):
            raise IndexError(f"expected integers in one dimension, got {indices.dtype} {indices.shape}")
        rows = indices.astype(np.int64)
        if ((rows < -len(self)) | (rows >= len(self))).any():
            raise IndexError(f"row out of range for a store of {len(self)} rows")
        return self._gather(np.where(rows < 0, rows + len(self), rows))

    def blocks(self, n_rows: int) -> Iterator[tuple[int, Float32]]:
        """The whole store in order: (first row, features of at most ``n_rows`` rows)."""
        for start in range(0, len(self), n_rows):
            yield start, self[start : start + n_rows]

    @property
    def shard_size(self) -> int:
        """Rows per shard; the last one may have fewer."""
        return self._manifest.shard_size

    @property
    def verifies(self) -> bool:
        """Whether shards are compared with their checksums as they are first read."""
        return self._verify

    @property
    def damaged(self) -> list[str]:
        """One line for each shard that was found damaged so far; only a store opened with allow_partial goes on."""
        return [self._damaged[shard] for shard in sorted(self._damaged)]

    def stored(self, start: int, stop: int) -> StoredRows | None:
        """Rows [start, stop), which lie in one shard, without decoding them; None where the shard is missing.

        Raises CorruptStoreError if the shard is damaged and the store was not opened with allow_partial.
        """
        number = start // self.shard_size
        first, last = self._manifest.bounds(number)
        if not first <= start < stop <= last:
            raise IndexError(f"rows {start} to {stop} do not lie in one shard of {self.shard_size} rows")
        shard = self._shard(number)
        if shard is None:
            return None
        rows = slice(start - first, stop - first)
        scale = shard.tensors["scale"][rows] if self._manifest.codec.scaled else None
        codes, norms, status = (shard.tensors[name][rows] for name in ("features", "norms", "status"))
        return StoredRows(start, stop, codes, scale, norms, status, shard.tensors.get("center"))

    def verify(self) -> Verification:
        """Read every file and compare it with its checksum."""
        problems = self._table_problems()
        for shard in range(self._manifest.n_shards):
            entry = self._manifest.shards.get(shard)
            if entry is None:
                problems.append(f"{self.path / manifests.shard_file(shard)}: not written yet")
                continue
            try:
                self._map(entry, check=True)
            except CorruptStoreError as error:
                problems.append(str(error))
        return Verification(self.path, self._manifest.n_shards, problems)

    def require_intact(self) -> None:
        """Raise CorruptStoreError naming what :meth:`verify` finds damaged."""
        if problems := self.verify().problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise CorruptStoreError(f"{problems[0]}{more}")

    def _table_problems(self) -> list[str]:
        problems = []
        if not manifests.checksum_holds(self.manifest):
            file = self.path / manifests.FILE_NAME
            problems.append(f"{file}: altered since it was written (its checksum differs); make the store again")
        file, expected = self.path / manifests.ROWS_NAME, self._manifest.rows_sha256
        try:
            if (found := sha256_of(file)) != expected:
                problems.append(f"{file}: damaged (SHA-256 is {found}, expected {shown(expected)}); {_MAKE_AGAIN}")
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}; {_MAKE_AGAIN}")
        return problems

    def _map(self, entry: ShardEntry, *, check: bool, columns_only: bool = False) -> Shard:
        checksum = entry.sha256 if check else None
        path, codec = self.path / entry.file, self._manifest.codec
        return open_shard(path, codec, self.dim, entry.start, entry.stop, checksum, columns_only=columns_only)

    @cached_property
    def _read_ahead(self) -> ReadAhead:
        return ReadAhead()

    def _fetch(self, number: int) -> Shard:
        return self._map(self._manifest.shards[number], check=self._to_check(number))

    def _to_check(self, number: int) -> bool:
        return self._verify and number not in self._sound

    def _shard(self, number: int, *, columns_only: bool = False) -> Shard | None:
        """An open shard, or None where it is missing. Few stay open: a map holds a file descriptor.

        ``columns_only``: its features are not needed, and need not be fetched.
        """
        remote = isinstance(self.path, RemotePath)
        with self._lock:
            if number in self._open:
                return self._open[number]
            if columns_only and number in self._columns:
                return self._columns[number]
            entry = self._manifest.shards.get(number)
            if entry is None or number in self._damaged:
                return None
        try:
            if not remote or columns_only:
                shard = self._map(entry, check=self._to_check(number), columns_only=columns_only)
            else:
                known = range(number + 1, self._manifest.n_shards)
                following = [other for other in known[:_OPEN_SHARDS] if other in self._manifest.shards]
                shard = self._read_ahead.take(number, following, self._fetch)
        except CorruptStoreError as error:
            if not self._allow_partial or (remote and isinstance(error.__cause__, OSError)):
                raise  # a server that can't be reached says nothing of its files
            self._leave_out(number, entry, str(error))
            return None
        with self._lock:
            if remote and columns_only:
                # Copies of what came with features, to be compared with a checksum: a view would keep those.
                columns = {name: np.array(values) for name, values in shard.tensors.items() if name != "features"}
                self._columns[number] = Shard(columns, shard.metadata)
                return self._columns[number]
            self._sound.add(number)
            self._open[number] = shard
            if len(self._open) > (_FETCHED_SHARDS if remote else _OPEN_SHARDS):
                del self._open[next(iter(self._open))]
        return shard

    def _leave_out(self, number: int, entry: ShardEntry, reason: str) -> None:
        self.check_n_rows()
        with self._lock:
            known = number in self._damaged
            self._damaged[number] = reason
            self._columns.pop(number, None)
            for name in _CACHED[1:]:
                self.__dict__.pop(name, None)  # they may have been read while the shard was still whole
        if not known:
            warnings.warn(f"{reason}; rows {entry.start} to {entry.stop} are left out", stacklevel=_frames_within())

    def check_n_rows(self) -> None:
        """Raise CorruptStoreError unless the table of rows vouches for their number, as missing shards do not."""
        if not self._n_rows_checked:
            check_rows(self.path / manifests.ROWS_NAME, len(self))
            self._n_rows_checked = isinstance(self.path, RemotePath)  # those are fetched whole

    def _check_dim(self, number: int) -> None:
        """Open shard ``number``, or any other if that is missing: memory is asked for by a dim that a file has."""
        if self._shard(number) or self._sound or any(self._shard(other) for other in list(self._manifest.shards)):
            return
        raise LessFastError(f"{self.path} has no shard that can be read; repeat the command that makes it")

    def _column(self, name: str) -> Array:
        spec = shard_tensors(self._manifest.codec, 0, self.dim)[name]
        parts = [np.empty(0, spec.dtype)]
        if isinstance(self.path, RemotePath):
            with ThreadPoolExecutor(_FETCHES if self._verify else _REQUESTS, "less_fast-columns") as threads:
                for _ in threads.map(lambda number: self._shard(number, columns_only=True), self._manifest.shards):
                    pass
        for number in range(self._manifest.n_shards):
            start, stop = self._manifest.bounds(number)
            shard = self._shard(number, columns_only=True)
            absent = Status.MISSING if name == "status" else 0
            # np.array, because a view would keep its shard's map open.
            parts.append(np.full(stop - start, absent, spec.dtype) if shard is None else np.array(shard.tensors[name]))
        return np.concatenate(parts)

    def _range(self, start: int, stop: int) -> Float32:
        if start < stop:
            self._check_dim(start // self.shard_size)
        out = np.zeros((stop - start, self.dim), np.float32)
        row = start
        while row < stop:
            number = row // self.shard_size
            first, last = self._manifest.bounds(number)
            end = min(last, stop)
            if shard := self._shard(number):
                rows = slice(row - first, end - first)
                self._manifest.codec.decode(shard.tensors, rows, out[row - start : end - start])
            row = end
        return out

    def _gather(self, rows: NDArray[np.int64]) -> Float32:
        numbers = rows // self.shard_size
        if len(rows):
            self._check_dim(int(numbers[0]))
        out = np.zeros((len(rows), self.dim), np.float32)
        for number in np.unique(numbers).tolist():
            if shard := self._shard(number):
                (places,) = np.nonzero(numbers == number)
                part = np.empty((len(places), self.dim), np.float32)
                self._manifest.codec.decode(shard.tensors, rows[places] - self._manifest.bounds(number)[0], part)
                out[places] = part
        return out


def _frames_within() -> int:
    """The ``stacklevel`` with which a caller's warning is laid to the first frame outside of this module."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals["__name__"] in (__name__, "functools"):
        frame, level = frame.f_back, level + 1
    return level
