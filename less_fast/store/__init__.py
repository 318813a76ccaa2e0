"""The on-disk format of features: a manifest, a table of rows, and shards that appear whole or not at all."""

from less_fast.store.files import atomic_file
from less_fast.store.reader import FeatureStore, Verification
from less_fast.store.rows import Rows
from less_fast.store.shard import Status
from less_fast.store.writer import StoreWriter

__all__ = ["FeatureStore", "Rows", "Status", "StoreWriter", "Verification", "atomic_file"]
