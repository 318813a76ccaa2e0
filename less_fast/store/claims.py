"""``Claims``: which shards of a shared store are being made, and by whom; and the turns at its manifest.

A claim keeps two processes from making the same shard twice. That would do no harm, since both would write the same
bytes: so where a file system has no locks, as remote ones have none, every claim is granted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from less_fast.errors import LessFastError
from less_fast.paths import AnyPath
from less_fast.store.files import fcntl

CLAIMS_NAME = ".claims"
# The byte that stands for the manifest; shards have those from 0 on, of which there are fewer.
_MANIFEST = 1 << 30
# The locks are the process's, so that its threads and objects don't keep each other out.
_turn = threading.Lock()


class Claims:
    """The claims of this process on the shards of the store in ``folder``: locks on bytes of one file.

    Byte i is shard i. The system lets go of a process's locks when it ends, however it ends; a child that it leaves
    behind inherits none.
    """

    def __init__(self, folder: AnyPath) -> None:
        self._path = folder / CLAIMS_NAME
        self._file: BinaryIO | None = None
        if isinstance(self._path, Path):
            if fcntl is None:
                raise LessFastError(f"{folder}: several processes can share a store on POSIX systems only")
            self._file = open(self._path, "ab")  # noqa: SIM115  # held until close
        self._held: set[int] = set()
        self.in_vain = self._file is None  # whether others don't know of them, nor of turns

    def take(self, shard: int) -> bool:
        """Claim a shard; False if another process, or this one, has done so."""
        if shard in self._held:
            return False
        try:
            if self._file is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            self.in_vain = True
        self._held.add(shard)
        return True

    def drop(self, shard: int) -> None:
        """Let others claim a shard; does nothing where it is not this process's."""
        if shard in self._held:
            self._lock(fcntl.LOCK_UN, shard)
            self._held.discard(shard)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block no other process (or thread) that asks for its turn reads or writes the manifest."""
        with _turn:
            self._lock(fcntl.LOCK_EX, _MANIFEST)
            try:
                yield
            finally:
                self._lock(fcntl.LOCK_UN, _MANIFEST)

    def _lock(self, operation: int, byte: int) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, operation, 1, byte)

    def close(self) -> None:
        """Drop all claims; a second call does nothing."""
        if self._file is None:
            return
        with _turn:  # closing any descriptor of a file drops the process's locks on it
            self._file.close()
        if self.in_vain:
            self._path.unlink(missing_ok=True)
