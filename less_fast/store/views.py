"""A store's rows for other libraries: a dataset of ``torch.utils.data``, and a ``datasets.Dataset``."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from less_fast.errors import LessFastError
from less_fast.paths import PathOrUrl
from less_fast.progress import progress_bar
from less_fast.store.files import atomic_file, check_free_space, failed_write
from less_fast.store.reader import FeatureStore
from less_fast.store.shard import Status

_BLOCK_BYTES = 4 << 20  # of features that are decoded at a time, which takes several times as much


class TorchRows(Dataset[dict[str, Any]]):
    """A store as a map-style dataset, for a ``DataLoader`` with any sampler, collation and number of workers.

    Item i is a dict of ``features`` float32 (K,), ``norm`` float32 () before rounding to the store's dtype, ``index``
    (row of the store), ``status``, ``n_tokens``, ``n_labels``, ``id``, ``dataset`` and ``subtask`` (empty where there
    is none). Only what is asked for is read from the disk.

    Parameters
    ----------
    store : a store, or its folder.
    include_invalid : whether rows that are not OK, which hold zeros, are items too; otherwise they are left out.
    """

    def __init__(self, store: FeatureStore | PathOrUrl, *, include_invalid: bool = False) -> None:
        self.store = _opened(store)
        self.rows = _rows(self.store, include_invalid)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a batch, read together."""
        rows = self.rows[np.asarray(indices, np.int64)]
        columns = _columns(self.store, rows)
        columns["subtask"] = [name or "" for name in columns["subtask"]]  # None cannot be collated
        # A Python float would be collated as float64.
        columns["norm"] = list(torch.tensor(columns["norm"], dtype=torch.float32))
        columns["features"] = list(torch.from_numpy(self.store[rows]))
        return [dict(zip(columns, item)) for item in zip(*columns.values())]


def to_dataset(
    store: FeatureStore | PathOrUrl,
    path: str | PathLike[str],
    *,
    include_invalid: bool = False,
    progress: bool = True,
) -> Any:
    """Copy a store to an Arrow file and open that as a ``datasets.Dataset``, which maps it instead of reading it.

    Columns: ``index`` (row of the store), ``id``, ``dataset``, ``subtask``, ``status``, ``norm`` (before rounding to
    the store's dtype), ``n_tokens``, ``n_labels``, and ``features``, a list of K float32: 4 K bytes a row whatever the
    dtype of the store.

    Parameters
    ----------
    store : a store, or its folder.
    path : the file, which appears whole or not at all; an old one is replaced. It has to stay while the result is used.
    include_invalid : whether rows that are not OK, which hold zeros, are copied too; otherwise they are left out.
    progress : show a progress bar.

    Raises LessFastError if the file cannot be written.
    """
    import datasets
    import pyarrow as pa

    store, path = _opened(store), Path(path)
    if path.suffix != ".arrow":
        raise LessFastError(f"{path}: expected the name of an .arrow file")
    rows = _rows(store, include_invalid)
    types = {"index": "int64", **dict.fromkeys(("id", "dataset", "subtask"), "string"), "status": "uint8"}
    types |= {"norm": "float32", "n_tokens": "int32", "n_labels": "int32"}
    columns = {name: datasets.Value(kind) for name, kind in types.items()}
    features = datasets.Sequence(datasets.Value("float32"), length=store.dim)
    schema = datasets.Features({**columns, "features": features}).arrow_schema
    check_free_space(path, len(rows) * 4 * store.dim)
    n_block = max(1, _BLOCK_BYTES // (4 * store.dim))
    try:
        with (
            progress_bar(len(rows), unit="row", desc=path.name, show=progress) as bar,
            atomic_file(path) as file,
            pa.ipc.new_stream(file, schema) as writer,
        ):
            for start in range(0, len(rows), n_block):
                block = rows[start : start + n_block]
                arrays = [pa.array(values, types[name]) for name, values in _columns(store, block).items()]
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(store[block].reshape(-1)), store.dim))
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
                bar.update(len(block))
    except OSError as error:
        raise failed_write(path, error, "nothing was changed") from error
    return datasets.Dataset.from_file(str(path))


def _opened(store: FeatureStore | PathOrUrl) -> FeatureStore:
    return store if isinstance(store, FeatureStore) else FeatureStore(store)


def _rows(store: FeatureStore, include_invalid: bool) -> NDArray[np.int64]:
    return np.arange(len(store)) if include_invalid else np.flatnonzero(store.status == Status.OK)


def _columns(store: FeatureStore, rows: NDArray[np.int64]) -> dict[str, list[Any]]:
    """All that is known of these rows besides their features."""
    numbers = rows.tolist()
    return {
        "index": numbers,
        "id": [store.rows.ids[row] for row in numbers],
        "dataset": [store.rows.datasets[row] for row in numbers],
        "subtask": [store.rows.subtasks[row] for row in numbers],
        "status": store.status[rows].tolist(),
        "norm": store.norms[rows].tolist(),
        "n_tokens": store.n_tokens[rows].tolist(),
        "n_labels": store.n_labels[rows].tolist(),
    }
