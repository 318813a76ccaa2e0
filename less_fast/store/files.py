"""Files that appear whole or not at all, the lock that keeps other writers out, and what a full disk looks like."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from less_fast.errors import LessFastError
from less_fast.paths import AnyPath, RemotePath

try:
    import fcntl
except ImportError:  # not on Windows: there the lock is left out
    fcntl = None  # type: ignore[assignment]

TEMPORARY_SUFFIX = ".tmp"
LOCK_NAME = ".lock"
_CREATE = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_LOCKED = (errno.EWOULDBLOCK, errno.EACCES)
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a link to nothing, or gone in the meantime
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_file(path: AnyPath) -> Iterator[BinaryIO]:
    """A file to write to that becomes ``path`` when the block ends well, and vanishes when it does not.

    The bytes are on the disk before the name is, and the name is before this returns: a crash at any instant leaves
    either the old file, or the new one, plus at most one ``*.tmp`` beside it, which the next writer takes over. Of two
    writers at a time each has a file of its own, and the last to end wins. A remote file is gathered in memory.
    """
    if isinstance(path, RemotePath):
        gathered = io.BytesIO()
        yield gathered
        path.write_bytes(gathered.getvalue())
        return
    temporary, file = _open_temporary(path)
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file; elsewhere it is locked until it has its name
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """An empty file beside ``path``, locked: ``{name}.tmp``, or, while another writer is at that one, a random name.

    Where nothing can be locked, nobody knows who is at which, and the name is always a random one.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    descriptor = os.open(temporary, _CREATE, 0o666)
    try:
        taken = _taken(descriptor, temporary)
    except OSError:
        taken = True
        temporary.unlink(missing_ok=True)
    if not taken:
        os.ftruncate(descriptor, 0)
    else:
        os.close(descriptor)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        descriptor = os.open(temporary, _CREATE | os.O_EXCL, 0o666)
    return temporary, os.fdopen(descriptor, "wb")


def _taken(descriptor: int, path: Path) -> bool:
    """Lock an open file; True if another writer holds it, or has already given it another name."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return not _is_file(descriptor, path)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that ``path`` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system lets one ask for it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers left in a folder; call it with the lock held."""
    for path in folder.glob("*" + TEMPORARY_SUFFIX):
        path.unlink(missing_ok=True)


def open_regular(path: AnyPath) -> BinaryIO:
    """Open a file for reading; OSError for a folder, and for a pipe or a device, which may block or never end.

    A remote file is fetched whole.
    """
    if isinstance(path, RemotePath):
        return io.BytesIO(path.read_bytes())
    descriptor = os.open(path, _READ)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def size_of_open(file: BinaryIO) -> int:
    """Bytes that an open file holds, whose position becomes 0."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def sha256_of(path: AnyPath) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open_regular(path) as file:
        return sha256_of_open(file)


def sha256_of_open(file: BinaryIO) -> str:
    """SHA-256 of the bytes of an open file from where it stands to its end, in hex."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sizes_in(folder: AnyPath) -> dict[str, int]:
    """Name -> bytes of all that lies in a folder; nothing where there is no such folder."""
    if isinstance(folder, RemotePath):
        return folder.sizes()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return {entry.name: size for entry in entries if (size := _size_of(entry)) is not None}
    return {}


def _size_of(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size
    except OSError as error:
        if error.errno not in _NOTHING:
            raise
        return None


def check_free_space(path: AnyPath, needed: int) -> None:
    """Raise LessFastError if the file system of ``path`` (there or not yet) has fewer than ``needed`` bytes free.

    What a remote one has is not known.
    """
    if isinstance(path, RemotePath):
        return
    free = _free_bytes(path)
    if free < needed:
        raise LessFastError(
            f"{path} needs {_size(needed)} more on the disk, but only {_size(free)} is free there; "
            "free some space, choose another folder, a smaller dtype or a smaller dim"
        )


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"


def _free_bytes(path: Path) -> int:
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def failed_write(path: AnyPath, error: OSError, outlook: str) -> LessFastError:
    """The error to raise for an ``OSError`` while writing ``path``; ``outlook`` says what is kept."""
    if error.errno in _DISK_FULL:
        left = "" if isinstance(path, RemotePath) else f" ({_size(_free_bytes(path))} free)"
        reason = f"the disk is full{left}"
        outlook += "; make room and repeat the command"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        reason = "it, or a part of its path, is a file, and a folder is expected"
    else:
        reason = error.strerror or str(error)
    return LessFastError(f"cannot write {path}: {reason}; {outlook}")


class FolderLock:
    """An advisory lock on a folder, held from construction until :meth:`release` or the process's end.

    ``shared``: beside other shared ones, where none is exclusive; and in vain on a file system without locks, which an
    exclusive one refuses. ``patience``: seconds to try for. Raises LessFastError if another process (or another object
    of this one) holds it.
    """

    def __init__(self, folder: Path, *, shared: bool = False, patience: float = 0.0) -> None:
        self._path = folder / LOCK_NAME
        self._shared = shared
        deadline = time.monotonic() + patience
        while (descriptor := self._try()) is None:
            if time.monotonic() >= deadline:
                alone = " alone" if shared else ""
                raise LessFastError(
                    f"{folder} is being written by another process{alone}; wait until it ends, or choose another folder"
                )
            time.sleep(0.02)
        self._descriptor: int | None = descriptor

    def _try(self) -> int | None:
        """The locked file, or None if another holds it."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _LOCKED or not self._shared:
                    os.close(descriptor)
                if error.errno in _LOCKED:
                    return None
                if not self._shared:
                    raise
            # The last holder may have removed the file between our open and our lock: then this lock is worth nothing.
            if _is_file(descriptor, self._path):
                return descriptor
            os.close(descriptor)

    def end_sharing(self) -> bool:
        """Make a shared lock exclusive, or let go of it where another process holds it too; whether it is exclusive."""
        self._shared = False
        if self._descriptor is None:
            return False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _LOCKED:
                os.close(self._descriptor)
                self._descriptor = None
            return False
        return True

    def release(self) -> None:
        """Let others in, and remove the lock file unless it is theirs too; a second call does nothing."""
        if self._shared:
            self.end_sharing()
        if self._descriptor is not None:
            # The folder may have been moved, and another one locked in its place.
            if _is_file(self._descriptor, self._path):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def is_locked(folder: Path) -> bool:
    """Whether another process holds the folder's lock for itself alone."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _LOCKED
    finally:
        os.close(descriptor)
    return False
