"""What a smaller store keeps of a float32 pool's scores: a run's features, converted to every dtype and scored again.

`python benchmarks/agreement.py RUN`, RUN being the folder of a finished `less-fast run` with float32 stores. For every
target: the rank correlation of the scores with those of float32, and the share of the best 5 % that is the same.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append_rows, machine
from numpy.typing import NDArray

from less_fast.scoring import Scores, influence, select
from less_fast.store import FeatureStore, convert_store
from less_fast.store.codec import CODECS

FRACTION = 0.05


def ranks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Place of every value in ascending order."""
    return np.argsort(np.argsort(values, kind="stable")).astype(np.float64)


def compare(exact: Scores, scores: Scores) -> dict[str, float]:
    """Agreement of the aggregate scores of the valid rows."""
    a, b = (part.aggregate()[exact.valid] for part in (exact, scores))
    best = [set(select(part, fraction=FRACTION).tolist()) for part in (exact, scores)]
    return {
        "rank_correlation": float(np.corrcoef(ranks(a), ranks(b))[0, 1]),
        "top_overlap": len(best[0] & best[1]) / len(best[0]),
        "score_rms": float(np.sqrt(np.mean((exact.matrix[exact.valid] - scores.matrix[exact.valid]) ** 2))),
    }


def measure(run: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for every dtype, type of queries and target."""
    record = json.loads((run / "checkpoints.json").read_text())
    features = [run / "features" / Path(checkpoint["path"]).name for checkpoint in record["checkpoints"]]
    tasks = sorted(path.name.removeprefix("target-") for path in features[0].glob("target-*"))
    targets: dict[str, Any] = {task: [path / f"target-{task}" for path in features] for task in tasks}
    pool = [FeatureStore(path / "train") for path in features]
    if {store.dtype for store in pool} != {"float32"}:
        raise SystemExit(f"{run}: its pool is not stored in float32, which the others are compared with")
    exact = influence(pool, targets, record["weights"])
    for dtype in list(CODECS)[1:]:
        stores = [
            convert_store(store.path, folder / dtype / str(number), dtype=dtype, progress=False)
            for number, store in enumerate(pool)
        ]
        for queries in ("float32", "1bit") if dtype == "1bit" else ("float32",):
            for task, scores in influence(stores, targets, record["weights"], queries=queries).items():
                yield {
                    "op": "agreement",
                    "dtype": dtype,
                    "query_dtype": queries,
                    "task": task,
                    "rows": len(pool[0]),
                    "k": pool[0].dim,
                    "checkpoints": len(pool),
                    "row_bytes": sum(entry.nbytes for entry in CODECS[dtype].tensors(1, pool[0].dim).values()),
                    **compare(exact[task], scores),
                    **machine(torch.device("cpu")),
                }


def main() -> None:
    """Compare and write the rows."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished less-fast run with float32 stores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to FILE as JSON lines")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="less_fast-agreement-"))
    try:
        rows = [*measure(options.run, folder)]
    finally:
        shutil.rmtree(folder)
    for row in rows:
        kept = f"{row['rank_correlation']:.4f}  {100 * row['top_overlap']:.0f} %"
        print(f"{row['dtype']:<9} x {row['query_dtype']:<8} {row['task']:<8} {kept}")
    append_rows(rows, options.json)


if __name__ == "__main__":
    main()
