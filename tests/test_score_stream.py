"""The streaming pass over a pool: every dtype against dequantised float64 rows, damage, memory, and what it writes."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.cli import less_fast, refused
from support.stores import change_manifest, make_rows, make_store, rotated, sign_values, unit_rows

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.scoring import ScoreStream, best_rows, influence, select, stream_scores, write_scores
from less_fast.store import FeatureStore
from less_fast.store.codec import CODECS, encode_signs
from less_fast.store.rotation import rotate_back

N, K = 53, 100
SUBTASKS: list[str | None] = ["b", "a", "b", "c", "a", "b", "c"]


def draw(seed: int, n: int = N, dim: int = K) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, dim)) * 10.0 ** rng.uniform(-8, 4, (n, 1))).astype(np.float32)


def unit(store: FeatureStore) -> np.ndarray:
    """What a row's features are read as, over the norm that was theirs before they were rounded."""
    norms = store.norms.astype(np.float64)[:, None]
    return np.divide(store[:].astype(np.float64), norms, out=np.zeros((len(store), store.dim)), where=norms > 0)


def means(targets: np.ndarray) -> np.ndarray:
    """The mean of each subtask's rows, (subtasks, K)."""
    names = list(dict.fromkeys(SUBTASKS))
    return np.stack([targets[[name == other for other in SUBTASKS]].mean(axis=0) for name in names])


def expected_scores(train: list[FeatureStore], target: list[FeatureStore], weights: list[float]) -> np.ndarray:
    pairs = zip(weights, train, target)
    return sum(w / sum(weights) * unit(store) @ means(unit(t)).T for w, store, t in pairs)


def centers(store: FeatureStore) -> np.ndarray:
    """The center of every row's shard, (N, K); zeros for rows of norm 0."""
    starts = range(0, len(store), store.shard_size)
    shards = [store.stored(start, min(start + store.shard_size, len(store))) for start in starts]
    rows = [np.zeros((0, K)) if s is None else np.where(s.norms[:, None] > 0, s.center, 0.0) for s in shards]
    return np.concatenate(rows).astype(np.float64)


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


def shared_rows(seed: int) -> np.ndarray:
    """Rows of any size that are much alike, one of zeros among them."""
    rows = unit_rows(draw(seed)) + 2 * unit_rows(draw(99, 1))
    rows[5] = 0
    return (rows * 10.0 ** np.random.default_rng(seed).uniform(-30, 30, (N, 1))).astype(np.float32)


@pytest.mark.parametrize("memory", [1 << 28, 500])
@pytest.mark.parametrize("queries", ["float32", "1bit"])
def test_1bit_scores_are_those_of_centers_and_signs(
    tmp_path: Path, memory: int, queries: str, target: list[FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("less_fast.scoring.stream.LEAST_MEMORY", 1)
    status = np.zeros(N, np.uint8)
    status[11] = 1
    train = [
        make_store(tmp_path / f"train{c}", shared_rows(c), dtype="1bit", status=status, shard_size=(10, 7)[c])
        for c in range(2)
    ]
    expected = np.zeros((N, 3))
    for weight, store, other in zip((0.75, 0.25), train, target):
        signs = rotated(unit(store) - centers(store))
        turned = rotated(unit(other)) if queries == "float32" else sign_values(unit(other))
        expected += weight * (centers(store) @ means(unit(other)).T + signs @ means(turned).T)
    train[0].path.joinpath("shards/00003.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"rows 30 to 40 are left out"):
        partial = [FeatureStore(store.path, allow_partial=True) for store in train]
        scores = influence(partial, target, [3, 1], queries=queries, memory=memory)
    left = np.setdiff1d(np.arange(N), [11, *range(30, 40)])
    np.testing.assert_array_equal(np.flatnonzero(scores.valid), left)
    np.testing.assert_allclose(scores.matrix[left], expected[left], atol=4e-7)
    assert not scores.matrix[5].any() and np.isneginf(scores.matrix[~scores.valid]).all()
    with pytest.raises(LessFastError, match="holds float32 features, and 1bit queries"):
        influence(target, target, queries="1bit")


def test_1bit_queries_without_a_mean(tmp_path: Path, target: list[FeatureStore]) -> None:
    """Every target row a subtask of its own, in two checkpoints."""
    train = [make_store(tmp_path / f"train{c}", shared_rows(c), dtype="1bit", shard_size=20) for c in range(2)]
    names: list[str | None] = [f"s{i}" for i in range(len(SUBTASKS))]
    single = [make_store(tmp_path / f"single{c}", t[:], subtasks=names) for c, t in enumerate(target)]
    expected = sum(
        0.5 * (centers(s) @ unit(t).T + rotated(unit(s) - centers(s)) @ sign_values(unit(t)).T)
        for s, t in zip(train, single)
    )
    np.testing.assert_allclose(influence(train, single, queries="1bit").matrix, expected, atol=4e-7)


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
        (["--target", f"../a={target[0].path}", "--out", tmp_path / "x.csv"], "'../a' cannot name a file"),
    ):
        assert message in refused("score", "--train", train.path, *wrong)
    damage(train, 0)
    assert "00000.safetensors: damaged" in refused("score", "--train", train.path, *named, *out)
    partial = json.loads(less_fast("score", "--train", train.path, *named, *out, "--allow-partial", "--json").stdout)
    assert partial["valid"] == N - 10 and len(partial["damaged"]) == 1


def test_ids_that_are_fewer_than_the_rows_are_an_error(tmp_path: Path, target: list[FeatureStore]) -> None:
    train = make_store(tmp_path / "train", draw(0))
    (train.path / "rows.parquet").write_bytes(make_rows(5).to_parquet())
    with pytest.raises(
        CorruptStoreError, match=r"rows\.parquet is missing or damaged: it has 5 rows, but the manifest says 53"
    ):
        stream_scores(ScoreStream(train, {"t": target[0]}), {"t": [tmp_path / "t.csv"]})


@pytest.mark.parametrize("seed", range(8))
def test_any_mixture_of_stores_scores_as_float64_does(tmp_path: Path, seed: int) -> None:
    """Checkpoints of different dtypes and shard sizes, shards missing in either, several targets, both query types."""
    rng = np.random.default_rng(seed)
    queries = "1bit" if seed % 2 else "float32"
    n_checkpoints = int(rng.integers(1, 4))
    dtypes = ["1bit"] * n_checkpoints if queries == "1bit" else rng.choice([*CODECS], n_checkpoints).tolist()
    train, lost = [], np.zeros(N, np.bool_)
    for c, dtype in enumerate(dtypes):
        size = int(rng.integers(3, 30))
        made = make_store(tmp_path / f"train{c}", draw(100 * seed + c), dtype=dtype, shard_size=size)
        shard = int(rng.integers(0, 2 * -(-N // size)))  # often none
        file = made.path / f"shards/{shard:05d}.safetensors"
        if file.exists():
            file.unlink()
            lost[shard * size : (shard + 1) * size] = True
        train.append(FeatureStore(made.path, allow_partial=True))
    targets, columns = {}, []
    weights = rng.uniform(0.1, 1, n_checkpoints)
    for t in range(int(rng.integers(1, 4))):
        names = rng.choice(list("abcd"), int(rng.integers(1, 9))).tolist()
        targets[f"t{t}"] = [
            make_store(tmp_path / f"t{t}-{c}", draw(7 * seed + 50 + 10 * t + c, len(names)), subtasks=names)
            for c in range(n_checkpoints)
        ]
        distinct = list(dict.fromkeys(names))
        members = np.array([[name == other for other in distinct] for name in names], float)
        total = np.zeros((N, len(distinct)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for store, target, weight in zip(train, targets[f"t{t}"], weights / weights.sum()):
                query = (members / members.sum(0)).T @ unit(target)
                of_signs = (members / members.sum(0)).T @ sign_rows(target) if queries == "1bit" else query
                total += weight * split_cosines(store, query, of_signs)
        columns.append(total)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = influence(train, targets, weights.tolist(), queries=queries)
    for expected, scores in zip(columns, found.values()):
        assert np.array_equal(scores.valid, ~lost)
        np.testing.assert_allclose(scores.matrix[~lost], expected[~lost], atol=1e-6)
        assert np.isneginf(scores.matrix[lost]).all()


def sign_rows(target: FeatureStore) -> np.ndarray:
    """Unit rows as their signs and factor give them back."""
    codes, scale = encode_signs(unit(target).astype(np.float32))
    signs = 1.0 - 2.0 * np.unpackbits(codes, axis=1, count=target.dim, bitorder="little")
    return rotate_back(signs.astype(np.float32)) * scale[:, None].astype(np.float64)


def split_cosines(store: FeatureStore, query: np.ndarray, of_signs: np.ndarray) -> np.ndarray:
    """Cosines of all rows: with what is left of them beside the center met by ``of_signs``."""
    total = np.zeros((len(store), len(query)))
    for start in range(0, len(store), store.shard_size):
        rows = slice(start, min(start + store.shard_size, len(store)))
        stored = store.stored(rows.start, rows.stop)
        if stored is None:
            continue
        units = store[rows].astype(np.float64) / stored.norms.astype(np.float64)[:, None]
        center = np.zeros(store.dim) if stored.center is None else stored.center.astype(np.float64)
        total[rows] = center @ query.T + (units - center) @ of_signs.T
    return total


def test_equal_rows_have_equal_scores_however_the_pool_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd numbers of rows and many target rows: what a matrix product rounds by place would put ties out of order."""
    monkeypatch.setattr("less_fast.scoring.stream.LEAST_MEMORY", 1)
    rows = np.tile(draw(0, 33, 64), (4, 1))[:131]
    names = [f"s{i % 7}" for i in range(60)]
    target = make_store(tmp_path / "target", draw(1, 60, 64), subtasks=names)
    store = make_store(tmp_path / "train", rows, dtype="1bit", shard_size=131)
    for queries in ("float32", "1bit"):
        found = [influence(store, target, queries=queries, memory=memory).matrix for memory in (1 << 20, 20_000, 3_000)]
        assert all(np.array_equal(found[0], other) for other in found)
        for row in range(33, 131):
            assert np.array_equal(found[0][row], found[0][row - 33])


def test_blocks_may_be_kept(tmp_path: Path, target: list[FeatureStore]) -> None:
    stream = ScoreStream(make_store(tmp_path / "train", draw(0), shard_size=10), target[0])
    kept = [*stream.blocks()]
    assert np.array_equal(np.concatenate([block.matrix for block in kept]), influence(stream.train, target[0]).matrix)


def test_what_a_manifest_claims_is_checked_before_memory_is_asked_for(
    tmp_path: Path, target: list[FeatureStore]
) -> None:
    store = make_store(tmp_path / "train", draw(0), shard_size=N)
    change_manifest(store.path, n_rows=10**13, shard_size=10**13)
    fields = json.loads((store.path / "manifest.json").read_text())
    fields["shards"][0]["stop"] = 10**13
    (store.path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(LessFastError, match=r"rows\.parquet"):
        influence(FeatureStore(store.path), target[0])


def test_wrong_calls_are_explained(tmp_path: Path, target: list[FeatureStore]) -> None:
    with pytest.raises(LessFastError, match="no targets were given"):
        influence(target[0], {})
    with pytest.raises(LessFastError, match="expected a list of numbers"):
        influence(target[0], target[0], ["much"])  # type: ignore[list-item]
    with pytest.raises(LessFastError, match="target 'c' is none of those of this pass: 'a'"):
        stream_scores(ScoreStream(target[0], {"a": target[0]}), {"c": [tmp_path / "c.csv"]})
    nothing = make_store(tmp_path / "nothing", draw(0), status=np.ones(N, np.uint8))
    with pytest.raises(LessFastError, match=r"no row of .*nothing has a usable gradient"):
        stream_scores(ScoreStream(nothing, target[0]), {"": [tmp_path / "n.csv"]})
    assert not (tmp_path / "n.csv").exists()
    own = target[0].path / "rows.parquet"
    line = refused("score", "--train", target[0].path, "--target", target[1].path, "--out", own)
    assert f"--out {own} lies in" in line
    assert "names no store" in refused("score", "--train", target[0].path, "--target", "a=", "--out", tmp_path / "x")
