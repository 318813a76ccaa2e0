"""The quality benchmark: its definitions against the library's own, and its one command on an invented corpus."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.stores import make_store

from less_fast.errors import LessFastError
from less_fast.layout import ParameterLayout
from less_fast.projection import Projection
from less_fast.scoring import influence, select

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LAYOUT = ParameterLayout.build([("m.lora_A.w", 4, 40), ("m.lora_B.w", 24, 4), ("n.lora_A.w", 4, 24)])


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """Imports a module of benchmarks/ by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


@pytest.fixture(scope="module")
def measured(module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run: ``work`` and ``rows.json``."""
    folder = tmp_path_factory.mktemp("quality")
    module("quality").main(command(folder))
    return folder


def command(folder: Path, *more: str) -> list[str]:
    options = {
        "--work": folder / "work",
        "--json": folder / "rows.json",
        "--seeds": 2,
        "--trainings": 2,
        "--threads": 1,
    }
    return ["--tiny", *(str(part) for item in options.items() for part in item), *more]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.json").read_text().splitlines()]


def normals(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("number", range(6))
def test_scores_and_selections_are_those_of_stores(module: Any, tmp_path: Path, number: int) -> None:
    case, sketch = module("quality_case"), module("quality_sketch")
    dtype, target_dtype = sketch.STORES[number]
    pool, targets = normals(0, 40, 192) * np.logspace(-3, 3, 40, dtype=np.float32)[:, None], normals(1, 5, 192)
    subtasks: list[str | None] = ["x", "y", "x", "y", "y"]
    stored_target = "float32" if target_dtype == "1bit" else target_dtype
    scores = influence(
        make_store(tmp_path / "pool", pool, dtype=dtype, shard_size=len(pool)),
        make_store(tmp_path / "targets", targets, dtype=stored_target, subtasks=subtasks),
        queries="1bit" if target_dtype == "1bit" else "float32",
    )
    groups = {"task": [np.array([0, 2]), np.array([1, 3, 4])]}
    ours = sketch.stored_cosines(pool, targets, dtype, target_dtype)
    np.testing.assert_allclose(case.subtask_means(ours, groups)["task"], scores.matrix, atol=2e-6)
    np.testing.assert_allclose(sketch.final_scores(ours, groups)["task"], scores.aggregate(), atol=2e-6)
    values = np.round(scores.aggregate(), 1)  # with equal ones
    assert case.top(values, 12).tolist() == select(values, n=12).tolist()


@pytest.mark.parametrize("kind", ["srht", "sjlt", "rademacher", "gaussian"])
def test_planted_columns_come_from_the_sketches_of_unit_vectors(module: Any, kind: str) -> None:
    sketch, case = module("quality_sketch"), module("quality_case")
    rows, projection = normals(2, 6, LAYOUT.size), Projection(kind, 64, seed=3, block=8)
    outliers = sketch.Outliers.of(LAYOUT)
    planted = outliers.plant(rows)
    changed = [
        f"{p.name} {(i - p.offset) % p.cols}"
        for p in LAYOUT.parameters
        for i in outliers.index
        if p.offset <= i < p.offset + p.size
    ]
    assert (
        sorted(set(changed)) == ["m.lora_A.w 22", "m.lora_A.w 8", "n.lora_A.w 13", "n.lora_A.w 4"]
        and len(changed) == 16
    )
    np.testing.assert_allclose(planted[:, LAYOUT.parameters[0].offset + 40 + 8], 60 * rows[:, 48])
    assert (planted != rows).sum() == 6 * 16
    plain, columns, expected = (
        sketch.sketch(case.as_tensor(part), LAYOUT, projection).numpy()
        for part in (rows, outliers.basis(LAYOUT.size), planted)
    )
    found = plain + (rows[:, outliers.index] * (outliers.factor - 1)) @ columns
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert 0.9 < outliers.energy(planted) < 1


def test_rank_correlation_is_that_of_ranks(module: Any) -> None:
    rank_correlation = module("quality_sketch").rank_correlation
    a = normals(4, 50)
    assert rank_correlation(a, np.exp(a)) == 1 and rank_correlation(a, -a) == -1
    b = a + normals(5, 50)
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    assert rank_correlation(a, b) == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-12)


def test_every_kind_dim_and_store_is_measured(module: Any, measured: Path) -> None:
    rows = [row for row in read_rows(measured) if row["op"] == "quality"]
    case = module("quality_case").tiny_case(measured / "work/input")
    found = {(r["gradients"], r["kind"], r["block"], r["k"], r["dtype"], r["target_dtype"]) for r in rows}
    kinds = [
        (kind, 64 if kind == "srht" else None, k)
        for kind in ("srht", "sjlt", "rademacher", "gaussian")
        for k in case.dims
    ]
    kinds += [("srht", block, case.block_dim) for block in case.blocks] + [("identity", None, 2048)]
    stores = module("quality_sketch").STORES
    assert found == {(name, *kind, *store) for name in ("real", "outliers") for kind in kinds for store in stores}
    assert len(rows) == len(found) and all("no measurement" in row["shape"] for row in rows)
    for row in rows:
        assert 0 <= row["top_overlap"] <= 1 and abs(row["rank_correlation"]) <= 1
        assert set(row["top_overlap_by_task"]) == {"dates", "logic"}
        assert (row["outlier_energy"] is None) == (row["gradients"] == "real")
        assert row["seeds"] == (1 if row["kind"] == "identity" else 2)
        assert (row["cosine_rms_sd"] is None) == (row["kind"] == "identity")
    exact = [row for row in rows if row["kind"] == "identity" and row["dtype"] == "float32"]
    assert all(row["cosine_rms"] < 1e-6 and row["top_overlap"] == 1 for row in exact) and len(exact) == 2


def test_measures_of_equal_and_of_opposite_features(module: Any) -> None:
    sketch = module("quality_sketch")
    pool, targets = normals(6, 50, 128), normals(7, 3, 128)
    groups = {"one": [np.array([0, 1])], "other": [np.array([2])]}
    reference = sketch.Reference.of(pool, targets, groups)
    same = sketch.measure(pool, targets, reference, 10)
    assert same["float32 x float32"]["cosine_rms"] < 1e-7
    assert (
        same["float32 x float32"]["rank_correlation"]
        == same["float32 x float32"]["top_overlap"]
        == {"one": 1, "other": 1}
    )
    errors = [same[f"{dtype} x {target}"]["cosine_rms"] for dtype, target in sketch.STORES]
    assert 0 < errors[1] < errors[2] < errors[3] < errors[4] < errors[5] < 0.2
    opposite = sketch.measure(-pool, targets, reference, 10)["float32 x float32"]
    assert opposite["cosine_rms"] == pytest.approx(2 * np.sqrt(np.mean(reference.cosines**2)), rel=1e-5)
    assert opposite["rank_correlation"] == {"one": -1, "other": -1} and set(opposite["top_overlap"].values()) == {0}


def test_every_arm_is_trained_and_tested(measured: Path) -> None:
    rows = [row for row in read_rows(measured) if row["op"] == "selection"]
    arms = ("exact", "srht, float32", "srht, 1bit", "random", "all", "none")
    assert [(row["task"], row["arm"]) for row in rows] == [(task, arm) for task in ("dates", "logic") for arm in arms]
    by_arm = {row["arm"]: row for row in rows if row["task"] == "dates"}
    assert [by_arm[arm]["examples"] for arm in arms] == [9, 9, 9, 9, 48, 0]
    assert [by_arm[arm]["seeds"] for arm in arms] == [2, 2, 2, 2, 2, 1]
    assert by_arm["exact"]["in_common_with_exact"] == by_arm["all"]["in_common_with_exact"] == 1
    assert by_arm["srht, float32"]["in_common_with_exact"] >= 0.5
    # Four times as many steps as with a selection, and the model had read next to nothing.
    assert by_arm["all"]["test_loss"] < by_arm["random"]["test_loss"] < by_arm["none"]["test_loss"]
    first, second = by_arm["random"]["test_losses"]
    assert first != second and by_arm["random"]["test_loss"] == pytest.approx((first + second) / 2)


def test_a_second_call_makes_nothing_again(module: Any, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("made again")

    before = read_rows(measured)
    monkeypatch.setattr(module("quality_sketch"), "measure", never)
    monkeypatch.setattr(module("quality_case"), "extract", never)
    monkeypatch.setattr(module("quality_selection"), "warmup", never)
    module("quality").main(command(measured))
    again = read_rows(measured)[len(before) :]
    for row in (*before, *again):
        del row["date"]
    assert again == before
    (measured / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in before))


def test_results_of_other_settings_are_not_mixed(module: Any, measured: Path) -> None:
    case = module("quality_case")
    other = replace(case.tiny_case(measured / "work/input"), learning_rate=1e-3)
    with pytest.raises(LessFastError, match="other settings"):
        case.Workspace(measured / "work", other)


def test_another_sketch_than_extraction_s_is_not_measured(
    module: Any, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, sketch = module("quality_case"), module("quality_sketch")
    space = case.Workspace(measured / "work", case.tiny_case(measured / "work/input"))
    checkpoint = space.checkpoints()[-1]
    exact, layout = space.exact(checkpoint), space.layout(checkpoint)
    kinds = [Projection("srht", 512), Projection("gaussian", 512)]
    sketch.check(space, checkpoint, exact, layout, kinds)
    right = sketch.sketch
    monkeypatch.setattr(sketch, "sketch", lambda rows, layout, kind: right(rows, layout, replace(kind, seed=1)))
    with pytest.raises(SystemExit, match="not measuring another thing"):
        sketch.check(space, checkpoint, exact, layout, kinds)


def test_without_real_data_one_line_says_so(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LESS_FAST_DATA", raising=False)
    with pytest.raises(SystemExit, match="LESS_FAST_DATA"):
        module("quality").main(["--work", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


def test_test_loss_is_the_mean_over_examples_of_answer_tokens(module: Any, measured: Path) -> None:
    from less_fast.data import encode_all, load_examples
    from less_fast.model import load_model

    model, tokenizer = load_model(measured / "work/input/model", device="cpu")
    file = measured / "work/input/dates_test.jsonl"
    losses = []
    for example in encode_all(load_examples(file), tokenizer, "tulu", 1024):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100).item())
    assert module("quality_selection").test_loss(model, tokenizer, file, 1024) == pytest.approx(
        np.mean(losses), rel=1e-5
    )
