"""Inner products of a pool's stored codes with the folded queries, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import LessFastError
from less_fast.ops.inner_products import inner_products, inner_products_bits
from less_fast.scoring.targets import Target, unit_rows
from less_fast.store import FeatureStore, StoredRows
from less_fast.store.codec import CODECS
from less_fast.store.rotation import rotate

Float32 = NDArray[np.float32]


class Products(Protocol):
    """The queries of one checkpoint, ready to be multiplied with the codes of its training store."""

    @property
    def row_bytes(self) -> int:
        """Scratch that a row of a block takes."""

    def add(self, rows: StoredRows, factor: Float32, out: Float32, *, accumulate: bool) -> None:
        """``out`` (n, subtasks) = or += factor (n,) · <codes, query> for every row and query."""


def prepare(
    train: Sequence[FeatureStore], targets: Sequence[Target], queries: str, memory: int, device: str
) -> list[Products]:
    """One :class:`Products` per checkpoint; ``queries`` and ``device`` as in :class:`ScoreStream`."""
    if queries not in ("float32", "1bit"):
        raise LessFastError(f"queries is {queries!r}; expected 'float32' or '1bit'")
    place = None if device == "cpu" else _cuda(device)
    if queries == "1bit":
        for store in train:
            if store.dtype != "1bit":
                raise LessFastError(
                    f"{store.path} holds {store.dtype} features, and 1bit queries are compared with 1bit ones; "
                    "convert the store, or use float32 queries"
                )
        return [_BitProducts(store.dim, targets, c, memory, place) for c, store in enumerate(train)]
    folded: list[Products] = []
    for checkpoint, store in enumerate(train):
        query = np.concatenate([target.queries(checkpoint, memory) for target in targets])
        if CODECS[store.dtype].rotated:
            query = rotate(query)
        folded.append(_FloatProducts(store, query, place))
    return folded


def _cuda(device: str) -> Any:
    """The torch device of a name; raises LessFastError for anything but a CUDA device that can be used."""
    import torch

    from less_fast.ops.device_products import supports

    try:
        found = torch.device(device)
    except RuntimeError:
        raise LessFastError(f"device is {device!r}; expected 'cpu', 'cuda' or 'cuda:N'") from None
    if (reason := supports(found)) is not None:
        raise LessFastError(f"scores cannot be computed on {device}: {reason}; use 'cpu'")
    return found


class _FloatProducts:
    row_bytes = 0

    def __init__(self, store: FeatureStore, query: Float32, device: Any) -> None:
        self._dtype, self._dim, self._query, self._on_device = store.dtype, store.dim, query, None
        if device is not None:
            from less_fast.ops.device_products import DeviceQueries, HostProducts

            self._on_device = HostProducts(DeviceQueries(query, device))

    def add(self, rows: StoredRows, factor: Float32, out: Float32, *, accumulate: bool) -> None:
        if self._on_device is not None:
            self._on_device.add(rows.codes, self._dtype, self._dim, factor, out, accumulate=accumulate)
        else:
            inner_products(rows.codes, self._dtype, self._dim, self._query, factor, out, accumulate=accumulate)


class _BitProducts:
    """Signs against signs, a target row at a time; the mean over a subtask is taken of the counts."""

    def __init__(self, dim: int, targets: Sequence[Target], checkpoint: int, memory: int, device: Any) -> None:
        parts = [
            CODECS["1bit"].encode(rows.astype(np.float32))
            for target in targets
            for _, rows in unit_rows(target.stores[checkpoint], memory)
        ]
        self._dim, self._on_device = dim, None
        self._codes, self._factor = (np.concatenate([part[name] for part in parts]) for name in ("features", "scale"))
        ends = np.cumsum([target.members.shape for target in targets], axis=0)
        self._members = np.zeros(tuple(ends[-1]), np.float32)
        for target, (row, column) in zip(targets, ends):
            n, width = target.members.shape
            self._members[row - n : row, column - width : column] = target.members
        # Where every subtask has one row, in order, its cosines are the scores.
        self._is_mean = not np.array_equal(self._members, np.eye(*self._members.shape, dtype=np.float32))
        self.row_bytes = 4 * len(self._codes) if self._is_mean else 0
        if device is not None:
            from less_fast.ops.device_products import DeviceBits, HostProducts

            self._on_device = HostProducts(DeviceBits(self._codes, self._factor, dim, device))

    def add(self, rows: StoredRows, factor: Float32, out: Float32, *, accumulate: bool) -> None:
        if not self._is_mean:
            self._multiply(rows, factor, out, accumulate)
            return
        cosines = np.empty((len(factor), len(self._codes)), np.float32)
        self._multiply(rows, factor, cosines, accumulate=False)
        if accumulate:
            out += cosines @ self._members
        else:
            np.matmul(cosines, self._members, out=out)

    def _multiply(self, rows: StoredRows, factor: Float32, out: Float32, accumulate: bool) -> None:
        if self._on_device is not None:
            self._on_device.add(rows.codes, "1bit", self._dim, factor, out, accumulate=accumulate)
        else:
            inner_products_bits(rows.codes, self._dim, self._codes, factor, self._factor, out, accumulate=accumulate)
