"""A store's rows in other libraries: ``torch.utils.data`` and ``datasets``."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from support.stores import make_store, open_writer
from torch.utils.data import DataLoader, Dataset

from less_fast.errors import LessFastError
from less_fast.store import FeatureStore, Status, TorchRows, to_dataset

N, K = 11, 24
STATUS = np.array([0, 0, Status.NO_LABELS, 0, 0, 0, Status.NON_FINITE, 0, 0, 0, 0], np.uint8)
VALID = [row for row in range(N) if STATUS[row] == Status.OK]
DTYPES = ("float32", "float16", "int8", "1bit")


@pytest.fixture(params=DTYPES)
def store(tmp_path: Path, request: pytest.FixtureRequest) -> FeatureStore:
    x = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    return make_store(tmp_path / "store", x, status=STATUS, subtasks=["a", None] * 5 + ["b"], dtype=request.param)


def test_items(store: FeatureStore) -> None:
    rows = TorchRows(store)
    assert isinstance(rows, Dataset) and len(rows) == len(VALID)
    for place in (0, 2, -1):
        row = VALID[place]
        item = rows[place]
        assert item["features"].dtype == torch.float32 and item["norm"].dtype == torch.float32
        np.testing.assert_array_equal(item["features"].numpy(), store[row])
        assert item["norm"].item() == store.norms[row]
        names = {
            "index": row,
            "id": f"id-{row}",
            "dataset": f"set-{row % 3}",
            "subtask": store.rows.subtasks[row] or "",
        }
        assert {name: item[name] for name in names} == names
        assert (item["status"], item["n_tokens"], item["n_labels"]) == (0, row + 2, row + 1)
    with pytest.raises(IndexError):
        rows[len(VALID)]
    everything = TorchRows(store.path, include_invalid=True)
    assert [everything[row]["index"] for row in range(N)] == list(range(N)) and len(everything) == N
    assert everything[6]["status"] == Status.NON_FINITE and not everything[6]["features"].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_sees_every_row_once(store: FeatureStore, workers: int) -> None:
    loader: DataLoader = DataLoader(
        TorchRows(store), batch_size=4, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(0)
    )
    batches = list(loader)
    assert [batch["features"].shape for batch in batches] == [(4, K), (4, K), (1, K)]
    index = torch.cat([batch["index"] for batch in batches])
    assert sorted(index.tolist()) == VALID and index.tolist() != VALID
    np.testing.assert_array_equal(torch.cat([batch["features"] for batch in batches]).numpy(), store[index.numpy()])
    norms = torch.cat([batch["norm"] for batch in batches])
    assert norms.dtype == torch.float32
    np.testing.assert_array_equal(norms.numpy(), store.norms[index.numpy()])
    assert [name for batch in batches for name in batch["id"]] == [f"id-{row}" for row in index.tolist()]


def test_a_batch_is_read_at_once_and_survives_pickling(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = TorchRows(store)
    one_by_one = [rows[place] for place in (5, 0, 5)]
    again = pickle.loads(pickle.dumps(rows))
    asked = []
    read = FeatureStore.__getitem__

    def counted(self: FeatureStore, index: np.ndarray) -> np.ndarray:
        asked.append(index)
        return read(self, index)

    monkeypatch.setattr(FeatureStore, "__getitem__", counted)
    batch = again.__getitems__([5, 0, 5])
    assert [index.tolist() for index in asked] == [[VALID[5], VALID[0], VALID[5]]]
    for item, expected in zip(batch, one_by_one):
        assert item.keys() == expected.keys()
        assert torch.equal(item.pop("features"), expected.pop("features"))
        assert item == expected


def test_rows_of_missing_shards(tmp_path: Path) -> None:
    with open_writer(tmp_path / "store", 9, K) as writer:
        writer.write(1, np.ones((4, K)), np.zeros(4), np.ones(4), np.ones(4))
    store = FeatureStore(tmp_path / "store", allow_partial=True)
    assert [item["index"] for item in TorchRows(store).__getitems__(range(4))] == [4, 5, 6, 7]
    assert TorchRows(store, include_invalid=True)[0]["status"] == Status.MISSING
    assert to_dataset(store, tmp_path / "rows.arrow", progress=False)["index"][:] == [4, 5, 6, 7]


def test_dataset(store: FeatureStore, tmp_path: Path) -> None:
    data = to_dataset(store, tmp_path / "rows.arrow", progress=False)
    assert isinstance(data, datasets.Dataset) and len(data) == len(VALID)
    assert data.cache_files == [{"filename": str(tmp_path / "rows.arrow")}]
    assert data.features["features"] == datasets.Sequence(datasets.Value("float32"), length=K)
    assert (data["index"][:], data["id"][:]) == (VALID, [f"id-{row}" for row in VALID])
    assert data["dataset"][:] == [f"set-{row % 3}" for row in VALID]
    assert data["subtask"][:] == [store.rows.subtasks[row] for row in VALID]
    assert data["n_tokens"][:] == [row + 2 for row in VALID] and data["n_labels"][:] == [row + 1 for row in VALID]
    arrays = data.with_format("numpy")
    assert arrays["features"][:].dtype == np.float32
    np.testing.assert_array_equal(arrays["features"][:], store[VALID])
    np.testing.assert_array_equal(arrays["norm"][:], store.norms[VALID])
    assert torch.equal(data.with_format("torch")[3]["features"], torch.from_numpy(store[VALID[3]]))
    everything = to_dataset(store.path, tmp_path / "rows.arrow", include_invalid=True, progress=False)
    assert everything["status"][:] == STATUS.tolist()
    assert not np.any(everything[6]["features"])
    np.testing.assert_array_equal(arrays["features"][:], store[VALID])  # the replaced file stays mapped
    everything.save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved")["index"][:] == list(range(N))


def test_a_dataset_is_made_in_bounded_memory(tmp_path: Path) -> None:
    n, dim = 12288, 1024
    store = make_store(tmp_path / "store", np.ones((n, dim), np.float32), dtype="1bit", shard_size=2048)
    tracemalloc.start()
    try:
        data = to_dataset(store, tmp_path / "rows.arrow", progress=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data) == n and (tmp_path / "rows.arrow").stat().st_size > n * dim * 4
    assert peak < n * dim * 4 // 2


def test_a_dataset_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store", np.ones((N, K), np.float32))
    target = tmp_path / "rows.arrow"
    target.write_text("before")
    with pytest.raises(LessFastError, match=r"expected the name of an \.arrow file"):
        to_dataset(store, tmp_path)
    with pytest.raises(LessFastError, match=r"no/rows\.arrow: No such file or directory"):
        to_dataset(store, tmp_path / "no" / "rows.arrow")
    with pytest.raises(LessFastError, match="is not a feature store"):
        to_dataset(tmp_path / "none", target)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LessFastError, match=r"cannot write .*rows\.arrow: the disk is full"):
        to_dataset(store, target, progress=False)
    assert target.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.arrow", "store"]


def test_stores_are_read_without_torch_until_a_view_is_asked_for() -> None:
    program = (
        "import sys; import less_fast.store as s; s.FeatureStore; s.convert_store; assert 'torch' not in sys.modules; "
        "s.TorchRows; assert 'torch' in sys.modules; from less_fast.store import *; to_dataset"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(ImportError, match="no_such_name"):
        from less_fast.store import no_such_name  # noqa: F401
