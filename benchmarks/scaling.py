"""How do time and memory grow? Extraction against examples, tokens, rank, width, K; scoring against rows and queries.

Sizes double along each axis and take turns, so that what else the machine does falls on all of them. An exponent is
the slope of a least-squares line through the logarithms; every row has that of its axis. Memory is what the peak of a
process of its own grew by during one pass, without mapped files. Every extraction fills at least one batch.
"""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import re
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, llama, peak_bytes, quantile, random_adam_state, row, with_adapter, write_rows
from score import Case, check, make_store, normals

from less_fast import Projection, extract
from less_fast.demo.corpus import generate
from less_fast.demo.model import train_tokenizer
from less_fast.scoring import ScoreStream
from less_fast.store import FeatureStore

CPU = torch.device("cpu")
TOKEN_BUDGET, VOCABULARY = 2048, 512
Work = Callable[[], Any]


@dataclass(frozen=True)
class Extraction:
    """One extraction to a store: Adam, ``srht``. ``tokens``: of every example; ``width``: of the 4-layer model."""

    folder: Path
    examples: int = 32
    tokens: int = 128
    rank: int = 8
    width: int = 192
    k: int = 8192

    implementation = "extract"

    def prepare(self, checked: bool = True) -> Work:
        """The pass to time; unless told otherwise its features have been compared with the reference backend's."""
        model = llama(self.width, 4, self.width // 16, self.width // 16, self.width * 8 // 3, VOCABULARY)
        model = with_adapter(model, self.rank)
        texts = [example["messages"][0]["content"] for example in generate(200, seed=0)]
        tokenizer = train_tokenizer(texts, self.folder / "tokenizer", vocab_size=VOCABULARY)
        text = itertools.cycle(texts)
        data = [{"prompt": "", "completion": _joined(text, 8 * self.tokens)} for _ in range(self.examples)]
        adam, projection = random_adam_state(model), Projection("srht", self.k)
        out = self.folder / "store"

        def run(rows: int = self.examples, backend: str = "auto") -> FeatureStore:
            shutil.rmtree(out, ignore_errors=True)
            return extract(
                model,
                data[:rows],
                out,
                projection=projection,
                precondition=adam,
                tokenizer=tokenizer,
                template="raw",
                max_length=self.tokens,
                token_budget=TOKEN_BUDGET,
                backend=backend,
                progress=False,
            )

        if checked:
            found, expected = run(2)[:], run(2, "reference")[:]
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            if not error < 1e-5:
                raise SystemExit(
                    f"{self}: features differ from the reference by {error:.1e}; not timing a wrong result"
                )
        return run

    @property
    def shape(self) -> str:
        return f"{self.examples}x{self.tokens} tokens, r={self.rank}, width {self.width}, K={self.k}"

    def facts(self, seconds: float) -> dict[str, Any]:
        """What the row says beside its times."""
        tokens = self.examples * self.tokens
        p = 4 * 4 * 2 * self.rank * self.width  # layers, matrices, A and B
        rates = {"examples_per_s": self.examples / seconds, "tokens_per_s": tokens / seconds}
        return {"dtype": "float32", "examples": self.examples, "tokens": tokens, "p": p, "k": self.k, **rates}


@dataclass(frozen=True)
class Scoring:
    """One pass over a float16 store; ``queries``: subtasks of all targets."""

    folder: Path
    rows: int = 16384
    queries: int = 16
    k: int = 2048

    implementation = "score"

    def prepare(self, checked: bool = True) -> Work:
        """The pass to time; unless told otherwise its scores have been compared with float64."""
        store, target = self._store("pool", self.rows, "float16", 0), self._store("target", self.queries, "float32", 1)
        stream = ScoreStream(store, {"t": target})
        if checked:
            check(Case("float16", self.queries, "float32", stream), target)
        return lambda: [*stream.blocks()]

    def _store(self, name: str, n: int, dtype: str, seed: int) -> FeatureStore:
        """Made once; a process that measures memory finds it there."""
        path = self.folder / f"{name}-{n}x{self.k}"
        return FeatureStore(path) if path.exists() else make_store(path, n, self.k, dtype, normals(seed, self.k))

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.k}, {self.queries} queries"

    def facts(self, seconds: float) -> dict[str, Any]:
        """What the row says beside its times."""
        facts = {"dtype": "float16", "rows": self.rows, "queries": self.queries, "k": self.k}
        n_bytes, flops = 2 * self.rows * self.k, 2 * self.rows * self.k * self.queries
        return {**facts, "bytes": n_bytes, "flops": flops, "rows_per_s": self.rows / seconds}


Point = Extraction | Scoring


def _joined(texts: Iterator[str], length: int) -> str:
    """Texts one after the other, at least so many characters."""
    pieces: list[str] = []
    while sum(map(len, pieces)) < length:
        pieces.append(next(texts))
    return " ".join(pieces)


def axes(folder: Path, tiny: bool) -> dict[str, list[Point]]:
    """The points of every axis, from the smallest on."""
    extraction, scoring = Extraction(folder), Scoring(folder)
    if tiny:
        extraction = replace(extraction, examples=2, tokens=16, rank=2, width=48, k=256)
        scoring = replace(scoring, rows=64, queries=2, k=256)
    sizes: dict[str, tuple[Point, list[int]]] = {
        "examples": (extraction, [16, 32, 64, 128]),
        "tokens": (extraction, [64, 128, 256, 512]),
        "rank": (extraction, [4, 8, 16, 32, 64]),
        "width": (replace(extraction, examples=extraction.examples // 2), [96, 192, 384, 768]),
        "k": (extraction, [1024, 2048, 4096, 8192, 16384]),
        "rows": (scoring, [8192, 16384, 32768, 65536]),
        "queries": (scoring, [4, 8, 16, 32, 64, 128, 256]),
    }
    if tiny:
        sizes = {axis: (point, [getattr(point, axis) << i for i in range(2)]) for axis, (point, _) in sizes.items()}
    return {axis: [_with_size(point, axis, size) for size in values] for axis, (point, values) in sizes.items()}


def _with_size(point: Point, axis: str, size: int) -> Point:
    change: dict[str, Any] = {axis: size}
    return replace(point, **change)


def times(points: Sequence[Point], repeats: int) -> list[list[float]]:
    """Seconds of every point in every round, after one to warm up."""
    works = [point.prepare() for point in points]
    seconds: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 1):
        for number in range(len(works)) if repeat % 2 else reversed(range(len(works))):
            started = time.perf_counter()
            works[number]()
            taken = time.perf_counter() - started
            if repeat:
                seconds[number].append(taken)
    return seconds


def memory(point: Point, threads: int) -> dict[str, int]:
    """Bytes of one pass, by the rows' names; to be called in a process that does nothing else.

    ``working_bytes``: what the peak grew by without ``mapped_bytes``, the pages of mapped files, which the operating
    system may take back at any time.
    """
    _quiet()
    _settings(threads)
    if isinstance(point, Extraction):
        replace(point, examples=2, tokens=16, rank=2, width=48, k=256).prepare(checked=False)()  # loads libraries
    work = point.prepare(checked=False)
    before, files = _resident("VmRSS"), _resident("RssFile")
    work()
    peak, mapped = peak_bytes(CPU), max(0, _resident("RssFile") - files)
    return {"peak_bytes": peak, "mapped_bytes": mapped, "working_bytes": max(0, peak - before - mapped)}


def _resident(name: str) -> int:
    """Bytes that this process holds now, by the name that Linux has for them; 0 on other systems."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _quiet() -> None:
    """Of processes of our own alone: a test that calls us has use for the library's log."""
    logging.getLogger("less_fast").setLevel(logging.ERROR)  # that every text is cut to a length is intended


def _settings(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, once in every process


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the least-squares line through (log size, log value)."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(x) for x in values]).slope


def axis_rows(
    axis: str, points: Sequence[Point], seconds: Sequence[Sequence[float]], memories: Sequence[dict[str, int]]
) -> list[dict[str, Any]]:
    """The JSON rows of an axis. The baseline of a size is the one before it, of which it is the double."""
    sizes = [int(getattr(point, axis)) for point in points]
    grown = [held["working_bytes"] for held in memories]
    rounds = [exponent(sizes, values) for values in zip(*seconds)]
    fit = {
        "exponent": exponent(sizes, [statistics.median(values) for values in seconds]),
        "exponent_20": quantile(rounds, 0.2),
        "exponent_80": quantile(rounds, 0.8),
        "memory_exponent": exponent(sizes, grown) if all(grown) else None,
    }
    rows = []
    for number, point in enumerate(points):
        before = seconds[max(0, number - 1)]
        made = row(
            "scaling",
            point.implementation,
            seconds[number],
            device=CPU,
            shape=point.shape,
            axis=axis,
            size=sizes[number],
            **point.facts(statistics.median(seconds[number])),
            baseline="half the size",
            ratio_to_baseline=statistics.median(a / b for a, b in zip(seconds[number], before)),
            **fit,
        )
        rows.append({**made, **memories[number]})
    return rows


def main() -> None:
    """Measure every axis and write the rows."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tiny", action="store_true", help="two small sizes an axis, whose figures mean nothing")
    parser.add_argument("--axes", nargs="+", help="only these")
    options = parser.parse_args()
    threads = options.threads or torch.get_num_threads()
    _settings(threads)
    folder = Path(tempfile.mkdtemp(prefix="less_fast-scaling-"))
    # A server that has imported everything and computed nothing starts a process for each point.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["less_fast.extraction", "less_fast.scoring", "transformers.models.llama", "peft"])
    rows: list[dict[str, Any]] = []
    try:
        with context.Pool(1, maxtasksperchild=1) as pool:
            for axis, points in axes(folder, options.tiny).items():
                if options.axes is None or axis in options.axes:
                    seconds = times(points, options.repeats)
                    memories = pool.starmap(memory, [(point, threads) for point in points], chunksize=1)
                    rows += axis_rows(axis, points, seconds, memories)
    finally:
        shutil.rmtree(folder)
    write_rows(rows, options.json)
    for first in (group[0] for group in _grouped(rows)):
        spread = f"{first['exponent_20']:.2f} to {first['exponent_80']:.2f}"
        grown = "too little to fit" if first["memory_exponent"] is None else f"~ size^{first['memory_exponent']:.2f}"
        print(
            f"{first['implementation']:<8} against {first['axis']:<9} time ~ size^{first['exponent']:.2f} ({spread}), "
            f"memory {grown}"
        )


def _grouped(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for _, group in itertools.groupby(rows, key=lambda entry: entry["axis"]):
        yield list(group)


if __name__ == "__main__":
    _quiet()
    main()
