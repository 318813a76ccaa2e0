"""One shard: a safetensors file with the features, norms, statuses and counts of consecutive rows.

The file is written and read here rather than through the safetensors package so that its bytes depend on nothing but
the content (the package orders metadata by hash), bfloat16 needs no further numpy types, nothing is copied on the way
to the disk, and every shape is checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from less_fast.errors import CorruptStoreError
from less_fast.store.codec import Array, Codec, Float32, TensorSpec
from less_fast.store.files import atomic_file

_MAX_HEADER = 1 << 20
_SLAB_ROWS = 64  # rows handled at a time: few enough that a slab stays in the cache
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
    return dict(sorted(specs.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize))


def shard_bytes(codec: Codec, n: int, dim: int) -> int:
    """Size of a shard's file, header included, rounded up a little."""
    return sum(spec.nbytes for spec in shard_tensors(codec, n, dim).values()) + 4096


def encode_shard(codec: Codec, features: Float32, status: Array) -> dict[str, Array]:
    """The tensors of features float32 (n, K) and statuses uint8 (n,), with ``norms`` of the rows before rounding.

    A row whose status is not OK is stored as zeros with norm 0. An OK row that holds an inf or a NaN, or whose norm is
    2^127 or more, becomes a NON_FINITE one.
    """
    n, dim = features.shape
    status = status.astype(np.uint8)
    out: dict[str, Array] = {name: np.empty(s.shape, s.dtype) for name, s in codec.tensors(n, dim).items()}
    out["status"] = status
    out["norms"] = np.zeros(n, np.float32)
    for start in range(0, n, _SLAB_ROWS):
        rows = slice(start, min(start + _SLAB_ROWS, n))
        slab = features[rows]
        wide = slab.astype(np.float64)
        norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        status[rows][(status[rows] == Status.OK) & ~(norms < _NORM_LIMIT)] = Status.NON_FINITE
        ok = status[rows] == Status.OK
        out["norms"][rows][ok] = norms[ok]
        if not ok.all():
            slab = np.where(ok[:, None], slab, np.float32(0.0))
        for name, values in codec.encode(slab).items():
            out[name][rows] = values
    return out


def write_shard(
    path: Path, tensors: Mapping[str, Array], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
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


def open_shard(path: Path, specs: Mapping[str, TensorSpec]) -> Shard:
    """Map a shard's tensors without reading them; raises CorruptStoreError if they are not exactly ``specs``."""

    def corrupt(reason: str) -> CorruptStoreError:
        return CorruptStoreError(f"{path}: {reason}; delete it and repeat the extraction to have this shard made again")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise corrupt("not a safetensors file, or truncated")
            header = json.loads(file.read(length))
    except OSError as error:
        raise corrupt(error.strerror or str(error)) from None
    except ValueError:
        raise corrupt("damaged safetensors header") from None
    if not isinstance(header, dict):
        raise corrupt("damaged safetensors header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt("damaged safetensors metadata")
    start, offset = 8 + length, 0
    tensors: dict[str, Array] = {}
    for name, spec in specs.items():
        expected = {"dtype": spec.tag, "shape": [*spec.shape], "data_offsets": [offset, offset + spec.nbytes]}
        if header.get(name) != expected:
            raise corrupt(f"tensor {name} is {header.get(name)}, expected {expected}")
        offset += spec.nbytes
    if set(header) != set(specs):
        raise corrupt(f"unexpected tensors {sorted(set(header) - set(specs))}")
    if size != start + offset:
        raise corrupt(f"{size} bytes, expected {start + offset}")
    data = np.memmap(path, np.uint8, mode="r")  # one map for all tensors: each map holds a file descriptor
    for name, spec in specs.items():
        begin, end = (start + offset for offset in header[name]["data_offsets"])
        tensors[name] = data[begin:end].view(spec.dtype).reshape(spec.shape)
    return Shard(tensors, metadata)
