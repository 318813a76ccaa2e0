"""``StoreWriter``: makes a feature store shard by shard, alone or with other processes, and goes on after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.paths import PathOrUrl, RemotePath, to_path
from less_fast.store import manifest as manifests
from less_fast.store.claims import CLAIMS_NAME, Claims
from less_fast.store.codec import Array
from less_fast.store.files import (
    LOCK_NAME,
    TEMPORARY_SUFFIX,
    FolderLock,
    atomic_file,
    check_free_space,
    failed_write,
    open_regular,
    remove_temporaries,
    sha256_of,
    sha256_of_open,
    size_of_open,
    sizes_in,
    sync_folder,
)
from less_fast.store.manifest import Manifest, ShardEntry, differences, shard_file
from less_fast.store.reader import FeatureStore
from less_fast.store.rows import Rows
from less_fast.store.shard import Status, encode_shard, open_shard, shard_bytes, shard_tensors, write_shard
from less_fast.store.strict_json import parse_json

_MAX_DIFFERENCES = 8
# Seconds in which a process that shared the store has cleaned up behind itself.
_PATIENCE = 5.0


class StoreWriter:
    """Creates the store at ``path``, or re-opens it to write what is still missing.

    Parameters
    ----------
    path : the store's folder, or its URL (``s3://…``); made, with its parents, if it is not there.
    facts : what the features are made with, as JSON values. A store is only resumed with the same ones.
    rows : id, dataset and subtask of every row, in dataset order.
    dim : K.
    dtype : ``float32``, ``float16``, ``bfloat16``, ``int8`` or ``1bit``.
    shard_size : rows per shard; the last shard may have fewer.
    shared : let other processes, whose writers are shared too, make the same store at the same time. Each asks with
        :meth:`claim` which shards are its own, and with :meth:`refresh` what the others have finished. A remote store
        is always shared, and without locks: two writers may make the same shard, with the same bytes.

    Raises
    ------
    LessFastError
        if the folder holds something else, was begun with other settings (each one is named, old -> new), is being
        written by another process, or the disk has too little room for what is missing.

    Whatever instant a writer is killed at, the next one with the same arguments, given the same features, makes a store
    that is the same in every byte; so do several that share it.
    """

    def __init__(
        self,
        path: PathOrUrl,
        facts: Mapping[str, Any],
        rows: Rows,
        *,
        dim: int,
        dtype: str,
        shard_size: int,
        shared: bool = False,
    ) -> None:
        self.path = to_path(path)
        self._lock: FolderLock | None = None
        self._claims: Claims | None = None
        plain_facts = json.loads(json.dumps(dict(facts), allow_nan=False))
        table = rows.to_parquet()
        wanted = Manifest(len(rows), dim, dtype, shard_size, plain_facts, rows.hash, hashlib.sha256(table).hexdigest())
        try:
            self._check_room(wanted, len(table))
            if isinstance(self.path, Path):
                self.path.mkdir(parents=True, exist_ok=True)
                sync_folder(self.path.parent)
                self._lock = FolderLock(self.path, shared=shared, patience=_PATIENCE if shared else 0.0)
            try:
                self._claims = Claims(self.path) if shared or self._lock is None else None
                with self._turn():
                    self._manifest = self._open(wanted, table)
            except BaseException:
                self.release()
                raise
        except OSError as error:
            raise failed_write(self.path, error, "nothing that was finished is lost") from error

    def _check_room(self, wanted: Manifest, table_bytes: int) -> None:
        windows = [wanted.bounds(shard) for shard in range(wanted.n_shards)]
        needed = sum(shard_bytes(wanted.codec, stop - start, wanted.dim) for start, stop in windows)
        there = sizes_in(self.path / manifests.SHARDS_NAME)
        done = sum(size for name, size in there.items() if not name.endswith(TEMPORARY_SUFFIX))
        check_free_space(self.path, needed + table_bytes - done)

    def _open(self, wanted: Manifest, table: bytes) -> Manifest:
        """With the lock and the turn: create or adopt what is in the folder, and bring manifest and rows up to date."""
        # One listing, so that a remote store that another process begins meanwhile is either seen whole or not at all.
        names = set(os.listdir(self.path)) if isinstance(self.path, Path) else set(self.path.sizes())
        begun = manifests.FILE_NAME in names
        if begun:
            found = Manifest.read(self.path)
            self._check_same(found, wanted)
        else:
            ours = {LOCK_NAME, CLAIMS_NAME, manifests.FILE_NAME + TEMPORARY_SUFFIX}
            if foreign := sorted(names - ours):
                raise LessFastError(f"{self.path} holds {foreign[0]} and is not a feature store; choose another folder")
            found = wanted
        if self._claims is None:
            self._clean()
        # The manifest comes first: with it there, whatever else lies in the folder is known to be ours.
        if not begun:
            wanted.write(self.path)
        if isinstance(self.path, Path):
            (self.path / manifests.SHARDS_NAME).mkdir(exist_ok=True)
        rows_path = self.path / manifests.ROWS_NAME
        if not rows_path.exists() or sha256_of(rows_path) != wanted.rows_sha256:
            with atomic_file(rows_path) as file:
                file.write(table)
        manifest = replace(wanted, shards=self._shards_on_disk(found))
        if manifest != found:
            manifest.write(self.path)
        return manifest

    def _clean(self) -> None:
        """Remove what killed writers left, with nobody else at the store."""
        assert isinstance(self.path, Path)
        remove_temporaries(self.path)
        remove_temporaries(self.path / manifests.SHARDS_NAME)
        (self.path / CLAIMS_NAME).unlink(missing_ok=True)

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._claims is None else self._claims.turn()

    def _check_same(self, found: Manifest, wanted: Manifest) -> None:
        lines = differences(found.settings(), wanted.settings())
        if lines:
            more = len(lines) - _MAX_DIFFERENCES
            text = "; ".join(lines[:_MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise LessFastError(
                f"{self.path} was begun with other settings (old -> new): {text}; "
                "resume with the old ones, or choose another folder"
            )

    def _shards_on_disk(self, found: Manifest) -> dict[int, ShardEntry]:
        """The table of the shards that are whole: listed ones of the right size, and whole ones not listed yet."""
        shards: dict[int, ShardEntry] = {}
        sizes = {
            f"{manifests.SHARDS_NAME}/{name}": n for name, n in sizes_in(self.path / manifests.SHARDS_NAME).items()
        }
        for shard in range(found.n_shards):
            listed = found.shards.get(shard)
            file = listed.file if listed else shard_file(shard)
            if listed and sizes.get(file) == listed.bytes:
                shards[shard] = listed
            elif file in sizes:
                shards.update(self._adopt(found, shard, file))
            elif listed:
                warnings.warn(f"{self.path / file} is missing; it will be made again", stacklevel=4)
        return shards

    def _adopt(self, found: Manifest, shard: int, file: str) -> dict[int, ShardEntry]:
        """The entry of a shard that lies in the folder; none, and the file is gone, where it is damaged.

        Raises OSError where a remote one cannot be read, which may be whole.
        """
        try:
            return {shard: self._entry(found, shard, file)}
        except CorruptStoreError as error:
            if isinstance(self.path, RemotePath) and isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            warnings.warn(f"{self.path / file} is damaged; it will be made again", stacklevel=5)
            (self.path / file).unlink(missing_ok=True)
            return {}

    def _entry(self, found: Manifest, shard: int, file: str) -> ShardEntry:
        path = self.path / file
        start, stop = found.bounds(shard)
        metadata = open_shard(path, found.codec, found.dim, start, stop, columns_only=True).metadata
        try:
            facts = parse_json(metadata["facts"])
            if not isinstance(facts, dict):
                raise ValueError
        except (KeyError, ValueError):
            raise CorruptStoreError(f"{path}: its metadata is not that of shard {shard}") from None
        with open_regular(path) as opened:
            size = size_of_open(opened)
            return ShardEntry(file, start, stop, sha256_of_open(opened), size, facts)

    def pending(self) -> list[int]:
        """Numbers of the shards that are not there yet, ascending."""
        return self._manifest.pending

    def misses(self, shard: int) -> bool:
        """Whether a shard is not known to be there."""
        return 0 <= shard < self._manifest.n_shards and shard not in self._manifest.shards

    def claim(self, shard: int) -> bool:
        """Whether this writer may make a shard: it is not there, and no other process is at it.

        The claim lasts until the shard is written, :meth:`give_up`, or the end of this writer or its process.
        """
        if self._claims is None or not self.misses(shard):
            return self.misses(shard)
        if not self._claims.take(shard):
            return False
        if (self.path / shard_file(shard)).exists():  # finished since the manifest was last read
            self._claims.drop(shard)
            return False
        return True

    def give_up(self, shard: int) -> None:
        """Let other processes claim a shard that this one will not write."""
        if self._claims is not None:
            self._claims.drop(shard)

    def refresh(self) -> None:
        """Take notice of the shards that other processes have finished since, and list those of the killed ones."""
        if self._claims is None:
            return
        claimed: list[int] = []
        try:
            with self._turn():
                there = sizes_in(self.path / manifests.SHARDS_NAME)
                found, entries = self._found(), {}
                for shard in found.pending:
                    file = shard_file(shard)
                    if Path(file).name in there and self._claims.take(shard):
                        claimed.append(shard)
                        entries.update(self._adopt(found, shard, file))
                self._list(found, entries)
        except OSError as error:
            raise failed_write(self.path, error, "nothing that was finished is lost") from error
        finally:
            for shard in claimed:
                self._claims.drop(shard)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        return self._manifest.bounds(shard)

    def shard_facts(self) -> dict[int, dict[str, Any]]:
        """The facts given with each shard that is there, by its number."""
        return {shard: dict(entry.facts) for shard, entry in self._manifest.shards.items()}

    def write(
        self,
        shard: int,
        features: ArrayLike,
        status: ArrayLike,
        n_tokens: ArrayLike,
        n_labels: ArrayLike,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Put a pending shard on the disk: whole and durable when this returns, not there at all if it raises.

        ``features`` float32 (n, K) in dataset order; ``status`` uint8 (n,), see :class:`Status`; ``n_tokens`` and
        ``n_labels`` int32 (n,). Rows that are not OK are stored as zeros; OK rows that are not finite become
        NON_FINITE. ``facts``: JSON values about this shard alone. Raises LessFastError if the disk is full.
        """
        self.write_encoded(shard, self._encode(shard, features, status, n_tokens, n_labels), facts)

    def put(
        self,
        shard: int,
        features: ArrayLike,
        status: ArrayLike,
        n_tokens: ArrayLike,
        n_labels: ArrayLike,
        facts: Mapping[str, Any] | None = None,
    ) -> ShardEntry | None:
        """As :meth:`write`, for a process that leaves the manifest to another, which is to :meth:`enlist` the entry.

        None where another process has put the shard there in the meantime.
        """
        try:
            return self._put(shard, self._encode(shard, features, status, n_tokens, n_labels), facts)
        finally:
            self.give_up(shard)

    def write_encoded(self, shard: int, tensors: Mapping[str, Array], facts: Mapping[str, Any] | None = None) -> None:
        """As :meth:`write`, for the tensors of :func:`~less_fast.store.shard.shard_tensors` as the file holds them."""
        try:
            entry = self._put(shard, tensors, facts)
            if entry is not None:
                self.enlist({shard: entry})
        finally:
            self.give_up(shard)

    def enlist(self, entries: Mapping[int, ShardEntry]) -> None:
        """Add shards that were :meth:`put` there, by this process or another, to the manifest's table."""
        try:
            with self._turn():
                self._list(self._found(), entries)
        except OSError as error:
            raise failed_write(self.path / manifests.FILE_NAME, error, self._finished()) from error

    def _encode(
        self, shard: int, features: ArrayLike, status: ArrayLike, n_tokens: ArrayLike, n_labels: ArrayLike
    ) -> dict[str, Array]:
        start, stop = self._pending_bounds(shard)
        arrays: dict[str, Array] = {
            "features": np.asarray(features, np.float32),
            "status": np.asarray(status, np.uint8),
            "n_tokens": np.asarray(n_tokens, np.int32),
            "n_labels": np.asarray(n_labels, np.int32),
        }
        for name, array in arrays.items():
            shape = (stop - start, self._manifest.dim) if name == "features" else (stop - start,)
            if array.shape != shape:
                raise LessFastError(f"{name} of shard {shard} have shape {array.shape}; expected {shape}")
        if (arrays["status"] > Status.NON_FINITE).any():
            raise LessFastError(f"status of shard {shard} holds {arrays['status'].max()}; expected 0, 1 or 2")
        return {**arrays, **encode_shard(self._manifest.codec, arrays["features"], arrays["status"])}

    def _put(self, shard: int, tensors: Mapping[str, Array], facts: Mapping[str, Any] | None) -> ShardEntry | None:
        """Write the file of a pending shard; None where claims are in vain and another process has been faster."""
        start, stop = self._pending_bounds(shard)
        plain_facts = json.loads(json.dumps(dict(facts or {}), allow_nan=False))
        metadata = {"start": str(start), "stop": str(stop), "facts": json.dumps(plain_facts, sort_keys=True)}
        specs = shard_tensors(self._manifest.codec, stop - start, self._manifest.dim)
        for name, spec in specs.items():
            if tensors[name].shape != spec.shape:
                raise LessFastError(f"{name} of shard {shard} have shape {tensors[name].shape}; expected {spec.shape}")
        path = self.path / shard_file(shard)
        try:
            if self._claims is not None and self._claims.in_vain:
                self._found()  # or else a store begun anew with other settings would take this shard for its own
            if self._claims is not None and path.exists():
                return None
            sha256, size = write_shard(path, tensors, specs, metadata)
        except OSError as error:
            raise failed_write(path, error, self._finished()) from error
        return ShardEntry(shard_file(shard), start, stop, sha256, size, plain_facts)

    def _finished(self) -> str:
        return (
            f"{self._manifest.n_shards - len(self.pending())} of {self._manifest.n_shards} shards are finished and stay"
        )

    def _found(self) -> Manifest:
        """The manifest as it is now, which others may have added to."""
        if self._claims is None:
            return self._manifest
        found = Manifest.read(self.path)
        self._check_same(found, self._manifest)
        return found

    def _list(self, found: Manifest, entries: Mapping[int, ShardEntry]) -> None:
        # Without turns, what another process read before this one wrote may have taken the place of what was written.
        known = self._manifest.shards if self._claims is not None and self._claims.in_vain else {}
        manifest = replace(self._manifest, shards={**known, **found.shards, **entries})
        if entries:
            manifest.write(self.path)
        self._manifest = manifest

    def _pending_bounds(self, shard: int) -> tuple[int, int]:
        known = self._claims is not None and shard in self._manifest.shards  # where claims are in vain
        if not self.misses(shard) and not known:
            raise LessFastError(f"shard {shard} of {self.path} is not pending")
        return self.bounds(shard)

    def close(self, *, allow_partial: bool = False) -> FeatureStore:
        """Let go of the store and open it for reading; raises LessFastError if shards are missing and may not be."""
        if self._claims is not None and self._claims.in_vain:
            self.refresh()  # of two who wrote the manifest at a time, one may have left out the other's shard
        self.release()
        return FeatureStore(self.path, allow_partial=allow_partial)

    def release(self) -> None:
        """Let go of the store, finished or not; a second call does nothing. The last to share it cleans up."""
        if self._claims is not None:
            self._claims.close()
            if self._lock is not None and self._lock.end_sharing():
                self._clean()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
