"""The streaming pass over a pool: every dtype against dequantised float64 rows, damage, memory, and what it writes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.cli import less_fast, refused
from support.stores import make_rows, make_store

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.scoring import ScoreStream, best_rows, influence, select, stream_scores, write_scores
from less_fast.store import FeatureStore
from less_fast.store.codec import CODECS

N, K = 53, 100
SUBTASKS: list[str | None] = ["b", "a", "b", "c", "a", "b", "c"]


def draw(seed: int, n: int = N, dim: int = K) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, dim)) * 10.0 ** rng.uniform(-8, 4, (n, 1))).astype(np.float32)


def unit(store: FeatureStore) -> np.ndarray:
    """What a row's features are read as, over the norm that was theirs before they were rounded."""
    return store[:].astype(np.float64) / store.norms.astype(np.float64)[:, None]


def expected_scores(train: list[FeatureStore], target: list[FeatureStore], weights: list[float]) -> np.ndarray:
    names = list(dict.fromkeys(SUBTASKS))
    members = np.array([[name == other for name in names] for other in SUBTASKS], float)
    queries = [unit(store).T @ (members / members.sum(0)) for store in target]
    return sum(w / sum(weights) * unit(store) @ query for w, store, query in zip(weights, train, queries))


@pytest.fixture
def target(tmp_path: Path) -> list[FeatureStore]:
    return [make_store(tmp_path / f"target{c}", draw(50 + c, len(SUBTASKS)), subtasks=SUBTASKS) for c in range(2)]


@pytest.mark.parametrize("dtype", [*CODECS])
def test_scores_are_those_of_the_dequantised_rows(tmp_path: Path, dtype: str, target: list[FeatureStore]) -> None:
    train = [make_store(tmp_path / f"train{c}", draw(c), dtype=dtype, shard_size=(10, 7)[c]) for c in range(2)]
    scores = influence(train, target, [3, 1])
    np.testing.assert_allclose(scores.matrix, expected_scores(train, target, [3, 1]), atol=4e-7)


def test_stores_of_different_dtypes_score_together(tmp_path: Path, target: list[FeatureStore]) -> None:
    train = [make_store(tmp_path / "a", draw(0), dtype="int8"), make_store(tmp_path / "b", draw(1), dtype="1bit")]
    np.testing.assert_allclose(influence(train, target).matrix, expected_scores(train, target, [1, 1]), atol=4e-7)


@pytest.mark.parametrize("memory", [1 << 28, 500])
def test_1bit_queries_are_signs_against_signs(
    tmp_path: Path, memory: int, target: list[FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("less_fast.scoring.stream.LEAST_MEMORY", 1)
    train = [make_store(tmp_path / f"train{c}", draw(c), dtype="1bit") for c in range(2)]
    signs = [
        make_store(tmp_path / f"signs{c}", t[:] / t.norms[:, None], dtype="1bit", subtasks=SUBTASKS)
        for c, t in enumerate(target)
    ]
    scores = influence(train, target, [3, 1], queries="1bit", memory=memory)
    np.testing.assert_allclose(scores.matrix, expected_scores(train, signs, [3, 1]), atol=4e-7)
    with pytest.raises(LessFastError, match="holds float32 features, and 1bit queries"):
        influence(target, target, queries="1bit")


def test_wrong_settings_are_named(target: list[FeatureStore]) -> None:
    for settings, message in (
        ({"queries": "int4"}, "queries is 'int4'; expected 'float32' or '1bit'"),
        ({"memory": 1000}, "memory is 1000; expected a number of bytes"),
        ({"device": "tpu"}, "device is 'tpu'; expected"),
    ):
        with pytest.raises(LessFastError, match=message):
            influence(target, target, **settings)  # type: ignore[call-overload]


def damage(store: FeatureStore, shard: int) -> Path:
    path = store.path / f"shards/{shard:05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", ["missing", "flipped", "truncated"])
def test_a_damaged_shard_is_named_and_the_rest_is_scored(tmp_path: Path, how: str, target: list[FeatureStore]) -> None:
    whole = make_store(tmp_path / "whole", draw(0), dtype="int8", shard_size=10)
    store = make_store(tmp_path / "damaged", draw(0), dtype="int8", shard_size=10)
    path = damage(store, 2)
    if how == "missing":
        path.unlink()
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptStoreError, match=r"00002\.safetensors"):
        influence(FeatureStore(store.path, verify=True), target[0])
    partial = FeatureStore(store.path, verify=True, allow_partial=True)
    with pytest.warns(UserWarning, match=r"00002\.safetensors.*rows 20 to 30 are left out"):
        scores = influence(partial, target[0])
    assert np.flatnonzero(~scores.valid).tolist() == [*range(20, 30)]
    assert np.isneginf(scores.matrix[20:30]).all()
    assert np.array_equal(scores.matrix[scores.valid], influence(whole, target[0]).matrix[scores.valid])
    assert len(partial.damaged) == 1 and "00002" in partial.damaged[0]


def test_a_feature_that_is_not_finite_is_an_error_not_a_score(tmp_path: Path, target: list[FeatureStore]) -> None:
    store = make_store(tmp_path / "s", draw(0), shard_size=10)
    path = store.path / "shards/00003.safetensors"
    content = bytearray(path.read_bytes())
    entry = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["features"]["data_offsets"]
    at = len(content) - 10 + entry[1] - entry[1] - 4 * K * 4  # a number of row 6 of the shard; 10 statuses follow
    content[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=rf"{store.path}: row 36 \(shard 3\) holds a non-finite feature"):
        influence(store, target[0])


@pytest.mark.parametrize("n", [1, 5, N, 10 * N])
def test_best_rows_are_those_that_select_chooses(tmp_path: Path, n: int, target: list[FeatureStore]) -> None:
    rows = np.repeat(draw(0, 8), 7, axis=0)[:N]  # many equal scores
    status = np.zeros(N, np.uint8)
    status[::9] = 1
    train = make_store(tmp_path / "train", rows, status=status, shard_size=10)
    targets = {"a": target[0], "b": target[1]}
    stream = ScoreStream(train, targets)
    for how in ("max", "mean"):
        best = best_rows(stream, n, how=how)
        for name, scores in influence(train, targets).items():
            expected = select(scores, n=min(n, int(scores.valid.sum())), how=how)
            assert best[name].rows.tolist() == expected.tolist()
            assert best[name].scores.tolist() == scores.aggregate(how)[expected].tolist()
    with pytest.raises(LessFastError, match="number of rows is 0"):
        best_rows(stream, 0)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_streamed_tables_equal_those_of_scores_in_memory(
    tmp_path: Path, suffix: str, target: list[FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("less_fast.store.rows._BATCH_ROWS", 7)
    status = np.zeros(N, np.uint8)
    status[4] = 1
    train = make_store(tmp_path / "train", draw(0), status=status, shard_size=10)
    targets = {"a": target[0], "b": target[1]}
    stream = ScoreStream(train, targets)
    files = {name: [tmp_path / f"out/{name}{suffix}"] for name in targets}
    assert stream_scores(stream, files, matrix=tmp_path / "out/all.npy") == N - 1
    scores = influence(train, targets)
    assert np.array_equal(np.load(tmp_path / "out/all.npy"), np.hstack([scores[name].matrix for name in targets]))
    for name, (file,) in files.items():
        write_scores(tmp_path / f"{name}{suffix}", train.rows, scores[name])
        if suffix == ".csv":
            assert file.read_bytes() == (tmp_path / f"{name}{suffix}").read_bytes()
        else:
            assert pq.read_table(file).equals(pq.read_table(tmp_path / f"{name}{suffix}"))


def test_an_error_in_the_middle_leaves_no_file(tmp_path: Path, target: list[FeatureStore]) -> None:
    train = make_store(tmp_path / "train", draw(0), shard_size=10)
    damage(train, 4)
    stream = ScoreStream(FeatureStore(train.path, verify=True), {"t": target[0]})
    with pytest.raises(CorruptStoreError):
        stream_scores(stream, {"t": [tmp_path / "out/t.parquet"]}, matrix=tmp_path / "out/t.npy")
    assert [*(tmp_path / "out").iterdir()] == []


def test_memory_does_not_grow_with_the_pool(tmp_path: Path) -> None:
    """Peak of what Python and numpy allocate in a pass, for a pool and one of eight times its size."""
    dim, peaks = 64, []
    names = [f"s{i}" for i in range(300)]
    target = make_store(tmp_path / "target", draw(9, len(names), dim), subtasks=names)
    for n in (4_000, 32_000):
        train = make_store(tmp_path / f"train{n}", draw(0, n, dim), dtype="1bit", shard_size=2_000)
        stream = ScoreStream(FeatureStore(train.path), {"t": target}, memory=2 << 20)
        tracemalloc.start()
        best_rows(stream, 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 3 << 20, peaks


def test_the_command_scores_several_targets_in_one_pass(tmp_path: Path, target: list[FeatureStore]) -> None:
    train = make_store(tmp_path / "train", draw(0), dtype="1bit", shard_size=10)
    named = ["--target", f"a={target[0].path}", "--target", f"b={target[1].path}"]
    out = ["--out", tmp_path / "scores"]
    settings = ["--matrix", tmp_path / "all.npy", "--memory", "2M", "--queries", "1bit", "--json"]
    shown = json.loads(less_fast("score", "--train", train.path, *named, *out, *settings).stdout)
    assert shown["subtasks"] == {"a": ["b", "a", "c"], "b": ["b", "a", "c"]} and shown["valid"] == N
    expected = influence(train, {"a": target[0], "b": target[1]}, queries="1bit")
    for name in ("a", "b"):
        table = pq.read_table(tmp_path / f"scores/{name}.parquet")
        np.testing.assert_array_equal(table["score"].to_numpy(), expected[name].aggregate())
    for wrong, message in (
        ([*named, "--target", target[0].path, *out], "has no name, but others have"),
        ([*named, "--out", tmp_path / "x.csv"], "expected --out FOLDER"),
        (["--target", target[0].path, *out], "expected a name that ends in .parquet or .csv"),
        ([*named, *out, "--memory", "lots"], "--memory is 'lots'; expected a size"),
        ([*named, *out, "--matrix", tmp_path / "x.bin"], "expected a name that ends in .npy"),
        (["--target", f"../a={target[0].path}", "--out", tmp_path / "x.csv"], "not a feature store"),
    ):
        assert message in refused("score", "--train", train.path, *wrong)
    damage(train, 0)
    assert "00000.safetensors: damaged" in refused("score", "--train", train.path, *named, *out)
    partial = json.loads(less_fast("score", "--train", train.path, *named, *out, "--allow-partial", "--json").stdout)
    assert partial["valid"] == N - 10 and len(partial["damaged"]) == 1


def test_ids_that_are_fewer_than_the_rows_are_an_error(tmp_path: Path, target: list[FeatureStore]) -> None:
    train = make_store(tmp_path / "train", draw(0))
    (train.path / "rows.parquet").write_bytes(make_rows(5).to_parquet())
    with pytest.raises(CorruptStoreError, match=r"rows\.parquet has fewer rows than the store"):
        stream_scores(ScoreStream(train, {"t": target[0]}), {"t": [tmp_path / "t.csv"]})
