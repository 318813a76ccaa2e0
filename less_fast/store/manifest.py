"""``manifest.json``: what a store holds, what it was made with, and the table of its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.store.codec import CODECS, Codec
from less_fast.store.files import atomic_file
from less_fast.store.rows import Rows

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
ROWS_NAME = "rows.parquet"
SHARDS_NAME = "shards"
_SIZES = ("n_rows", "dim", "shard_size")
_RESERVED = ("schema_version", *_SIZES, "dtype", "rows", "shards", "sha256")


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard: rows [start, stop) of the store lie in ``file`` (relative to the store)."""

    file: str
    start: int
    stop: int
    sha256: str
    bytes: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The content of the file. ``facts`` (what the features were made with) lie beside the other keys in the JSON.

    ``rows_hash`` is of the content of the rows, ``rows_sha256`` of the parquet file that holds them.
    """

    n_rows: int
    dim: int
    dtype: str
    shard_size: int
    facts: dict[str, Any]
    rows_hash: str
    rows_sha256: str
    shards: dict[int, ShardEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, lowest in (("n_rows", 0), ("dim", 1), ("shard_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise LessFastError(f"store {name} is {value!r}; expected an integer of at least {lowest}")
        if self.dtype not in CODECS:
            raise LessFastError(f"store dtype is {self.dtype!r}; expected one of {', '.join(CODECS)}")
        if taken := sorted(set(_RESERVED) & set(self.facts)):
            raise LessFastError(f"facts may not be named {', '.join(taken)}: the manifest has keys of that name")

    @property
    def codec(self) -> Codec:
        return CODECS[self.dtype]

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.shard_size)

    @property
    def pending(self) -> list[int]:
        """Numbers of the shards that are not in the table yet."""
        return [shard for shard in range(self.n_shards) if shard not in self.shards]

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.n_rows)

    def with_rows(self, rows: Rows, sha256: str) -> Manifest:
        return replace(self, rows_hash=rows.hash, rows_sha256=sha256)

    def settings(self) -> dict[str, Any]:
        """All that has to be the same for a store to be resumed."""
        sizes = {name: getattr(self, name) for name in (*_SIZES, "dtype")}
        return {**self.facts, **sizes, "rows (ids, datasets, subtasks)": self.rows_hash}

    def to_dict(self) -> dict[str, Any]:
        """The JSON of the file; equal manifests give equal bytes."""
        fields = {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in (*_SIZES, "dtype")},
            **self.facts,
            "rows": {"file": ROWS_NAME, "content_sha256": self.rows_hash, "sha256": self.rows_sha256},
            "shards": [asdict(entry) for _, entry in sorted(self.shards.items())],
        }
        return {**fields, "sha256": _checksum(fields)}

    def write(self, store: Path) -> None:
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"
        with atomic_file(store / FILE_NAME) as file:
            file.write(text.encode())

    @classmethod
    def read(cls, store: Path) -> Manifest:
        """Read and check the manifest of a store; see :func:`load_json` and :meth:`from_dict` for the errors."""
        return cls.from_dict(load_json(store), store / FILE_NAME)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], path: Path) -> Manifest:
        """The inverse of :meth:`to_dict`.

        Raises LessFastError if a newer version wrote it, CorruptStoreError if a field is missing, of the wrong type,
        or a shard is not where it should be (a path that leaves the store is never followed).
        """
        version = fields.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise LessFastError(
                f"{path} has schema version {version}, but this less_fast reads up to {SCHEMA_VERSION}; "
                "upgrade less_fast"
            )
        try:
            if version != SCHEMA_VERSION:
                raise LessFastError(f"schema_version is {version!r}; expected {SCHEMA_VERSION}")
            rows = fields["rows"]
            manifest = cls(
                **{name: fields[name] for name in (*_SIZES, "dtype")},
                facts={name: value for name, value in fields.items() if name not in _RESERVED},
                rows_hash=rows["content_sha256"],
                rows_sha256=rows["sha256"],
            )
            for row in fields["shards"]:
                entry = ShardEntry(**row)
                shard = manifest._number_of(entry)
                if shard in manifest.shards:
                    raise LessFastError(f"shard {shard} is there twice")
                manifest.shards[shard] = entry
        except KeyError as error:
            raise CorruptStoreError(f"{path} is not a valid manifest: {error.args[0]!r} is missing") from None
        except (LessFastError, TypeError) as error:
            raise CorruptStoreError(f"{path} is not a valid manifest: {error}") from None
        return manifest

    def _number_of(self, entry: ShardEntry) -> int:
        for name in ("start", "stop", "bytes"):
            value = getattr(entry, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise LessFastError(f"{name} of shard {entry.file!r} is {value!r}; expected an integer")
        for name in ("file", "sha256"):
            if not isinstance(getattr(entry, name), str):
                raise LessFastError(f"{name} of a shard is {getattr(entry, name)!r}; expected a string")
        if not isinstance(entry.facts, dict):
            raise LessFastError(f"facts of shard {entry.file!r} are {entry.facts!r}; expected an object")
        path = PurePosixPath(entry.file)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.file or ":" in entry.file:
            raise LessFastError(f"shard file {entry.file!r} lies outside of the store")
        shard = entry.start // self.shard_size
        if not 0 <= shard < self.n_shards or (entry.start, entry.stop) != self.bounds(shard):
            raise LessFastError(
                f"shard {entry.file!r} has rows {entry.start} to {entry.stop}, not a window of the store"
            )
        return shard


def load_json(store: Path) -> dict[str, Any]:
    """The parsed manifest. Raises LessFastError where there is no store, CorruptStoreError if it is not JSON."""
    path = store / FILE_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        reason = f"it has no {FILE_NAME}" if store.is_dir() else "there is no such folder"
        raise LessFastError(f"{store} is not a feature store: {reason}") from None
    except OSError as error:
        raise LessFastError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CorruptStoreError(f"{path} is not a valid manifest: expected an object")
    return fields


def checksum_holds(fields: Mapping[str, Any]) -> bool:
    """Whether a manifest's own checksum fits the rest of it."""
    return fields.get("sha256") == _checksum({name: value for name, value in fields.items() if name != "sha256"})


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def shard_file(shard: int) -> str:
    """Where a new shard goes, relative to the store."""
    return f"{SHARDS_NAME}/{shard:05d}.safetensors"


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Every leaf in which two JSON values differ, as ``name: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{name}.{key}" if name else key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new))]
    else:
        return [] if old == new else [f"{name}: {_brief(old)} -> {_brief(new)}"]
    return [line for key, a, b in pairs for line in differences(a, b, key)]


def _brief(value: Any) -> str:
    text = f"{len(value)} entries" if isinstance(value, list) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
