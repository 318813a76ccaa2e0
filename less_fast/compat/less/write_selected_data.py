"""``python -m less_fast.compat.less.write_selected_data``: LESS's ``sorted.csv`` and ``top_*.jsonl`` from scores."""

from __future__ import annotations

import argparse
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from less_fast.compat.less.command import run_command
from less_fast.compat.less.files import load_tensor
from less_fast.errors import LessFastError
from less_fast.store import atomic_file
from less_fast.store.files import failed_write

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Ranking:
    """The rows of several files, best first; equal scores in the files' order, rows without a finite score last.

    ``scores`` float32, ``sources`` (number of the file) and ``indices`` (row in it), int64, all (N,). ``n_finite``:
    how many have a score.
    """

    scores: NDArray[np.float32]
    sources: NDArray[np.int64]
    indices: NDArray[np.int64]
    n_finite: int


def rank(scores: Sequence[NDArray[np.float32]]) -> Ranking:
    """Sort the scores of all files together."""
    every = np.concatenate(scores)
    sources = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    indices = np.concatenate([np.arange(len(s)) for s in scores])
    finite = np.isfinite(every)
    order = np.argsort(np.where(finite, -every, np.inf), kind="stable")
    return Ranking(every[order], sources[order], indices[order], int(finite.sum()))


class Lines:
    """The lines of a JSON Lines file that are not blank: as many as LESS's loader makes rows of; only places are kept.

    A byte-order mark is not part of the first line, and a line end (LF or CR LF) of none.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        starts, lengths = array("q"), array("q")
        offset = 0
        try:
            with open(self.path, "rb") as file:
                for line in file:
                    start, offset = offset, offset + len(line)
                    if start == 0 and line.startswith((_GZIP_MAGIC, _PARQUET_MAGIC)):
                        kind = "compressed" if line.startswith(_GZIP_MAGIC) else "a parquet file"
                        raise LessFastError(
                            f"{self.path}: is {kind}; give the file of JSON lines that it was made from"
                        )
                    if start == 0 and line.startswith(_BYTE_ORDER_MARK):
                        start, line = len(_BYTE_ORDER_MARK), line.removeprefix(_BYTE_ORDER_MARK)
                    if line.strip():
                        starts.append(start)
                        lengths.append(len(line.removesuffix(b"\n").removesuffix(b"\r")))
        except OSError as error:
            raise LessFastError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        self._starts, self._lengths = starts, lengths

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, rows: NDArray[np.int64]) -> Iterator[bytes]:
        """The bytes of these rows' lines, one by one, without line ends."""
        with open(self.path, "rb") as file:
            for row in rows.tolist():
                file.seek(self._starts[row])
                yield file.read(self._lengths[row])


def write_selection(
    folder: str | PathLike[str],
    names: Sequence[str],
    files: Sequence[Lines],
    *,
    max_samples: int | None = None,
    percentage: float | None = None,
) -> Path:
    """Write ``sorted.csv`` and ``top_*.jsonl`` of one task; returns the latter.

    ``folder``: the task's, with ``{name}_influence_score.pt`` of every file. ``names`` and ``files``: as many of each.
    ``percentage`` (a share: 0.05 is 5 %) of all rows, rounded down, or ``max_samples`` rows; where both are given, the
    percentage counts, as in LESS. Rows without a finite score are never selected: with fewer usable rows than asked
    for, warns and writes those. Both files appear whole or not at all.

    Raises LessFastError for missing scores, a file with fewer rows than scores, and a number of rows out of range.
    """
    folder = Path(folder)
    scores = []
    for name, lines in zip(names, files):
        file = folder / f"{name}_influence_score.pt"
        found = load_tensor(file)
        if found.ndim != 1:
            raise LessFastError(f"{file}: holds a tensor of shape {tuple(found.shape)}; expected one score per row")
        if len(found) > len(lines):
            raise LessFastError(
                f"{file}: has {len(found)} scores, but {lines.path} only {len(lines)} lines that are not blank; "
                "give the file that the gradients were collected from"
            )
        if len(found) < len(lines):
            warnings.warn(
                f"{lines.path} has {len(lines)} rows and {file} {len(found)} scores; they count as those of the first",
                stacklevel=2,
            )
        scores.append(found.to(torch.float32).numpy())
    ranking = rank(scores)
    total = len(ranking.scores)
    count = _count(total, max_samples, percentage)
    if not ranking.n_finite:
        raise LessFastError(
            f"{folder}: none of {total} rows has a score that counts; look at what get_info reported of their examples"
        )
    if count > ranking.n_finite:
        warnings.warn(f"{count} rows were asked for, but only {ranking.n_finite} of {total} are usable", stacklevel=2)
        count = ranking.n_finite
    amount = f"num{max_samples}" if percentage is None else f"p{percentage}"
    out = folder / f"top_{amount}.jsonl"
    if out.exists() and any(out.samefile(lines.path) for lines in files):
        raise LessFastError(f"{out}: is one of the training files and would be overwritten; choose another output_path")
    try:
        _write_table(folder / "sorted.csv", names, ranking)
        _write_lines(out, files, ranking, count)
    except OSError as error:
        raise failed_write(out, error, "the scores are as they were") from error
    return out


def _count(total: int, max_samples: int | None, percentage: float | None) -> int:
    if percentage is not None:
        if not 0 < percentage <= 1:
            raise LessFastError(f"--percentage is {percentage}; expected a share of more than 0 and at most 1")
        count = int(percentage * total)
        if not count:
            raise LessFastError(f"--percentage {percentage} of {total} rows is less than one row; choose a larger one")
        return count
    if max_samples is None:
        raise LessFastError("how many rows to select was not said: give --percentage or --max_samples")
    if not 1 <= max_samples <= total:
        raise LessFastError(f"--max_samples is {max_samples}; expected 1 to {total}, the number of rows")
    return max_samples


def _write_table(path: Path, names: Sequence[str], ranking: Ranking) -> None:
    rows = zip(ranking.sources.tolist(), ranking.indices.tolist(), ranking.scores.tolist())
    with atomic_file(path) as file:
        file.write(b"file name, index, score\n")
        file.writelines(f"{names[source]}, {index}, {round(score, 6)}\n".encode() for source, index, score in rows)


def _write_lines(path: Path, files: Sequence[Lines], ranking: Ranking, count: int) -> None:
    sources = ranking.sources[:count].tolist()
    # One reader per file, each giving its lines in the order in which they are asked for.
    readers = [
        lines.read(ranking.indices[:count][ranking.sources[:count] == number]) for number, lines in enumerate(files)
    ]
    with atomic_file(path) as out:
        for source in sources:
            out.write(next(readers[source]) + b"\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m less_fast.compat.less.write_selected_data", description=__doc__)
    add = parser.add_argument
    add("--train_file_names", nargs="+", required=True, help="names of the training files, as given to matching")
    add("--train_files", nargs="+", required=True, help="the training files, in the same order")
    add("--target_task_names", nargs="+", required=True, help="names of the target tasks")
    add("--output_path", type=Path, default=Path("selected_data"), help="folder of the scores and the selections")
    add("--max_samples", type=int, help="number of rows to select")
    add("--percentage", type=float, help="share of all rows to select, such as 0.05; counts before --max_samples")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the selection for every task."""
    arguments = _parser().parse_args(argv)
    names, paths = arguments.train_file_names, arguments.train_files
    if len(names) != len(paths):
        raise LessFastError(f"{len(names)} --train_file_names for {len(paths)} --train_files; expected as many of each")
    files = [Lines(path) for path in paths]
    for task in arguments.target_task_names:
        out = write_selection(
            arguments.output_path / task,
            names,
            files,
            max_samples=arguments.max_samples,
            percentage=arguments.percentage,
        )
        print(f"{out}: the best rows, in order; {out.with_name('sorted.csv')}: all of them")


if __name__ == "__main__":
    run_command(main)
