"""JSON from files that nobody vouches for: read without surprises, and shown in errors without filling the screen."""

from __future__ import annotations

import json
import reprlib
from typing import Any

_DEEPEST = 64  # far below what Python's own recursion allows, so that whatever walks a value may recurse
_MOST_DIGITS = 20  # those of 2^64

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text, in UTF-8 if it is bytes.

    Raises ValueError for anything that readers of JSON take differently or choke on: a key that an object has twice,
    NaN and infinities, integers of more than 20 digits, lists and objects nested more than 64 deep, and text that is
    not JSON.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"nested more than {_DEEPEST} deep") from None
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for children in inner for child in children]
    return value


def shown(value: Any) -> str:
    """A value as an error shows it: one line of bounded length."""
    return _SHORT.repr(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer has more than {_MOST_DIGITS} digits")
    return int(digits)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON value")
