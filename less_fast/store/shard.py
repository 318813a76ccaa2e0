"""One shard: a safetensors file with the features, norms, statuses and counts of consecutive rows.

The file is written and read here rather than through the safetensors package so that its bytes depend on nothing but
the content (the package orders metadata by hash), bfloat16 needs no further numpy types, nothing is copied on the way
to the disk, and every shape is checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from less_fast.errors import CorruptStoreError
from less_fast.paths import AnyPath, RemotePath
from less_fast.store.codec import Array, Codec, Float32, TensorSpec
from less_fast.store.files import atomic_file, open_regular, sha256_of_open, size_of_open
from less_fast.store.strict_json import parse_json, shown

_MAX_HEADER = 1 << 20
_HEAD = 1 << 17  # bytes of a remote shard that are fetched at a time for its columns
_SLAB_ROWS = 16  # rows handled at a time: few enough that a slab stays in the cache
# Norms from here on count as non-finite, so that rounding a row's entries up can never reach infinity.
_NORM_LIMIT = 2.0**127


class Status(IntEnum):
    """What is known of a row. Only ``OK`` rows have features, and only they can be selected."""

    OK = 0
    NO_LABELS = 1  # every label masked: the example has no loss
    NON_FINITE = 2  # loss or gradient not finite
    MISSING = 3  # its shard is not there yet; never stored, only told by a store opened with allow_partial


def shard_tensors(codec: Codec, n: int, dim: int) -> dict[str, TensorSpec]:
    """All tensors of a shard of ``n`` rows, in file order: widest type first, so that each one is aligned."""
    specs = {
        "n_labels": TensorSpec("I32", "<i4", (n,)),
        "n_tokens": TensorSpec("I32", "<i4", (n,)),
        "norms": TensorSpec("F32", "<f4", (n,)),
        "status": TensorSpec("U8", "|u1", (n,)),
        **codec.tensors(n, dim),
    }
    if codec.rotated:
        specs["center"] = TensorSpec("F32", "<f4", (dim,))
    return dict(sorted(specs.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize))


def shard_bytes(codec: Codec, n: int, dim: int) -> int:
    """Size of a shard's file, header included, rounded up a little."""
    return sum(spec.nbytes for spec in shard_tensors(codec, n, dim).values()) + 4096


class LazyRows(Protocol):
    """Float32 (n, K) that is made slice by slice, as it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, K)."""

    def __getitem__(self, rows: slice, /) -> Float32:
        """The rows of a slice with step 1."""


def encode_shard(
    codec: Codec, features: Float32 | LazyRows, status: Array, norms: Float32 | None = None
) -> dict[str, Array]:
    """The tensors of features float32 (n, K) and statuses uint8 (n,), with ``norms`` of the rows before rounding.

    ``norms``: the norms to store where ``features`` were rounded before; default: those of ``features``. A row whose
    status is not OK is stored as zeros with norm 0. An OK row that holds an inf or a NaN, or whose norm is 2^127 or
    more, becomes a NON_FINITE one. Where codes are rotated, ``features`` are gone through twice.
    """
    n, dim = features.shape
    status = status.astype(np.uint8)
    out: dict[str, Array] = {name: np.empty(s.shape, s.dtype) for name, s in codec.tensors(n, dim).items()}
    out["status"] = status
    out["norms"] = np.zeros(n, np.float32)
    lengths = np.zeros(n)
    total = np.zeros(dim)
    for rows, slab in _slabs(features):
        wide = slab.astype(np.float64)
        found = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        status[rows][(status[rows] == Status.OK) & ~(found < _NORM_LIMIT)] = Status.NON_FINITE
        ok = status[rows] == Status.OK
        out["norms"][rows][ok] = (found if norms is None else norms[rows])[ok]
        lengths[rows][ok] = found[ok]
        if codec.rotated:
            for row in _unit(slab, lengths[rows]):  # one at a time: no sum depends on where a slab ends
                total += row
            continue
        if not ok.all():
            slab = np.where(ok[:, None], slab, np.float32(0.0))
        for name, values in codec.encode(slab).items():
            out[name][rows] = values
    if codec.rotated:
        center = (total / max(1, int(np.count_nonzero(lengths)))).astype(np.float32)
        out["center"] = center
        for rows, slab in _slabs(features):
            left = np.where(out["norms"][rows, None] > 0, _unit(slab, lengths[rows]) - center, np.float32(0.0))
            for name, values in codec.encode(left).items():
                out[name][rows] = values
    return out


def _slabs(features: Float32 | LazyRows) -> Iterator[tuple[slice, Float32]]:
    n = features.shape[0]
    for start in range(0, n, _SLAB_ROWS):
        rows = slice(start, min(start + _SLAB_ROWS, n))
        yield rows, np.ascontiguousarray(features[rows])  # or else sums, and so their bits, would have another order


def _unit(rows: Float32, lengths: NDArray[np.float64]) -> Float32:
    """Float32 rows (n, K) divided by their lengths (n,); zeros where that is 0, whatever the row holds."""
    return np.divide(rows, lengths[:, None], out=np.zeros_like(rows), where=lengths[:, None] > 0, casting="same_kind")


def write_shard(
    path: AnyPath, tensors: Mapping[str, Array], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[str, int]:
    """Write the file atomically, in the order of ``specs``; returns its SHA-256 and size in bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.tag, "shape": spec.shape, "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            digest.update(chunk)
            file.write(chunk)
        for name, spec in specs.items():
            values = np.ascontiguousarray(tensors[name], spec.dtype).reshape(-1).view(np.uint8).data
            digest.update(values)
            file.write(values)
    return digest.hexdigest(), 8 + len(text) + offset


@dataclass(frozen=True)
class Shard:
    """An open shard: its tensors as read-only views of one memory map, and its metadata."""

    tensors: dict[str, Array]
    metadata: dict[str, str]


def open_shard(
    path: AnyPath,
    codec: Codec,
    dim: int,
    start: int,
    stop: int,
    sha256: str | None = None,
    *,
    columns_only: bool = False,
) -> Shard:
    """Map the tensors of the shard that holds rows [start, stop) without reading them; a remote one is fetched.

    With ``sha256``, the bytes that are mapped are read and compared with it first. Raises CorruptStoreError if they
    are others, or the file is not exactly such a shard; nothing is allocated by what it claims. A file that takes this
    one's name later does not touch the map. ``columns_only``: features are not needed, and of a remote file, where
    there is no ``sha256`` to compare, they are neither fetched nor among the tensors.
    """
    try:
        if columns_only and sha256 is None and isinstance(path, RemotePath):
            with path.open(_HEAD) as file:
                return _open(file, codec, dim, start, stop, _columns)
        with open_regular(path) as file:
            return _open(file, codec, dim, start, stop, partial(_map, sha256=sha256))
    except FileNotFoundError:
        raise CorruptStoreError(
            f"{path}: No such file or directory; repeat the command that made it to have it made again"
        ) from None
    except OSError as error:
        raise CorruptStoreError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        reason = str(error)
    raise CorruptStoreError(f"{path}: {reason}; delete it and repeat the command that made it to have it made again")


_Places = dict[str, tuple[int, TensorSpec]]


def _map(file: BinaryIO, places: _Places, sha256: str | None) -> dict[str, Array]:
    if sha256 is not None:
        file.seek(0)
        if (found := sha256_of_open(file)) != sha256:
            raise ValueError(f"damaged (SHA-256 is {found}, expected {shown(sha256)})")
    if isinstance(file, io.BytesIO):
        data = np.frombuffer(file.getvalue(), np.uint8)
    else:
        data = np.asarray(np.memmap(file, np.uint8, mode="r"))  # one for all tensors: each holds a file descriptor
    return {
        name: data[at : at + spec.nbytes].view(spec.dtype).reshape(spec.shape) for name, (at, spec) in places.items()
    }


def _columns(file: BinaryIO, places: _Places) -> dict[str, Array]:
    tensors = {}
    for name, (at, spec) in places.items():
        if name != "features":
            file.seek(at)
            tensors[name] = np.frombuffer(file.read(spec.nbytes), spec.dtype).reshape(spec.shape)
    return tensors


def _open(
    file: BinaryIO,
    codec: Codec,
    dim: int,
    start: int,
    stop: int,
    read: Callable[[BinaryIO, _Places], dict[str, Array]],
) -> Shard:
    size = size_of_open(file)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise ValueError("not a safetensors file, or truncated")
    header = _header(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("damaged safetensors metadata")
    if (metadata.get("start"), metadata.get("stop")) != (str(start), str(stop)):
        found = f"{shown(metadata.get('start'))} to {shown(metadata.get('stop'))}"
        raise ValueError(f"its metadata says that it holds rows {found}, expected {start} to {stop}")
    specs = shard_tensors(codec, stop - start, dim)
    places: _Places = {}
    end = 8 + length
    for name, spec in specs.items():
        offset = end - 8 - length
        expected = {"dtype": spec.tag, "shape": [*spec.shape], "data_offsets": [offset, offset + spec.nbytes]}
        if header.get(name) != expected:
            raise ValueError(f"tensor {name} is {shown(header.get(name))}, expected {expected}")
        places[name] = end, spec
        end += spec.nbytes
    if set(header) != set(specs):
        raise ValueError(f"unexpected tensors {shown(sorted(set(header) - set(specs)))}")
    if size != end:
        raise ValueError(f"{size} bytes, expected {end}")
    tensors = read(file, places)
    for name in ("norms", "scale"):
        # The smallest and the largest of numbers with a NaN among them are NaN, which no comparison holds for.
        values = tensors.get(name)
        if values is not None and values.size and not (values.min() >= 0 and values.max() < np.inf):
            raise ValueError(f"tensor {name} holds a negative or non-finite number")
    center = tensors.get("center")
    if center is not None and not (center.min() > -np.inf and center.max() < np.inf):
        raise ValueError("tensor center holds a non-finite number")
    if (highest := tensors["status"].max(initial=0)) > Status.NON_FINITE:
        raise ValueError(f"tensor status holds {highest}, expected 0, 1 or 2")
    return Shard(tensors, metadata)


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ValueError(f"damaged safetensors header ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("damaged safetensors header")
    return header
