"""Unpickling without running anything: whatever is not plain data becomes an inert object that only remembers."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import torch

from less_fast.errors import LessFastError


class Inert:
    """Stands in for an object of any class: ``args`` it was called with, its attributes where it has a dictionary."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return Inert


def unpickle(file: Path) -> Any:
    """A plain pickle's content. Raises LessFastError where the file is none."""
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise unreadable(file, error) from error


def load_inert(file: Path) -> Any:
    """A file of ``torch.save``, tensors mapped from disk, by torch's weights-only reader with stand-ins for classes.

    Raises LessFastError where the file is none.
    """
    try:
        names: list[tuple[Any, str] | Any] = [
            (Inert, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(file)
        ]
        with torch.serialization.safe_globals(names):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> LessFastError:
    """The error for a file that cannot be read, with the reader's own reason."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return LessFastError(f"{file}: not a readable optimizer file ({reason}); copy or save the checkpoint again")
