"""Does scoring a store cost one read of it, or the queries' arithmetic, and no more?

Every dtype is scored against 1 to 285 queries, in turn with a plain read of the same bytes. The floor of a case is the
larger of that read and the queries' multiplications and additions at the measured float32 matrix-product rate.
``--large`` scores a store of 1,000,000 x 8,192 signs with the command line and reports the memory it took.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, row, write_rows
from numpy.typing import NDArray

from less_fast.ops.inner_products import default_threads
from less_fast.projection import Projection
from less_fast.scoring import ScoreStream
from less_fast.store import FeatureStore, Rows, StoreWriter
from less_fast.store.codec import CODECS, encode_signs
from less_fast.store.rotation import rotate_back

QUERIES = (1, 9, 57, 285)
SHARD = 4096


@dataclass
class Case:
    """What is timed: a pass over one store with one set of queries."""

    dtype: str
    n_queries: int
    query_dtype: str
    stream: ScoreStream
    seconds: list[float] = field(default_factory=list)


def make_store(path: Path, n: int, dim: int, dtype: str, draw: Callable[[int], NDArray[np.float32]]) -> FeatureStore:
    """A store whose shards hold ``draw(n rows)``."""
    rows = Rows([f"row-{i}" for i in range(n)], ["made"] * n, [f"query-{i}" for i in range(n)])
    facts = {"projection": Projection("srht", dim).to_dict()}
    with StoreWriter(path, facts, rows, dim=dim, dtype=dtype, shard_size=SHARD) as writer:
        for shard in writer.pending():
            size = int(np.diff(writer.bounds(shard))[0])
            writer.write(shard, draw(size), np.zeros(size), np.ones(size), np.ones(size))
    return FeatureStore(path)


def normals(seed: int, dim: int) -> Callable[[int], NDArray[np.float32]]:
    """Rows of independent normals, from a generator of their own."""
    rng = np.random.default_rng(seed)
    return lambda n: rng.standard_normal((n, dim), np.float32)


def check(case: Case, target: FeatureStore) -> None:
    """A pass must give the products of the dequantised rows, or it is not timed."""
    block = next(iter(case.stream.blocks()))
    store, rows = case.stream.train[0], slice(0, 64)
    unit = store[rows].astype(np.float64) / store.norms[rows, None]
    queries = target[:].astype(np.float64) / target.norms[:, None]
    expected = unit @ queries.T
    if case.query_dtype == "1bit":
        stored = store.stored(0, 64)
        assert stored is not None and stored.center is not None
        codes, scale = encode_signs(queries.astype(np.float32))
        signs = rotate_back(CODECS["1bit"].to_float(codes, store.dim)) * scale[:, None].astype(np.float64)
        expected = stored.center @ queries.T + (unit - stored.center) @ signs.T
    error = np.abs(block.matrix[rows] - expected).max()
    if not error < 1e-6:
        raise SystemExit(f"{case}: scores are off by {error:.1e}; not timing a wrong result")


def read(store: FeatureStore, threads: ThreadPoolExecutor) -> None:
    """Read every byte of the features once, with all threads."""
    words: list[torch.Tensor] = []
    for start in range(0, len(store), store.shard_size):
        stored = store.stored(start, min(start + store.shard_size, len(store)))
        assert stored is not None
        flat = stored.codes.reshape(-1).view(np.uint8)
        words += torch.frombuffer(flat[: len(flat) // 8 * 8], dtype=torch.int64).chunk(2)
    for _ in threads.map(torch.Tensor.sum, words):
        pass


def scan_once(stream: ScoreStream, matrix: NDArray[np.float32]) -> None:
    """The pass that is timed."""
    for _ in stream.blocks(matrix):
        pass


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def matmul_rate(repeats: int) -> float:
    """float32 multiplications and additions per second of square matrix products: the better of numpy and torch."""
    a, b = (np.random.default_rng(i).standard_normal((2048, 2048), np.float32) for i in range(2))
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    best = min(min(timed(lambda: a @ b), timed(lambda: x @ y)) for _ in range(max(5, repeats)))
    return 2 * 2048**3 / best


def measure(
    folder: Path, n: int, dim: int, queries: tuple[int, ...], repeats: int, threads: int
) -> list[dict[str, Any]]:
    """Rows of every dtype and number of queries."""
    stores = {dtype: make_store(folder / dtype, n, dim, dtype, normals(0, dim)) for dtype in CODECS}
    targets = {q: make_store(folder / f"target{q}", q, dim, "float32", normals(1, dim)) for q in queries}
    cases = []
    for q in queries:
        for dtype, store in stores.items():
            cases.append(Case(dtype, q, "float32", ScoreStream(store, {"t": targets[q]})))
        cases.append(Case("1bit", q, "1bit", ScoreStream(stores["1bit"], {"t": targets[q]}, queries="1bit")))
    for case in cases:
        check(case, targets[case.n_queries])
    rate = matmul_rate(repeats)
    # One thread of torch's in each of these: those of OpenMP would spin for a while after a call, on the cores of the
    # pass that is timed next.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    time.sleep(1)
    reads: dict[str, list[float]] = {dtype: [] for dtype in stores}
    matrix = {q: np.zeros((n, q), np.float32) for q in queries}
    for repeat in range(repeats + 1):
        for case in cases:
            actions = [partial(scan_once, case.stream, matrix[case.n_queries]), partial(read, stores[case.dtype], pool)]
            # Whoever comes second finds the maps of the store warm, so they take turns.
            order = (0, 1) if repeat % 2 else (1, 0)
            taken = {which: timed(actions[which]) for which in order}
            if repeat:
                case.seconds.append(taken[0])
                reads[case.dtype].append(taken[1])
    torch.set_num_threads(threads)
    rate = max(rate, matmul_rate(repeats))
    return [result(case, cases, statistics.median(reads[case.dtype]), rate, n, dim) for case in cases]


def result(case: Case, cases: list[Case], plain: float, rate: float, n: int, dim: int) -> dict[str, Any]:
    """The JSON row of a case. The baseline is the float16 store with as many queries."""
    flops = 2 * n * dim * case.n_queries
    floor = max(plain, flops / rate) if case.query_dtype == "float32" else plain
    (half,) = (other for other in cases if (other.dtype, other.n_queries) == ("float16", case.n_queries))
    return row(
        "score",
        f"{case.dtype} x {case.query_dtype}",
        case.seconds,
        device=torch.device("cpu"),
        shape=f"{n}x{dim}, {case.n_queries} queries",
        dtype=case.dtype,
        queries=case.n_queries,
        query_dtype=case.query_dtype,
        bytes=sum(entry.nbytes for name, entry in CODECS[case.dtype].tensors(n, dim).items() if name == "features"),
        flops=flops,
        read_ms=1e3 * plain,
        matmul_gflops=rate / 1e9,
        floor_ms=1e3 * floor,
        ratio_to_floor=statistics.median(case.seconds) / floor,
        ratio_to_baseline=statistics.median(s / h for s, h in zip(case.seconds, half.seconds)),
        rows_per_s=n / statistics.median(case.seconds),
    )


def measure_large(folder: Path, n: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    """One row: the command line on a store of ``n`` rows of signs, with the most memory its process held."""
    block = normals(0, dim)(SHARD)
    shift = iter(range(n))
    store = make_store(folder / "large", n, dim, "1bit", lambda size: np.roll(block[:size], next(shift), axis=1))
    target = make_store(folder / "large-target", 57, dim, "float32", normals(1, dim))
    program = (  # not ru_maxrss, which a process begins with as its parent has it
        "import sys; from less_fast.cli import main\n"
        "try: main()\n"
        "finally:\n"
        " status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        " print(1024 * int(status['VmHWM'].split()[0]), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "score", "--train", str(store.path), "--target", str(target.path)]
    seconds, peak = [], 0
    for _ in range(repeats):
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--out", str(folder / "scores.parquet"), "--no-progress"],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.perf_counter() - started)
        peak = max(peak, int(done.stderr.split()[-1]))
    facts = {"dtype": "1bit", "queries": 57, "query_dtype": "float32", "bytes": n * dim // 8}
    entry = row("score-large", "less-fast score", seconds, device=torch.device("cpu"), shape=f"{n}x{dim}", **facts)
    return [{**entry, "peak_bytes": peak, "rows_per_s": n / statistics.median(seconds)}]


def main() -> None:
    """Make the stores, measure and write the rows."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--rows", type=int, default=27_000, help="rows of the stores")
    parser.add_argument("--dim", type=int, default=8192, help="features of a row")
    parser.add_argument("--queries", type=int, nargs="+", default=QUERIES, help="numbers of queries")
    parser.add_argument("--large", type=int, nargs="?", const=1_000_000, help="score a 1bit store of so many rows")
    parser.add_argument("--folder", type=Path, help="where the stores are made and removed again; default: temporary")
    options = parser.parse_args()
    threads = options.threads or default_threads()
    torch.set_num_threads(threads)
    folder = Path(tempfile.mkdtemp(prefix="less_fast-score-", dir=options.folder))
    try:
        if options.large:
            rows = measure_large(folder, options.large, options.dim, options.repeats)
        else:
            rows = measure(folder, options.rows, options.dim, tuple(options.queries), options.repeats, threads)
    finally:
        shutil.rmtree(folder)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
