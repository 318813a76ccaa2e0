"""Inner products of a pool's stored codes with the folded queries, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import LessFastError
from less_fast.ops.inner_products import inner_products, inner_products_bits
from less_fast.scoring.targets import Target, inverse, unit_rows
from less_fast.store import FeatureStore, StoredRows
from less_fast.store.codec import CODECS, encode_signs
from less_fast.store.rotation import rotate

Float32 = NDArray[np.float32]

_CHUNK = 512
_LARGEST = float(np.finfo(np.float32).max)


class _CodeProducts(Protocol):
    """Queries, ready to be multiplied with stored codes."""

    @property
    def row_bytes(self) -> int:
        """Scratch that a row of a block takes."""

    def add(self, rows: StoredRows, factor: Float32, out: Float32, *, accumulate: bool) -> None:
        """``out`` (n, subtasks) = or += factor (n,) · <codes, query> for every row and query."""


class Products:
    """The queries of one checkpoint, ready to be multiplied with the rows of its training store.

    ``query`` float32 (subtasks, K), not rotated, meets the shards' centers, and ``codes`` holds what meets the codes.
    """

    def __init__(self, query: Float32, codes: _CodeProducts) -> None:
        self._query, self._codes = _in_chunks(query), codes
        self.row_bytes = codes.row_bytes

    def add(self, rows: StoredRows, share: float, out: Float32, *, accumulate: bool) -> None:
        """``out`` (n, subtasks) = or += share · <row, query> / norm, and 0 for rows of norm 0."""
        if rows.center is None or rows.scale is None:
            self._codes.add(rows, _factor(rows, share), out, accumulate=accumulate)
            return
        # Codes of unit rows less their center.
        common, factor = self._with_center(rows.center, share), np.float32(share) * rows.scale
        has_norm = rows.norms > 0
        if not has_norm.all():
            common = np.where(has_norm[:, None], common, np.float32(0.0))
            factor[~has_norm] = 0.0
        if accumulate:
            out += common
        else:
            out[:] = common
        self._codes.add(rows, factor, out, accumulate=True)

    def _with_center(self, center: Float32, share: float) -> Float32:
        """Share · <center, query> of every query; not by a matrix product, whose order of sums may vary."""
        sums = np.einsum("qck,ck->qc", self._query, _in_chunks(center[None])[0])
        return (share * sums.sum(axis=1, dtype=np.float64)).astype(np.float32)


def _in_chunks(rows: Float32) -> Float32:
    """(n, K) as (n, chunks, _CHUNK), with zeros at the end: float32 sums of a chunk lose little."""
    if extra := -rows.shape[1] % _CHUNK:
        rows = np.pad(rows, ((0, 0), (0, extra)))
    return rows.reshape(len(rows), -1, _CHUNK)


def _factor(rows: StoredRows, share: float) -> Float32:
    """What the product of a row's codes with a query is to be multiplied by."""
    factor = share * inverse(rows.norms)
    if rows.scale is not None:
        factor *= rows.scale
    return np.minimum(factor, _LARGEST).astype(np.float32)


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
    products = []
    for checkpoint, store in enumerate(train):
        query = np.concatenate([target.queries(checkpoint, memory) for target in targets])
        codes: _CodeProducts
        if queries == "1bit":
            codes = _BitProducts(store.dim, targets, checkpoint, memory, place)
        else:
            codes = _FloatProducts(store, query, place)
        products.append(Products(query, codes))
    return products


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
        if CODECS[store.dtype].rotated:
            query = rotate(query)
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
            encode_signs(rows.astype(np.float32))
            for target in targets
            for _, rows in unit_rows(target.stores[checkpoint], memory)
        ]
        self._dim, self._on_device = dim, None
        self._codes, self._factor = map(np.concatenate, zip(*parts))
        first_columns = np.cumsum([0, *(len(target.subtasks) for target in targets)])
        columns = np.concatenate([first + target.columns for first, target in zip(first_columns, targets)])
        # Where every subtask has one row, in order, its cosines are the scores.
        self._means: Float32 | None = None
        if not np.array_equal(columns, np.arange(first_columns[-1])):
            self._means = np.zeros((first_columns[-1], len(columns)), np.float32)
            self._means[columns, np.arange(len(columns))] = np.concatenate([target.weights for target in targets])
        self.row_bytes = 0 if self._means is None else 4 * len(columns)
        if device is not None:
            from less_fast.ops.device_products import DeviceBits, HostProducts

            self._on_device = HostProducts(DeviceBits(self._codes, self._factor, dim, device))

    def add(self, rows: StoredRows, factor: Float32, out: Float32, *, accumulate: bool) -> None:
        if self._means is None:
            self._multiply(rows, factor, out, accumulate)
            return
        cosines = np.empty((len(factor), len(self._codes)), np.float32)
        self._multiply(rows, factor, cosines, accumulate=False)
        # By the kernel, whose bits for a row do not depend on its neighbours: equal rows have equal scores.
        ones = np.ones(len(factor), np.float32)
        inner_products(cosines, "float32", cosines.shape[1], self._means, ones, out, accumulate=accumulate)

    def _multiply(self, rows: StoredRows, factor: Float32, out: Float32, accumulate: bool) -> None:
        if self._on_device is not None:
            self._on_device.add(rows.codes, "1bit", self._dim, factor, out, accumulate=accumulate)
        else:
            inner_products_bits(rows.codes, self._dim, self._codes, factor, self._factor, out, accumulate=accumulate)
