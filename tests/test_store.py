"""The store: what is written is what is read, whatever the dtype, the shard size or the way of asking."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from support.stores import folder_hashes, make_facts, make_rows, make_store, open_writer, write_pending

from less_fast.errors import LessFastError
from less_fast.projection import Projection
from less_fast.store import FeatureStore, Rows, Status, StoreWriter
from less_fast.store.codec import round_to_bfloat16, widen_bfloat16

N, K = 11, 8
DTYPES = ("float32", "float16", "bfloat16")
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place, relative


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)


def test_columns_and_facts(tmp_path: Path, features: np.ndarray) -> None:
    store = make_store(tmp_path / "s", features, model="m", numerics={"dtype": "float32"})
    assert (len(store), store.dim, store.dtype) == (N, K, "float32")
    assert store.projection == Projection("sjlt", K)
    assert store.manifest["schema_version"] == 1
    assert store.manifest["model"] == "m" and store.facts["numerics"] == {"dtype": "float32"}
    assert store.rows == make_rows(N)
    assert store.status.dtype == np.uint8 and (store.status == Status.OK).all()
    np.testing.assert_array_equal(store.n_tokens, np.arange(N) + 2)
    np.testing.assert_array_equal(store.n_labels, np.arange(N) + 1)
    assert store.n_tokens.dtype == store.n_labels.dtype == np.int32
    assert store.norms.dtype == np.float32
    np.testing.assert_allclose(store.norms, np.linalg.norm(features.astype(np.float64), axis=1), rtol=1e-7)
    entries = store.manifest["shards"]
    assert [(e["start"], e["stop"]) for e in entries] == [(0, 4), (4, 8), (8, 11)]
    assert [e["facts"] for e in entries] == [{"token_budget": 100 + i} for i in range(3)]
    assert store.verify().ok


def test_every_way_of_asking(tmp_path: Path, features: np.ndarray) -> None:
    store = make_store(tmp_path / "s", features)
    asked = [
        slice(None),
        slice(3, 9),
        slice(-2, None),
        slice(5, 2),
        slice(10, 1, -3),
        slice(4, 8),
        np.array([7, 0, 0, 10, -1]),
        [3, 1],
        [],
        np.arange(N) % 2 == 0,
    ]
    for index in asked:
        out = store[index]
        assert out.dtype == np.float32 and type(out) is np.ndarray
        rows = np.array(index, int) if isinstance(index, list) else index
        np.testing.assert_array_equal(out, features[rows])
    for i in (0, 10, -1, np.int64(5)):
        assert store[i].shape == (K,)
        np.testing.assert_array_equal(store[i], features[i])
    for wrong in (N, -N - 1, [0, N], np.zeros(N - 1, bool), np.array([0.5])):
        with pytest.raises(IndexError):
            store[wrong]
    blocks = list(store.blocks(3))
    assert [start for start, _ in blocks] == [0, 3, 6, 9]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), features)
    store[2:4][:] = 0  # a copy: the store is none the worse
    np.testing.assert_array_equal(store[2:4], features[2:4])


@pytest.mark.parametrize("n", [0, 1, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows(tmp_path: Path, n: int, dtype: str) -> None:
    features = np.ones((n, 3), np.float32)
    store = make_store(tmp_path / "s", features, dtype=dtype)
    np.testing.assert_array_equal(store[:], features)
    assert store.status.shape == store.norms.shape == (n,)
    assert store.verify().ok


def test_rows_without_features_are_zeros(tmp_path: Path, features: np.ndarray) -> None:
    features[1, 3] = np.nan
    features[4, 0] = np.inf
    features[6] = np.nan
    features[9] = 3e38  # finite, but its norm is not
    status = np.zeros(N, np.uint8)
    status[[5, 6]] = Status.NO_LABELS
    for dtype in DTYPES:
        store = make_store(tmp_path / dtype, features, status=status, dtype=dtype)
        expected = status.copy()
        expected[[1, 4, 9]] = Status.NON_FINITE
        np.testing.assert_array_equal(store.status, expected)
        bad = expected != Status.OK
        assert not store[:][bad].any() and not store.norms[bad].any()
        assert np.isfinite(store[:]).all() and store[:][~bad].all(axis=1).all()
    assert (status[[1, 4, 9]] == Status.OK).all(), "the caller's array was changed"


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 7), st.integers(1, 9)),
        elements=st.floats(-(2.0**125), 2.0**125, width=32),
    ),
    shard_size=st.integers(1, 8),
)
def test_round_trip(dtype: str, features: np.ndarray, shard_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "s", features, dtype=dtype, shard_size=shard_size)
        out, exact = store[:].astype(np.float64), features.astype(np.float64)
        norms = np.sqrt((exact**2).sum(axis=1))
        assert (store.status == Status.OK).all()
        np.testing.assert_array_equal(store.norms, norms.astype(np.float32))
    if dtype == "float32":
        np.testing.assert_array_equal(out, exact)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    # The smallest entries of a row are a fixed point number: far below what the largest one is rounded by; and
    # float32 itself ends at 2^-149.
    slack = largest * 2.0**-39 + 2.0**-149
    assert (np.abs(out - exact) <= np.abs(exact) * ROUNDING[dtype] + slack).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e6, 1e30])
def test_half_precision_does_not_depend_on_the_size_of_a_row(tmp_path: Path, dtype: str, size: float) -> None:
    features = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32) * np.float32(size)
    out = make_store(tmp_path / "s", features, dtype=dtype)[:]
    relative = np.abs(out.astype(np.float64) / features - 1)
    assert relative.max() <= ROUNDING[dtype] * (1 + 1e-6)
    assert relative.max() > ROUNDING[dtype] / 4  # it really is stored in that many bits


@given(hnp.arrays(np.float32, 32, elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_bfloat16_rounds_as_torch_does(x: np.ndarray) -> None:
    bits = round_to_bfloat16(x)
    expected = torch.from_numpy(x).to(torch.bfloat16)
    np.testing.assert_array_equal(bits.view(np.int16), expected.view(torch.int16).numpy())
    np.testing.assert_array_equal(widen_bfloat16(bits), expected.float().numpy())


def test_bfloat16_ties_go_to_even() -> None:
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20], np.float32)
    np.testing.assert_array_equal(widen_bfloat16(round_to_bfloat16(x)), [1.0, 1 + 2.0**-6, 1 + 2.0**-7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_safetensors(tmp_path: Path, features: np.ndarray, dtype: str) -> None:
    store = make_store(tmp_path / "s", features, dtype=dtype)
    with safe_open(tmp_path / "s" / "shards" / "00001.safetensors", "pt") as file:
        assert file.metadata() == {"start": "4", "stop": "8", "facts": '{"token_budget": 101}'}
        stored = file.get_tensor("features")
        assert str(stored.dtype) == f"torch.{dtype}"
        scale = file.get_tensor("scale")[:, None] if dtype != "float32" else 1.0
        np.testing.assert_array_equal((stored.float() * scale).numpy(), store[4:8])
        np.testing.assert_array_equal(file.get_tensor("norms").numpy(), store.norms[4:8])
        assert file.get_tensor("status").dtype == torch.uint8
        assert file.get_tensor("n_tokens").tolist() == [6, 7, 8, 9]


def test_reading_needs_no_torch_and_few_files(tmp_path: Path) -> None:
    make_store(tmp_path / "s", np.ones((200, 2), np.float32), shard_size=1)
    code = (
        "import sys, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from less_fast.store import FeatureStore\n"
        "store = FeatureStore(sys.argv[1])\n"
        "assert store[:].sum() == 400 and store[::-1].sum() == 400 and store.status.sum() == 0\n"
        "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=True, cwd=tmp_path)


def test_same_job_same_bytes(tmp_path: Path, features: np.ndarray) -> None:
    make_store(tmp_path / "a", features, dtype="float16")
    with open_writer(tmp_path / "b", N, K, dtype="float16") as writer:
        numbers = np.arange(N)
        for shard in (2, 0, 1):  # the order in which shards get ready leaves no trace
            rows = slice(*writer.bounds(shard))
            budget = {"token_budget": 100 + shard}
            writer.write(shard, features[rows], np.zeros(N)[rows], numbers[rows] + 2, numbers[rows] + 1, budget)
    assert folder_hashes(tmp_path / "a") == folder_hashes(tmp_path / "b")


def test_resume_writes_what_is_missing(tmp_path: Path, features: np.ndarray) -> None:
    make_store(tmp_path / "whole", features)
    writer = open_writer(tmp_path / "s", N, K)
    assert writer.pending() == [0, 1, 2] and writer.bounds(2) == (8, 11)
    writer.write(1, features[4:8], [0] * 4, np.arange(4, 8) + 2, np.arange(4, 8) + 1, {"token_budget": 101})
    assert writer.pending() == [0, 2]
    with pytest.raises(LessFastError, match="not pending"):
        writer.write(1, features[4:8], [0] * 4, [1] * 4, [1] * 4)
    with pytest.raises(LessFastError, match="2 of 3 shards are missing"):
        writer.close()
    again = open_writer(tmp_path / "s", N, K)
    assert again.pending() == [0, 2]
    write_pending(again, features)
    np.testing.assert_array_equal(again.close()[:], features)
    finished = open_writer(tmp_path / "s", N, K)
    assert finished.pending() == []
    finished.close()
    assert folder_hashes(tmp_path / "s") == folder_hashes(tmp_path / "whole")


def test_partial_store_reads_on_request(tmp_path: Path, features: np.ndarray) -> None:
    with open_writer(tmp_path / "s", N, K) as writer:
        writer.write(1, features[4:8], [0] * 4, [1] * 4, [1] * 4)
    store = FeatureStore(tmp_path / "s", allow_partial=True)
    assert len(store) == N
    np.testing.assert_array_equal(store.status, [Status.MISSING] * 4 + [0] * 4 + [Status.MISSING] * 3)
    np.testing.assert_array_equal(store[4:8], features[4:8])
    assert not store[:4].any() and not store[[0, 9]].any() and not store.norms[8:].any()
    report = store.verify()
    assert not report.ok and len(report.problems) == 2 and "00002.safetensors: not written yet" in report.problems[1]


def test_settings_must_match_on_resume(tmp_path: Path) -> None:
    open_writer(tmp_path / "s", N, K, precondition={"rule": "less", "eps": 1e-8}).release()
    before = folder_hashes(tmp_path / "s")

    def message(
        *, rows: Rows | None = None, dim: int = K, dtype: str = "float32", size: int = 4, **changes: object
    ) -> str:
        facts = make_facts(K, precondition={"rule": "less", "eps": 1e-8}) | changes
        with pytest.raises(LessFastError) as caught:
            StoreWriter(tmp_path / "s", facts, rows or make_rows(N), dim=dim, dtype=dtype, shard_size=size)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "precondition.eps: 1e-08 -> 1e-06" in message(precondition={"rule": "less", "eps": 1e-6})
    both = message(projection=Projection("sjlt", K, seed=3).to_dict(), dtype="float16")
    assert "projection.seed: 0 -> 3" in both and 'dtype: "float32" -> "float16"' in both
    assert "rule" not in both
    assert "dim: 8 -> 9" in message(dim=9)
    assert "shard_size: 4 -> 5" in message(size=5)
    assert "extra: null -> 1" in message(extra=1)
    assert "n_rows: 11 -> 12" in message(rows=make_rows(12))
    other = make_rows(N)
    other.ids[3] = "another"
    assert "rows (ids, datasets, subtasks)" in message(rows=other)
    assert "n_rows: 11 -> 99; " in message(rows=make_rows(99), dim=K, **{f"a{i}": i for i in range(7)})
    assert "; and 3 more; " in message(**{f"a{i:02}": i for i in range(11)})
    assert folder_hashes(tmp_path / "s") == before


def test_bad_arguments(tmp_path: Path, features: np.ndarray) -> None:
    for wrong, match in (
        ({"dim": 0}, "dim is 0"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"shard_size": True}, "shard_size is True"),
    ):
        arguments = {"dim": K, "dtype": "float32", "shard_size": 4} | wrong
        with pytest.raises(LessFastError, match=match):
            StoreWriter(tmp_path / "s", {}, make_rows(N), **arguments)
    with pytest.raises(LessFastError, match="facts may not be named shards"):
        StoreWriter(tmp_path / "s", {"shards": 1}, make_rows(N), dim=K, dtype="float32", shard_size=4)
    with pytest.raises(LessFastError, match="not valid Unicode"):
        StoreWriter(tmp_path / "s", {}, Rows(["\ud800"], ["d"], [None]), dim=K, dtype="float32", shard_size=4)
    with pytest.raises(LessFastError, match="2 ids, 1 datasets"):
        Rows(["a", "b"], ["d"], [None])
    assert not (tmp_path / "s").exists()
    with open_writer(tmp_path / "s", N, K) as writer:
        with pytest.raises(LessFastError, match=r"features of shard 0 have shape \(4, 7\); expected \(4, 8\)"):
            writer.write(0, features[:4, :7], [0] * 4, [1] * 4, [1] * 4)
        with pytest.raises(LessFastError, match=r"n_labels of shard 2 have shape \(4,\); expected \(3,\)"):
            writer.write(2, features[8:], [0] * 3, [1] * 3, [1] * 4)
        with pytest.raises(LessFastError, match="holds 3; expected 0, 1 or 2"):
            writer.write(0, features[:4], [3] * 4, [1] * 4, [1] * 4)


def test_manifest_is_plain_json_without_machine_or_time(tmp_path: Path, features: np.ndarray) -> None:
    make_store(tmp_path / "s", features)
    text = (tmp_path / "s" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert set(json.loads(text)) == {
        *("schema_version", "n_rows", "dim", "dtype", "shard_size", "rows", "shards", "sha256"),
        *("projection", "layout_hash", "examples"),
    }
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["manifest.json", "rows.parquet", "shards"]
