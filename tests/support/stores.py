"""Small feature stores for tests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from less_fast.errors import LessFastError
from less_fast.projection import Projection
from less_fast.store import FeatureStore, Rows, Status, StoreWriter

DTYPES = ("float32", "float16", "bfloat16", "int8", "1bit")


def make_rows(n: int, subtasks: list[str | None] | None = None) -> Rows:
    return Rows([f"id-{i}" for i in range(n)], [f"set-{i % 3}" for i in range(n)], subtasks or [None] * n)


def make_facts(dim: int, **changes: Any) -> dict[str, Any]:
    return {"projection": Projection("sjlt", dim).to_dict(), "layout_hash": "a" * 64, "examples": "e", **changes}


def open_writer(
    path: Path, n: int, dim: int, *, dtype: str = "float32", shard_size: int = 4, **changes: Any
) -> StoreWriter:
    return StoreWriter(path, make_facts(dim, **changes), make_rows(n), dim=dim, dtype=dtype, shard_size=shard_size)


def write_pending(writer: StoreWriter, features: np.ndarray, status: np.ndarray | None = None) -> None:
    """Write every pending shard; token and label counts follow from the row number."""
    if status is None:
        status = np.full(len(features), Status.OK, np.uint8)
    for shard in writer.pending():
        rows = slice(*writer.bounds(shard))
        numbers = np.arange(len(features))[rows]
        writer.write(shard, features[rows], status[rows], numbers + 2, numbers + 1, {"token_budget": 100 + shard})


def make_store(
    path: Path,
    features: np.ndarray,
    *,
    status: np.ndarray | None = None,
    subtasks: list[str | None] | None = None,
    dtype: str = "float32",
    shard_size: int = 4,
    **changes: Any,
) -> FeatureStore:
    n, dim = features.shape
    rows, facts = make_rows(n, subtasks), make_facts(dim, **changes)
    with patch("os.fsync"):  # no power cut is tested with these stores, and waiting for the disk is slow
        writer = StoreWriter(path, facts, rows, dim=dim, dtype=dtype, shard_size=shard_size)
        write_pending(writer, features, status)
        writer.release()
    return FeatureStore(path)


def folder_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative name."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def refusal(action: Callable[[], Any]) -> str:
    """The message, one line, with which less_fast refuses to do something."""
    with pytest.raises(LessFastError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_manifest(path: Path, **fields: Any) -> None:
    """Overwrite some fields of a store's manifest, whose checksum is then wrong."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the checksum that fits the rest of it."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def flip_bit(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def rotated(x: np.ndarray) -> np.ndarray:
    """R x of the documented R for rows (n, K), in float64: every window a product with an explicit ±1 matrix."""
    dim = x.shape[1]
    m = 2 ** int(math.log2(dim))
    n_bytes = math.ceil(m / 8)
    stream = hashlib.shake_256(b"less_fast 1bit rotation").digest(2 * n_bytes)
    out, places = x.astype(np.float64), np.arange(m, dtype=np.uint16)
    sign = np.array([-1.0 if bin(i).count("1") % 2 else 1.0 for i in range(m)])
    for window, first in enumerate([0] if m == dim else [0, dim - m]):
        drawn = stream[window * n_bytes : (window + 1) * n_bytes]
        signs = np.array([-1.0 if drawn[i // 8] >> (i % 8) & 1 else 1.0 for i in range(m)])
        old = out[:, first : first + m] * signs
        for start in range(0, m, 256):  # rows of H: entry (i, j) is -1 to the number of ones that i and j share
            rows = sign[places[start : start + 256, None] & places]
            out[:, first + start : first + start + len(rows)] = old @ rows.T / math.sqrt(m)
    return out


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Every row over its length, float64; rows of zeros stay."""
    wide = x.astype(np.float64)
    length = np.sqrt((wide**2).sum(axis=1, keepdims=True))
    return np.divide(wide, length, out=np.zeros_like(wide), where=length > 0)


def sign_values(x: np.ndarray) -> np.ndarray:
    """What the signs of R x say of it, times their factor |Rx|^2 / sum|Rx|, and turned by R still: float64 (n, K)."""
    turned = rotated(x)
    total = np.abs(turned).sum(axis=1, keepdims=True)
    scale = np.divide((turned**2).sum(axis=1, keepdims=True), total, out=np.zeros_like(total), where=total > 0)
    return scale * np.where(turned < 0, -1.0, 1.0)
