"""Paths that may be URLs: ``s3://…``, ``gs://…``, all that fsspec knows; requests that fail are tried again."""

from __future__ import annotations

import errno
import io
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TypeVar
from urllib.request import url2pathname

from less_fast.errors import LessFastError

logger = logging.getLogger("less_fast")

# A protocol has two letters at least: one is a drive.
_URL = re.compile(r"[a-z][a-z0-9+.-]+(::[a-z][a-z0-9+.-]+)*://.*", re.IGNORECASE | re.DOTALL)
_FLATTENED = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/).*", re.IGNORECASE | re.DOTALL)
_LOCAL = ("file", "local")
# A request is made so often, and before each further time there is a pause: seconds, doubled up to the longest.
_ATTEMPTS = 6
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
# Answers that another attempt would not change, as the errors of a local file system.
_FINAL: dict[type[Exception], int] = {
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    FileExistsError: errno.EEXIST,
    **dict.fromkeys((NotImplementedError, TypeError, AttributeError), errno.ENOTSUP),
}
_NOT_THERE = (FileNotFoundError, NotADirectoryError)
_READ_AHEAD = 4 << 20  # bytes of a remote file that are asked for at a time when it is read from front to back

_T = TypeVar("_T")


@dataclass(frozen=True)
class RemotePath:
    """A file or folder that fsspec reaches, with as much of ``pathlib.Path`` as is needed; safe to pickle.

    Requests that fail for reasons that may pass are repeated, with growing pauses. What fails for good is an OSError,
    whatever the file system's own errors are. A file is written with one request: it appears whole or not at all
    where the file system does that, as object stores do.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rstrip("/").rpartition("/")[0])

    def resolve(self) -> RemotePath:
        """The one spelling of the URL that equal paths share."""
        return RemotePath(self.url.rstrip("/"))

    def expanduser(self) -> RemotePath:
        return self

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Nothing: folders are made with the first file in them."""

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the path there."""
        from fsspec.core import url_to_fs

        try:
            place: tuple[Any, str] = url_to_fs(self.url)
        except (ImportError, TypeError, ValueError) as error:  # its settings, not a request
            raise LessFastError(f"{self.url} cannot be reached: {_first_line(error)}") from error
        return place

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def info(self) -> dict[str, Any]:
        """What the file system tells of a file or folder: ``size`` in bytes, ``type`` and more."""

        def ask(fs: Any, path: str) -> dict[str, Any]:
            fs.invalidate_cache(fs._parent(path))
            found: dict[str, Any] = fs.info(path)
            return found

        return self._tried(ask)

    def exists(self) -> bool:
        try:
            self.info()
        except _NOT_THERE:
            return False
        return True

    def is_file(self) -> bool:
        try:
            return self.info()["type"] == "file"
        except _NOT_THERE:
            return False

    def is_dir(self) -> bool:
        try:
            return self.info()["type"] == "directory"
        except _NOT_THERE:
            return False

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of what lies in a folder, 0 for folders; nothing where there is no such folder."""
        return {name: int(entry.get("size") or 0) for name, entry in self._entries().items()}

    def files(self) -> list[RemotePath]:
        """All files in a folder and in its folders."""
        found = []
        for name, entry in self._entries().items():
            if name in (".", "..") or os.path.basename(name) != name or os.path.splitdrive(name)[0]:
                raise LessFastError(f"{self.url} holds something named {name!r}, which no local folder can")
            found += (self / name).files() if entry["type"] == "directory" else [self / name]
        return found

    def _entries(self) -> dict[str, dict[str, Any]]:
        def ask(fs: Any, path: str) -> list[dict[str, Any]]:
            fs.invalidate_cache(path)
            found: list[dict[str, Any]] = fs.ls(path, detail=True)
            return found

        try:
            entries = self._tried(ask)
        except _NOT_THERE:
            return {}
        own = self._place[1].rstrip("/")
        # Object stores may list an empty file that stands for the folder.
        others = (entry for entry in entries if entry["name"].strip("/") != own.strip("/"))
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in others}

    def read_bytes(self, start: int | None = None, stop: int | None = None) -> bytes:
        """The file's bytes, or those from ``start`` on and before ``stop``; fewer where it ends before."""

        def read(fs: Any, path: str) -> bytes:
            found: bytes = fs.cat_file(path, start=start, end=stop)
            return found

        found = self._tried(read)
        if start is not None and stop is not None and len(found) > stop - start:
            return found[start:stop]  # a server that knows no ranges answers with the whole file
        return found

    def write_bytes(self, data: bytes) -> None:
        """Write the whole file, in place of one that is there."""

        def write(fs: Any, path: str) -> None:
            try:
                fs.pipe_file(path, data)
            except FileNotFoundError:
                # Where folders have to be made, they are; not so a bucket, which is the first of them.
                start = len(path) - len(path.lstrip("/"))
                fs.info(path[:start] + path[start:].partition("/")[0])
                fs.makedirs(fs._parent(path), exist_ok=True)
                fs.pipe_file(path, data)

        self._tried(write)

    def checksum(self) -> int:
        """A number that changes when the file does, without reading it."""

        def ask(fs: Any, path: str) -> int:
            fs.invalidate_cache(fs._parent(path))
            return int(fs.checksum(path))

        return self._tried(ask)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._tried(lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def open(self, read_ahead: int = _READ_AHEAD) -> BinaryIO:
        """The file for reading, fetched as it is read, ``read_ahead`` bytes at a time."""
        return io.BufferedReader(_RemoteFile(self), read_ahead)

    def _tried(self, request: Callable[[Any, str], _T]) -> _T:
        pause = _FIRST_PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return request(*self._place)
            except LessFastError:
                raise
            except tuple(_FINAL) as error:
                raise self._final(error) from error
            except Exception as error:  # each file system has errors of its own
                if attempt == _ATTEMPTS:
                    raise OSError(
                        getattr(error, "errno", None) or 0, f"{_first_line(error)}, {attempt} times", self.url
                    ) from error
                logger.warning("%s: %s; trying again", self.url, _first_line(error))
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError

    def _final(self, error: Exception) -> OSError:
        number = next(number for kind, number in _FINAL.items() if isinstance(error, kind))
        if number == errno.ENOTSUP:
            return OSError(number, f"its file system cannot do that ({_first_line(error)})", self.url)
        told = _first_line(error) if number == errno.EACCES else os.strerror(number)
        return OSError(number, getattr(error, "strerror", None) or told, self.url)


class _RemoteFile(io.RawIOBase):
    """A remote file's bytes, by ranges."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        size = path.info()["size"]
        if size is None:
            raise OSError(errno.ENOTSUP, "its server does not tell its size", path.url)
        self._size = int(size)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._path.read_bytes(self._at, stop)
        if not data:
            raise OSError(errno.EIO, f"it ends at {self._at} of {self._size} bytes", self._path.url)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


AnyPath = Path | RemotePath
# What is given by users: a URL as a string, or anything that names a local path.
PathOrUrl = str | os.PathLike[str] | RemotePath


def to_path(path: PathOrUrl) -> AnyPath:
    """The path that a name or a URL stands for; ``file://`` URLs are local.

    Raises LessFastError for a URL that is broken, or of a protocol that no installed package knows.
    """
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    if _URL.fullmatch(text):
        protocol, _, rest = text.partition("://")
        if protocol.lower() in _LOCAL:
            return Path(url2pathname(rest))
        if not rest.strip("/"):
            raise LessFastError(f"{text} names no bucket or folder; expected a URL such as {protocol}://bucket/name")
        if "::" in rest:
            raise LessFastError(f"{text} is a path within a path, which cannot be read; give one without '::' in it")
        from fsspec import get_filesystem_class

        try:
            for name in protocol.split("::"):
                get_filesystem_class(name)
        except (ImportError, ValueError) as error:
            raise LessFastError(f"{text} cannot be reached: {_first_line(error)}") from error
        return RemotePath(text)
    if (flattened := _FLATTENED.fullmatch(text)) and _is_protocol(flattened[1]) and not os.path.exists(text):
        raise LessFastError(f"{text!r} is a URL that has lost a slash, as pathlib.Path does to it; give it as a string")
    return Path(path)


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Within the block, a folder with what is at a URL; anything else, names on the hub included, stays as it is."""
    place = to_path(path) if "://" in path else None
    if not isinstance(place, RemotePath):
        yield path
        return
    files = place.files()
    if not files:
        raise LessFastError(f"{path}: there is no such folder, or it is empty")
    with TemporaryDirectory(prefix="less_fast-") as folder:
        for file in files:
            target = Path(folder, *file.url.removeprefix(place.resolve().url).strip("/").split("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open() as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, _READ_AHEAD)
        yield folder


def is_same_file(one: AnyPath, other: AnyPath) -> bool:
    """Whether two paths are of the same file; False where one of them is of none."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.exists() and other.exists() and one.samefile(other)
    return one.resolve() == other.resolve()


def lies_in(path: AnyPath, folder: AnyPath) -> bool:
    """Whether a path is, or is below, a folder that is there."""
    if isinstance(path, Path) and isinstance(folder, Path):
        return folder.is_dir() and path.resolve().is_relative_to(folder.resolve())
    return f"{path}/".startswith(f"{str(folder).rstrip('/')}/") and folder.is_dir()


def _is_protocol(name: str) -> bool:
    from fsspec import available_protocols

    return name.lower() in available_protocols()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
