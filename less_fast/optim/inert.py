"""Unpickling without running anything: whatever is not plain data becomes an inert object that only remembers."""

from __future__ import annotations

import collections
import io
import pickle
import reprlib
from pathlib import Path
from typing import Any

import torch

from less_fast.errors import LessFastError

_LONGEST_REASON = 300


class Inert:
    """Stands in for an object of any class: ``args`` it was called with, its attributes where it has a dictionary."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Unpickler(pickle._Unpickler):
    # The one written in Python: its memo is a dictionary, where that in C is an array as long as the file's word.
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return Inert


def unpickle(file: Path) -> Any:
    """A plain pickle's content. Raises LessFastError where the file is none."""
    try:
        # From memory, so that a length given in the file allocates no more than the file has.
        return _Unpickler(io.BytesIO(file.read_bytes())).load()
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
    except Exception as error:  # a damaged file may raise anything
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> LessFastError:
    """The error for a file that cannot be read, with the reader's own reason."""
    # torch's text on what it does not load goes on to advise loading it all the same.
    said = [] if isinstance(error, pickle.UnpicklingError) else str(error).strip().splitlines()[:1]
    reason = ": ".join([type(error).__name__, *said])[:_LONGEST_REASON]
    return LessFastError(f"{file}: not a readable optimizer file ({reason}); copy or save the checkpoint again")


class _Short(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if x is None or isinstance(x, (bool, float)) else type(x).__name__


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxlist = 2, 20


def shown(value: Any) -> str:
    """A value from a file as an error shows it: lists that hold each other have exponentially long representations."""
    return _SHORT.repr(value)
