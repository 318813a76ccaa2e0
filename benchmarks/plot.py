"""Draw measured rows: `python benchmarks/plot.py [FOLDER ...]`, by default every folder of benchmarks/results.

Ratio bars, a roofline, scaling curves, peers, quality and a simulated map, each where its JSON file is; nothing else is
read. The SVGs lie beside the rows; equal rows give equal bytes with one version of matplotlib, which the files name.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import AXES, RESULTS, Rows, read_rows

OURS, OTHERS, MEMORY, INK = "#1f6feb", "#9aa4b2", "#d9822b", "#24292f"
CYCLE = (OURS, MEMORY, "#2da44e", "#8250df", "#cf222e", "#57606a")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE = {
    "svg.hashsalt": "less_fast",  # ids of the SVG's elements: else they are random
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # matplotlib's own, so that text is as wide everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8c959f",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",  # readable on a dark page too
    "savefig.facecolor": "white",
}
# What the project asks of a ratio: at most this.
BARS = {("overhead", "ratio_to_baseline"): 1.05, ("score", "ratio_to_floor"): 1.3}
RATIO_FILES = ("overhead.json", "score.json", "sketch.json", "outer.json", "less.json", "memory.json")
_CREATOR = re.compile(r"Matplotlib v[\w.]+")


def subplots(columns: int, rows: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of so many inches and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def horizontal(
    axes: Any, labels: Sequence[str], values: Sequence[float], own: Sequence[bool], bar: float | None = None
) -> None:
    """Bars from the top down with their values, and a line where they should end."""
    places, colours = range(len(values)), [OURS if ours else OTHERS for ours in own]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
        axes.scatter(values, places, color=colours, s=24)  # a bar's length would mean nothing
    else:
        axes.barh(places, values, color=colours, height=0.7)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.18)
    for place, value in zip(places, values):
        text = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        axes.annotate(text, (value, place), (5, 0), va="center", **_OFFSET)
    if bar is not None:
        axes.axvline(bar, color="#cf222e", linewidth=1, linestyle="--")


_OFFSET: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}


def ratios(folder: Path) -> Any:
    """Time over the baseline's and over the floor, a panel for each benchmark and ratio that there is."""
    panels = []
    for file in RATIO_FILES:
        for name in ("ratio_to_baseline", "ratio_to_floor"):
            rows = [row for row in read_rows(folder / file) if row.get(name) is not None]
            if name == "ratio_to_baseline":
                rows = [row for row in rows if row[name] != 1.0]  # the baselines themselves
            if rows:
                panels.append((rows[0]["op"].partition(" ")[0], name, rows))
    if not panels:
        return None
    heights = [0.6 + 0.2 * len(rows) for _, _, rows in panels]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights}).ravel()
    for axes, (op, name, rows) in zip(grid, panels):
        labels = [_label(row) for row in rows]
        bar = BARS.get((op, name))
        own = [row.get("baseline") != row["implementation"] for row in rows]
        horizontal(axes, labels, [row[name] for row in rows], own, bar)
        wanted = "" if bar is None else f" (wanted: at most {bar})"
        axes.set_title(f"{op}: time over the {name.removeprefix('ratio_to_')}{wanted}")
    return figure


def _label(row: dict[str, Any]) -> str:
    if row["op"] == "overhead":
        return row["shape"] if row["implementation"] == "less_fast" else f"{row['implementation']}, {row['shape']}"
    if "projection" in row:
        return f"{row['implementation']}, {row['projection']}, {row['rule']}"
    if "queries" in row:
        return f"{row['implementation']}, {row['queries']} {'query' if row['queries'] == 1 else 'queries'}"
    case = row["op"].partition(" ")[2]  # GPU rows say more there
    return ", ".join(part for part in (row["implementation"], case, row["shape"], row["dtype"]) if part)


def roofline(folder: Path) -> Any:
    """Operations per second against operations per byte, under the two measured ceilings."""
    limits = {row["implementation"]: row for row in read_rows(folder / "ceilings.json")}
    points = [row for file in RATIO_FILES for row in read_rows(folder / file) if row.get("bytes") and row.get("flops")]
    if not points or not {"copy", "matmul"} <= set(limits):
        return None
    bandwidth, rate = limits["copy"]["bytes_per_s"], limits["matmul"]["flops_per_s"]
    figure, (axes,) = subplots(1, 1, 8, 4.6)
    intensities = [row["flops"] / row["bytes"] for row in points]
    low, high = min(intensities) / 2, max(*intensities, rate / bandwidth) * 2
    axes.plot([low, rate / bandwidth, high], [low * bandwidth / 1e9, rate / 1e9, rate / 1e9], color=INK, linewidth=1.2)
    axes.annotate(f"copy: {bandwidth / 1e9:.3g} GB/s", (low, low * bandwidth / 1e9), (14, -4), **_OFFSET)
    axes.annotate(f"matrix product: {rate / 1e9:.4g} GFLOP/s", (high, rate / 1e9), (0, 4), ha="right", **_OFFSET)
    groups = list(dict.fromkeys((row["op"], row["implementation"]) for row in points))
    for number, group in enumerate(groups):
        mine = [row for row in points if (row["op"], row["implementation"]) == group]
        axes.plot(
            [row["flops"] / row["bytes"] for row in mine],
            [row["flops"] / row["ms_50"] / 1e6 for row in mine],
            MARKERS[number // len(CYCLE) % len(MARKERS)],
            color=CYCLE[number % len(CYCLE)],
            markersize=5,
            label=" ".join(group),
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title=limits["copy"]["device"])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def scaling(folder: Path) -> Any:
    """Growth of time and memory over the smallest size, a panel per axis, with the fitted exponents."""
    rows = read_rows(folder / "scaling.json")
    names = list(dict.fromkeys(row["axis"] for row in rows))
    if not names:
        return None
    figure, grid = subplots(4, math.ceil(len(names) / 4), 10, 2.7 * math.ceil(len(names) / 4))
    for axes, name in zip(grid, names):
        points = [row for row in rows if row["axis"] == name]
        sizes, first = [row["size"] for row in points], points[0]
        times = [[row[f"ms_{share}"] / first["ms_50"] for row in points] for share in (20, 50, 80)]
        axes.plot(sizes, [size / sizes[0] for size in sizes], color="#8c959f", linewidth=0.8, linestyle=":")
        axes.fill_between(sizes, times[0], times[2], color=OURS, alpha=0.2, linewidth=0)
        axes.plot(sizes, times[1], "o-", color=OURS, markersize=4, label=f"time ~ size^{first['exponent']:.2f}")
        if first["memory_exponent"] is not None:
            memory = [row["working_bytes"] / first["working_bytes"] for row in points]
            label = f"memory ~ size^{first['memory_exponent']:.2f}"
            axes.plot(sizes, memory, "s-", color=MEMORY, markersize=3.5, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
        axes.yaxis.set_major_formatter(lambda value, _: f"×{value:g}")
        axes.set_title(f"{first['implementation']} against {AXES.get(name, name)}")
        axes.legend(fontsize=7, loc="upper left")
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    return figure


def peers(folder: Path) -> Any:
    """Examples per second and peak memory of every way of every library that could be measured."""
    rows = [row for row in read_rows(folder / "peers.json") if row["ms_50"] is not None]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: -row["examples_per_s"])
    figure, (speed, memory) = subplots(2, 1, 10, 0.9 + 0.24 * len(rows))
    own = [row["peer"] == "less_fast" for row in rows]
    labels = [row["implementation"] for row in rows]
    horizontal(speed, labels, [row["examples_per_s"] for row in rows], own)
    horizontal(memory, [""] * len(rows), [row["peak_bytes"] / 2**20 for row in rows], own)
    speed.set_title("examples per second")
    memory.set_title("peak memory, MiB")
    return figure


def simulation(folder: Path) -> Any:
    """Efficiency of the simulated map over shards against workers, a panel for each way that shards are taken."""
    rows = read_rows(folder / "simulate.json")
    kinds = list(dict.fromkeys((row["schedule"], row["order"]) for row in rows))
    if not kinds:
        return None
    figure, grid = subplots(len(kinds), 1, 10, 3.2)
    for axes, kind in zip(grid, kinds):
        mine = [row for row in rows if (row["schedule"], row["order"]) == kind]
        for number, size in enumerate(sorted({row["shard_size"] for row in mine})):
            points = sorted((row for row in mine if row["shard_size"] == size), key=lambda row: row["workers"])
            axes.plot(
                [row["workers"] for row in points],
                [row["efficiency"] for row in points],
                f"{MARKERS[number]}-",
                color=CYCLE[number],
                markersize=4,
                label=f"shards of {size:,}",
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set(ylim=(0, 1.02), xlabel="workers", title=", ".join(kind))
        axes.legend(fontsize=7, loc="lower left")
    grid[0].set_ylabel("efficiency")
    return figure


def quality(folder: Path) -> Any:
    """Rank correlation with the exact scores against K: kinds in float32, and store dtypes of the default kind."""
    rows = [row for row in read_rows(folder / "quality.json") if row["op"] == "quality" and row["kind"] != "identity"]
    rows = [row for row in rows if row["block"] in (None, 64)]
    sides = [side for side in ("real", "outliers") if any(row["gradients"] == side for row in rows)]
    if not sides:
        return None
    figure, grid = subplots(2, len(sides), 8, 3.1 * len(sides))
    for number, side in enumerate(sides):
        mine = [row for row in rows if row["gradients"] == side]
        plain = [row for row in mine if (row["dtype"], row["target_dtype"]) == ("float32", "float32")]
        stored = [row for row in mine if row["kind"] == "srht"]
        curves(grid[2 * number], plain, lambda row: row["kind"])
        curves(grid[2 * number + 1], stored, lambda row: f"{row['dtype']} x {row['target_dtype']}")
        gradients = "real gradients" if side == "real" else "gradients with outlier columns"
        grid[2 * number].set_title(f"{gradients}, stored as float32")
        grid[2 * number + 1].set_title(f"{gradients}, srht")
    return figure


def curves(axes: Any, rows: Rows, group: Callable[[dict[str, Any]], str]) -> None:
    """One curve per group: 1 - rank correlation against K, with a standard deviation over seeds."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for number, name in enumerate(dict.fromkeys(map(group, rows))):
        mine = sorted((row for row in rows if group(row) == name), key=lambda row: row["k"])
        axes.errorbar(
            [row["k"] for row in mine],
            [1 - row["rank_correlation"] for row in mine],
            yerr=[row["rank_correlation_sd"] or 0.0 for row in mine],
            fmt=f"{MARKERS[number % len(MARKERS)]}-",
            color=CYCLE[number % len(CYCLE)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=name,
        )
    sizes = sorted({row["k"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set(yscale="log", xlabel="K", ylabel="1 − rank correlation")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7)


FIGURES: dict[str, Callable[[Path], Any]] = {
    "ratios": ratios,
    "roofline": roofline,
    "scaling": scaling,
    "peers": peers,
    "quality": quality,
    "simulation": simulation,
}


def draw(folder: Path, out: Path | None = None) -> list[Path]:
    """Write the folder's figures as SVG, beside its rows or to ``out``; ModuleNotFoundError without matplotlib."""
    import matplotlib

    style: Any = STYLE
    written = []
    for name, make in FIGURES.items():
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # whatever the user's own settings are
            matplotlib.rcParams.update(style)
            figure = make(folder)
            if figure is not None:
                settle(figure)
                written.append((out or folder) / f"{name}.svg")
                figure.savefig(written[-1], metadata={"Date": None, "Creator": f"Matplotlib v{matplotlib.__version__}"})
    return written


def settle(figure: Any) -> None:
    """Fix the axes where the layout puts them, rounded: the last bits of its solver are not the same each time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(value, 6) for value in axes.get_position().bounds])


def drawn_by(file: Path) -> str | None:
    """The version of matplotlib that made an SVG."""
    found = _CREATOR.search(file.read_text(encoding="utf-8"))
    return found and found[0].removeprefix("Matplotlib v")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    for folder in parser.parse_args(argv).folders or sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for file in draw(folder):
            print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
