"""LESS's folders of ``.pt`` files: parts of 160 rows, all rows as they are, all rows normalised.

    grads-160.pt, grads-320.pt, ...   the rows in order; the number is that of the last row, counted from 1
    all_unormalized.pt                all rows as they are (the name is LESS's)
    all_orig.pt                       all rows divided by their norms: what ``matching`` reads
    less_fast.json, rows.parquet      what LESS leaves out: the projection, unusable rows, ids, subtasks, checksums

Folders that LESS wrote have neither of the last two, and are read all the same.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from less_fast.errors import LessFastError
from less_fast.store import FeatureStore, Rows, Status, atomic_file
from less_fast.store.files import FolderLock, check_free_space, failed_write, remove_temporaries, sha256_of
from less_fast.store.manifest import ROWS_NAME, differences

NORMALISED = "all_orig.pt"
UNNORMALISED = "all_unormalized.pt"
SIDECAR = "less_fast.json"
ROWS_PER_PART = 160
DTYPES = {"float32": torch.float32, "float16": torch.float16}

_SCHEMA_VERSION = 1
_PART = re.compile(r"(grads|reps)-(\d+)\.pt")
_REASONS = {Status.NO_LABELS: "no labels", Status.NON_FINITE: "not finite"}


@dataclass(frozen=True)
class Sidecar:
    """What less_fast knows of a folder beyond its tensors.

    ``facts``: what the features were made with, as in a store's manifest. ``excluded``: row -> why it has no features
    ("no labels", "not finite"). ``files``: file name -> SHA-256. ``rows``: id, dataset and subtask of every row.
    """

    facts: dict[str, Any]
    excluded: dict[int, str]
    files: dict[str, str]
    rows: Rows


def write_folder(
    folder: str | PathLike[str],
    blocks: Iterable[NDArray[np.float32]],
    *,
    facts: Mapping[str, Any],
    rows: Rows,
    excluded: Mapping[int, str] | None = None,
    every: int = ROWS_PER_PART,
    dtype: str = "float32",
    prefix: str = "grads",
) -> None:
    """Write LESS's files of the rows that come in ``blocks``, float32 (n, D) each, and the sidecar.

    Rows in ``excluded`` are written as zeros, over which other programs do not stumble as over the NaN that they are
    in LESS; the sidecar lists them. ``facts``: JSON values that tell what the rows were made with. ``dtype``:
    ``float32`` or ``float16``. ``prefix``: ``grads``, or ``reps``, of which LESS keeps normalised rows only. A folder
    that an interrupted call left is written again, with the same bytes; a whole one is left alone.

    Raises LessFastError where there are no rows, where the folder holds such files that less_fast did not write, or
    wrote with other facts or of other rows, where ``blocks`` has not as many rows as ``rows``, and where the disk is
    full.
    """
    folder = Path(folder)
    excluded = excluded or {}
    begun: dict[str, Any] = {
        "schema_version": _SCHEMA_VERSION,
        "facts": dict(facts),
        "excluded": {str(row): reason for row, reason in sorted(excluded.items())},
        "dtype": dtype,
        "rows_per_part": every,
        "n_rows": len(rows),
        "rows_hash": rows.hash,
    }
    begun = json.loads(json.dumps(begun, allow_nan=False))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        try:
            if _is_done(folder, begun):
                return
            _claim(folder, begun, prefix)
            for count, part in _parts(blocks, every):
                for row in range(count - len(part), count):
                    if row in excluded:
                        part[row - count] = 0.0
                save_tensor(torch.from_numpy(part).to(DTYPES[dtype]), folder / f"{prefix}-{count}.pt")
            names = [NORMALISED, UNNORMALISED] if prefix == "grads" else [NORMALISED]
            for name in names:
                n = merge_parts(folder, prefix, normalised=name == NORMALISED)
                if n != len(rows):
                    raise LessFastError(f"{folder}: was given {n} rows of features for {len(rows)} examples; give all")
            with atomic_file(folder / ROWS_NAME) as file:
                file.write(rows.to_parquet())
            names.append(ROWS_NAME)
            _write_json(folder / SIDECAR, {**begun, "files": {name: sha256_of(folder / name) for name in names}})
        finally:
            lock.release()
    except OSError as error:
        raise failed_write(folder, error, "the features in the store are kept") from error


def write_store(
    store: FeatureStore, folder: str | PathLike[str], *, every: int = ROWS_PER_PART, dtype: str = "float32"
) -> None:
    """Write a store's rows as a folder of LESS's; errors as for :func:`write_folder`."""
    width = DTYPES[dtype].itemsize
    if not is_whole(folder):
        needed = 4 * len(store) * store.dim * width  # parts, two tables, and one in the making
        check_free_space(Path(folder), needed - replaced_bytes(Path(folder)))
    facts = {name: value for name, value in store.facts.items() if name != "layout"}  # its hash says as much
    blocks = (block for _, block in store.blocks(every))
    write_folder(folder, blocks, facts=facts, excluded=excluded_rows(store), rows=store.rows, every=every, dtype=dtype)


def replaced_bytes(folder: Path, prefix: str = "grads") -> int:
    """The size of what :func:`write_folder` removes before it writes: the room that an interrupted call has taken."""
    return sum(path.stat().st_size for path in _tensor_files(folder, prefix))


def excluded_rows(store: FeatureStore) -> dict[int, str]:
    """The rows of a store that have no features, and why."""
    status = store.status
    return {int(row): _REASONS[Status(status[row])] for row in np.flatnonzero(status != Status.OK)}


def merge_parts(folder: str | PathLike[str], prefix: str = "grads", *, normalised: bool) -> int:
    """Join ``{prefix}-{count}.pt`` to ``all_orig.pt`` (each row divided by its norm) or ``all_unormalized.pt``.

    Norms are taken part by part in the parts' own dtype, as in LESS. One part is in memory at a time. Returns the
    number of rows. Raises LessFastError where there are no parts, or parts that do not fit each other.
    """
    folder = Path(folder)
    parts = _part_files(folder, prefix)
    if not parts:
        raise LessFastError(f"{folder}: holds no {prefix}-<count>.pt to merge; collect the features first")
    out = folder / (NORMALISED if normalised else UNNORMALISED)
    spool = folder / f"{out.name}.rows.tmp"
    try:
        n = 0
        first = read_folder(parts[0])
        dim = first.shape[1]
        with open(spool, "wb") as file:
            for path in parts:
                part = read_folder(path)
                if part.shape[1] != dim:
                    raise LessFastError(f"{path}: has {part.shape[1]} columns, but {parts[0].name} {dim}; remove one")
                if part.dtype != first.dtype:
                    raise LessFastError(f"{path}: is {part.dtype}, but {parts[0].name} {first.dtype}; remove one")
                part = _normalise(part) if normalised else part
                file.write(part.contiguous().view(torch.uint8).numpy().data)  # numpy knows no bfloat16
                n += len(part)
        rows = torch.from_file(str(spool), shared=False, size=n * dim, dtype=first.dtype)
        save_tensor(rows.view(n, dim), out)
        return n
    finally:
        spool.unlink(missing_ok=True)


def _part_files(folder: Path, prefix: str) -> list[Path]:
    """The parts of one prefix, in the order of their numbers."""
    matches = [(match, path) for path in folder.glob("*.pt") if (match := _PART.fullmatch(path.name))]
    found = {int(match[2]): path for match, path in matches if match[1] == prefix}
    return [path for _, path in sorted(found.items())]


def _tensor_files(folder: Path, prefix: str) -> list[Path]:
    tables = [folder / name for name in (NORMALISED, UNNORMALISED)]
    return [*_part_files(folder, prefix), *(path for path in tables if path.exists())]


def _normalise(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows, dim=1)
    unit[(rows == 0).all(1)] = 0  # in float16 the smallest norm that torch divides by is 0 as well
    return unit


def is_whole(folder: str | PathLike[str]) -> bool:
    """Whether less_fast has finished writing this folder, and its tables are still there."""
    files = (_sidecar_content(Path(folder)) or {}).get("files")
    return files is not None and all((Path(folder) / name).exists() for name in files)


def read_folder(path: str | PathLike[str], *, normalised: bool = True) -> Tensor:
    """``all_orig.pt`` (normalised) or ``all_unormalized.pt`` of a folder, or the tensor of a file: (N, D), as stored.

    The tensor is mapped rather than read where the file's format allows. Raises LessFastError for a file that is
    missing or not a matrix.
    """
    path = Path(path)
    file = path / (NORMALISED if normalised else UNNORMALISED) if path.is_dir() else path
    tensor = load_tensor(file)
    if tensor.ndim != 2:
        raise LessFastError(f"{file}: holds a tensor of shape {tuple(tensor.shape)}; expected one row per example")
    return tensor


def read_sidecar(path: str | PathLike[str]) -> Sidecar | None:
    """What less_fast wrote beside the tensors of a folder (or beside a file in it); None where LESS wrote them."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    content = _sidecar_content(folder)
    if content is None:
        return None
    if "files" not in content:
        raise LessFastError(f"{folder}: was not written to its end; repeat the command that makes it")
    excluded = {int(row): reason for row, reason in content["excluded"].items()}
    return Sidecar(content["facts"], excluded, content["files"], Rows.read(folder / ROWS_NAME))


def require_intact(folder: str | PathLike[str]) -> None:
    """Raise LessFastError naming a file that is not the one less_fast wrote; folders of LESS's have no checksums."""
    sidecar = read_sidecar(folder)
    for name, expected in sidecar.files.items() if sidecar else ():
        file = Path(folder) / name
        if not file.exists() or sha256_of(file) != expected:
            raise LessFastError(f"{file}: missing or damaged (its SHA-256 differs); make the folder again")


def load_tensor(path: Path) -> Tensor:
    """The tensor, or list of numbers, in a ``.pt`` file, on the CPU; nothing but tensors and plain values is unpickled.

    Raises LessFastError for a file that is missing, damaged, or holds something else.
    """
    value = load_value(path)
    if isinstance(value, list):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise LessFastError(f"{path}: holds a {type(value).__name__}; expected a tensor")
    return value


def load_value(path: Path) -> Any:
    """What a ``.pt`` file holds, tensors mapped from it where its format allows; errors as for :func:`load_tensor`."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format that torch wrote before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise LessFastError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise LessFastError(
            f"{path}: holds something else than tensors, lists and numbers; save it as a tensor"
        ) from None
    except OSError as error:  # not allowed to, or cut off where it is mapped
        raise LessFastError(
            f"{path}: cannot be read ({error.strerror or error}); if it is damaged, remove it and make it again"
        ) from None
    except (RuntimeError, EOFError, IndexError, KeyError, ValueError) as error:
        raise LessFastError(
            f"{path}: cannot be read as a file of torch.save ({type(error).__name__}); make it again"
        ) from None


def save_tensor(value: Any, path: Path) -> None:
    """``torch.save`` to a file that appears whole or not at all."""
    with atomic_file(path) as file:
        torch.save(value, file)


def _parts(blocks: Iterable[NDArray[np.float32]], every: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The blocks' rows cut into new arrays of ``every`` rows, with the number of rows up to the end of each."""
    count, waiting = 0, None
    for block in blocks:
        waiting = np.array(block, np.float32) if waiting is None else np.concatenate([waiting, block])
        while len(waiting) >= every:
            part, waiting = waiting[:every].copy(), waiting[every:]
            count += every
            yield count, part
    if waiting is not None and len(waiting):
        yield count + len(waiting), waiting
    elif not count:
        raise LessFastError("there are no rows to write; expected at least one")


def _is_done(folder: Path, begun: dict[str, Any]) -> bool:
    content = _sidecar_content(folder) or {}
    files = content.pop("files", None)
    return files is not None and content == begun and all((folder / name).exists() for name in files)


def _claim(folder: Path, begun: dict[str, Any], prefix: str) -> None:
    """With the lock held: make sure that what lies there is ours and of the same rows; mark it as unfinished, empty it.

    Nothing that was not written now may come into the tables. The mark is first: a crash leaves no folder that looks
    whole.
    """
    content = _sidecar_content(folder)
    if content is None:
        foreign = sorted(
            p.name for p in folder.iterdir() if _PART.fullmatch(p.name) or p.name in (NORMALISED, UNNORMALISED)
        )
        if foreign:
            raise LessFastError(
                f"{folder}: holds {foreign[0]}, which less_fast did not write, and its rows may be of another "
                "projection; choose another folder, or remove them"
            )
    elif changes := differences({k: v for k, v in content.items() if k != "files"}, begun):
        raise LessFastError(
            f"{folder}: was made with other settings (old -> new): {'; '.join(changes[:8])}; choose another folder"
        )
    remove_temporaries(folder)
    _write_json(folder / SIDECAR, begun)
    for path in _tensor_files(folder, prefix):
        path.unlink()


def _sidecar_content(folder: Path) -> dict[str, Any] | None:
    path = folder / SIDECAR
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LessFastError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise LessFastError(f"{path}: not valid JSON; restore it, or make the folder again") from None
    if not isinstance(content, dict) or content.get("schema_version") != _SCHEMA_VERSION:
        raise LessFastError(f"{path}: not a description that this less_fast can read; upgrade less_fast")
    return content


def _write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
