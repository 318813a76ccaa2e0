"""``TokenSource``: examples that can be had as tokens by the window, from files as they are needed or from batches."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from less_fast.data import Encoded, Examples, encode_all
from less_fast.errors import LessFastError
from less_fast.extraction import tokenizer_facts
from less_fast.store import Rows

TEMPLATE = "tulu"
_COLUMNS = ("input_ids", "labels", "attention_mask")


@dataclass(frozen=True)
class TokenSource:
    """N examples. ``encode`` gives those with the numbers of a range; ``facts`` (JSON) identify them and their tokens.

    ``max_length``: no example has more tokens.
    """

    rows: Rows
    encode: Callable[[range], list[Encoded]]
    facts: dict[str, Any]
    max_length: int

    def __len__(self) -> int:
        return len(self.rows)


def from_examples(examples: Examples, tokenizer: Any, max_length: int) -> TokenSource:
    """Training examples in LESS's format, tokenised window by window."""
    encode_all([], tokenizer, TEMPLATE, max_length)  # a length that cannot serve: an error at once
    return TokenSource(
        Rows(examples.ids, examples.datasets, examples.subtasks),
        lambda window: encode_all([examples[i] for i in window], tokenizer, TEMPLATE, max_length),
        {
            "examples": examples.fingerprint,
            "tokenizer": tokenizer_facts(tokenizer),
            "template": TEMPLATE,
            "max_length": max_length,
        },
        max_length,
    )


def from_encoded(encoded: Sequence[Encoded], rows: Rows) -> TokenSource:
    """Examples that are tokens already."""
    table = _Table()
    for example in encoded:
        table.add(example.input_ids, example.labels, example.truncated)
    return table.source(rows)


def from_dataloader(dataloader: Iterable[Any], max_samples: int | None = None) -> TokenSource:
    """The examples of a loader of batches with ``input_ids``, ``labels`` and perhaps ``attention_mask``, (N, T) each.

    They are taken in the loader's order, padding left out; the first ``max_samples`` of them. Where it goes through a
    dataset in order, ``id``, ``dataset`` and ``subtask`` are the dataset's columns of these names.
    """
    table = _Table()
    for batch in dataloader:
        if missing := [name for name in _COLUMNS[:2] if name not in batch]:
            raise LessFastError(f"a batch of the dataloader has no {missing[0]!r}; it has {', '.join(batch)}")
        ids, labels = torch.as_tensor(batch["input_ids"]), torch.as_tensor(batch["labels"])
        mask = (
            torch.as_tensor(batch["attention_mask"]).bool()
            if "attention_mask" in batch
            else torch.ones_like(ids, dtype=torch.bool)
        )
        for tokens, targets, real in zip(ids, labels, mask):
            table.add(tokens[real].tolist(), targets[real].tolist())
            if len(table) == max_samples:
                break
        if len(table) == max_samples:
            break
    return table.source(_names(dataloader, len(table)))


def _names(dataloader: Any, n: int) -> Rows:
    dataset: Any = getattr(dataloader, "dataset", None)
    in_order = isinstance(getattr(dataloader, "sampler", None), torch.utils.data.SequentialSampler)
    columns = set(getattr(dataset, "column_names", None) or ()) if in_order else set()

    def column(name: str, default: Callable[[int], Any]) -> list[Any]:
        if name not in columns:
            return [default(i) for i in range(n)]
        values = list(dataset.with_format(None)[name])  # a column that the format hides is there too
        return [default(i) if value is None else str(value) for i, value in enumerate(values[:n])]

    return Rows(column("id", str), column("dataset", lambda _: "examples"), column("subtask", lambda _: None))


class _Table:
    """Tokens of many examples in 4 bytes each."""

    def __init__(self) -> None:
        self._ids, self._labels = array("i"), array("i")
        self._ends, self._truncated = array("q", [0]), array("b")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, input_ids: Sequence[int], labels: Sequence[int], truncated: bool = False) -> None:
        self._ids.extend(input_ids)
        self._labels.extend(labels)
        self._ends.append(len(self._ids))
        self._truncated.append(truncated)

    def source(self, rows: Rows) -> TokenSource:
        if not len(self):
            raise LessFastError("there are no examples; expected at least one")
        digest = hashlib.sha256()
        for part in (self._ends, self._ids, self._labels):
            digest.update(part.tobytes())
        longest = max(end - start for start, end in zip(self._ends, self._ends[1:]))
        return TokenSource(rows, self._encode, {"examples": digest.hexdigest()}, max(longest, 1))

    def _encode(self, window: range) -> list[Encoded]:
        encoded = []
        for i in window:
            at = slice(self._ends[i], self._ends[i + 1])
            encoded.append(Encoded(self._ids[at].tolist(), self._labels[at].tolist(), bool(self._truncated[i])))
        return encoded
