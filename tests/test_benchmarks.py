"""The CPU benchmarks: growth is fitted right, and tables and plots say what the committed rows say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
DEVICES = sorted(path for path in RESULTS.iterdir() if path.is_dir())
FIELDS = {
    *("op", "implementation", "shape", "dtype", "ms_50", "ms_20", "ms_80", "ratio_to_baseline", "peak_bytes"),
    *("device", "driver", "torch", "triton", "commit", "date"),
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def score_row(queries: int, dtype: str, query_dtype: str = "float32", **facts: Any) -> dict[str, Any]:
    return {
        "op": "score",
        "implementation": f"{dtype} x {query_dtype}",
        "shape": f"27000x8192, {queries} queries",
        "dtype": dtype,
        "query_dtype": query_dtype,
        "queries": queries,
        "ms_50": 150.0,
        "bytes": 1e9,
        "flops": 1e9 * queries,
        "ratio_to_floor": 1.25,
        "ratio_to_baseline": 0.5,
        "rows_per_s": 180_000.0,
        **facts,
    }


def simulation_row(workers: int, order: str = "dataset", **facts: Any) -> dict[str, Any]:
    taken = {"schedule": "claims", "order": order, "shard_size": 4096, "workers": workers}
    return {"op": "simulation", **taken, "efficiency": 0.98765 / workers, "shard_s_99": 1234.0, **facts}


def quality_row(kind: str, k: int, **facts: Any) -> dict[str, Any]:
    return {
        "op": "quality",
        "gradients": "real",
        "kind": kind,
        "block": 64 if kind == "srht" else None,
        "k": k,
        "dtype": "float32",
        "target_dtype": "float32",
        "cosine_rms": 0.0123,
        "rank_correlation": 0.98764,
        "rank_correlation_sd": 0.0004,
        "top_overlap": 0.951,
        "top_overlap_sd": None,
        **facts,
    }


def peers_row(peer: str, **facts: Any) -> dict[str, Any]:
    return {
        "op": "peers",
        "rule": "less",
        "implementation": f"{peer} adam",
        "peer": peer,
        "peer_version": "1.2",
        "what": "LESS's Adam",
        "k": 8192,
        "ms_50": 800.0,
        "examples_per_s": 40.0,
        "ratio_to_baseline": 8.5,
        "peak_bytes": 3 << 29,
        "reason": None,
        **facts,
    }


def scaling_row(axis: str, size: int, **facts: Any) -> dict[str, Any]:
    times = {"ms_20": 9.0 * size, "ms_50": 10.0 * size, "ms_80": 12.0 * size}
    fit = {"exponent": 1.0, "exponent_20": 0.9, "exponent_80": 1.1, "memory_exponent": 0.5}
    made = {"op": "scaling", "implementation": "extract", "axis": axis, "size": size, "working_bytes": 100 + size}
    return {**made, **times, **fit, **facts}


def every_file(folder: Path) -> None:
    """Rows for every table and every plot."""
    write_rows(folder / "score.json", [score_row(n, dtype) for n in (1, 57) for dtype in ("float16", "int8")])
    write_rows(folder / "scaling.json", [scaling_row(axis, 2**i) for axis in ("examples", "k") for i in range(3, 6)])
    refused = peers_row("bergson", ms_50=None, reason="no first moment\n| at all", examples_per_s=None, peak_bytes=None)
    write_rows(folder / "peers.json", [peers_row("less_fast", ratio_to_baseline=1.0), peers_row("traker"), refused])
    sketched = [quality_row(kind, k) for kind in ("srht", "sjlt") for k in (512, 1024)]
    tuned = {"op": "selection", "task": "bbh", "arm": "random", "test_loss": 1.5, "test_loss_sd": 0.25}
    planted = [quality_row("srht", k, gradients="outliers") for k in (512, 1024)]
    write_rows(folder / "quality.json", [*sketched, *planted, tuned])
    simulated = [simulation_row(workers, order) for order in ("dataset", "longest first") for workers in (1, 64)]
    write_rows(folder / "simulate.json", simulated)
    limits = [("copy", "bytes_per_s"), ("matmul", "flops_per_s")]
    ceilings = [{"op": "ceilings", "implementation": name, rate: 1e10, "device": "CPU"} for name, rate in limits]
    write_rows(folder / "ceilings.json", ceilings)


def test_exponents_are_those_of_power_laws(module: Any) -> None:
    exponent = module("scaling").exponent
    sizes = [3, 6, 12, 24]
    for power in (0.0, 0.5, 1.0, 2.0):
        assert exponent(sizes, [7e-3 * size**power for size in sizes]) == pytest.approx(power)
    noisy = exponent(sizes, [1.0 * 3, 1.1 * 6, 0.9 * 12, 1.0 * 24])
    assert noisy != pytest.approx(1.0, abs=1e-3) and noisy == pytest.approx(1.0, abs=0.1)


def held(n_bytes: int) -> dict[str, int]:
    return {"peak_bytes": 1000 + n_bytes, "working_bytes": n_bytes}


def test_rows_of_an_axis_have_its_fit_and_spread(module: Any, tmp_path: Path) -> None:
    scaling = module("scaling")
    points = [scaling.Extraction(tmp_path, examples=size) for size in (8, 16, 32)]
    # Three rounds, of which the second grows like size^2.
    seconds = [[1.0, 1.0, 1.0], [2.0, 4.0, 2.0], [4.0, 16.0, 4.0]]
    rows = scaling.axis_rows("examples", points, seconds, [held(10), held(20), held(40)])
    assert [row["size"] for row in rows] == [8, 16, 32]
    assert [row["ratio_to_baseline"] for row in rows] == [1.0, 2.0, 2.0]
    assert [(row["peak_bytes"], row["working_bytes"]) for row in rows] == [(1010, 10), (1020, 20), (1040, 40)]
    for row in rows:
        assert set(row) >= FIELDS and row["examples_per_s"] == pytest.approx(8.0)
        assert row["exponent"] == pytest.approx(1.0) and row["memory_exponent"] == pytest.approx(1.0)
        assert row["exponent_20"] == pytest.approx(1.0) and row["exponent_80"] == pytest.approx(1.6)
    (row, *_) = scaling.axis_rows("examples", points, seconds, [held(0)] * 3)
    assert row["memory_exponent"] is None


def test_scaling_measures_what_it_says(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scaling.json"
    options = ["--tiny", "--repeats", "2", "--axes", "rank", "rows", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *options])
    module("scaling").main()
    rows = module("tables").read_rows(file)
    assert [(row["axis"], row["size"]) for row in rows] == [("rank", 2), ("rank", 4), ("rows", 64), ("rows", 128)]
    assert [row["p"] for row in rows[:2]] == [4 * 4 * 2 * rank * 48 for rank in (2, 4)]
    assert rows[3]["bytes"] == 2 * rows[2]["bytes"] == 2 * 128 * 256
    for row in rows:
        assert set(row) >= FIELDS and 0 < row["ms_20"] <= row["ms_50"] <= row["ms_80"]
        assert row["peak_bytes"] > 50 << 20 and row["working_bytes"] < row["peak_bytes"]
    assert "extract  against rank" in capsys.readouterr().out


def test_scaling_refuses_wrong_features(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = module("scaling")
    extract = scaling.extract

    def wrong(model: Any, data: Any, out: Path, *, backend: str, projection: Any, **settings: Any) -> Any:
        seed = 1 if backend == "reference" else 0
        other = scaling.Projection("srht", projection.dim, seed=seed)
        return extract(model, data, out, backend=backend, projection=other, **settings)

    monkeypatch.setattr(scaling, "extract", wrong)
    (point, _) = scaling.axes(tmp_path, tiny=True)["examples"]
    with pytest.raises(SystemExit, match="not timing a wrong result"):
        point.prepare()


def test_pages_show_the_committed_rows(module: Any) -> None:
    tables = module("tables")
    shown = 0
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.updated(text) == text, f"{page.name} is not in step: python benchmarks/tables.py --write"
        shown += len(tables._MARKED.findall(text))
        assert text.count("<!-- table:") == len(tables._MARKED.findall(text)), f"a marker of {page.name} is not closed"
    assert shown


def test_the_overhead_table_is_read_off_the_rows(module: Any, tmp_path: Path) -> None:
    facts = {"op": "overhead", "shape": "small", "examples": 3, "tokens": 4567}
    bare = {**facts, "implementation": "bare", "ms_50": 2000.0, "ratio_to_baseline": 1.0}
    ours = {**facts, "implementation": "less_fast", "ms_50": 2068.0, "ratio_to_baseline": 1.0341}
    write_rows(tmp_path / "overhead.json", [bare, ours])
    line = "| small | 3 examples, 4,567 tokens | 2.00 s | 2.07 s | 1.034 |"
    assert module("tables").render("overhead", tmp_path).splitlines()[2:] == [line]


def test_other_tables_are_read_off_the_rows(module: Any, tmp_path: Path) -> None:
    every_file(tmp_path)
    made = {name: module("tables").render(name, tmp_path).splitlines() for name in module("tables").TABLES}
    assert made["score"][0] == "| pool | queries as | 1 query | 57 queries |"
    assert made["score"][3] == "| `int8` | `float32` | 150 ms (1.25) | 150 ms (1.25) |"
    assert made["scan"][0] == "| pool | queries as | codes of 10⁹ rows | read at | 1 query | 57 queries |"
    assert made["scan"][3] == "| `int8` | `float32` | 37 TB | 6.67 GB/s | 1.5 h | 1.5 h |"
    assert made["simulation"][0].endswith("| 99 % take less than | 1 worker | 64 workers |")
    assert made["simulation"][3] == "| claims | longest first | 4,096 | 21 min | 98.8 % | 1.5 % |"
    assert made["scaling"][3] == "| extract | K | 8 | 32 | size^1.00 | 0.90 to 1.10 | size^0.50 |"
    assert made["quality"][2:] == ["| `float32` | `float32` | 0.012 | 0.9876 ± 0.0004 | 95.1 % |"]  # of the largest K
    assert made["projections"][-1] == "| outliers | 1,024 | `srht` | 0.012 | 0.9876 ± 0.0004 | 95.1 % |"
    assert made["selection"][2:] == ["| random | 1.500 ± 0.250 |"]
    assert made["peers"][3] == "| traker 1.2 | LESS's Adam | 8,192 | 40.00 | 8.50 | 1,536 MiB |"
    assert made["peers"][4] == "| bergson 1.2 | LESS's Adam | 8,192 | — | no first moment \\| at all | — |"
    assert made["rivals"][2:] == made["peers"][2:4]
    assert made["sketch"] == made["overhead"] == made["callback"] == []  # no rows: nothing is shown


def test_writing_replaces_the_marked_tables_only(module: Any, tmp_path: Path) -> None:
    tables = module("tables")
    write_rows(tmp_path / "cpu/score.json", [score_row(9, "int8")])
    page = "a | b\n<!-- table: cpu/score -->\nold | table\n<!-- end -->\nc\n"
    once = tables.updated(page, tmp_path)
    assert once.startswith("a | b\n<!-- table: cpu/score -->\n| pool |") and once.endswith(
        "(1.25) |\n<!-- end -->\nc\n"
    )
    assert "old" not in once and tables.updated(once, tmp_path) == once


@pytest.mark.parametrize("name", ["cpu/peers", "gpu/score", "cpu/nonsense"])
def test_a_table_without_rows_is_refused(module: Any, tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "cpu/score.json", [score_row(9, "int8")])
    with pytest.raises(SystemExit, match=f"no rows for the table {name}"):
        module("tables").updated(f"<!-- table: {name} -->\n<!-- end -->\n", tmp_path)


def matplotlib_version() -> str:
    try:
        return importlib.import_module("matplotlib").__version__
    except ModuleNotFoundError:
        return pytest.skip("matplotlib is not installed: pip install 'less_fast[bench]'")


@pytest.mark.parametrize("device", DEVICES, ids=lambda path: path.name)
def test_committed_plots_are_redrawn_from_the_rows(module: Any, tmp_path: Path, device: Path) -> None:
    version = matplotlib_version()
    committed = {path.name: path.read_text() for path in device.glob("*.svg")}
    for name in committed:
        drawn_by = module("plot").drawn_by(device / name)
        if drawn_by != version:
            pytest.skip(f"{name} was drawn by matplotlib {drawn_by}, and this is {version}")
    drawn = {path.name: path.read_text() for path in module("plot").draw(device, tmp_path)}
    assert drawn == committed, f"python benchmarks/plot.py {device.relative_to(ROOT)}"


def test_every_plot_is_drawn_the_same_each_time(module: Any, tmp_path: Path) -> None:
    matplotlib_version()
    plot, folder = module("plot"), tmp_path / "rows"
    every_file(folder)
    drawn = plot.draw(folder)
    assert [path.stem for path in drawn] == list(plot.FIGURES)
    (tmp_path / "again").mkdir()
    for first, second in zip(drawn, plot.draw(folder, tmp_path / "again")):
        assert first.read_bytes() == second.read_bytes() and b"<dc:date>" not in first.read_bytes()
    write_rows(folder / "peers.json", [peers_row("less_fast"), peers_row("traker", examples_per_s=1.0)])
    assert (tmp_path / "again/peers.svg").read_bytes() != plot.draw(folder)[3].read_bytes()
    assert plot.draw(tmp_path / "again") == []  # no rows, no plots


def test_plots_need_matplotlib_and_tables_do_not(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError):
        module("plot").draw(tmp_path)


@pytest.fixture
def cpu(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/cpu.py, whose benchmarks are replaced by one row each."""
    found = module("cpu")
    made = {"score": [score_row(9, "int8", device="CPU")], "scaling": [scaling_row("k", 8, device="CPU")]}
    monkeypatch.setattr(found, "script", lambda name, tiny: made.get(name, []))
    monkeypatch.setattr(found, "sketch", lambda tiny, rates: [])
    monkeypatch.setattr(found, "draw", lambda folder: None)
    return found


def test_the_command_replaces_rows_and_prints_tables(
    cpu: Any, module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert cpu.main(["--tiny", "--out", str(tmp_path)]) == 0
    (row,) = module("tables").read_rows(tmp_path / "score.json")
    assert row["device"] == "CPU, tiny shapes: no measurement"
    ceilings = {row["implementation"]: row for row in module("tables").read_rows(tmp_path / "ceilings.json")}
    assert ceilings["copy"]["bytes_per_s"] > 1e8 and ceilings["matmul"]["flops_per_s"] > 1e8
    assert "| `int8` | `float32` | 150 ms (1.25) |" in capsys.readouterr().out


def test_a_benchmark_that_fails_leaves_its_rows_and_ends_nothing_else(
    cpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(name: str, tiny: bool) -> list[dict[str, Any]]:
        if name == "score":
            raise subprocess.CalledProcessError(1, name)
        return [scaling_row("k", 8, device="CPU")] if name == "scaling" else []

    monkeypatch.setattr(cpu, "script", script)
    write_rows(tmp_path / "score.json", [score_row(9, "int8")])
    earlier = (tmp_path / "score.json").read_bytes()
    assert cpu.main(["--tiny", "--out", str(tmp_path)]) == 1
    assert "; score failed" in capsys.readouterr().out
    assert (tmp_path / "score.json").read_bytes() == earlier and (tmp_path / "scaling.json").exists()


def test_tiny_figures_are_never_results(cpu: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cpu.main(["--tiny"])
    assert stopped.value.code == 2


def test_the_whole_command(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/cpu.py", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("ceilings", "sketch", "overhead", "score", "scaling"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.json").read_text().splitlines()]
        assert rows and all(row["device"].endswith("tiny shapes: no measurement") for row in rows)
        assert all(set(row) >= FIELDS - {"ratio_to_baseline"} for row in rows)
    assert "| projection | rule | by |" in done.stdout
