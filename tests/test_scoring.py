"""Influence against the LESS formula written out in float64; selection and its outputs against plain Python."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stores import make_rows, make_store

from less_fast.errors import LessFastError
from less_fast.projection import Projection
from less_fast.scoring import Scores, composition, influence, select, write_scores
from less_fast.store import FeatureStore, Status

N, K = 23, 16
SUBTASKS: list[str | None] = ["b", "a", "b", "c", "a", "b", "c"]


def random_store(path: Path, seed: int, n: int = N, **settings: Any) -> FeatureStore:
    draw = np.random.default_rng(seed)
    sizes = 10.0 ** draw.uniform(-8, 4, (n, 1))  # norms from 1e-8 to 1e4: the cosine does not mind
    return make_store(path, (draw.standard_normal((n, K)) * sizes).astype(np.float32), **settings)


def checkpoints(tmp_path: Path, count: int, **settings: Any) -> tuple[list[FeatureStore], list[FeatureStore]]:
    train = [random_store(tmp_path / f"train{c}", c, **settings) for c in range(count)]
    target = [random_store(tmp_path / f"target{c}", 50 + c, len(SUBTASKS), subtasks=SUBTASKS) for c in range(count)]
    return train, target


def less(train: list[np.ndarray], target: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """The formula, a pair of rows at a time: (N, subtasks in order of first appearance)."""
    names = list(dict.fromkeys(SUBTASKS))
    out = np.zeros((len(train[0]), len(names)))
    for a, b, weight in zip(train, target, weights):
        for i in range(len(a)):
            for s, name in enumerate(names):
                members = [j for j, other in enumerate(SUBTASKS) if other == name]
                cosines = [
                    float(np.dot(a[i].astype(float), b[j].astype(float)))
                    / (math.hypot(*map(float, a[i])) * math.hypot(*map(float, b[j])))
                    for j in members
                ]
                out[i, s] += weight / sum(weights) * sum(cosines) / len(cosines)
    return out


@pytest.mark.parametrize("weights", [None, [1.6e-5, 1.2e-5, 7.7e-6], [0.5, 0.0, 0.5], [3, 1, 2]])
@pytest.mark.parametrize("memory", [256 << 20, 120])
def test_less_formula(
    tmp_path: Path, weights: list[float] | None, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("less_fast.scoring.stream.LEAST_MEMORY", 1)
    train, target = checkpoints(tmp_path, 3)
    scores = influence(train, target, weights, memory=memory)
    expected = less([s[:] for s in train], [s[:] for s in target], weights or [1.0] * 3)
    assert scores.subtasks == ["b", "a", "c"]
    assert scores.matrix.dtype == np.float32 and scores.valid.all() and len(scores) == N
    np.testing.assert_allclose(scores.matrix, expected, atol=5e-7)
    np.testing.assert_allclose(scores.aggregate(), expected.max(axis=1), atol=5e-7)
    np.testing.assert_allclose(scores.aggregate("mean"), expected.mean(axis=1), atol=5e-7)
    assert scores.aggregate().dtype == scores.aggregate("mean").dtype == np.float32
    with pytest.raises(LessFastError, match="expected 'max' or 'mean'"):
        scores.aggregate("sum")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_rounded_stores_score_within_their_rounding(tmp_path: Path, dtype: str, tolerance: float) -> None:
    train, target = checkpoints(tmp_path / "exact", 1)
    rounded, _ = checkpoints(tmp_path / "rounded", 1, dtype=dtype)
    difference = influence(rounded, target).matrix - influence(train, target).matrix
    # |cos' - cos| <= |row' - row| / |row|, and every entry is off by at most ``tolerance`` of itself.
    assert 0 < np.abs(difference).max() <= tolerance


def test_one_store_a_path_and_several_targets_at_once(tmp_path: Path) -> None:
    train = random_store(tmp_path / "train", 0)
    a = random_store(tmp_path / "a", 1, 7, subtasks=SUBTASKS)
    b = random_store(tmp_path / "b", 2, 5)
    both = influence(train, {"a": [a], "b": b.path})
    assert list(both) == ["a", "b"]
    for name, store in (("a", a), ("b", b)):
        alone = influence([str(train.path)], store)
        assert isinstance(alone, Scores)
        np.testing.assert_allclose(both[name].matrix, alone.matrix, atol=1e-6)
        assert both[name].subtasks == alone.subtasks
    assert both["b"].subtasks == ["all"]


def test_a_row_on_the_target_scores_one(tmp_path: Path) -> None:
    rows = np.zeros((4, K), np.float32)
    rows[0, 0], rows[1, 0], rows[2, 1], rows[3, :2] = 3.0, -1e-9, 5.0, 1.0
    target = np.zeros((1, K), np.float32)
    target[0, 0] = 1e-6
    scores = influence(make_store(tmp_path / "a", rows), make_store(tmp_path / "b", target))
    np.testing.assert_allclose(scores.matrix[:, 0], [1, -1, 0, math.sqrt(0.5)], rtol=1e-7)


def test_a_gradient_of_zero_scores_zero(tmp_path: Path) -> None:
    rows = np.ones((3, K), np.float32)
    rows[1] = 0
    target = np.ones((2, K), np.float32)
    target[1] = 0
    scores = influence(make_store(tmp_path / "a", rows), make_store(tmp_path / "b", target))
    np.testing.assert_allclose(scores.matrix[:, 0], [0.5, 0, 0.5], rtol=1e-6)
    assert scores.valid.all()


def test_rows_without_features_are_never_selected(tmp_path: Path) -> None:
    stores = []
    for c, bad in enumerate(([3, 4], [4, 20])):
        features = np.random.default_rng(c).standard_normal((N, K)).astype(np.float32)
        status = np.zeros(N, np.uint8)
        status[bad[0]] = Status.NO_LABELS
        features[bad[1]] = np.nan
        stores.append(make_store(tmp_path / f"train{c}", features, status=status))
    _, target = checkpoints(tmp_path, 2)
    scores = influence(stores, target)
    assert np.flatnonzero(~scores.valid).tolist() == [3, 4, 20]
    assert np.flatnonzero(np.isneginf(scores.aggregate())).tolist() == [3, 4, 20]
    assert np.isneginf(scores.aggregate("mean")[[3, 4, 20]]).all()
    assert not np.isnan(scores.matrix).any()
    with pytest.warns(UserWarning, match="23 rows asked for, but only 20 of 23 are valid"):
        chosen = select(scores, n=N)
    assert len(chosen) == 20 and not set(chosen.tolist()) & {3, 4, 20}


def test_unusable_target_rows_are_left_out_of_the_mean(tmp_path: Path) -> None:
    train, target = checkpoints(tmp_path, 2)
    status = np.zeros(len(SUBTASKS), np.uint8)
    status[2] = Status.NO_LABELS
    with_gap = [target[0], make_store(tmp_path / "gap", target[1][:], status=status, subtasks=SUBTASKS)]
    with pytest.warns(UserWarning, match=r"1 of 7 rows of target .* have no usable gradient"):
        scores = influence(train, with_gap)
    keep = np.array([0, 1, 3, 4, 5, 6])
    names = [SUBTASKS[i] for i in keep]
    expected = [make_store(tmp_path / f"keep{c}", target[c][keep], subtasks=names) for c in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(scores.matrix, influence(train, expected).matrix, atol=1e-6)
    status[[0, 2, 5]] = Status.NO_LABELS
    emptied = make_store(tmp_path / "emptied", target[0][:], status=status, subtasks=SUBTASKS)
    with pytest.raises(LessFastError, match=r"subtask 'b' of target .*emptied has no row"), pytest.warns(UserWarning):
        influence(train[0], emptied)
    with pytest.raises(LessFastError, match="empty has no rows"):
        influence(train[0], make_store(tmp_path / "empty", np.zeros((0, K), np.float32)))


def test_stores_that_cannot_be_compared(tmp_path: Path) -> None:
    train = random_store(tmp_path / "train", 0)
    other = random_store(tmp_path / "other", 1)

    def message(train_stores: Any, target_stores: Any, weights: Any = None) -> str:
        with pytest.raises(LessFastError) as caught:
            influence(train_stores, target_stores, weights)
        return str(caught.value)

    seed = Projection("sjlt", K, seed=9).to_dict()
    text = message(train, random_store(tmp_path / "p", 1, projection=seed))
    assert f"{train.path} and {tmp_path / 'p'} cannot be compared" in text
    assert "projection is (kind=sjlt, dim=16, seed=0, nnz=1) in the first" in text and "seed=9" in text
    assert "layout_hash is (aaa" in message(train, random_store(tmp_path / "l", 1, layout_hash="b" * 64))
    identity = {"kind": "identity", "dim": K}
    wide = make_store(tmp_path / "w", np.ones((2, 2 * K), np.float32), projection=identity)
    assert "dim is (16) in the first and (32)" in message(random_store(tmp_path / "i", 1, projection=identity), wide)
    longer = random_store(tmp_path / "n", 1, N + 1)
    assert "number of rows is (23) in the first and (24)" in message([train, longer], [other, other])
    named = random_store(tmp_path / "r", 1, subtasks=["x"] * N)
    assert "ids, datasets or subtasks" in message([train, named], [other, other])
    assert "ids, datasets or subtasks" in message([train, train], [other, named])
    assert "examples is (e) in the first and (f)" in message(
        [train, random_store(tmp_path / "e", 1, examples="f")], [other, other]
    )
    assert "2 training stores but 1 target stores" in message([train, train], other)
    assert "no feature stores" in message([], other)
    assert "1 checkpoint weights for 2 training stores" in message([train, train], [other, other], [1.0])
    for weights in ([0, 0], [1, -1], [1, math.nan], [1, math.inf]):
        assert "checkpoint weights are" in message([train, train], [other, other], weights)
    assert "does not say which projection" in message(random_store(tmp_path / "x", 1, projection=None), other)
    with pytest.warns(UserWarning, match="different adapters"):
        influence(random_store(tmp_path / "a1", 1, adapter="1"), random_store(tmp_path / "a2", 1, adapter="2"))


def test_the_training_stores_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = random_store(tmp_path / "train", 0)
    target = random_store(tmp_path / "target", 1)
    read: list[int] = []
    stored, get = FeatureStore.stored, FeatureStore.__getitem__

    def counted(self: FeatureStore, start: int, stop: int) -> Any:
        if self is train:
            read.extend(range(start, stop))
        return stored(self, start, stop)

    def never(self: FeatureStore, index: Any) -> Any:
        assert self is not train
        return get(self, index)

    monkeypatch.setattr(FeatureStore, "stored", counted)
    monkeypatch.setattr(FeatureStore, "__getitem__", never)
    influence(train, dict.fromkeys("abcde", target))
    assert read == [*range(N)]


def scores_of(values: list[float]) -> Scores:
    column = np.array(values, np.float32)[:, None]
    return Scores(column, ["all"], np.isfinite(column[:, 0]))


@given(st.lists(st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 1.0, -math.inf]), min_size=1, max_size=30), st.data())
def test_select_orders_as_python_does(values: list[float], data: st.DataObject) -> None:
    valid = [i for i, value in enumerate(values) if value > -math.inf]
    expected = sorted(valid, key=lambda i: (-values[i], i))
    n = data.draw(st.integers(1, max(1, len(valid))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not valid else "error")
        chosen = select(scores_of(values), n=n)
    assert chosen.dtype == np.int64 and chosen.tolist() == expected[:n]
    np.testing.assert_array_equal(chosen, select(np.array(values), n=n) if valid else [])


def test_select_by_fraction() -> None:
    values = list(np.random.default_rng(0).random(100))
    for fraction, count in ((0.05, 5), (0.29, int(0.29 * 100)), (1.0, 100), (0.0199, 1)):
        assert len(select(scores_of(values), fraction=fraction)) == count
    values[:50] = [-math.inf] * 50
    assert len(select(scores_of(values), fraction=0.4)) == 40, "N counts invalid rows too, as LESS does"
    for arguments, match in (
        ({}, "either a fraction or a number"),
        ({"fraction": 0.1, "n": 3}, "not both"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"fraction": 1.01}, "fraction is 1.01"),
        ({"fraction": math.nan}, "fraction is nan"),
        ({"fraction": 0.001}, "less than one row"),
        ({"n": 0}, "rows to select is 0"),
        ({"n": 2.0}, "rows to select is 2.0"),
        ({"n": True}, "rows to select is True"),
    ):
        with pytest.raises(LessFastError, match=match):
            select(scores_of(values), **arguments)
    with pytest.raises(LessFastError, match=r"scores have shape \(2, 2\)"):
        select(np.ones((2, 2)), n=1)
    assert select(np.array([1.0, math.nan, 2.0, math.inf]), n=2).tolist() == [2, 0]


def test_select_aggregates_as_told() -> None:
    matrix = np.array([[1.0, -1.0], [0.5, 0.4]], np.float32)
    scores = Scores(matrix, ["a", "b"], np.ones(2, bool))
    assert select(scores, n=1).tolist() == [0]
    assert select(scores, n=1, how="mean").tolist() == [1]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_written_scores(tmp_path: Path, suffix: str) -> None:
    rows = make_rows(3)
    rows.ids[1] = 'with "quotes", commas\nand lines'
    matrix = np.array([[0.1, 0.3], [-np.inf, -np.inf], [-0.25, -0.5]], np.float32)
    path = tmp_path / "new folder" / f"scores.{suffix}"
    write_scores(path, rows, Scores(matrix, ["x", "y"], np.array([True, False, True])))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if suffix == "csv":
        with open(path, newline="") as file:
            table: Any = list(csv.DictReader(file))
        for row in table:
            row["index"] = int(row["index"])
            for name in ("score:x", "score:y", "score"):
                row[name] = float(np.float32(row[name])) if row[name] else None
    else:
        table = pq.read_table(path).to_pylist()
    assert [list(row) for row in table] == [["id", "dataset", "index", "score:x", "score:y", "score"]] * 3
    assert [row["id"] for row in table] == rows.ids and [row["index"] for row in table] == [0, 1, 2]
    assert [row["dataset"] for row in table] == rows.datasets
    as_float32 = [float(np.float32(x)) for x in (0.1, 0.3)]
    assert [(row["score:x"], row["score:y"], row["score"]) for row in table] == [
        (*as_float32, as_float32[1]),
        (None, None, None),
        (-0.25, -0.5, -0.25),
    ]


def test_scores_that_cannot_be_written(tmp_path: Path) -> None:
    scores = scores_of([1.0, 2.0])
    with pytest.raises(LessFastError, match=r"ends in \.csv or \.parquet"):
        write_scores(tmp_path / "scores.pkl", make_rows(2), scores)
    with pytest.raises(LessFastError, match="3 rows, but scores of 2"):
        write_scores(tmp_path / "scores.csv", make_rows(3), scores)
    assert not list(tmp_path.iterdir())


def test_composition() -> None:
    datasets = ["a"] * 6 + ["b"] * 3 + ["c"]
    table = composition(datasets, np.array([6, 7, 0]))
    assert [(s.dataset, s.n_pool, s.n_selected, s.pool_share) for s in table] == [
        ("b", 3, 2, 0.3),
        ("a", 6, 1, 0.6),
        ("c", 1, 0, 0.1),
    ]
    assert [s.selected_share for s in table] == [2 / 3, 1 / 3, 0.0]
    assert [s.selected_share for s in composition(datasets, [])] == [0.0] * 3
    assert composition([], []) == []


def test_features_of_another_programs_matrix_are_not_compared(tmp_path: Path) -> None:
    """Converted features carry the fact ``projector``: their kind and seed alone would look like ours."""
    rows = np.ones((3, 8), np.float32)
    ours = make_store(tmp_path / "ours", rows)
    theirs = make_store(tmp_path / "theirs", rows, projector={"name": "fast_jl", "multiprocessors": 108})
    influence(theirs, make_store(tmp_path / "same", rows, projector={"name": "fast_jl", "multiprocessors": 108}))
    with pytest.raises(LessFastError, match="projector"):
        influence(ours, theirs)
