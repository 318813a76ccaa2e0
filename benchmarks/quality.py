"""What does a sketch cost? Cosines, rankings and selections against those of exact gradients, and what the end loses.

``--part sketch``: kinds x K x store dtype on real gradients, and on the same with planted outlier columns. ``--part
selection``: fine-tuning on what exact and sketched features select, on a random choice, and on the whole pool. What is
made is kept in ``--work``, and a second call goes on from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import quality_selection
import quality_sketch
import torch
from common import data_folder, machine
from quality_case import Workspace, real_case, tiny_case

from less_fast.report import table


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="what is made is kept here (2 GB)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to FILE as JSON lines")
    parser.add_argument("--part", choices=("sketch", "selection", "both"), default="both", help="default: both")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each projection; default: 5")
    parser.add_argument("--trainings", type=int, default=3, help="seeds of each fine-tuning; default: 3")
    parser.add_argument("--threads", type=int, help="torch threads, and trainings at a time; default: all cores")
    parser.add_argument("--tiny", action="store_true", help="an invented corpus, in seconds: measures nothing")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = data_folder()
    if not options.tiny and folder is None:
        raise SystemExit("LESS_FAST_DATA names no folder of real data, on which quality is measured; nothing was done")
    case = tiny_case(options.work / "input") if options.tiny or folder is None else real_case(folder)
    space = Workspace(options.work, case)
    parts = ("sketch", "selection") if options.part == "both" else (options.part,)
    for part in parts:
        if part == "sketch":
            rows = [sketch_row(found, case.source) for found in quality_sketch.run(space, options.seeds)]
            print(sketch_table(rows))
        else:
            results = quality_selection.run(space, options.trainings, torch.get_num_threads())
            rows = [selection_row(found, case.source) for found in results]
            print(selection_table(rows))
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            with options.json.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(f"{len(rows)} rows added to {options.json}", file=sys.stderr)


def sketch_row(found: dict[str, Any], source: str) -> dict[str, Any]:
    """A JSON row of a projection and a store dtype."""
    return {"op": "quality", "implementation": found["kind"], "shape": source, **found, **machine(torch.device("cpu"))}


def selection_row(found: dict[str, Any], source: str) -> dict[str, Any]:
    """A JSON row of a task and an arm."""
    facts = {"op": "selection", "implementation": found["arm"], "shape": source, "dtype": "float32"}
    return {**facts, **found, **machine(torch.device("cpu"))}


def sketch_table(rows: list[dict[str, Any]]) -> str:
    """One line per projection and store dtype."""
    lines = []
    for row in rows:
        block = "" if row["block"] is None else f" B={row['block']}"
        stores = row["dtype"] if row["target_dtype"] != "1bit" else "1bit x 1bit"
        figures = [_with_spread(row[metric], row[f"{metric}_sd"], 4) for metric in quality_sketch.METRICS]
        lines.append((f"{row['gradients']}  {row['kind']}{block}", str(row["k"]), stores, *figures))
    return table(("gradients, kind", "K", "store", "RMS of cosines", "rank correlation", "top-5 % overlap"), lines)


def selection_table(rows: list[dict[str, Any]]) -> str:
    """One line per arm, one column per task."""
    tasks, arms = (list(dict.fromkeys(row[name] for row in rows)) for name in ("task", "arm"))
    found = {(row["arm"], row["task"]): _with_spread(row["test_loss"], row["test_loss_sd"], 3) for row in rows}
    return table(("trained on", *tasks), [(arm, *(found[arm, task] for task in tasks)) for arm in arms])


def _with_spread(mean: float, deviation: float | None, places: int) -> str:
    return f"{mean:.{places}f}" + ("" if deviation is None else f" ± {deviation:.{places}f}")


if __name__ == "__main__":
    main()
