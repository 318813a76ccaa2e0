"""``manifest.json``: what a store holds, what it was made with, and the table of its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from less_fast.errors import CorruptStoreError, LessFastError
from less_fast.paths import AnyPath
from less_fast.store.codec import CODECS, Codec
from less_fast.store.files import atomic_file, open_regular, size_of_open
from less_fast.store.rows import Rows
from less_fast.store.strict_json import parse_json, shown

SCHEMA_VERSION = 2  # the newest that is read; a store is written in the first version that has its dtype
FILE_NAME = "manifest.json"
ROWS_NAME = "rows.parquet"
SHARDS_NAME = "shards"
_SIZES = ("n_rows", "dim", "shard_size")
_RESERVED = ("schema_version", *_SIZES, "dtype", "rows", "shards", "sha256")
# Lowest and highest: a size that is not exact in every JSON reader, or a table of shards that is slow to read and is
# written anew with every shard, is a mistake or an attack.
_LIMITS = {"n_rows": (0, 2**53 - 1), "dim": (1, 2**31 - 1), "shard_size": (1, 2**53 - 1)}
_MOST_SHARDS = 1 << 18
_MOST_BYTES = 1 << 28
_LONGEST_NAME = 1000
_SHARD_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard: rows [start, stop) of the store lie in ``file`` (relative to the store)."""

    file: str
    start: int
    stop: int
    sha256: str
    bytes: int
    facts: dict[str, Any]


_ENTRY = set(ShardEntry.__dataclass_fields__)


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
        for name in ("rows_hash", "rows_sha256"):
            if not isinstance(getattr(self, name), str):
                raise LessFastError(f"store {name} is {shown(getattr(self, name))}; expected a string")
        for name, (lowest, highest) in _LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
                raise LessFastError(f"store {name} is {shown(value)}; expected an integer from {lowest} to {highest}")
        if self.n_shards > _MOST_SHARDS:
            raise LessFastError(
                f"store shard_size is {self.shard_size}, which makes {self.n_shards} shards of {self.n_rows} rows; "
                f"expected at most {_MOST_SHARDS} shards"
            )
        if not isinstance(self.dtype, str) or self.dtype not in CODECS:
            raise LessFastError(f"store dtype is {shown(self.dtype)}; expected one of {', '.join(CODECS)}")
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
            "schema_version": self.codec.schema,
            **{name: getattr(self, name) for name in (*_SIZES, "dtype")},
            **self.facts,
            "rows": {"file": ROWS_NAME, "content_sha256": self.rows_hash, "sha256": self.rows_sha256},
            "shards": [asdict(entry) for _, entry in sorted(self.shards.items())],
        }
        return {**fields, "sha256": _checksum(fields)}

    def write(self, store: AnyPath) -> None:
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"
        with atomic_file(store / FILE_NAME) as file:
            file.write(text.encode())

    @classmethod
    def read(cls, store: AnyPath) -> Manifest:
        """Read and check the manifest of a store; see :func:`load_json` and :meth:`from_dict` for the errors."""
        return cls.from_dict(load_json(store), store / FILE_NAME)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], path: AnyPath) -> Manifest:
        """The inverse of :meth:`to_dict`.

        Raises LessFastError if a newer version wrote it, CorruptStoreError if a field is missing, of the wrong type,
        or a shard is not where it should be. A path that leaves the store by its name is refused; links are followed,
        since a name in a file can't make one: whoever did chose where it leads.
        """
        version = fields.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise LessFastError(
                f"{path} has schema version {shown(version)}, but this less_fast reads up to {SCHEMA_VERSION}; "
                "upgrade less_fast"
            )
        try:
            if isinstance(version, bool) or not isinstance(version, int) or version < 1:
                raise LessFastError(f"schema_version is {shown(version)}; expected 1 to {SCHEMA_VERSION}")
            rows, entries = fields["rows"], fields["shards"]
            if not isinstance(rows, dict) or rows.get("file", ROWS_NAME) != ROWS_NAME:
                raise LessFastError(f"rows is {shown(rows)}; expected an object with {ROWS_NAME!r} as file")
            if not isinstance(entries, list):
                raise LessFastError(f"shards is {shown(entries)}; expected a list")
            manifest = cls(
                **{name: fields[name] for name in (*_SIZES, "dtype")},
                facts={name: value for name, value in fields.items() if name not in _RESERVED},
                rows_hash=rows["content_sha256"],
                rows_sha256=rows["sha256"],
            )
            if version < manifest.codec.schema:
                raise LessFastError(f"schema version {version} has no dtype {manifest.dtype}")
            for row in entries:
                if not isinstance(row, dict) or set(row) != _ENTRY:
                    raise LessFastError(f"an entry of shards is {shown(row)}; expected {', '.join(sorted(_ENTRY))}")
                entry = ShardEntry(**row)
                shard = manifest._number_of(entry)
                if shard in manifest.shards:
                    raise LessFastError(f"shard {shard} is there twice")
                manifest.shards[shard] = entry
        except KeyError as error:
            raise CorruptStoreError(f"{path} is not a valid manifest: {error.args[0]!r} is missing") from None
        except LessFastError as error:
            raise CorruptStoreError(f"{path} is not a valid manifest: {error}") from None
        return manifest

    def _number_of(self, entry: ShardEntry) -> int:
        """The number of the shard that an entry of the table describes; raises LessFastError if there is none."""
        for name, kind in (("file", str), ("start", int), ("stop", int), ("bytes", int), ("sha256", str)):
            value = getattr(entry, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                word = "a string" if kind is str else "an integer"
                raise LessFastError(f"{name} of shard {shown(entry.file)} is {shown(value)}; expected {word}")
        if not isinstance(entry.facts, dict):
            raise LessFastError(f"facts of shard {shown(entry.file)} are {shown(entry.facts)}; expected an object")
        path = PurePosixPath(entry.file)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.file or ":" in entry.file:
            raise LessFastError(f"shard file {shown(entry.file)} lies outside of the store")
        if not entry.file.isprintable() or path.suffix != _SHARD_SUFFIX or len(entry.file) > _LONGEST_NAME:
            raise LessFastError(f"shard file {shown(entry.file)} is no name of a {_SHARD_SUFFIX} file")
        shard = entry.start // self.shard_size
        if not 0 <= shard < self.n_shards or (entry.start, entry.stop) != self.bounds(shard):
            raise LessFastError(
                f"shard {shown(entry.file)} has rows {shown(entry.start)} to {shown(entry.stop)}, "
                "not a window of the store"
            )
        return shard


def load_json(store: AnyPath) -> dict[str, Any]:
    """The parsed manifest. Raises LessFastError where there is no store, CorruptStoreError if it is not JSON."""
    path = store / FILE_NAME
    try:
        with open_regular(path) as file:
            if size_of_open(file) > _MOST_BYTES:
                raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
            fields = parse_json(file.read())
    except (FileNotFoundError, NotADirectoryError):
        reason = f"it has no {FILE_NAME}" if store.is_dir() else "there is no such folder"
        raise LessFastError(f"{store} is not a feature store: {reason}") from None
    except LessFastError:  # which is a ValueError
        raise
    except OSError as error:
        raise LessFastError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
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
    return f"{SHARDS_NAME}/{shard:05d}{_SHARD_SUFFIX}"


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
