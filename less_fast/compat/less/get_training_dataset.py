"""``get_training_dataset``: JSON Lines files as LESS tokenises them for training, a ``datasets.Dataset``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from less_fast.compat.less.tokens import TEMPLATE
from less_fast.data import Encoded, encode_all, load_examples

_ROWS_PER_CHUNK = 1024
_COLUMNS = ("dataset", "id", "subtask", "messages", "prompt", "completion")


def get_training_dataset(
    train_files: str | PathLike[str] | Sequence[str | PathLike[str]],
    tokenizer: Any,
    max_seq_length: int,
    sample_percentage: float = 1.0,
    seed: int = 0,
) -> Any:
    """The files' rows in order, with ``input_ids``, ``labels`` and ``attention_mask``, in torch's format.

    ``sample_percentage``: the fraction of the rows that is drawn, the same rows as in LESS for the same ``seed``.
    The columns ``dataset``, ``id``, ``subtask``, ``messages``, ``prompt`` and ``completion`` stay where there are any.
    Raises LessFastError that names the file and line of a row that cannot serve.
    """
    from less_fast.warmup import draw_subset

    files = [train_files] if isinstance(train_files, (str, PathLike)) else list(train_files)
    examples = load_examples(files)
    kept = examples.take(draw_subset(len(examples), sample_percentage, seed))
    rows = list(kept)
    chunks = (rows[start : start + _ROWS_PER_CHUNK] for start in range(0, len(rows), _ROWS_PER_CHUNK))
    columns = {name: [row.get(name) for row in rows] for name in _COLUMNS}
    dataset = token_dataset(
        (encode_all(chunk, tokenizer, TEMPLATE, max_seq_length) for chunk in chunks),
        {name: values for name, values in columns.items() if any(value is not None for value in values)},
        f"{kept.fingerprint} {max_seq_length}",
    )
    dataset.set_format("torch")
    return dataset


def token_dataset(chunks: Iterable[Sequence[Encoded]], columns: Mapping[str, Sequence[Any]], identity: Any) -> Any:
    """A ``datasets.Dataset`` of columns, and of tokens that come chunk by chunk; ``identity`` makes its fingerprint."""
    import datasets
    import pyarrow as pa

    kind = pa.list_(pa.int64())
    tokens: dict[str, list[Any]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for chunk in chunks:
        tokens["input_ids"].append(pa.array([example.input_ids for example in chunk], kind))
        tokens["labels"].append(pa.array([example.labels for example in chunk], kind))
        tokens["attention_mask"].append(pa.array([[1] * len(example.input_ids) for example in chunk], kind))
    arrays = {name: pa.chunked_array(parts, kind) for name, parts in tokens.items()}
    table = pa.table({**{name: pa.array(values) for name, values in columns.items()}, **arrays})
    return datasets.Dataset(table, fingerprint=datasets.fingerprint.Hasher.hash(identity))
