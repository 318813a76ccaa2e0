"""``FeatureStore``: reads a store's features, norms, statuses and rows, and checks its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.projection import Projection
from less_fast.store import manifest as manifests
from less_fast.store.codec import Array, Float32
from less_fast.store.files import sha256_of
from less_fast.store.manifest import Manifest, ShardEntry
from less_fast.store.rows import Rows
from less_fast.store.shard import Shard, Status, open_shard, shard_tensors


@dataclass(frozen=True)
class Verification:
    """What :meth:`FeatureStore.verify` found: one line per problem, each naming the file."""

    path: Path
    n_shards: int
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems


class FeatureStore:
    """The features of N examples, in dataset order, read from the disk as they are asked for.

    Parameters
    ----------
    path : the store's folder.
    allow_partial : open it although shards are missing; their rows read as zeros with status ``MISSING``.

    Raises
    ------
    LessFastError
        if the folder is not a store, a newer less_fast wrote it, or shards are missing.
    CorruptStoreError
        if the manifest is damaged; later, if a shard that is asked for is. Other shards stay readable.
    """

    def __init__(self, path: str | PathLike[str], *, allow_partial: bool = False) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = manifests.load_json(self.path)
        self._manifest = Manifest.from_dict(self.manifest, self.path / manifests.FILE_NAME)
        self._open: tuple[int, Shard] | None = None
        missing = self._manifest.n_shards - len(self._manifest.shards)
        if missing and not allow_partial:
            raise LessFastError(
                f"{self.path} is not finished: {missing} of {self._manifest.n_shards} shards are missing; "
                "repeat the command that makes it to resume, or open it with allow_partial=True"
            )
        if missing:
            _ = self.rows  # checks n_rows, which nothing else vouches for where shards are missing

    def __len__(self) -> int:
        return self._manifest.n_rows

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
        """The projection the features were made with; raises LessFastError if the store does not say."""
        if not isinstance(self.facts.get("projection"), dict):
            raise LessFastError(f"{self.path} does not say which projection its features were made with")
        return Projection.from_dict(self.facts["projection"])

    @cached_property
    def rows(self) -> Rows:
        """Ids, datasets and subtasks, in row order."""
        path = self.path / manifests.ROWS_NAME
        rows = Rows.read(path)
        if len(rows) != len(self):
            raise CorruptStoreError(f"{path} has {len(rows)} rows, but the manifest says {len(self)}")
        return rows

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

    def verify(self) -> Verification:
        """Read every file and compare it with its checksum."""
        problems = []
        if not manifests.checksum_holds(self.manifest):
            problems.append(f"{self.path / manifests.FILE_NAME}: altered since it was written (its checksum differs)")
        rows_path = self.path / manifests.ROWS_NAME
        problems += _checksum_problems(rows_path, self._manifest.rows_sha256)
        for shard in range(self._manifest.n_shards):
            entry = self._manifest.shards.get(shard)
            if entry is None:
                problems.append(f"{self.path / manifests.shard_file(shard)}: not written yet")
                continue
            problems += _checksum_problems(self.path / entry.file, entry.sha256) or self._structure_problems(entry)
        return Verification(self.path, self._manifest.n_shards, problems)

    def require_intact(self) -> None:
        """Raise CorruptStoreError naming what :meth:`verify` finds damaged."""
        if problems := self.verify().problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise CorruptStoreError(f"{problems[0]}{more}; remove the file and extract again to have it made anew")

    def _structure_problems(self, entry: ShardEntry) -> list[str]:
        try:
            self._map(entry)
        except CorruptStoreError as error:
            return [str(error)]
        return []

    def _map(self, entry: ShardEntry) -> Shard:
        return open_shard(
            self.path / entry.file, shard_tensors(self._manifest.codec, entry.stop - entry.start, self.dim)
        )

    def _shard(self, shard: int) -> Shard | None:
        """An open shard, or None where it is missing. One stays open: a map holds a file descriptor."""
        entry = self._manifest.shards.get(shard)
        if entry is None:
            return None
        if self._open is None or self._open[0] != shard:
            self._open = shard, self._map(entry)
        return self._open[1]

    def _column(self, name: str) -> Array:
        spec = shard_tensors(self._manifest.codec, 0, self.dim)[name]
        parts = [np.empty(0, spec.dtype)]
        for number in range(self._manifest.n_shards):
            start, stop = self._manifest.bounds(number)
            shard = self._shard(number)
            absent = Status.MISSING if name == "status" else 0
            # np.array, because a view would keep its shard's map open.
            parts.append(np.full(stop - start, absent, spec.dtype) if shard is None else np.array(shard.tensors[name]))
        return np.concatenate(parts)

    def _range(self, start: int, stop: int) -> Float32:
        if start < stop:
            self._shard(start // self._manifest.shard_size)  # a wrong dim is found out before memory is asked for
        out = np.zeros((stop - start, self.dim), np.float32)
        row = start
        while row < stop:
            number = row // self._manifest.shard_size
            first, last = self._manifest.bounds(number)
            end = min(last, stop)
            if shard := self._shard(number):
                rows = slice(row - first, end - first)
                self._manifest.codec.decode(shard.tensors, rows, out[row - start : end - start])
            row = end
        return out

    def _gather(self, rows: NDArray[np.int64]) -> Float32:
        numbers = rows // self._manifest.shard_size
        if len(rows):
            self._shard(int(numbers[0]))
        out = np.zeros((len(rows), self.dim), np.float32)
        for number in np.unique(numbers):
            if shard := self._shard(int(number)):
                (places,) = np.nonzero(numbers == number)
                part = np.empty((len(places), self.dim), np.float32)
                self._manifest.codec.decode(shard.tensors, rows[places] - self._manifest.bounds(int(number))[0], part)
                out[places] = part
        return out


def _checksum_problems(path: Path, expected: str) -> list[str]:
    try:
        found = sha256_of(path)
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    return [] if found == expected else [f"{path}: damaged (SHA-256 is {found}, expected {expected})"]
