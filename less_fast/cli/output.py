"""What commands share: pure standard output, lists in options, and what a full disk looks like."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from less_fast.errors import LessFastError
from less_fast.paths import AnyPath, PathOrUrl, is_same_file, lies_in, to_path
from less_fast.workers import Worker

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# How libraries that write in Rust or C++ word it; they do not raise OSError.
_DISK_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "code: 28", "file write failed")


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Whatever libraries print while the work goes on belongs to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_warnings() -> None:
    """From now on a warning is one line on standard error, without the place in the code that it came from."""

    def print_one(message: Warning | str, *_: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = print_one  # type: ignore[assignment]  # the hook is passed more, by position


def show(result: Any, text: str, as_json: bool) -> None:
    """Print a result: as JSON, or the text. Of the processes that made it together, rank 0 does."""
    if Worker.from_environment().rank == 0:
        print(json.dumps(result, indent=2) if as_json else text)


def numbers(text: str | None, option: str) -> list[float] | None:
    """The numbers of an option such as ``0.4,0.3``."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LessFastError(
            f"{option} is {text!r}; expected numbers with commas between them, such as 0.6,0.4"
        ) from None


def n_bytes_of(memory: str) -> int:
    """The bytes that ``--memory`` names, such as 512M or 2G."""
    found = re.fullmatch(r"(\d+)\s*([KMG]?)(i?B)?", memory.strip(), re.IGNORECASE)
    if found is None:
        raise LessFastError(f"--memory is {memory!r}; expected a size such as 512M or 2G")
    return int(found[1]) * _UNITS[found[2].upper()]


def require_other_file(out: AnyPath | None, option: str, inputs: Iterable[PathOrUrl]) -> None:
    """Raise LessFastError where an output would replace an input, or lies in the folder of one."""
    for source in map(to_path, inputs):
        if out is None:
            return
        if lies_in(out, source):
            raise LessFastError(f"{option} {out} lies in {source}, which is read; choose another place")
        if is_same_file(out, source):
            raise LessFastError(f"{option} {out} is a file that is read; choose another name")


def require_local(folder: Path, option: str) -> None:
    """Raise LessFastError for a folder that was a URL before it became a Path."""
    try:
        to_path(folder)
    except LessFastError:
        raise LessFastError(f"{option} is {str(folder)!r}, a URL; expected a folder of this machine") from None


def named_files(values: Sequence[str]) -> dict[str, str] | list[str]:
    """``NAME=FILE`` values as a table; plain files stay a list. A mixture names the plain ones by their stems."""
    from less_fast.config import task_name

    pairs = [value.partition("=") for value in values]
    if not any(mark and "/" not in name for name, mark, _ in pairs):
        return list(values)
    named: dict[str, str] = {}
    for value, (name, mark, file) in zip(values, pairs):
        if not mark or "/" in name:
            name, file = task_name(value), value
        if name in named:
            raise LessFastError(
                f"two targets are named {name!r} ({named[name]} and {file}); give them names of their own"
            )
        named[name] = file
    return named


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that there is no room left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if any(words in str(error) for words in _DISK_FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
