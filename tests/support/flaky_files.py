"""A remote file system for tests: ``flaky:///folder`` is a folder of this machine, seen through requests that fail.

It has no locks, no renames and no order of its listings, and writes whole files. What fails, and how often, is in the
environment, so that child processes see the same; they know the protocol by an entry point, as that of any package.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem, register_implementation

RATE = "FLAKY_RATE"  # share of the requests that fail, half of them after they were done
BROKEN = "FLAKY_BROKEN"  # "pipe .npy": these requests for paths that end so always fail
LOG = "FLAKY_LOG"  # a file that gets a line for each request
_PACKAGE = Path(__file__).parent


class LostRequestError(Exception):
    """An error of the file system's own, as many have: it is no OSError."""


class FlakyFileSystem(AbstractFileSystem):
    """Files below ``/``."""

    protocol = "flaky"
    cachable = False

    def _request(self, what: str, path: str, action: Any) -> Any:
        log, broken = os.environ.get(LOG), os.environ.get(BROKEN, "none of them").split()
        if log:
            with open(log, "a") as file:
                file.write(f"{what} {path}\n")
        lot = random.random() / max(float(os.environ.get(RATE, "0")), 1e-9)
        if lot < 0.5 or (what.startswith(broken[0]) and path.endswith(broken[-1])):
            raise LostRequestError(f"{what} went astray")
        done = action()
        if lot < 1.0:
            raise LostRequestError(f"the answer to {what} went astray")
        return done

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return dict(self._request("info", path, lambda: self._info(Path(self._strip_protocol(path)))))

    def _info(self, path: Path) -> dict[str, Any]:
        facts = path.stat()
        kind = "directory" if path.is_dir() else "file"
        return {"name": str(path), "size": facts.st_size, "type": kind, "changed": facts.st_mtime_ns}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        def listed() -> list[Any]:
            entries = [self._info(entry) for entry in Path(self._strip_protocol(path)).iterdir()]
            random.shuffle(entries)
            return entries if detail else [entry["name"] for entry in entries]

        return list(self._request("ls", path, listed))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        def read() -> bytes:
            with open(self._strip_protocol(path), "rb") as file:
                file.seek(start or 0)
                return file.read() if end is None else file.read(end - (start or 0))

        return bytes(self._request(f"cat {start}:{end}", path, read))

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        def write() -> None:
            place = Path(self._strip_protocol(path))
            temporary = place.with_name(f".{place.name}.{random.random()}")
            temporary.write_bytes(value)
            temporary.replace(place)

        self._request("pipe", path, write)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._request("makedirs", path, lambda: Path(self._strip_protocol(path)).mkdir(parents=True, exist_ok=exist_ok))

    def rm_file(self, path: str) -> None:
        self._request("rm", path, lambda: Path(self._strip_protocol(path)).unlink())


def register() -> None:
    """Make the protocol known in this process."""
    register_implementation("flaky", FlakyFileSystem, clobber=True)


def requests(folder: Path, what: str) -> list[str]:
    """The lines of the log of a ``flaky`` fixture's folder that begin so."""
    lines = (folder.parent / "requests.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(what)]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a child process that knows the protocol; ``folder`` gets what it is found by."""
    installed = folder / "flaky-1.dist-info"
    installed.mkdir(parents=True, exist_ok=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: flaky\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[fsspec.specs]\nflaky = flaky_files:FlakyFileSystem\n")
    paths = [str(folder), str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables}
