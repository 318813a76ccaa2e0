"""``convert_store``: the same features in another dtype, shard by shard, resumable like the extraction itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.paths import PathOrUrl, to_path
from less_fast.progress import progress_bar
from less_fast.store.codec import CODECS, Array, Float32
from less_fast.store.reader import FeatureStore
from less_fast.store.shard import encode_shard
from less_fast.store.writer import StoreWriter


def convert_store(
    source: PathOrUrl,
    out: PathOrUrl,
    *,
    dtype: str,
    shard_size: int | None = None,
    verify: bool = True,
    progress: bool = True,
) -> FeatureStore:
    """The features of a store in another dtype, in a store of their own; the same call goes on where one stopped.

    From float32, the codes are those that an extraction in ``dtype`` writes. Norms stay those of the features before
    any rounding; rows, statuses, counts and facts stay too, and the fact ``converted_from`` names the source's dtype
    and the checksum of its manifest. Memory: the codes of one shard.

    Parameters
    ----------
    source, out : folders of the stores.
    dtype : ``float32``, ``float16``, ``bfloat16``, ``int8`` or ``1bit``. The source's own copies the codes, but signs
        that come into other shards are read and taken again, against the centers of those. A larger dtype than the
        source's gets a warning, since what was rounded away does not come back.
    shard_size : rows per shard of ``out``; default: the source's.
    verify : compare each file of the source with its checksum before it is used.
    progress : show a progress bar with rows/s and the time left.

    Raises
    ------
    LessFastError
        if the source is unfinished, or ``out`` is the source or cannot be written; see :class:`StoreWriter`.
    CorruptStoreError
        if a file of the source is damaged. What was finished before stays, and the same call goes on after a repair.
    """
    if dtype not in CODECS:
        raise LessFastError(f"dtype is {dtype!r}; expected one of {', '.join(CODECS)}")
    store = FeatureStore(source, verify=verify)
    if to_path(out).resolve() == store.path.resolve():
        raise LessFastError(f"{out} is the store to convert; choose another folder for the result")
    if _row_bytes(dtype, store.dim) > _row_bytes(store.dtype, store.dim):
        warnings.warn(
            f"{store.path} holds {store.dtype}, and {dtype} is larger: what was rounded away does not come back",
            stacklevel=2,
        )
    writer = StoreWriter(
        out,
        {**store.facts, "converted_from": _origin(store)},
        store.rows,
        dim=store.dim,
        dtype=dtype,
        shard_size=store.shard_size if shard_size is None else shard_size,
    )
    with writer:
        pending = writer.pending()
        todo = sum(stop - start for start, stop in map(writer.bounds, pending))
        with progress_bar(len(store), unit="row", desc=dtype, show=progress, initial=len(store) - todo) as bar:
            # Not through ``store``, which would read every shard whole, for its checksum, before the first is written.
            columns = FeatureStore(source)
            for shard in pending:
                start, stop = writer.bounds(shard)
                try:
                    tensors = _tensors(store, columns, dtype, start, stop, bar.update)
                except CorruptStoreError as error:
                    done, left = len(writer.shard_facts()), len(writer.pending())
                    kept = f"{done} of {done + left} shards of {out} are finished and stay"
                    raise CorruptStoreError(f"{error} ({kept})") from None
                writer.write_encoded(shard, tensors, _shard_facts(store, start, stop))
        return writer.close()


def _origin(store: FeatureStore) -> dict[str, Any]:
    origin = {"dtype": store.dtype, "manifest": store.manifest.get("sha256")}
    earlier = store.facts.get("converted_from")
    return {**origin, "converted_from": earlier} if earlier is not None else origin


def _row_bytes(dtype: str, dim: int) -> int:
    return CODECS[dtype].tensors(1, dim)["features"].nbytes


@dataclass
class _Window:
    """Rows [start, start + n) of a store as float32, decoded as they are asked for; ``told`` hears how many."""

    store: FeatureStore
    start: int
    shape: tuple[int, int]
    told: Callable[[int], object]
    n_told: int = 0

    def __getitem__(self, rows: slice) -> Float32:
        if rows.stop > self.n_told:  # signs are taken in a second pass, which is no news
            self.told(rows.stop - self.n_told)
            self.n_told = rows.stop
        return self.store[self.start + rows.start : self.start + rows.stop]


def _tensors(
    store: FeatureStore, columns: FeatureStore, dtype: str, start: int, stop: int, told: Callable[[int], object]
) -> dict[str, Array]:
    """The tensors of a shard with rows [start, stop)."""
    names = ("status", "norms", "n_tokens", "n_labels")
    kept: dict[str, Array] = {name: getattr(columns, name)[start:stop] for name in names}
    codec = CODECS[dtype]
    if dtype != store.dtype or (codec.rotated and not _is_shard(store, start, stop)):
        window = _Window(store, start, (stop - start, store.dim), told)
        return {**kept, **encode_shard(codec, window, kept["status"], kept["norms"])}
    # Decoding and encoding again would round the scales once more.
    parts = [part for piece in _pieces(store, start, stop) if (part := store.stored(*piece))]
    kept["features"] = np.concatenate([part.codes for part in parts])
    if codec.scaled:
        kept["scale"] = np.concatenate([part.scale for part in parts if part.scale is not None])
    kept.update(("center", part.center) for part in parts if part.center is not None)
    told(stop - start)
    return kept


def _is_shard(store: FeatureStore, start: int, stop: int) -> bool:
    """Whether rows [start, stop) are those of one shard of the store."""
    return start % store.shard_size == 0 and stop == min(start + store.shard_size, len(store))


def _pieces(store: FeatureStore, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut where the shards of the store end."""
    while start < stop:
        end = min(stop, (start // store.shard_size + 1) * store.shard_size)
        yield start, end
        start = end


def _shard_facts(store: FeatureStore, start: int, stop: int) -> dict[str, Any]:
    """The facts of the source's shard; where the windows differ, of all those that rows [start, stop) are from."""
    entries = {entry["start"]: entry for entry in store.manifest["shards"]}
    if _is_shard(store, start, stop):
        return dict(entries[start]["facts"])
    found = (entries[piece - piece % store.shard_size] for piece, _ in _pieces(store, start, stop))
    return {"converted_from": [{name: entry[name] for name in ("start", "stop", "facts")} for entry in found]}
