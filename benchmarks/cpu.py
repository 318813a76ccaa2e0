"""Measure everything that a CPU can, in at most ten minutes: `python benchmarks/cpu.py`, which `make bench` runs.

Measures the two ceilings, then runs every benchmark in a process of its own, writes one file of rows each under
benchmarks/results/<device>, draws them where matplotlib is installed, and prints the tables. With `--tiny --out DIR` it
tries itself out on small shapes, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tables
import torch
from common import device_name, row
from gpu import RESULTS, slug

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
SURROUNDINGS = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # rows name the device there is, and this is about the CPU
NO_MEASUREMENT = ", tiny shapes: no measurement"

NAMES = ("ceilings", "sketch", "overhead", "score", "scaling")

# How the scripts are tried out.
TINY = {
    "overhead": ["--examples", "8", "--repeats", "1"],
    "score": ["--rows", "256", "--dim", "256", "--queries", "1", "9", "--repeats", "1"],
    "scaling": ["--tiny", "--repeats", "1"],
}


def ceilings(tiny: bool) -> list[dict[str, Any]]:
    """Rows of a large copy (bytes read plus written) and a float32 matrix product, at best of ten, in turn."""
    n, side = (1 << 18, 128) if tiny else (1 << 26, 2048)
    source, (left, right) = torch.rand(n), torch.rand(2, side, side)
    target, product = torch.empty_like(source), torch.empty(side, side)
    seconds: dict[str, list[float]] = {"copy": [], "matmul": []}
    for _ in range(11):
        for name in seconds:
            started = time.perf_counter()
            target.copy_(source) if name == "copy" else torch.matmul(left, right, out=product)
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, rate, amount in (("copy", "bytes_per_s", 8 * n), ("matmul", "flops_per_s", 2 * side**3)):
        taken = seconds[name][1:]
        made = row("ceilings", name, taken, device=CPU, shape=f"{amount:.3g}", dtype="float32")
        rows.append({**made, rate: amount / min(taken)})
    return rows


def sketch(tiny: bool, limits: tuple[float, float]) -> list[dict[str, Any]]:
    """Rows of bench_ops.py, held against its copy and against the ceilings (bytes and operations per second)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ops.json"
        # The dense kinds' definition takes seconds a call, and no one computes with it.
        chosen = "copy or cpu" if tiny else "not (reference and (rademacher or gaussian))"
        options = [
            "-q",
            "-k",
            chosen,
            "-p",
            "no:cacheprovider",
            f"--benchmark-json={file}",
            "--benchmark-columns=median,iqr",
        ]
        if tiny:
            options += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2"]
        # From this folder: with the root on sys.path, kernels/ could be imported under another package's name.
        command = [sys.executable, "-m", "pytest", f"--rootdir={HERE.parent}", "bench_ops.py", *options]
        subprocess.run(command, cwd=HERE, env=SURROUNDINGS, check=True)
        found = {entry["name"]: entry for entry in json.loads(file.read_text())["benchmarks"]}
    copied = found.pop("test_copy")["stats"]["median"]
    rows = []
    for entry in found.values():
        kind, dim, rule, backend = entry["param"].split("-")
        median, extra = entry["stats"]["median"], entry["extra_info"]
        floor = max(extra["bytes"] / limits[0], extra["flops"] / limits[1])
        facts = {"shape": "16x16x4096", "dtype": "float32", "projection": f"{kind}, K = {dim}", "rule": rule, **extra}
        ratios = {"floor_ms": 1e3 * floor, "ratio_to_floor": median / floor, "ratio_to_baseline": median / copied}
        rows.append(row("sketch", backend, entry["stats"]["data"], device=CPU, **facts, baseline="copy", **ratios))
    return rows


def script(name: str, tiny: bool) -> list[dict[str, Any]]:
    """Rows of a benchmark that is a program."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        options = [*(TINY[name] if tiny else []), "--json", str(file)]
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], env=SURROUNDINGS, check=True)
        return tables.read_rows(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 0 where all of them ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--tiny", action="store_true", help="small shapes, whose figures mean nothing")
    options = parser.parse_args(argv)
    if options.tiny and options.out is None:
        parser.error("--tiny needs --out: its figures are never results")
    folder = options.out or RESULTS / slug(device_name(CPU))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    limits = ceilings(options.tiny)
    rates = limits[0]["bytes_per_s"], limits[1]["flops_per_s"]
    failed = []
    for name in options.only:
        print(f"{name}, after {time.monotonic() - started:.0f} s", flush=True)
        try:
            if name == "ceilings":
                rows = limits
            else:
                rows = sketch(options.tiny, rates) if name == "sketch" else script(name, options.tiny)
        except subprocess.CalledProcessError:
            failed.append(name)
            continue
        if options.tiny:
            rows = [{**entry, "device": entry["device"] + NO_MEASUREMENT} for entry in rows]
        # In place of those of an earlier run.
        (folder / f"{name}.json").write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    draw(folder)
    tables.main([str(folder)])
    print(f"{folder} written in {time.monotonic() - started:.0f} s" + "".join(f"; {name} failed" for name in failed))
    return int(bool(failed))


def draw(folder: Path) -> None:
    """The plots of the folder's rows, if matplotlib is there."""
    import plot

    try:
        plot.draw(folder)
    except ModuleNotFoundError as error:
        print(f"nothing is drawn: {error}; pip install 'less_fast[bench]'")


if __name__ == "__main__":
    sys.exit(main())
