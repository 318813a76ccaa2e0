"""``get_dataset`` and ``get_dataloader``: LESS's validation sets, and targets of your own, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from less_fast.compat.less.get_training_dataset import token_dataset
from less_fast.compat.less.tasks import TASKS, Question, Style, questions
from less_fast.compat.less.tokens import TEMPLATE
from less_fast.data import IGNORED, Encoded, collate, encode_all, load_examples
from less_fast.errors import LessFastError
from less_fast.store import Rows


def get_dataset(task: str, **kwargs: Any) -> Any:
    """A task's examples as a ``datasets.Dataset`` of ``input_ids``, ``labels`` and ``attention_mask``.

    Parameters are those of :func:`validation_tokens`. The columns ``id``, ``dataset`` and ``subtask`` are there too,
    but left out of rows, so that any collator for tokens takes them.
    """
    rows, encoded = validation_tokens(task, **kwargs)
    columns: dict[str, list[Any]] = {"id": rows.ids, "dataset": rows.datasets, "subtask": rows.subtasks}
    dataset = token_dataset([encoded], columns, [rows.hash, encoded])
    dataset.set_format(columns=["input_ids", "labels", "attention_mask"])
    return dataset


def get_dataloader(dataset: Any, tokenizer: Any, batch_size: int = 1) -> DataLoader[Any]:
    """A loader of the rows in order: ``input_ids``, ``labels`` and ``attention_mask``, padded on the right."""
    pad = tokenizer.pad_token_id
    return DataLoader(dataset, batch_size=batch_size, collate_fn=partial(_collate, pad_id=0 if pad is None else pad))


def validation_tokens(
    task: str,
    *,
    tokenizer: Any,
    max_length: int,
    data_dir: str | PathLike[str] | None = None,
    use_chat_format: bool = True,
    chat_format: str = "tulu",
    zh: bool = False,
    task_file: str | PathLike[str] | None = None,
) -> tuple[Rows, list[Encoded]]:
    """Names and tokens of a task's examples, in LESS's order.

    Parameters
    ----------
    task : ``bbh``, ``tydiqa`` or ``mmlu``, read from ``data_dir``; or the path of a file of examples.
    use_chat_format, chat_format, zh : for these three: see LESS.
    task_file : a file of examples, whatever ``task`` is called.

    A file's examples are training examples (``messages``, or ``prompt`` and ``completion``) and encoded as such; their
    field ``subtask`` says what belongs together. Raises LessFastError where there is no such task or file.
    """
    file = task_file if task_file is not None else task if task not in TASKS else None
    if file is not None:
        if task_file is None and not Path(file).exists():
            raise LessFastError(f"task {task}: no such file, and none of the tasks {', '.join(TASKS)}")
        examples = load_examples(str(file))
        encoded = encode_all(list(examples), tokenizer, TEMPLATE, max_length)
        return Rows(examples.ids, examples.datasets, examples.subtasks), encoded
    if data_dir is None:
        raise LessFastError(f"task {task} needs data_dir, the folder of LESS's data with eval/{task} in it")
    found = questions(task, Path(data_dir), Style(use_chat_format, chat_format), zh=zh)
    return _rows(task, found), [_encode(question, tokenizer, max_length) for question in found]


def _rows(task: str, found: Sequence[Question]) -> Rows:
    seen: dict[str, int] = {}
    ids = []
    for question in found:
        number = seen[question.subtask] = seen.get(question.subtask, -1) + 1
        ids.append(f"{question.subtask}_{number}")
    return Rows(ids, [task] * len(found), [question.subtask for question in found])


def _encode(question: Question, tokenizer: Any, max_length: int) -> Encoded:
    """As many labels are masked as the query alone has tokens, whether a token crosses its end or not, as in LESS."""
    text = question.query + question.answer
    whole = tokenizer(text, verbose=False)["input_ids"]
    ids, masked = (
        tokenizer(part, max_length=max_length, truncation=True)["input_ids"] for part in (text, question.query)
    )
    n = min(len(masked), len(ids))
    return Encoded(ids, [IGNORED] * n + ids[n:], len(whole) > max_length)


def _collate(rows: Sequence[Any], pad_id: int) -> dict[str, Any]:
    return collate([Encoded(_list(row["input_ids"]), _list(row["labels"]), False) for row in rows], pad_id)


def _list(tokens: Any) -> list[int]:
    return tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
