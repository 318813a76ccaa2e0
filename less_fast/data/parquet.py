"""Examples as a parquet table: the columns that ``load_examples`` reads, and whatever else their source says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

_NAMES = ("dataset", "id", "subtask")
_TEXTS = ("prompt", "completion")
_MESSAGE = ("role", "content")
_STRING_BYTES = 2**31 - 1  # what a string array can hold; a large_string array holds more
_NO_ARROW_FORM = (TypeError, ValueError, OverflowError, NotImplementedError)


def write_table(rows: Sequence[Mapping[str, Any]], raw: Sequence[Mapping[str, Any]], file: IO[bytes]) -> None:
    """Write examples so that reading the file gives the same ones.

    ``rows`` : the examples as `Examples` presents them. ``raw`` : the same rows with all fields of their source. A
    field is null in rows that lack it, and has no column where all do. Values that parquet has no common type for are
    written as JSON text.
    """
    others = dict.fromkeys(name for row in raw for name in row if name not in (*_NAMES, "messages", *_TEXTS))
    columns = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in _NAMES}
    columns["messages"] = _messages([_well_formed(row.get("messages")) for row in raw])
    for name in _TEXTS:
        texts = (row.get(name) for row in raw)
        columns[name] = pa.array([text if isinstance(text, str) else None for text in texts], pa.string())
    for name in others:
        columns[_column_name(name)] = _column([row.get(name) for row in raw])
    kept = {
        name: column for name, column in columns.items() if name in ("dataset", "id") or column.null_count < len(rows)
    }
    pq.write_table(pa.table(kept), file)


def _well_formed(messages: Any) -> Sequence[Mapping[str, Any]] | None:
    """The messages, or None where an example that does not use them has something else in their place."""
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        return None
    strings = all(isinstance(message.get(name), str) for message in messages for name in _MESSAGE)
    return messages if strings else None


def _messages(lists: Sequence[Sequence[Mapping[str, Any]] | None]) -> pa.Array:
    """A list of structs for every row, with a field for every key that any message has."""
    messages = [message for some in lists for message in some or ()]
    columns = {name: _strings([message[name] for message in messages]) for name in _MESSAGE}
    for name in dict.fromkeys(name for message in messages for name in message if name not in _MESSAGE):
        columns[name] = _column([message.get(name) for message in messages])
    starts = list(accumulate((len(some or ()) for some in lists), initial=0))
    offsets = [None if some is None else start for some, start in zip(lists, starts)]  # None: the row has no list
    structs = pa.StructArray.from_arrays(list(columns.values()), list(columns))
    return pa.ListArray.from_arrays(pa.array([*offsets, starts[-1]], pa.int32()), structs)


def _strings(texts: Sequence[str]) -> pa.Array:
    most = 4 * sum(map(len, texts))  # bytes of UTF-8
    return pa.array(texts, pa.string() if most <= _STRING_BYTES else pa.large_string())


def _column_name(name: Any) -> str:
    """The name, with escapes for what JSON lets it hold and parquet does not: control characters, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def _column(values: Sequence[Any]) -> pa.Array:
    """Values of the type that holds them all, or as JSON text where parquet has none."""
    with contextlib.suppress(*_NO_ARROW_FORM):
        column = pa.array(values)
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.schema([("column", column.type)]).empty_table(), buffer)
        if pq.read_schema(pa.BufferReader(buffer.getvalue())).field("column").type == column.type:
            return column
    return pa.array([None if value is None else json.dumps(value, default=str) for value in values], pa.string())
