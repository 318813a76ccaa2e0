"""Examples: what comes in, the bytes that go out, and every refusal with the line it is about."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from less_fast.data import Examples, load_examples
from less_fast.errors import LessFastError

DATA = os.environ.get("LESS_FAST_DATA")

ROWS = [
    {"dataset": "a", "id": "a0", "messages": [{"role": "user", "content": "Grüße, 世界"}], "subtask": "greetings"},
    {"dataset": "a", "id": "a1", "messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "Да"}]},
    {"dataset": "b", "id": "b0", "prompt": "2 + 2 =", "completion": " 4"},
]
# Spacing, escapes, an odd line end and unknown keys, all of which have to survive; and no newline at the end.
LINES = [
    '{"dataset":"a",   "id": "a0", "subtask": "greetings", "messages": [{"role":"user","content":"Grüße, \\u4e16界"}]}',
    '  {"extra": {"n": [1, 2.50, null]}, "dataset": "a", "id": "a1", "messages": [{"role": "user", "content": "", '
    '"name": "x"}, {"role": "assistant", "content": "Да"}]}\r',
    '{"id": "b0", "dataset": "b", "prompt": "2 + 2 =", "completion": " 4", "messages": null, "tags": []}',
]


def write(path: Path, text: str | bytes) -> Path:
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_dataset(rows) -> datasets.Dataset:
    """With every column of any row, as the library takes the columns of the first."""
    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows])


def refusal(source, **options) -> str:
    with pytest.raises(LessFastError) as error:
        load_examples(source, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.jsonl.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_source_lines_come_back_byte_for_byte(tmp_path, name, mark):
    source = write(tmp_path / name, mark + f"{LINES[0]}\n\n{LINES[1]}\n \t\n{LINES[2]}".encode())
    examples = load_examples(source)
    assert list(examples) == ROWS
    assert [examples[i] for i in range(3)] == ROWS
    assert examples[np.int64(2)] == ROWS[2]
    examples.write_lines([2, 0, 1, 0], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes().decode() == "".join(LINES[i] + "\n" for i in (2, 0, 1, 0))
    examples.take([1, 2]).take(np.array([1])).write_lines([0], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes().decode() == LINES[2] + "\n"
    examples.write_lines([], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_columns_and_take(tmp_path):
    examples = load_examples(ROWS)
    assert (examples.ids, examples.datasets) == (["a0", "a1", "b0"], ["a", "a", "b"])
    assert examples.subtasks == ["greetings", None, None]
    some = examples.take([2, 0, 2])
    assert (len(some), some.ids, list(some)) == (3, ["b0", "a0", "b0"], [ROWS[2], ROWS[0], ROWS[2]])
    assert some.fingerprint == load_examples([ROWS[2], ROWS[0], ROWS[2]]).fingerprint
    assert len(examples.take([])) == 0
    with pytest.raises(IndexError):
        examples[3]


@pytest.mark.parametrize("indices", [[0, 3], [-1], np.array([True, False, True]), [0.0], [[0, 1]]])
def test_rows_that_are_not_there_are_refused(indices, tmp_path):
    examples = load_examples(ROWS)
    with pytest.raises(LessFastError, match=r"^row"):
        examples.take(indices)
    with pytest.raises(LessFastError, match=r"^row"):
        examples.write_lines(indices, tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


def test_missing_names_get_defaults_and_numbers_become_text(tmp_path):
    lines = ['{"prompt": "a", "completion": "b"}', '{"id": 7, "subtask": 3, "prompt": "c", "completion": "d"}']
    source = write(tmp_path / "my.pool.jsonl.gz", "\n" + "\n".join(lines))
    examples = load_examples(source)
    assert (examples.datasets, examples.ids, examples.subtasks) == (["my.pool"] * 2, ["0", "7"], [None, "3"])
    examples.write_lines([1, 0], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == f"{lines[1]}\n{lines[0]}\n"


def test_all_sources_give_the_same_examples(tmp_path):
    dataset = as_dataset(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"validation": dataset}).save_to_disk(tmp_path / "dict")
    dataset.to_parquet(tmp_path / "pool.parquet")
    sources = [
        write(tmp_path / "pool.jsonl", "\n".join(LINES)),
        str(write(tmp_path / "pool.jsonl.gz", "\n".join(LINES))),
        tmp_path / "pool.parquet",
        str(tmp_path / "saved"),
        tmp_path / "dict",
        dataset,
        datasets.DatasetDict({"test": dataset.select([0]), "train": dataset}),
        ROWS,
    ]
    loaded = [load_examples(source) for source in sources]
    for source, examples in zip(sources, loaded):
        assert list(examples) == ROWS, source
        examples.write_lines([1, 0, 2], tmp_path / "out.jsonl")
        again = load_examples(tmp_path / "out.jsonl")
        assert list(again) == [ROWS[1], ROWS[0], ROWS[2]], source
    assert "Grüße" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert len({examples.fingerprint for examples in loaded}) == 1
    assert load_examples(loaded[0]) is loaded[0]


def test_fingerprint_changes_with_content_and_order():
    changed = [dict(ROWS[0], id="a9"), dict(ROWS[0], subtask=None), {**ROWS[0], "messages": ROWS[1]["messages"]}]
    tables = [ROWS, ROWS[::-1], ROWS[:2], *([row, *ROWS[1:]] for row in changed)]
    assert len({load_examples(rows).fingerprint for rows in tables}) == len(tables)


def test_rows_that_are_not_json_lines_keep_their_other_fields(tmp_path):
    when = pa.array([np.datetime64("2024-02-06", "s")])
    table = pa.table({"prompt": ["p"], "completion": ["c"], "score": [0.5], "when": when})
    pq.write_table(table, tmp_path / "pool.parquet")
    examples = load_examples(tmp_path / "pool.parquet")
    assert examples[0] == {"dataset": "pool", "id": "0", "prompt": "p", "completion": "c"}
    examples.write_lines([0], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "prompt": "p",
        "completion": "c",
        "score": 0.5,
        "when": "2024-02-06 00:00:00",
    }


def test_files_are_joined_in_order_up_to_a_limit(tmp_path):
    first = write(tmp_path / "first.jsonl", "\n".join(LINES[:2]))
    second = write(tmp_path / "second.jsonl.gz", LINES[2] + "\n" + LINES[0] + "\n")
    as_dataset(ROWS[1:]).to_parquet(tmp_path / "third.parquet")
    sources = [first, str(second), tmp_path / "third.parquet"]
    assert load_examples(sources).ids == ["a0", "a1", "b0", "a0", "a1", "b0"]
    for limit in range(1, 8):
        assert load_examples(sources, limit=limit).ids == ["a0", "a1", "b0", "a0", "a1", "b0"][:limit]
    load_examples(sources).write_lines([5, 3, 1, 2, 0], tmp_path / "out.jsonl")
    written = (tmp_path / "out.jsonl").read_bytes().decode().split("\n")
    assert json.loads(written[0]).items() >= ROWS[2].items()
    assert written[1:] == [LINES[0], LINES[1], LINES[2], LINES[0], ""]
    assert load_examples(load_examples(sources), limit=2).ids == ["a0", "a1"]
    assert "limit must be at least 1, found 0" in refusal(sources, limit=0)


def test_a_table_of_many_rows_keeps_its_order(tmp_path):
    lines = [json.dumps({"id": i, "prompt": "é" * (i % 7), "completion": str(i)}) for i in range(20_000)]
    examples = load_examples(write(tmp_path / "many.jsonl.gz", "\n".join(lines)))
    assert examples.ids == [str(i) for i in range(20_000)]
    chosen = [19_999, 0, 8192, 8191, 16_384]
    assert [examples[i]["completion"] for i in chosen] == [str(i) for i in chosen]
    examples.write_lines(chosen, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "".join(lines[i] + "\n" for i in chosen)


GOOD = '{"prompt": "p", "completion": "c"}'
USER = '{"role": "user", "content": "x"}'
BAD_LINES = [
    ('{"prompt": "p" "completion": "c"}', "not valid JSON (Expecting ',' delimiter at column 16)"),
    ('{"prompt": "p", "comp', "not valid JSON (Unterminated string starting at at column 17)"),
    ("[", "not valid JSON (Expecting value at column 2), and a JSON array is not JSON Lines"),
    (f"[{GOOD}]", "expected an object with fields, found a list"),
    ('{"a": ' + "[" * 100_000, "JSON that cannot be read"),
    ('{"n": ' + "1" * 5000 + "}", "JSON that cannot be read"),
    ("{}", "expected 'messages', or 'prompt' and 'completion', found no field at all"),
    ('{"prompt": "p", "text": "t"}', "expected 'messages', or 'prompt' and 'completion', found prompt, text"),
    ('{"id": "7", "messages": null}', "expected 'messages', or 'prompt' and 'completion', found id"),
    ('{"messages": []}', "'messages' is empty"),
    ('{"messages": "hello"}', "'messages' must be a list, found a str"),
    ('{"messages": ["hello"]}', "message 1 must be an object with 'role' and 'content', found a str"),
    (f'{{"messages": [{USER}, {{"content": "x"}}]}}', "message 2 has no role; expected one of system, user, assistant"),
    ('{"messages": [{"role": "human", "content": "x"}]}', "message 1 has unknown role 'human'; expected one of system"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "message 1 has unknown role ['user']"),
    ('{"messages": [{"role": "user", "content": null}]}', "content of message 1 must be a string, found nothing"),
    ('{"messages": [{"role": "user", "content": ["x"]}]}', "content of message 1 must be a string, found a list"),
    ('{"prompt": "p", "completion": 4}', "completion must be a string, found a int"),
    ('{"prompt": ["p"], "completion": "c"}', "prompt must be a string, found a list"),
    ('{"id": 1.5, "prompt": "p", "completion": "c"}', "'id' must be a string or an integer, found a float"),
    ('{"dataset": {}, "prompt": "p", "completion": "c"}', "'dataset' must be a string or an integer, found a dict"),
    ('{"prompt": "\\ud800", "completion": "c"}', "text holds an unpaired surrogate ('\\ud800')"),
    (b'{"prompt": "\xff"}', "not valid UTF-8 (byte 0xff at byte 13 of the line)"),
    ((GOOD + "\n").encode("utf-16"), "not valid UTF-8 (byte 0xff at byte 1 of the line)"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason[:40] for _, reason in BAD_LINES])
@pytest.mark.parametrize("name", ["pool.jsonl", "pool.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, line, reason, name):
    line = line if isinstance(line, bytes) else line.encode()
    source = write(tmp_path / name, f"{GOOD}\n\n{GOOD}\n".encode() + line + b"\n" + GOOD.encode())
    message = refusal(source)
    assert message.startswith(f"{source} line 4: {reason}")
    assert message.endswith("; fix or remove the line")
    assert len(load_examples(source, limit=2)) == 2


def test_a_bad_row_is_named(tmp_path):
    rows = [ROWS[0], {"messages": [{"role": "bot", "content": "x"}]}]
    assert refusal(rows).startswith("the given list row 1: message 1 has unknown role 'bot'; expected one of system")
    assert refusal([ROWS[0], 3]).startswith("the given list row 1: expected an object with fields, found a int")
    datasets.Dataset.from_list([*rows[1:], *rows[:1]]).to_parquet(tmp_path / "pool.parquet")
    assert refusal(tmp_path / "pool.parquet").startswith(f"{tmp_path}/pool.parquet row 0: message 1 has unknown role")


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert refusal(tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: no such file"
    assert refusal(str(tmp_path / "no.parquet")) == f"{tmp_path}/no.parquet: no such file"
    assert refusal(tmp_path / "pool.csv") == f"{tmp_path}/pool.csv: no such file"
    assert "unknown kind of file; expected .jsonl" in refusal(write(tmp_path / "pool.csv", "a,b\n"))
    assert "not one that Dataset.save_to_disk wrote" in refusal(tmp_path)
    assert "not a readable parquet file" in refusal(write(tmp_path / "text.parquet", "hello"))
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), tmp_path / "other.parquet")
    assert refusal(tmp_path / "other.parquet") == (
        f"{tmp_path}/other.parquet: expected the columns 'messages', or 'prompt' and 'completion', found question, "
        "answer"
    )
    dataset = as_dataset(ROWS)
    assert "which split? It has a, b" in refusal(datasets.DatasetDict({"a": dataset, "b": dataset}))
    assert "cannot read examples from a int" in refusal(3)
    assert "either paths or rows" in refusal([ROWS[0], "pool.jsonl"])


def test_a_saved_dataset_that_is_damaged_is_named(tmp_path):
    as_dataset(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    assert refusal(tmp_path / "saved").startswith(f"{tmp_path}/saved: the saved dataset cannot be read (")


@pytest.mark.parametrize("text", ["", "\n \n\n", "\ufeff", "\ufeff\n"])
@pytest.mark.parametrize("name", ["target.jsonl", "target.jsonl.gz"])
def test_an_empty_file_is_named(tmp_path, text, name):
    source = write(tmp_path / name, text)
    assert refusal(source).startswith(f"{source}: holds no examples; expected rows with 'messages', or")
    whole = write(tmp_path / "pool.jsonl", LINES[0])
    assert refusal([whole, source]).startswith(f"{source}: holds no examples")
    assert refusal([]).startswith("the given list: holds no examples")


def test_a_damaged_gzip_file_is_named(tmp_path):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"prompt": str(rng.random(20).tolist()), "completion": "c"}) for _ in range(500)]
    whole = gzip.compress("\n".join(lines).encode())
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 50] = bytes(50)
    wrong_checksum = bytearray(whole)
    wrong_checksum[-6] ^= 1
    for data in (whole[: len(whole) // 2], bytes(damaged), bytes(wrong_checksum), whole[:5]):
        (tmp_path / "pool.jsonl.gz").write_bytes(data)
        message = refusal(tmp_path / "pool.jsonl.gz")
        assert message.startswith(f"{tmp_path}/pool.jsonl.gz ")
        assert "the gzip file is truncated or corrupt" in message or "not valid" in message
    (tmp_path / "pool.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "the gzip file is truncated or corrupt" in refusal(tmp_path / "pool.jsonl.gz")


def test_hub_names_go_to_the_datasets_library(monkeypatch):
    asked = []

    def load_dataset(name):
        asked.append(name)
        if name != "org/pool":
            raise ConnectionError(f"cannot reach {name}\nlong story")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("org/pool")[0] == {"dataset": "org/pool", "id": "0", "prompt": "p", "completion": "c"}
    assert refusal("org/other") == (
        "org/other: no such file or folder, and no such dataset could be had from the hub (cannot reach org/other)"
    )
    refusal("missing/pool.jsonl")
    refusal("some/where/else")
    assert asked == ["org/pool", "org/other"]


def test_a_source_that_changed_is_not_mixed_in(tmp_path):
    source = write(tmp_path / "pool.jsonl", "\n".join(LINES))
    examples = load_examples(source)
    write(source, "\n".join(reversed(LINES)) + "\n")
    with pytest.raises(LessFastError, match=r"pool\.jsonl: changed since it was loaded; load it again"):
        examples.write_lines([0], tmp_path / "out.jsonl")
    source.unlink()
    with pytest.raises(LessFastError, match=r"pool\.jsonl: cannot be read again \(No such file or directory\)"):
        examples.write_lines([0], tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    examples: Examples = load_examples(ROWS)
    with pytest.raises(LessFastError, match=r"no/out\.jsonl: cannot be written \(No such file or directory\)"):
        examples.write_lines([0], tmp_path / "no" / "out.jsonl")
    (tmp_path / "out.jsonl").write_text("before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LessFastError, match=r"out\.jsonl: cannot be written \(No space left on device\)"):
        examples.write_lines([0], tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "before"


@pytest.mark.skipif(DATA is None, reason="LESS_FAST_DATA is not set")
def test_the_real_pool_comes_back_byte_for_byte(tmp_path):
    source = Path(str(DATA)) / "pool_2k.jsonl.gz"
    raw = gzip.decompress(source.read_bytes())
    examples = load_examples(source)
    examples.write_lines(range(2000), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == raw
    rows = [json.loads(line) for line in raw.splitlines()]
    assert list(examples) == rows
    order = np.random.default_rng(1).permutation(2000)[:100]
    examples.write_lines(order, tmp_path / "out.jsonl")
    assert load_examples(tmp_path / "out.jsonl").ids == [rows[i]["id"] for i in order]
