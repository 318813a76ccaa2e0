"""``Stores``: the driver's view of the stores that actors make."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from less_fast.errors import LessFastError
from less_fast.store import FeatureStore, Rows, StoreWriter
from less_fast.store.manifest import ShardEntry
from less_fast.store.sharing import claim_shards, missing_shards

# How often finished shards are listed at most, and what part of the time goes into that at most.
_LIST_SECONDS = 1.0
_LIST_SHARE = 0.05
# How often a driver that has nothing left to do looks whether other processes have finished or died.
_POLL_SECONDS = 0.5


class Stores:
    """The stores as the driver sees them: it alone adds to their manifests while actors put shards in place.

    Nobody knows what they are made with till an actor has loaded it; the first one to do so creates them.
    """

    def __init__(self, stack: ExitStack, paths: list[str], rows: Rows, shard_size: int, shards: range) -> None:
        self._stack = stack
        self._paths = paths
        self._rows = rows
        self._shard_size = shard_size
        self.shards = shards
        self._writers: list[StoreWriter] = []
        self._unlisted: list[dict[int, ShardEntry]] = [{} for _ in paths]
        self._list_after = 0.0

    def open_begun(self) -> None:
        """Join the writers of the stores, where all of them have been created."""
        with suppress(LessFastError):  # an actor says what is wrong with what is there, if anything is
            self.open()

    def open(self) -> None:
        """Join the writers of the stores, which an actor has created."""
        if self._writers:
            return
        arguments = [self._arguments(path) for path in self._paths]
        self._writers = [
            self._stack.enter_context(StoreWriter(path, **made, shared=True))
            for path, made in zip(self._paths, arguments)
        ]

    def _arguments(self, path: str) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that shards are missing is known
            found = FeatureStore(path, allow_partial=True)
        sizes = {"dim": found.dim, "dtype": found.dtype, "shard_size": found.manifest["shard_size"]}
        return {"facts": found.facts, "rows": self._rows, **sizes}

    def add(self, shard: int, entries: Sequence[dict[str, Any] | None]) -> None:
        """Take notice of a shard that is in place: for every store its entry, None where somebody else has made it."""
        for unlisted, entry in zip(self._unlisted, entries):
            if entry is not None:
                unlisted[shard] = ShardEntry(**entry)
        if time.monotonic() >= self._list_after:
            self._list()

    def n_rows(self, shards: Iterable[int]) -> int:
        size = self._shard_size
        return sum(min(size, len(self._rows) - shard * size) for shard in shards)

    def _list(self) -> None:
        began = time.monotonic()
        for writer, unlisted in zip(self._writers, self._unlisted):
            # A network's file system may show a file late; a folder that is another one on each machine, never.
            path = writer.path
            seen = {n: e for n, e in unlisted.items() if not isinstance(path, Path) or (path / e.file).exists()}
            if seen:
                writer.enlist(seen)
            for shard in seen:
                del unlisted[shard]
        now = time.monotonic()
        self._list_after = now + max(_LIST_SECONDS, (now - began) / _LIST_SHARE)

    def missing(self) -> list[int]:
        """The shards that are not there; all of them before the stores are."""
        if not self._writers:
            return list(self.shards)
        self._list()
        return missing_shards(self._writers, self.shards)

    def missing_unclaimed(self) -> list[int]:
        """Wait till a shard that is missing is nobody's, or none is missing; return what is missing."""
        while missing := self.missing():
            for claim in claim_shards(self._writers, missing):
                for writer in claim.writers:
                    writer.give_up(claim.shard)
                return missing
            time.sleep(_POLL_SECONDS)
        return missing

    def outstay(self, seconds: float) -> None:
        """Wait for actors that are about to end: the last to leave a store cleans up behind all."""
        deadline = time.monotonic() + seconds
        for path, writer in zip(self._paths, self._writers):
            writer.release()
            arguments = self._arguments(path)
            while time.monotonic() < deadline:
                try:
                    StoreWriter(path, **arguments).release()
                    break
                except LessFastError:
                    time.sleep(_POLL_SECONDS / 5)

    def close(self, *, allow_partial: bool) -> dict[str, FeatureStore]:
        return {path: writer.close(allow_partial=allow_partial) for path, writer in zip(self._paths, self._writers)}
