"""The tables of measured figures in README and docs, made of the committed JSON rows alone.

They stand between `<!-- table: DEVICE/NAME -->` and `<!-- end -->`: DEVICE is a folder of benchmarks/results, NAME one
of TABLES. `python benchmarks/tables.py` compares them with the rows, `--write` brings them in step; with a folder it
prints all that the folder's rows give.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"

Rows = Sequence[dict[str, Any]]
_MARKED = re.compile(r"(<!-- table: ([\w.-]+)/([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none where there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def overhead(rows: Rows) -> list[list[str]]:
    """Extraction beside the bare model, for every model that was measured."""
    return _beside(rows, "bare", "less_fast")


def callback(rows: Rows) -> list[list[str]]:
    """Training with the Trainer callback beside training alone."""
    return _beside(rows, "train", "train + features")


def _beside(rows: Rows, baseline: str, thing: str) -> list[list[str]]:
    lines = [["model", "examples", baseline, "with features", "ratio"]]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        bare, ours = (
            next(row for row in rows if (row["shape"], row["implementation"]) == (shape, name))
            for name in (baseline, thing)
        )
        work = f"{ours['examples']} examples, {ours['tokens']:,} tokens"
        lines.append([shape, work, _seconds(bare), _seconds(ours), f"{ours['ratio_to_baseline']:.3f}"])
    return lines


def sketch(rows: Rows) -> list[list[str]]:
    """Each projection of gradients that exist on a CPU, beside a copy of them."""
    lines = [["projection", "rule", "by", "time", "over a copy", "over the floor"]]
    for row in (row for row in rows if "projection" in row):
        ratios = [f"{row[name]:.2f}" for name in ("ratio_to_baseline", "ratio_to_floor")]
        lines.append([row["projection"], row["rule"], row["implementation"], _ms(row["ms_50"]), *ratios])
    return lines


def score(rows: Rows) -> list[list[str]]:
    """Time of a pass over the store, and that over its floor, for every dtype and number of queries."""
    rows = [row for row in rows if row["op"] == "score"]
    counts = sorted({row["queries"] for row in rows})
    lines = [["pool", "queries as", *map(_queries, counts)]]
    for dtype, query_dtype in dict.fromkeys((row["dtype"], row["query_dtype"]) for row in rows):
        found = {row["queries"]: row for row in rows if (row["dtype"], row["query_dtype"]) == (dtype, query_dtype)}
        cells = [f"{_ms(found[n]['ms_50'])} ({found[n]['ratio_to_floor']:.2f})" if n in found else "" for n in counts]
        lines.append([f"`{dtype}`", f"`{query_dtype}`", *cells])
    return lines


def scan(rows: Rows) -> list[list[str]]:
    """What 10^9 rows would take at the measured speed: bytes, the bytes/s of the fewest queries, and hours."""
    passes = [row for row in rows if row["op"] == "score"]
    counts = sorted({row["queries"] for row in passes})
    lines = [["pool", "queries as", "codes of 10⁹ rows", "read at", *map(_queries, counts)]]
    for dtype, query_dtype in dict.fromkeys((row["dtype"], row["query_dtype"]) for row in passes):
        found = {row["queries"]: row for row in passes if (row["dtype"], row["query_dtype"]) == (dtype, query_dtype)}
        first = found[min(found)]
        rate = 1e3 * first["bytes"] / first["ms_50"]
        size = rate / first["rows_per_s"] * 1e9
        hours = [f"{1e9 / found[n]['rows_per_s'] / 3600:.2g} h" if n in found else "" for n in counts]
        lines.append([f"`{dtype}`", f"`{query_dtype}`", f"{size / 1e12:.3g} TB", f"{rate / 1e9:.3g} GB/s", *hours])
    return lines


def _queries(n: int) -> str:
    return f"{n} {'query' if n == 1 else 'queries'}"


def simulation(rows: Rows) -> list[list[str]]:
    """Efficiency of the simulated map over shards, a column for each number of workers."""
    counts = sorted({row["workers"] for row in rows})
    lines = [["shards are taken by", "order", "examples of a shard", "99 % take less than", *map(_workers, counts)]]
    for kind in dict.fromkeys((row["schedule"], row["order"], row["shard_size"]) for row in rows):
        found = {row["workers"]: row for row in rows if (row["schedule"], row["order"], row["shard_size"]) == kind}
        cells = [f"{100 * found[n]['efficiency']:.1f} %" if n in found else "" for n in counts]
        minutes = f"{found[max(found)]['shard_s_99'] / 60:,.0f} min"
        lines.append([kind[0], kind[1], f"{kind[2]:,}", minutes, *cells])
    return lines


def _workers(n: int) -> str:
    return f"{n:,} {'worker' if n == 1 else 'workers'}"


def scaling(rows: Rows) -> list[list[str]]:
    """The fitted exponents of every axis."""
    lines = [["", "against", "from", "to", "time grows as", "20 % to 80 %", "memory grows as"]]
    for axis in dict.fromkeys(row["axis"] for row in rows):
        points = [row for row in rows if row["axis"] == axis]
        first, last = points[0], points[-1]
        memory = first["memory_exponent"]
        lines.append(
            [
                first["implementation"],
                AXES.get(axis, axis),
                f"{first['size']:,}",
                f"{last['size']:,}",
                f"size^{first['exponent']:.2f}",
                f"{first['exponent_20']:.2f} to {first['exponent_80']:.2f}",
                "" if memory is None else f"size^{memory:.2f}",
            ]
        )
    return lines


AXES = {"k": "K", "queries": "subtasks"}


def quality(rows: Rows) -> list[list[str]]:
    """What each store dtype keeps of the exact ranking: real gradients, the default projection at the largest K."""
    default = [row for row in _sketches(rows) if row["kind"] == "srht" and row["block"] == 64]
    largest = max((row["k"] for row in default), default=0)
    lines = [["pool", "targets", "error of cosines", "rank correlation", "same top 5 %"]]
    for row in default:
        if row["k"] == largest:
            lines.append([f"`{row['dtype']}`", f"`{row['target_dtype']}`", *_agreement(row)])
    return lines


def large(rows: Rows) -> list[list[str]]:
    """The command line on a store that is large: its time and the most memory that its process held."""
    lines = [["pool", "dtype", "queries", "time", "memory"]]
    for row in (row for row in rows if row["op"] == "score-large"):
        memory = f"{row['peak_bytes'] / 1e6:.0f} MB"
        lines.append([row["shape"], f"`{row['dtype']}`", str(row["queries"]), _seconds(row), memory])
    return lines


def agreement(rows: Rows) -> list[list[str]]:
    """What each store dtype keeps of a float32 pool's scores, a column for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [["pool", "bytes of a row", "queries as", *tasks]]
    for dtype, query_dtype in dict.fromkeys((row["dtype"], row["query_dtype"]) for row in rows):
        found = {row["task"]: row for row in rows if (row["dtype"], row["query_dtype"]) == (dtype, query_dtype)}
        cells = [f"{found[t]['rank_correlation']:.4f}, {100 * found[t]['top_overlap']:.0f} %" for t in tasks]
        lines.append([f"`{dtype}`", f"{found[tasks[0]]['row_bytes']:,}", f"`{query_dtype}`", *cells])
    return lines


def projections(rows: Rows) -> list[list[str]]:
    """What each kind and K keep of the exact ranking, in float32; real gradients, and such with outlier columns."""
    lines = [["gradients", "K", "projection", "error of cosines", "rank correlation", "same top 5 %"]]
    plain = [row for gradients in ("real", "outliers") for row in _sketches(rows, gradients)]
    for row in plain:
        if (row["dtype"], row["target_dtype"]) == ("float32", "float32") and row["kind"] != "identity":
            kind = f"`{row['kind']}`" + (f", block {row['block']}" if row["block"] not in (None, 64) else "")
            lines.append([row["gradients"], f"{row['k']:,}", kind, *_agreement(row)])
    return lines


def _sketches(rows: Rows, gradients: str = "real") -> Rows:
    return [row for row in rows if row["op"] == "quality" and row.get("gradients") == gradients]


def _agreement(row: dict[str, Any]) -> list[str]:
    """Error of the cosines; rank correlation and share of the same selection, with standard deviations over seeds."""
    overlap, deviation = 100 * row["top_overlap"], row["top_overlap_sd"]
    same = f"{overlap:.1f} %" if deviation is None else f"{overlap:.1f} ± {100 * deviation:.1f} %"
    return [f"{row['cosine_rms']:.2g}", _spread(row, "rank_correlation", 4), same]


def selection(rows: Rows) -> list[list[str]]:
    """Test loss after fine-tuning on each selection, a column for each task."""
    rows = [row for row in rows if row["op"] == "selection"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [["trained on", *tasks]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = {row["task"]: row for row in rows if row["arm"] == arm}
        lines.append([arm, *(_spread(found[task], "test_loss", 3) for task in tasks)])
    return lines


def _spread(row: dict[str, Any], name: str, places: int) -> str:
    deviation = row[f"{name}_sd"]
    return f"{row[name]:.{places}f}" + ("" if deviation is None else f" ± {deviation:.{places}f}")


def peers(rows: Rows) -> list[list[str]]:
    """Every way of every library: its speed beside less_fast's for the same features, or why there is none."""
    lines = [["library", "what it computes", "K", "examples/s", "time, less_fast = 1", "peak memory"]]
    for row in rows:
        name = " ".join(part for part in (row["peer"], row["peer_version"]) if part)
        if row["reason"] is not None:
            lines.append([name, row["what"], f"{row['k']:,}", "—", row["reason"], "—"])
            continue
        ratio = row.get("ratio_to_baseline")
        beside = "" if ratio is None else f"{ratio:.2f}"
        peak = f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        lines.append([name, row["what"], f"{row['k']:,}", f"{row['examples_per_s']:.2f}", beside, peak])
    return lines


def rivals(rows: Rows) -> list[list[str]]:
    """The part of :func:`peers` that was timed and has the whole of an Adam in it."""
    return peers([row for row in rows if row["reason"] is None and row["rule"] in ("less", "torch")])


class Table(NamedTuple):
    """``file``: of the rows; ``cells`` makes the header and the lines of them."""

    file: str
    cells: Callable[[Rows], list[list[str]]]


TABLES = {
    "overhead": Table("overhead.json", overhead),
    "callback": Table("callback.json", callback),
    "sketch": Table("sketch.json", sketch),
    "score": Table("score.json", score),
    "scan": Table("score.json", scan),
    "large": Table("score_large.json", large),
    "agreement": Table("agreement.json", agreement),
    "scaling": Table("scaling.json", scaling),
    "quality": Table("quality.json", quality),
    "projections": Table("quality.json", projections),
    "selection": Table("quality.json", selection),
    "peers": Table("peers.json", peers),
    "simulation": Table("simulate.json", simulation),
    "rivals": Table("peers.json", rivals),
}


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['ms_50'] / 1e3:.2f} s"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def render(name: str, folder: Path) -> str:
    """A table in Markdown; empty where the folder has no rows for it."""
    lines = TABLES[name].cells(read_rows(folder / TABLES[name].file))
    if len(lines) < 2:
        return ""
    clean = [[re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line] for line in lines]
    body = [f"| {' | '.join(line)} |" for line in clean]
    return "\n".join([body[0], "|" + "---|" * len(lines[0]), *body[1:]]) + "\n"


def updated(text: str, results: Path = RESULTS) -> str:
    """A page with its tables as the rows say; SystemExit where it shows one that has no rows."""

    def table(marked: re.Match[str]) -> str:
        begin, device, name, end = marked.groups()
        made = render(name, results / device) if name in TABLES else ""
        if not made:
            raise SystemExit(f"there are no rows for the table {device}/{name}: remove it, or measure it")
        return f"{begin}{made}{end}"

    return _MARKED.sub(table, text)


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, write or print the tables; 1 where a page was not as its rows are and still is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="print the tables of this folder's rows, change nothing")
    parser.add_argument("--write", action="store_true", help="bring the pages in step with the rows")
    options = parser.parse_args(argv)
    if options.folder is not None:
        found = {name: render(name, options.folder) for name in TABLES}
        print("\n".join(f"{name}\n\n{table}" for name, table in found.items() if table))
        return 0
    different = False
    for page in pages():
        text = page.read_text(encoding="utf-8")
        wanted = updated(text)
        if wanted != text:
            different = True
            print(f"{page.relative_to(ROOT)}: {'written' if options.write else 'differs; --write brings it in step'}")
            if options.write:
                page.write_text(wanted, encoding="utf-8")
    return int(different and not options.write)


if __name__ == "__main__":
    sys.exit(main())
