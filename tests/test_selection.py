"""Every strategy and filter against its definition written out plainly; memory and reads of de-duplication counted."""

from __future__ import annotations

import math
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.selection import Chooser, naive_cosines, naive_gains, naive_selection, naive_turns
from support.stores import make_store

from less_fast.errors import LessFastError
from less_fast.scoring import (
    Caps,
    Duplicates,
    Ranking,
    Scores,
    balanced,
    best,
    composition,
    pick,
    quotas,
    round_robin,
    select,
)
from less_fast.scoring.ranking import top_rows
from less_fast.store import FeatureStore

# Few values, so that ties are common, and rows that must never be selected.
_SCORE = st.one_of(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5, 1.0]), st.floats(-1, 1, width=16))
STRATEGIES = ["best", "round-robin", "quotas", "balanced"]


@st.composite
def pools(draw: st.DrawFn) -> np.ndarray:
    """Scores (N, J), float32."""
    n, width = draw(st.integers(1, 24)), draw(st.integers(1, 4))
    return np.array(draw(st.lists(_SCORE, min_size=n * width, max_size=n * width)), np.float32).reshape(n, width)


def quiet_pick(ranking: Ranking, n: int, filters: Sequence[Any] = ()) -> tuple[list[int], list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        selection = pick(ranking, n, filters)
    assert selection.rows.dtype == selection.columns.dtype == np.int64
    return selection.rows.tolist(), selection.columns.tolist()


def both(strategy: str, matrix: np.ndarray, sizes: Sequence[int]) -> tuple[Ranking, Chooser]:
    """A strategy on the columns of a pool, ours and the plain one."""
    tasks = {f"task{j}": matrix[:, j] for j in range(matrix.shape[1])}
    columns = [column.astype(np.float64) for column in matrix.T]
    if strategy == "best":
        return best(matrix[:, 0]), naive_turns(columns[:1], None)
    if strategy == "round-robin":
        return round_robin(tasks), naive_turns(columns, None)
    if strategy == "quotas":
        return quotas(tasks, dict(zip(tasks, sizes))), naive_turns(columns, sizes)
    return balanced(tasks), naive_gains(matrix.astype(np.float64))


# Strategies


@given(st.lists(st.sampled_from([-math.inf, -0.0, 0.0, 0.25, 1.0]), max_size=40), st.data())
def test_top_rows_are_those_of_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    assert top_rows(np.array(values), k).tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(pool=pools(), data=st.data())
def test_strategies_are_their_definitions(strategy: str, pool: np.ndarray, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=4))[: pool.shape[1]]
    ranking, choose = both(strategy, pool, sizes)
    n = data.draw(st.integers(1, len(pool) + 1))
    rows, columns = naive_selection(choose, len(pool), n)
    for _ in range(2):  # a ranking is a value: nothing of the first selection is left in it
        ours = quiet_pick(ranking, n)
        assert ours[0] == rows
        assert strategy == "balanced" or ours[1] == columns
    assert all(np.isfinite(pool[row]).any() for row in rows)


def test_round_robin_takes_turns() -> None:
    tasks = {"a": [9, 8, 7, 6, 5, 1], "b": [9, 1, 8, 2, 3, 0], "c": [-math.inf] * 5 + [1]}
    # a: 0; b: 2 (0 is gone); c: 5; a: 1; b: 4; c has none left; a: 3.
    assert select(round_robin(tasks), n=6).tolist() == [0, 2, 5, 1, 4, 3]


def test_quotas_hold_for_a_prefix_too() -> None:
    draw = np.random.default_rng(0)
    tasks = {"a": draw.random(100), "b": draw.random(100)}
    selection = pick(quotas(tasks, {"a": 30, "b": 10}), 40)
    assert Counter(selection.columns.tolist()) == {0: 30, 1: 10}
    assert Counter(selection.columns[:20].tolist()) == {0: 15, 1: 5}
    assert len(set(selection.rows.tolist())) == 40
    by_share = quotas(tasks, {"a": 0.29, "b": 0.5}, n=100)
    assert by_share.size == 79, "0.29 of 100 rows are 29, whatever its last bit is"
    assert len(select(by_share)) == 79 and len(select(by_share, n=7)) == 7


def test_balanced_evens_out_columns_of_unequal_size() -> None:
    """A column with large scores everywhere would take all rows by its maximum; normalised it gets its part."""
    draw = np.random.default_rng(0)
    matrix = np.stack([0.5 + 0.2 * draw.random(400), 0.01 * draw.random(400), 0.001 * draw.random(400)], axis=1)
    scores = Scores(matrix.astype(np.float32), ["large", "small", "tiny"], np.ones(400, bool))
    assert (matrix[select(scores, n=30)].argmax(axis=1) == 0).all()
    selection = pick(balanced(scores), 30)
    assert min(Counter(selection.columns.tolist()).values()) >= 7
    assert balanced(scores).names == ["large", "small", "tiny"]
    np.testing.assert_array_equal(selection.rows, select(balanced({"a": scores.matrix}), n=30))


def test_balanced_ignores_constant_columns() -> None:
    values = np.array([0.3, 0.1, 0.2])
    constant = np.full(3, np.float32(0.1))  # its deviation, computed, is not 0 for every number of rows
    assert select(balanced({"a": values, "b": constant}), n=1).tolist() == [0]
    many = np.full(1001, 0.1)
    assert select(balanced({"b": many}), n=3).tolist() == [0, 1, 2]


def test_balanced_at_full_size_is_quick() -> None:
    """A scan of all rows and columns a pick would be 10^10 operations here."""
    matrix = np.random.default_rng(0).standard_normal((60_000, 57)).astype(np.float32)
    started = time.process_time()
    rows = select(balanced({"all": matrix}), n=3000)
    assert time.process_time() - started < 10
    assert len(set(rows.tolist())) == 3000


def test_a_ranking_reaches_its_last_row() -> None:
    """Beyond the rows that are sorted at first."""
    values = np.random.default_rng(0).permutation(20_000).astype(float)
    np.testing.assert_array_equal(pick(best(values), 20_000).rows, np.argsort(-values))


def test_what_is_refused() -> None:
    a, b = np.arange(4.0), np.arange(5.0)
    for make, message in (
        (lambda: round_robin({"a": a, "b": b}), "'a' has scores of 4 rows, but task 'b' of 5"),
        (lambda: balanced({"a": a, "b": b}), "'a' has scores of 4 rows, but task 'b' of 5"),
        (lambda: round_robin({}), "no tasks"),
        (lambda: balanced({}), "no tasks"),
        (lambda: balanced({"a": np.ones((2, 2, 2))}), r"shape \(2, 2, 2\)"),
        (lambda: best(np.ones((2, 2))), r"shape \(2, 2\)"),
        (lambda: quotas({"a": a}, {"a": 1, "b": 1}), "quotas are given for 'a', 'b', but the tasks are 'a'"),
        (lambda: quotas({"a": a}, {}), "quotas are given for none"),
        (lambda: quotas({"a": a}, {"a": 0}), "'a' is 0; expected at least one"),
        (lambda: quotas({"a": a}, {"a": -1}), "'a' is -1; expected a number of rows, or a share"),
        (lambda: quotas({"a": a}, {"a": 1.5}, n=3), "'a' is 1.5; expected a number of rows, or a share"),
        (lambda: quotas({"a": a}, {"a": math.nan}, n=3), "'a' is nan"),
        (lambda: quotas({"a": a}, {"a": True}), "'a' is True"),
        (lambda: quotas({"a": a}, {"a": 0.5}), "is a share"),
        (lambda: quotas({"a": a}, {"a": 0.1}, n=3), "0.1 of 3 rows, less than one"),
        (lambda: quotas({"a": a, "b": a}, {"a": 2, "b": 2}, n=3), "come to 4 rows, but 3"),
        (lambda: select(round_robin({"a": a})), "either a fraction or a number"),
        (lambda: select(a, n=1, filters=[Caps(["x"] * 3)]), "datasets of 3 rows, but the scores 4"),
        (lambda: select(a, n=1, filters=[Caps(["x"] * 4, {"y": 1})]), "no such dataset; it has x"),
        (lambda: select(a, n=1, filters=[Caps(["x"] * 4, {"x": 2.0})]), "cap of 'x' is 2.0"),
        (lambda: select(a, n=4, filters=[Caps(["x"] * 4, default=0.1)]), "less than one"),
    ):
        with pytest.raises(LessFastError, match=message):
            make()


def test_a_selection_that_ends_early_says_why() -> None:
    values = np.array([1.0, -math.inf, 3.0])
    with pytest.warns(UserWarning, match="3 rows asked for, but only 2 of 3 are valid"):
        assert pick(best(values), 3).rows.tolist() == [2, 0]
    for ranking, filters in (
        (best(values), [Caps(["x"] * 3, default=1)]),
        (quotas({"a": values, "b": [-math.inf] * 3}, {"a": 1, "b": 2}), []),
    ):
        with pytest.warns(UserWarning, match="3 rows asked for, but only 1 of 3 could be selected"):
            assert select(ranking, n=3, filters=filters).tolist() == [2]


# Caps and duplicates


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(pool=pools(), data=st.data())
def test_filters_reject_what_they_say(
    strategy: str, pool: np.ndarray, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Caps and duplicates together, on every strategy, with windows of one row to all of them."""
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=4))[: pool.shape[1]]
    ranking, choose = both(strategy, pool, sizes)
    n, n_rows = data.draw(st.integers(1, len(pool))), len(pool)
    sources = data.draw(st.lists(st.sampled_from("xyz"), min_size=n_rows, max_size=n_rows))
    caps = data.draw(st.dictionaries(st.sampled_from(sources), st.integers(0, 4)))
    share = data.draw(st.none() | st.floats(1 / n, 1.0))
    limits = {name: caps.get(name, n_rows if share is None else math.floor(share * n + 1e-9)) for name in sources}
    dim, n_stores = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    entries = st.lists(st.integers(-2, 2), min_size=n_rows * dim, max_size=n_rows * dim)
    features = [np.array(data.draw(entries), np.float32).reshape(n_rows, dim) for _ in range(n_stores)]
    cosines, threshold = naive_cosines(features), data.draw(st.floats(0, 0.999))
    assume(np.abs(cosines - threshold).min() > 1e-5)
    folder = tmp_path_factory.mktemp("stores")
    stores = [make_store(folder / str(i), rows * 10.0 ** (-9 * i)) for i, rows in enumerate(features)]
    memory = data.draw(st.sampled_from([32, 64, 150, 1 << 20])) * 4 * dim * n_stores
    filters = [Caps(sources, caps, share), Duplicates(stores, threshold, memory)]
    expected = naive_selection(choose, n_rows, n, sources=sources, limits=limits, cosines=cosines, threshold=threshold)
    for order in (filters, filters[::-1]):
        rows, columns = quiet_pick(ranking, n, order)
        assert rows == expected[0]
        assert strategy == "balanced" or columns == expected[1]


def clustered(n: int, dim: int, n_clusters: int) -> np.ndarray:
    """Unit rows around a few centres: within a cluster cosines are near 0.99, between them near 0."""
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((n_clusters, dim))
    rows = centres[draw.integers(0, n_clusters, n)] + 0.1 * draw.standard_normal((n, dim))
    return (rows * 10.0 ** draw.uniform(-3, 3, (n, 1))).astype(np.float32)


def test_duplicates_within_their_memory(tmp_path: Path) -> None:
    """Selected rows that find no room are read again; the selection is the same, and the memory is kept to."""
    n, dim = 2000, 512
    features, values = clustered(n, dim, 500), np.random.default_rng(1).random(n)
    store = make_store(tmp_path / "store", features, shard_size=64)
    cosines, expected = naive_cosines([features]), []
    for row in np.argsort(-values).tolist():
        if not (cosines[row, expected] > 0.9).any():
            expected.append(row)
    assert 400 < len(expected) <= 500
    for memory in (8 << 20, 1 << 20):  # all selected rows find room; half of them do
        used = Duplicates(FeatureStore(store.path), 0.9, memory)
        ranking = best(values)
        tracemalloc.start()
        rows, _ = quiet_pick(ranking, n, [used])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert rows == expected
    assert peak < memory + (64 << 10) + 40 * n, "beside the features: the walk, and the manifest"


def test_candidates_are_read_once_where_memory_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that come next are foreseen, caps included, so that work is done by the block."""
    n = 2000
    features, draw = clustered(n, 32, 500), np.random.default_rng(2)
    tasks, sources = {"a": draw.random(n), "b": draw.random(n)}, draw.choice(["x", "y"], n).tolist()
    store = make_store(tmp_path / "store", features, shard_size=512)
    reads: list[int] = []
    get = FeatureStore.__getitem__

    def counted(self: FeatureStore, index: Any) -> Any:
        reads.append(len(index))
        return get(self, index)

    monkeypatch.setattr(FeatureStore, "__getitem__", counted)
    for ranking in (best(tasks["a"]), round_robin(tasks), balanced(tasks)):
        reads.clear()
        selection = pick(ranking, 300, [Caps(sources, {"x": 20}), Duplicates(store, 0.9)])
        n_offered = 300 + selection.n_rejected[1]
        assert selection.n_rejected[0] > 200 and selection.n_rejected[1] > 50
        assert sum(reads) <= 2.5 * n_offered and len(reads) <= 12, "about once each, in few blocks"


def test_a_cosine_at_the_threshold_is_not_above_it(tmp_path: Path) -> None:
    """Signs, as 1bit stores have: their cosines are multiples of 2 / K, and thresholds are likely to be among them."""
    signs = np.ones((3, 64), np.float32)
    signs[1, :8] = -1  # cosine 0.75 with row 0
    signs[2, :7] = -1  # cosine 0.78125 with row 0
    store = make_store(tmp_path / "store", signs * np.array([[0.1], [0.3], [0.7]], np.float32))
    assert select([3.0, 2.0, 1.0], n=2, filters=[Duplicates(store, 0.75)]).tolist() == [0, 1]
    assert quiet_pick(best([3.0, 1.0, 2.0]), 3, [Duplicates(store, 0.75)])[0] == [0, 1]


def test_exact_copies_and_zeros(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((6, 8192)).astype(np.float32)
    rows[3], rows[4], rows[5] = 7 * rows[0], 0, 0
    store = make_store(tmp_path / "store", rows)
    chosen = quiet_pick(best(np.arange(6.0)[::-1]), 6, [Duplicates(store.path, 0.9999)])[0]
    assert chosen == [0, 1, 2, 4, 5], "a row of norm 0 has cosine 0 with every row"


def test_duplicates_that_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", np.ones((4, 8), np.float32))
    other = make_store(tmp_path / "other", np.ones((4, 8), np.float32), examples="others")
    for filter_, message in (
        (Duplicates(store, 1.0), "threshold of duplicates is 1.0; expected a cosine from 0 to 0.9999"),
        (Duplicates(store, math.nan), "threshold of duplicates is nan"),
        (Duplicates([]), "no feature stores"),
        (Duplicates([store, other]), "cannot be compared"),
        (Duplicates(store, memory=1000), "1000 bytes; expected at least 1024 for 8 features"),
    ):
        with pytest.raises(LessFastError, match=message):
            select(np.arange(4.0), n=1, filters=[filter_])
    with pytest.raises(LessFastError, match="store has 4 rows, but the scores 5"):
        select(np.arange(5.0), n=1, filters=[Duplicates(store)])


# The mixture


def test_composition_with_scores() -> None:
    sources = ["a", "a", "a", "b", "b", "c"]
    scores = {"t": [1.0, 2.0, -math.inf, 4.0, 0.0, -math.inf], "u": [0.0] * 6}
    a, b, c = sorted(composition(sources, [3, 1], scores), key=lambda share: share.dataset)
    assert (a.pool_mean, a.selected_mean, a.lift) == ({"t": 1.5, "u": 0.0}, {"t": 2.0, "u": 0.0}, 1.0)
    assert (b.pool_mean["t"], b.selected_mean["t"], b.lift) == (2.0, 4.0, 1.5)
    assert (c.pool_mean["t"], c.selected_mean, c.lift) == (None, {"t": None, "u": None}, 0.0)
    assert composition(sources, [3])[0].pool_mean == {}


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=30), st.data())
def test_shares_are_counts(sources: list[str], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(sources) - 1), unique=True))
    values = [float(row) for row in range(len(sources))]
    for share in composition(sources, rows, {"t": values}):
        pool = [values[row] for row in range(len(sources)) if sources[row] == share.dataset]
        chosen = [values[row] for row in rows if sources[row] == share.dataset]
        assert (share.n_pool, share.n_selected) == (len(pool), len(chosen))
        assert share.lift == pytest.approx(len(chosen) / max(1, len(rows)) / (len(pool) / len(sources)))
        assert share.pool_mean["t"] == pytest.approx(sum(pool) / len(pool))
        assert share.selected_mean["t"] == (pytest.approx(sum(chosen) / len(chosen)) if chosen else None)
