"""The on-disk format of features: a manifest, a table of rows, and shards that appear whole or not at all."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from less_fast.store.files import atomic_file
from less_fast.store.reader import FeatureStore, StoredRows, Verification
from less_fast.store.rows import Rows
from less_fast.store.shard import Status
from less_fast.store.writer import StoreWriter

if TYPE_CHECKING:
    from less_fast.store.convert import convert_store
    from less_fast.store.views import TorchRows, to_dataset

# Loaded when first used: the views need torch, which reading and scoring on the CPU do without.
_ROOMS = {"TorchRows": "views", "convert_store": "convert", "to_dataset": "views"}

__all__ = [
    "FeatureStore",
    "Rows",
    "Status",
    "StoreWriter",
    "StoredRows",
    "TorchRows",
    "Verification",
    "atomic_file",
    "convert_store",
    "to_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value
