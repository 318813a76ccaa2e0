"""Small feature stores for tests."""

from __future__ import annotations

import hashlib
import json
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
