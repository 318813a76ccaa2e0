"""write_selected_data: its table and its lines, and where LESS's own is broken."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from support.less_selection import select

from less_fast.compat.less import write_selected_data
from less_fast.compat.less.write_selected_data import Lines, rank
from less_fast.errors import LessFastError


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def write_scores(folder: Path, **scores: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in scores.items():
        torch.save(torch.tensor(values), folder / f"{name}_influence_score.pt")


def test_rounding_header_and_order_of_the_table(tmp_path):
    write_scores(tmp_path / "t", a=[0.1234565, 1e-7, -0.25], b=[0.5, 0.1234565])
    for name, n in (("a", 3), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'"{name}{k}"\n' for k in range(n)))
    files = {name: tmp_path / f"{name}.jsonl" for name in "ab"}
    select(tmp_path, files, "--max_samples", "3")
    rounded = round(float(np.float32(0.1234565)), 6)
    expected = f"file name, index, score\nb, 0, 0.5\na, 0, {rounded}\nb, 1, {rounded}\na, 1, 0.0\na, 2, -0.25\n"
    assert (tmp_path / "t/sorted.csv").read_text() == expected  # equal scores in the files' order
    assert (tmp_path / "t/top_num3.jsonl").read_text() == '"b0"\n"a0"\n"b1"\n'


def test_a_stale_table_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    for scores in ([0.1, 0.2], [0.4, 0.3]):
        write_scores(tmp_path / "t", a=scores)
        select(tmp_path, {"a": tmp_path / "a.jsonl"}, "--max_samples", "1")
    assert (tmp_path / "t/sorted.csv").read_text() == "file name, index, score\na, 0, 0.4\na, 1, 0.3\n"


@pytest.mark.parametrize(
    "content",
    [
        b'{"id": 0}\n{"id": 1}\n{"id": 2}',
        b'\n{"id": 0}\n  \n\n{"id": 1}\n{"id": 2}\n\n',
        b'{"id": 0}\r\n{"id": 1}\r\n{"id": 2}\r\n',
        b'\xef\xbb\xbf{"id": 0}\n{"id": 1}\n{"id": 2}\n',
    ],
    ids=["no last line end", "blank lines", "CR LF", "byte-order mark"],
)
def test_lines_are_those_of_the_rows_and_end_with_one_line_end(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    write_scores(tmp_path / "t", a=[0.2, 0.1, 0.3])
    select(tmp_path, {"a": tmp_path / "a.jsonl"}, "--percentage", "1.0")
    assert (tmp_path / "t/top_p1.0.jsonl").read_bytes() == b'{"id": 2}\n{"id": 0}\n{"id": 1}\n'


def test_rows_without_a_finite_score_come_last_in_file_order():
    scores = [np.array([np.nan, 0.5, -np.inf], np.float32), np.array([np.inf, -0.5], np.float32)]
    ranking = rank(scores)
    assert ranking.n_finite == 2
    assert list(zip(ranking.sources, ranking.indices)) == [(0, 1), (1, 1), (0, 0), (0, 2), (1, 0)]


def test_scores_and_lines_that_do_not_fit_each_other(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 0}\n{"id": 1}\n{"id": 2}\n')
    write_scores(tmp_path / "t", a=[0.1, 0.2, 0.3, 0.4])
    with pytest.raises(LessFastError, match=r"has 4 scores, but .* only 3 lines that are not blank"):
        select(tmp_path, {"a": tmp_path / "a.jsonl"}, "--max_samples", "1")
    write_scores(tmp_path / "t", a=[0.1, 0.2])  # get_info --max_samples 2
    with pytest.warns(UserWarning, match="they count as those of the first"):
        select(tmp_path, {"a": tmp_path / "a.jsonl"}, "--max_samples", "1")
    assert (tmp_path / "t/top_num1.jsonl").read_text() == '{"id": 1}\n'


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "give --percentage or --max_samples"),
        (["--percentage", "0.2"], "less than one row"),
        (["--percentage", "5"], "at most 1"),
        (["--max_samples", "5"], "expected 1 to 4"),
        (["--max_samples", "0"], "expected 1 to 4"),
    ],
)
def test_numbers_of_rows_out_of_range_are_refused(tmp_path, flags, reason):
    (tmp_path / "a.jsonl").write_text("{}\n" * 4)
    write_scores(tmp_path / "t", a=[0.1, 0.2, 0.3, 0.4])
    with pytest.raises(LessFastError, match=reason):
        select(tmp_path, {"a": tmp_path / "a.jsonl"}, *flags)


def test_files_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(LessFastError, match=r"a\.jsonl: cannot be read"):
        Lines(tmp_path / "a.jsonl")
    with gzip.open(tmp_path / "a.jsonl", "wt") as file:
        file.write("{}\n")
    with pytest.raises(LessFastError, match="is compressed"):
        Lines(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on\nPAR1")
    with pytest.raises(LessFastError, match="is a parquet file"):
        Lines(tmp_path / "a.parquet")
    write_scores(tmp_path / "t", a=[0.1])
    (tmp_path / "t/top_num1.jsonl").write_text("{}\n")
    with pytest.raises(LessFastError, match="would be overwritten"):
        select(tmp_path, {"a": tmp_path / "t/top_num1.jsonl"}, "--max_samples", "1")
    with pytest.raises(LessFastError, match="1 --train_file_names for 2"):
        write_selected_data.main(
            ["--train_file_names", "a", "--train_files", "x", "y", "--target_task_names", "t", "--max_samples", "1"]
        )
    torch.save(torch.zeros(2, 2), tmp_path / "t/a_influence_score.pt")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(LessFastError, match="expected one score per row"):
        select(tmp_path, {"a": tmp_path / "b.jsonl"}, "--max_samples", "1")


def test_a_selection_of_nothing_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 3)
    write_scores(tmp_path / "t", a=[-np.inf, np.nan, -np.inf])
    with pytest.raises(LessFastError, match="none of 3 rows has a score that counts"):
        select(tmp_path, {"a": tmp_path / "a.jsonl"}, "--max_samples", "2")
