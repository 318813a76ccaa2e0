"""Selected examples as parquet: the same examples when read again, with all that their source said besides."""

from __future__ import annotations

import datetime
import errno
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from less_fast.data import load_examples, parquet
from less_fast.errors import LessFastError

USER, REPLY = {"role": "user", "content": "Grüße, 世界"}, {"role": "assistant", "content": ""}
ROWS: list[dict[str, Any]] = [
    {"dataset": "a", "id": "a0", "subtask": "greetings", "messages": [USER, REPLY], "score": 0.5, "tags": ["x", "y"]},
    {"id": 7, "messages": [{**USER, "name": "ann", "weight": 1}, REPLY], "score": 1, "nested": {"n": [1, 2]}},
    {"prompt": "2 + 2 =", "completion": " 4", "messages": None, "tags": [], "mixed": 3},
    {"prompt": "", "completion": "", "messages": [USER], "subtask": 3, "mixed": ["three"], "empty": {}},
    {"prompt": "unused", "messages": [REPLY], "large": 2**70, "half": "\ud800", "\ud800": "half", "": "no name"},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_read_again_they_are_the_same_examples(tmp_path: Path) -> None:
    examples = load_examples(write_jsonl(tmp_path / "pool.jsonl", ROWS))
    for rows in ([0, 1, 2, 3, 4], [4, 2, 2, 0], [1], [2]):
        examples.write_parquet(rows, tmp_path / "out.parquet")
        again = load_examples(tmp_path / "out.parquet")
        assert list(again) == [examples[row] for row in rows]
        assert again.fingerprint == examples.take(rows).fingerprint
    assert again.ids == ["2"] and again.datasets == ["pool"]  # the defaults, which a new file would give otherwise


def test_other_fields_are_kept(tmp_path: Path) -> None:
    load_examples(write_jsonl(tmp_path / "pool.jsonl", ROWS)).write_parquet(range(5), tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    found = {name: table[name].to_pylist() for name in table.column_names}
    absent = [None] * 3
    assert found["score"] == [0.5, 1.0, *absent]
    assert found["tags"] == [["x", "y"], None, [], None, None]
    assert found["nested"] == [None, {"n": [1, 2]}, *absent]
    # No type of parquet holds these: JSON text.
    assert [value and json.loads(value) for value in found["mixed"]] == [None, None, 3, ["three"], None]
    assert found["empty"] == [*absent, "{}", None]
    assert [json.loads(found[name][4]) for name in ("large", "half")] == [2**70, "\ud800"]
    assert found["\\ud800"][4] == "half" and found[""][4] == "no name"
    # What an example does not use is kept where it has the form of the column.
    assert found["prompt"] == [None, None, "2 + 2 =", "", "unused"]
    assert found["messages"][3] == [{**USER, "name": None, "weight": None}]
    assert found["messages"][1] == [{**USER, "name": "ann", "weight": 1}, {**REPLY, "name": None, "weight": None}]
    assert found["messages"][2] is None
    assert table.column_names[:6] == ["dataset", "id", "subtask", "messages", "prompt", "completion"]


def test_columns_that_no_row_has_are_left_out(tmp_path: Path) -> None:
    examples = load_examples(write_jsonl(tmp_path / "pool.jsonl", ROWS))
    examples.write_parquet([0], tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").column_names == [
        *("dataset", "id", "subtask", "messages", "score", "tags")
    ]
    examples.write_parquet([], tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert (table.column_names, len(table)) == (["dataset", "id"], 0)


def test_malformed_messages_that_are_not_used_are_left_out(tmp_path: Path) -> None:
    pairs: list[Any] = ["text", [3], [{"role": "user"}], [{"role": 1, "content": "c"}], {"role": "user"}]
    rows = [{"prompt": "p", "completion": "c", "messages": messages} for messages in pairs]
    examples = load_examples(write_jsonl(tmp_path / "pool.jsonl", rows))
    examples.write_parquet(range(5), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["dataset", "id", "prompt", "completion"]
    assert load_examples(tmp_path / "out.parquet").fingerprint == examples.fingerprint


def test_all_kinds_of_sources_in_one_file(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 2, 6, 12)
    pq.write_table(
        pa.table({"prompt": ["p"], "completion": ["c"], "when": [when], "raw": [b"\xff"]}), tmp_path / "in.parquet"
    )
    saved = datasets.Dataset.from_list([{"messages": [USER, REPLY], "score": 2.5}])
    saved.save_to_disk(tmp_path / "saved")
    sources = [write_jsonl(tmp_path / "pool.jsonl", ROWS[:2]), tmp_path / "in.parquet", tmp_path / "saved"]
    examples = load_examples(sources)
    examples.write_parquet([3, 0, 2, 1], tmp_path / "out.parquet")
    again = load_examples(tmp_path / "out.parquet")
    assert list(again) == [examples[row] for row in (3, 0, 2, 1)]
    assert again.datasets == ["saved", "a", "in", "pool"]
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["when"].to_pylist() == [None, None, when, None] and table["raw"].to_pylist()[2] == b"\xff"
    assert table["score"].to_pylist() == [2.5, 0.5, None, 1.0]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
LOOSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}, optional={"x": LOOSE}
    ),
    min_size=1,
    max_size=3,
)
LABELS = {"dataset": TEXT, "id": TEXT | st.integers(), "subtask": TEXT | st.none(), "more": LOOSE, "\x00": LOOSE}
EXAMPLE = st.fixed_dictionaries({"messages": MESSAGES}, optional={**LABELS, "prompt": LOOSE}) | st.fixed_dictionaries(
    {"prompt": TEXT, "completion": TEXT}, optional={**LABELS, "messages": LOOSE | MESSAGES}
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(EXAMPLE, min_size=1, max_size=4))
def test_whatever_the_rows_hold(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for source in (rows, write_jsonl(tmp_path / "pool.jsonl", rows)):
        examples = load_examples(source)
        examples.write_parquet(range(len(rows)), tmp_path / "out.parquet")
        assert load_examples(tmp_path / "out.parquet").fingerprint == examples.fingerprint


def test_more_text_than_a_string_array_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_STRING_BYTES", 20)
    examples = load_examples(ROWS[:2])
    examples.write_parquet([0, 1], tmp_path / "out.parquet")
    message = pq.read_schema(tmp_path / "out.parquet").field("messages").type.value_type
    assert message.field("content").type == pa.large_string()
    assert load_examples(tmp_path / "out.parquet").fingerprint == examples.fingerprint


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "pool.parquet"
    load_examples(ROWS[:3]).write_parquet([0, 1, 2], source)
    whole = source.read_bytes()
    examples = load_examples(ROWS[:3])
    out = tmp_path / "out.parquet"
    for rows, path, reason in (
        ([3], out, "row 3 is not one of the 3 examples"),
        ([0], tmp_path, r"is a folder; expected the name of a \.parquet file"),
        ([0], tmp_path / "no" / "out.parquet", r"cannot be written \(No such file or directory\)"),
    ):
        with pytest.raises(LessFastError, match=reason):
            examples.write_parquet(rows, path)
    lines = write_jsonl(tmp_path / "pool.jsonl", ROWS[:3])
    loaded = load_examples(lines)
    for own in (loaded, load_examples(source)):
        for write in (own.write_parquet, own.write_lines):
            with pytest.raises(LessFastError, match="is a source of these examples and would be overwritten"):
                write([0], lines if own is loaded else source)
    write_jsonl(lines, ROWS[1:3])
    with pytest.raises(LessFastError, match="changed since it was loaded"):
        loaded.write_parquet([0], out)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LessFastError, match=r"cannot be written \(No space left on device\)"):
        examples.write_parquet([0], source)
    assert source.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool.jsonl", "pool.parquet"]
