"""What one example is: the checks that every row passes, and the fixed schema that all sources are brought to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from less_fast.errors import LessFastError

ROLES = ("system", "user", "assistant")
EXPECTED_FIELDS = "'messages', or 'prompt' and 'completion'"

_ROWS_PER_BATCH = 8192  # keeps every Arrow string chunk far below its 2 GiB limit
_SCHEMA = pa.schema(
    {
        "dataset": pa.string(),
        "id": pa.string(),
        "subtask": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "prompt": pa.string(),
        "completion": pa.string(),
    }
)
COLUMNS = tuple(_SCHEMA.names)


class Row(NamedTuple):
    """One checked example: either `messages`, or `prompt` and `completion`; the fields are those of the schema."""

    dataset: str
    id: str
    subtask: str | None
    messages: list[dict[str, str]] | None
    prompt: str | None
    completion: str | None


def check_row(row: object, dataset: str, row_id: str) -> Row:
    """Bring one mapping to a `Row`; `dataset` and `row_id` stand in for missing fields.

    A row with both forms counts as prompt and completion, as in LESS. Keys that LESS doesn't know are left out.
    Raises LessFastError with the reason alone; the caller knows the file and the line.
    """
    if not isinstance(row, Mapping):
        raise LessFastError(f"expected an object with fields, found {_kind(row)}")
    messages: list[dict[str, str]] | None = None
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        _check_text(prompt, "prompt")
        _check_text(completion, "completion")
    elif row.get("messages") is not None:
        messages = _check_messages(row["messages"])
        prompt = completion = None
    else:
        found = ", ".join(str(key) for key, value in row.items() if value is not None) or "no field at all"
        raise LessFastError(f"expected {EXPECTED_FIELDS}, found {found}")
    label = _label(row, "dataset")
    name = _label(row, "id")
    return Row(
        dataset if label is None else label,
        row_id if name is None else name,
        _label(row, "subtask"),
        messages,
        prompt,
        completion,
    )


def _check_messages(messages: object) -> list[dict[str, str]]:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise LessFastError(f"'messages' must be a list, found {_kind(messages)}")
    if not messages:
        raise LessFastError("'messages' is empty; an example needs at least one message")
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise LessFastError(f"message {number} must be an object with 'role' and 'content', found {_kind(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            found = "no role" if role is None else f"unknown role {role!r}"
            raise LessFastError(f"message {number} has {found}; expected one of {', '.join(ROLES)}")
        _check_text(content, f"content of message {number}")
        checked.append({"role": role, "content": content})
    return checked


def _check_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise LessFastError(f"{name} must be a string, found {_kind(value)}")


def _label(row: Mapping[str, Any], name: str) -> str | None:
    """A field that names something: text, or an integer that is read as text."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise LessFastError(f"'{name}' must be a string or an integer, found {_kind(value)}")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


class TableBuilder:
    """Gathers rows into Arrow batches of the fixed schema, and the SHA-256 of each row's content."""

    def __init__(self) -> None:
        self._pending: list[Row] = []
        self._batches: list[pa.RecordBatch] = []
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._digests) // 32

    def add(self, row: Row) -> None:
        """Append a row; raises LessFastError where its text has no UTF-8 form."""
        try:
            content = json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            surrogate = error.object[error.start]
            raise LessFastError(f"text holds an unpaired surrogate ({surrogate!r}), which is not a character") from None
        self._digests += hashlib.sha256(content).digest()
        self._pending.append(row)
        if len(self._pending) == _ROWS_PER_BATCH:
            self._flush()

    def finish(self) -> tuple[pa.Table, np.ndarray]:
        """The table of all rows, and their digests, uint8 (N, 32)."""
        self._flush()
        table = pa.Table.from_batches(self._batches, schema=_SCHEMA)
        return table, np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, 32)

    def _flush(self) -> None:
        if self._pending:
            columns = [pa.array(column, type=field.type) for column, field in zip(zip(*self._pending), _SCHEMA)]
            self._batches.append(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
            self._pending = []
