"""The GPU benchmarks' one command, tried out whole on a CPU with tiny shapes, and what its stages rest on."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from less_fast.features import FeatureExtractor
from less_fast.projection import Projection

ROOT = Path(__file__).parent.parent
BENCHMARKS = ("sketch", "outer", "score", "overhead", "less", "memory")
FIELDS = {
    *("op", "implementation", "shape", "dtype", "ms_50", "ms_20", "ms_80", "bytes", "flops", "floor_ms"),
    *("ratio_to_floor", "ratio_to_baseline", "examples_per_s", "tokens_per_s", "peak_bytes"),
    *("device", "driver", "torch", "triton", "commit", "date", "bar", "bar_value", "met"),
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def session(module: Any, tmp_path: Path) -> Any:
    return module("gpu_session").Session(torch.device("cpu"), tmp_path / "rows", tiny=True)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the whole command writes; it is started as the documentation says, from the root."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(out), "--minutes", "3"]
    done = subprocess.run([*command, "--commit", "abc"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_stage_writes_its_file(results: Path) -> None:
    names = {"summary.md", "run.json", "ceilings.json", *(f"{name}.json" for name in BENCHMARKS)}
    assert {path.name for path in results.iterdir()} == names and len(names) <= 9
    run = read_rows(results / "run.json")
    done = [row["implementation"] for row in run if row.get("status") == "done"]
    assert done == ["tests", "ceilings", *BENCHMARKS]
    assert not [row for row in run if row.get("status") in ("failed", "skipped")]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_have_the_fields_of_the_format(results: Path, name: str) -> None:
    ceilings = {row["implementation"]: row for row in read_rows(results / "ceilings.json")}
    bandwidth, rate = ceilings["copy"]["bytes_per_s"], ceilings["matmul"]["flops_per_s"]
    rows = read_rows(results / f"{name}.json")
    assert rows
    for row in rows:
        assert set(row) >= FIELDS
        assert row["op"].partition(" ")[0] == name and row["commit"] == "abc"
        assert row["device"].endswith("tiny shapes: no measurement") and row["driver"] is None and row["met"] is None
        assert 0 < row["ms_20"] <= row["ms_50"] <= row["ms_80"]
        assert row["floor_ms"] == pytest.approx(1e3 * max(row["bytes"] / bandwidth, row["flops"] / rate))
        assert row["ratio_to_floor"] == pytest.approx(row["ms_50"] / row["floor_ms"])
        assert row["examples_per_s"] == pytest.approx(1e3 * row["examples"] / row["ms_50"])
        if row["tokens"]:
            assert row["tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row["ms_50"])
        same = [r for r in rows if (r["op"], r["shape"], r["dtype"]) == (row["op"], row["shape"], row["dtype"])]
        (baseline,) = [r for r in same if r["implementation"] == row["baseline"]]
        assert baseline["ratio_to_baseline"] == 1 and row["ratio_to_baseline"] > 0
        assert (row["bar"] is None) == (row["bar_value"] is None)
    assert any(row["bar"] for row in rows)


def test_extraction_is_measured_padded_and_packed(results: Path) -> None:
    shapes = {row["shape"] for row in read_rows(results / "overhead.json")}
    assert any(shape.endswith(", padded") for shape in shapes) and any(", packed, " in shape for shape in shapes)


def test_summary_names_every_bar_and_stage(results: Path) -> None:
    text = (results / "summary.md").read_text()
    assert text.startswith("# ") and "tiny shapes: no measurement" in text.partition("\n")[0]
    for benchmark in BENCHMARKS:
        for row in read_rows(results / f"{benchmark}.json"):
            assert f"| {row['op']} | {row['implementation']} | {row['shape']}, {row['dtype']} |" in text
        assert f"- {benchmark}: " in text
    assert "not judged" in text and "pytest -m gpu: " in text and "Ceilings: " in text


@pytest.mark.parametrize("options", [["--device", "cpu"], ["--device", "cpu", "--tiny"], ["--tiny"]])
def test_a_cpu_never_writes_results(module: Any, options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        module("gpu").main(options)
    assert stopped.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_line_says_so(module: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        module("gpu").main(["--out", str(tmp_path / "out")])
    assert "torch sees no CUDA device" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_failing_stage_is_recorded_and_ends_nothing_else(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(session: Any) -> None:
        raise torch.OutOfMemoryError("no memory for this\nand a second line")

    monkeypatch.setattr(module("gpu_outer"), "run", fail)
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--one-file", "--stages", "sketch,outer,memory"]
    assert module("gpu").main(options) == 1
    rows = read_rows(tmp_path / "results.json")
    (failed,) = [row for row in rows if row.get("status") == "failed"]
    assert failed["implementation"] == "outer" and failed["error"] == "OutOfMemoryError: no memory for this"
    assert "in fail" in failed["traceback"]
    assert {row["op"] for row in rows} >= {"ceilings", "sketch srht", "memory"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "summary.md"]
    assert "- outer: OutOfMemoryError: no memory for this" in (tmp_path / "summary.md").read_text()


def test_what_the_time_does_not_allow_is_skipped_and_said(module: Any, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--stages", "less,sketch", "--minutes", "0"]
    assert module("gpu").main(options) == 0
    rows = read_rows(tmp_path / "run.json")
    skipped = [row["implementation"] for row in rows if row.get("status") == "skipped"]
    assert len(skipped) == 7 and "less" in skipped and all("0 s are left" in row["reason"] for row in rows[:6])
    assert "Skipped:" in (tmp_path / "summary.md").read_text() and not (tmp_path / "sketch.json").exists()


def test_an_unknown_stage_is_refused(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("gpu").main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--stages", "sketch,speed"])
    assert "no stage speed" in capsys.readouterr().err


def test_a_resumed_run_keeps_what_it_has_begun_and_begins_the_rest_anew(module: Any, session: Any) -> None:
    session.write("less", [{"op": "less", "number": 1}])
    session.write("outer", [{"op": "outer", "number": 2}])
    other = module("gpu_session").Session(torch.device("cpu"), session.folder, tiny=True)
    other.resume(["less.json"])
    other.write("less", [{"op": "less", "number": 3}])
    other.write("outer", [{"op": "outer", "number": 4}])
    assert [row["number"] for row in other.rows] == [1, 3, 4]
    assert [row["number"] for row in read_rows(session.folder / "less.json")] == [1, 3]
    assert [row["number"] for row in read_rows(session.folder / "outer.json")] == [4]
    assert other.begun() == ["less.json", "outer.json"]


def test_a_resumed_run_takes_its_ceilings_from_before(module: Any, session: Any) -> None:
    other = module("gpu_session").Session(torch.device("cpu"), session.folder, tiny=True)
    before = session.ceilings
    other.resume(session.begun())
    assert other.ceilings == before and len(read_rows(session.folder / "ceilings.json")) == 2


def test_the_default_run_is_estimated_within_its_minutes(module: Any, tmp_path: Path) -> None:
    session = module("gpu_session").Session(torch.device("cpu"), tmp_path)
    seconds = {stage: module(f"gpu_{stage}").estimate(session) for stage in module("gpu").STAGES}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) <= 9.5 * 60 - 60  # a minute to build the package


def test_bars_are_judged_in_their_own_direction(module: Any) -> None:
    bar = module("gpu_session").Bar
    assert bar("ratio", 1.04, 1.05).facts(True) == {"bar": "ratio <= 1.05", "bar_value": 1.04, "met": True}
    assert bar("share", 0.6, 0.7, at_least=True).facts(True)["met"] is False
    assert bar("ratio", math.nan, 1.05).facts(True)["met"] is False
    assert bar("ratio", 1.0, 1.05).facts(False)["met"] is None


def test_variants_take_turns_and_a_ratio_is_of_the_same_round(module: Any, session: Any) -> None:
    order: list[str] = []
    seconds = session.interleaved({"a": lambda i: order.append("a"), "b": lambda i: order.append("b")}, calls=1)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 5, "b": 5}
    rounds = ["".join(order[i : i + 2]) for i in range(0, 12, 2)]
    assert sorted(set(rounds)) == ["ab", "ba"] and len(order) == 12
    ratio = module("gpu_session").median_ratio({"x": [1.0, 4.0, 9.0], "y": [1.0, 2.0, 1.0]}, "x", "y")
    assert ratio == 2.0


@pytest.mark.parametrize("found", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, math.nan])])
def test_nothing_is_timed_that_differs(module: Any, found: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="not timing a wrong result"):
        module("gpu_session").must_agree("it", found, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("mean", [43, 371])
@pytest.mark.parametrize("n", [32, 50, 192])
def test_lengths_have_the_mean_that_was_asked_for(module: Any, n: int, mean: int) -> None:
    models = module("gpu_models")
    lengths = models.real_lengths(n, mean, models.QUANTILES)
    assert len(lengths.values) == n and max(lengths.values) <= models.LONGEST and min(lengths.values) >= 4
    assert lengths.tokens / n == pytest.approx(mean, rel=0.03)
    assert sorted(lengths.values)[n // 2] < 0.75 * mean  # as skewed as the real ones


def test_shapes_have_the_published_sizes(module: Any) -> None:
    models = module("gpu_models")
    sizes = [round(shape.weights / 1e9, 2) for shape in (models.LLAMA_7B, models.LLAMA_1B, models.QWEN_HALF_B)]
    assert sizes == [6.74, 1.24, 0.49]
    assert models.LLAMA_7B.work(371, 0, 1).flops == pytest.approx(4 * 6.48e9 * 371, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_random_signs_are_balanced_at_every_place_of_a_word(module: Any, dtype: torch.dtype) -> None:
    signs = module("gpu_dense").random_signs(301, 400, dtype, torch.Generator().manual_seed(0))
    assert signs.dtype == dtype and signs.shape == (301, 400) and signs.abs().eq(1).all()
    per_word = 8 // dtype.itemsize
    means = signs.float().view(-1, per_word).mean(0)
    assert means.abs().max() < 5 / (301 * 400 / per_word) ** 0.5


def test_dense_projection_is_the_product_with_one_matrix(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = module("gpu_dense")
    monkeypatch.setattr(dense, "CHUNK_BYTES", 64 * 4 * 7)  # 7 columns at a time, 45 in all
    matrix = dense.dense_projection(torch.eye(45), 64)
    assert (matrix * 8).abs().eq(1).all()
    grads = torch.randn(3, 45, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(dense.dense_projection(grads, 64), grads @ matrix)


def test_less_loop_computes_the_vectors_that_extraction_does(module: Any, session: Any) -> None:
    less, models, overhead = module("gpu_less"), module("gpu_models"), module("gpu_overhead")
    setup = overhead.make_setup(session, models.TINY, 4)
    lengths = models.Lengths("mixed", (5, 9, 12))
    (batch,) = models.make_batches(session, models.TINY, setup.model, lengths, setup.extractor.batches)
    m, v = less.flat_moments(setup, session)
    vectors = less.less_loop(setup, list(less.alone(batch, session.device)), m, v, 0, torch.float32)
    identity = Projection("identity", setup.extractor.layout.size)
    expected = FeatureExtractor(setup.model, identity, setup.outputs[0].precondition)(batch)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not [p for p in setup.model.parameters() if p.requires_grad or p.grad is not None]


def test_less_loop_and_extraction_are_told_apart_when_they_differ(module: Any) -> None:
    compare = module("gpu_less").compare
    vectors = torch.randn(8, 2000, generator=torch.Generator().manual_seed(2)) + 1
    dense = module("gpu_dense").dense_projection
    assert compare(dense(vectors, 1024, 0), dense(vectors, 1024, 1), 1024) < 4 / 32
    with pytest.raises(AssertionError, match="not timing different work"):
        compare(dense(vectors, 1024, 0), dense(vectors - 1, 1024, 1), 1024)


def test_report_of_pytest_is_read(module: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="t" name="good"/>'
        '<testcase classname="t" name="bad"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>'
        '<testcase classname="" name="t2"><error message="collection failure">'
        "ModuleNotFoundError: No module named 'a_package_nobody_has'</error></testcase>"
        '<testcase classname="" name="t3"><error message="collection failure">'
        "ModuleNotFoundError: No module named 'less_fast.new'</error></testcase>"
        '<testcase classname="t" name="no"><skipped message="no CUDA device"/></testcase></testsuite></testsuites>'
    )
    counts, problems = module("gpu_tests").read_report(report)
    assert counts == {"passed": 1, "failed": 1, "errors": 1, "skipped": 1, "unreadable": 1}
    assert problems == ["t::bad: assert 1 == 2", "::t3: collection failure"]


def test_a_test_run_that_takes_too_long_is_ended(module: Any) -> None:
    outcome = module("gpu_tests").pytest(["--collect-only", "tests"], 1e-3)
    assert outcome.reason == "ended after 0 s" and outcome.passed == 0 and outcome.seconds < 30


def test_the_package_is_used_from_a_copy_without_exposing_its_kernels_folder(module: Any, tmp_path: Path) -> None:
    site = tmp_path / "site"
    module("gpu_bootstrap").copy_python(ROOT, site)
    code = (
        "import less_fast.kernels, importlib.util as u; "
        "print(less_fast.__file__, less_fast.kernels.__file__, u.find_spec('kernels'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    package = site / "less_fast"
    assert done.stdout.split() == [str(package / "__init__.py"), str(package / "kernels/__init__.py"), "None"]
    assert not [*package.rglob("*.so")]
