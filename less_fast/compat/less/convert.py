"""``python -m less_fast.compat.less.convert``: LESS's and QLESS's ``.pt`` folders to feature stores, and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from less_fast.compat.less.command import run_command
from less_fast.compat.less.files import (
    DTYPES,
    NORMALISED,
    UNNORMALISED,
    Sidecar,
    excluded_rows,
    read_folder,
    read_sidecar,
    require_intact,
    write_store,
)
from less_fast.compat.less.matching import N_SUBTASKS
from less_fast.compat.less.qless import BITS, NAME, Quantiser, read_packed, write_packed
from less_fast.data import load_examples
from less_fast.errors import LessFastError
from less_fast.projection import KINDS, Projection
from less_fast.store import FeatureStore, Rows, Status, StoreWriter
from less_fast.store.codec import CODECS
from less_fast.store.files import failed_write, sha256_of

# What made the matrix where less_fast did not: both are dense +-1s, and neither's numbers are less_fast's.
_FOREIGN = ("fast_jl", "trak_basic")
_ROWS = 1024
_STATUS = {"no labels": Status.NO_LABELS, "not finite": Status.NON_FINITE}


@dataclass(frozen=True)
class Origin:
    """What a folder of LESS's does not say. ``projection`` and ``projector``: the matrix, and whose it is.

    ``projector`` is None for less_fast's own. ``precondition``: a store's fact of that name. ``rows``: id, dataset and
    subtask of every row; ``examples``: the fingerprint of the examples, where known.
    """

    projection: Projection
    projector: str | None
    precondition: dict[str, Any]
    rows: Rows
    examples: str | None = None

    def facts(self) -> dict[str, Any]:
        """The facts of a store."""
        known = {"projector": self.projector, "examples": self.examples}
        return {
            "projection": self.projection.to_dict(),
            "precondition": self.precondition,
            **{name: value for name, value in known.items() if value is not None},
        }


@dataclass(frozen=True)
class Source:
    """Rows to convert. ``read``: float32 rows [start, stop). ``sidecar``: what less_fast knows of them.

    ``facts``: which file they are in, and what that file keeps of them.
    """

    path: Path
    shape: tuple[int, int]
    read: Callable[[int, int], NDArray[np.float32]]
    sidecar: Sidecar | None
    facts: dict[str, Any]


def open_source(path: str | PathLike[str]) -> Source:
    """A folder of LESS's or QLESS's, or one file of it; of a folder's files the one that tells most is taken.

    ``all_unormalized.pt``, else ``all_orig.pt``, else the packed file. Raises LessFastError where there is none, more
    than one packed file, or one that is not what less_fast wrote.
    """
    path = Path(path)
    if path.is_dir():
        require_intact(path)
        packed = sorted(file for file in path.iterdir() if NAME.fullmatch(file.name))
        whole = [path / name for name in (UNNORMALISED, NORMALISED) if (path / name).exists()]
        if not whole and len(packed) != 1:
            found = ", ".join(file.name for file in packed) or "neither"
            raise LessFastError(
                f"{path}: expected {UNNORMALISED}, {NORMALISED} or one all_quantized_*.pt, found {found}; "
                "name the file itself"
            )
        path = whole[0] if whole else packed[0]
    facts: dict[str, Any] = {"file": path.name, "sha256": sha256_of(path) if path.is_file() else None}
    if NAME.fullmatch(path.name):
        codes = read_packed(path)
        facts |= {"bits": codes.quantiser.bits, "absmax": codes.quantiser.absmax}
        return Source(path, codes.shape, codes.rows, _sidecar_of(codes.note), facts)
    tensor = read_folder(path)
    facts["dtype"] = str(tensor.dtype).removeprefix("torch.")
    n, dim = tensor.shape
    return Source(path, (n, dim), lambda start, stop: tensor[start:stop].float().numpy(), read_sidecar(path), facts)


def to_store(
    source: Source, out: str | PathLike[str], origin: Origin | None = None, *, dtype: str = "float32"
) -> FeatureStore:
    """Write the rows to a store, which is resumable and read back against its checksums.

    ``origin``: what a folder of LESS's does not say; None where less_fast wrote the folder, which then says it. A
    float32 store holds the file's numbers bit for bit (of packed codes, the values that they stand for). Rows that are
    not finite get a status; numbers of tokens and labels are not known and 0.

    Raises LessFastError where the origin is missing, or is given twice, and where it does not fit the file's shape.
    """
    sidecar = source.sidecar
    if sidecar and origin:
        raise LessFastError(f"{source.path}: less_fast made it and knows what it is; leave the flags that say it out")
    if sidecar:
        facts, rows = sidecar.facts, sidecar.rows
    elif origin:
        facts, rows = origin.facts(), origin.rows
    else:
        raise LessFastError(f"{source.path}: does not say what it was made with; pass an Origin")
    n, dim = source.shape
    if len(rows) != n:
        raise LessFastError(f"{source.path}: has {n} rows, but {len(rows)} examples were given; give its own")
    if (stated := facts.get("projection", {}).get("dim", dim)) != dim:
        raise LessFastError(f"{source.path}: has {dim} features a row, not {stated}; correct the projection's dim")
    status = np.full(n, Status.OK, np.uint8)
    for row, reason in (sidecar.excluded if sidecar else {}).items():
        status[row] = _STATUS[reason]
    zeros = np.zeros(n, np.int32)
    facts = {**facts, "converted_from": source.facts}
    with StoreWriter(out, facts, rows, dim=dim, dtype=dtype, shard_size=_ROWS) as writer:
        for shard in writer.pending():
            start, stop = writer.bounds(shard)
            features = source.read(start, stop)
            writer.write(shard, features, status[start:stop], zeros[start:stop], zeros[start:stop])
        store = writer.close()
    store.require_intact()
    return store


def to_less(store: FeatureStore, out: str | PathLike[str], *, dtype: str = "float32") -> None:
    """Write a store, its checksums compared first, as a folder of LESS's; rows without features become zeros."""
    store.require_intact()
    write_store(store, out, dtype=dtype)


def to_qless(store: FeatureStore, out: str | PathLike[str], bits: int, *, absmax: float | None = None) -> Path:
    """Write a store, its checksums compared first, as ``all_quantized_{bits}bits_absmax.pt`` in the folder ``out``.

    ``absmax``: the value of the largest code. QLESS takes the largest entry of all training files at all checkpoints,
    or of one task's folders; not given: the largest of this store's normalised rows. A store that was made of a file of
    as many bits gives that file's codes again. Rows without features have codes of 0 (-1 with one bit), because the
    format cannot mark them. Returns the file.
    """
    store.require_intact()
    if bits not in BITS:
        raise LessFastError(f"QLESS has no files of {bits} bits; expected one of {', '.join(map(str, BITS))}")
    if absmax is not None and not 0 < absmax < float("inf"):
        raise LessFastError(f"absmax is {absmax}; expected the size of the largest entry, a number above 0")
    origin = store.facts.get("converted_from", {})
    as_it_was = absmax is None and origin.get("bits") == bits
    largest = max(float(np.abs(block).max(initial=0.0)) for block in _rows_to_pack(store, as_it_was))
    quantiser = Quantiser(bits, origin["absmax"] if as_it_was else largest if absmax is None else absmax)
    rows = store.rows
    note = {
        "facts": {name: value for name, value in store.facts.items() if name != "layout"},
        "excluded": {str(row): reason for row, reason in excluded_rows(store).items()},
        "rows": [rows.ids, rows.datasets, rows.subtasks],
    }
    file = Path(out) / f"all_quantized_{bits}bits_absmax.pt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_packed(file, _rows_to_pack(store, as_it_was), (len(store), store.dim), quantiser, largest, note)
    except OSError as error:
        raise failed_write(file, error, "the store is as it was") from error
    return file


def _rows_to_pack(store: FeatureStore, as_they_are: bool) -> Iterator[NDArray[np.float32]]:
    for _, block in store.blocks(_ROWS):
        yield block if as_they_are else torch.nn.functional.normalize(torch.from_numpy(block), dim=1).numpy()


def _sidecar_of(note: Mapping[str, Any] | None) -> Sidecar | None:
    if note is None:
        return None
    excluded = {int(row): reason for row, reason in note["excluded"].items()}
    return Sidecar(note["facts"], excluded, {}, Rows(*note["rows"]))


# The command


def _origin(arguments: argparse.Namespace, source: Source) -> Origin | None:
    """What the flags say of the folder; LessFastError lists all flags that are missing."""
    flags = ("projection", "precondition", "examples", "task", "dim", "seed", "block", "nnz", "multiprocessors")
    if source.sidecar is not None and all(getattr(arguments, flag) is None for flag in flags):
        return None
    kind = arguments.projection
    needed = {
        "projection": "which matrix the gradients were projected with",
        "precondition": "adam for training gradients, sgd for validation gradients in LESS's scripts",
    }
    if kind not in (None, "identity"):
        needed["seed"] = "the seed of the matrix (0 in LESS)"
    if kind in ("srht", "trak_basic"):
        needed["block"] = "the length of its blocks"
    if kind == "sjlt":
        needed["nnz"] = "the non-zeros of its columns"
    if kind == "fast_jl":
        needed["multiprocessors"] = "those of the GPU, which its matrix depends on: 108 on A100, 132 on H100 SXM"
    missing = [f"--{flag} ({why})" for flag, why in needed.items() if getattr(arguments, flag) is None]
    if arguments.examples is None and arguments.task is None:
        missing.append("--examples (the files it was made of, for ids and subtasks) or --task (one of LESS's own)")
    if missing:
        raise LessFastError(f"{source.path}: does not say what it was made with; give {', '.join(missing)}")
    rows, fingerprint = _rows(arguments, source.shape[0])
    projection, projector = _projection(arguments, source.shape[1])
    precondition: dict[str, Any] = {"kind": arguments.precondition}
    if arguments.precondition == "adam":
        precondition["rule"] = "less"
    return Origin(projection, projector, precondition, rows, fingerprint)


def _projection(arguments: argparse.Namespace, dim: int) -> tuple[Projection, str | None]:
    kind = arguments.projection
    dim = dim if arguments.dim is None else arguments.dim
    if kind == "fast_jl":
        return Projection("rademacher", dim, arguments.seed), f"fast_jl, {arguments.multiprocessors} multiprocessors"
    if kind == "trak_basic":
        return Projection("rademacher", dim, arguments.seed), f"trak BasicProjector, block {arguments.block}"
    given = {"seed": arguments.seed, "block": arguments.block, "nnz": arguments.nnz}
    return Projection(kind, dim, **{name: value for name, value in given.items() if value is not None}), None


def _rows(arguments: argparse.Namespace, n: int) -> tuple[Rows, str | None]:
    if arguments.examples is not None:
        examples = load_examples(arguments.examples)
        return Rows(examples.ids, examples.datasets, examples.subtasks), examples.fingerprint
    task, count = arguments.task, N_SUBTASKS[arguments.task]
    if n % count:
        raise LessFastError(
            f"--task {task} has {count} subtasks of equal size, which {n} rows are not; give --examples"
        )
    subtasks: list[str | None] = [f"{task}-{row // (n // count)}" for row in range(n)]
    return Rows([f"{task}-{row}" for row in range(n)], [task] * n, subtasks), None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m less_fast.compat.less.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    store = commands.add_parser("to-store", help="a folder of LESS's or QLESS's to a feature store")
    store.add_argument("source", type=Path, help="the folder with all_orig.pt, or a file")
    store.add_argument("out", type=Path, help="folder of the store")
    store.add_argument("--projection", choices=[*_FOREIGN, *KINDS], help="fast_jl is LESS's, trak_basic its fallback")
    store.add_argument("--dim", type=int, help="features per row, checked against the file")
    store.add_argument("--seed", type=int, help="seed of the projection")
    store.add_argument("--block", type=int, help="block length of srht or trak_basic")
    store.add_argument("--nnz", type=int, help="non-zeros per column of sjlt")
    store.add_argument("--multiprocessors", type=int, help="of the GPU that fast_jl ran on")
    store.add_argument("--precondition", choices=["adam", "sgd", "sign"], help="what LESS calls gradient_type")
    store.add_argument("--examples", nargs="+", help="the files the gradients are of, in order")
    store.add_argument("--task", choices=sorted(N_SUBTASKS), help="LESS's own validation set, in place of --examples")
    store.add_argument("--dtype", choices=[*CODECS], default="float32", help="of the store")
    less = commands.add_parser("to-less", help="a feature store to a folder of LESS's or QLESS's")
    less.add_argument("store", type=Path, help="folder of the store")
    less.add_argument("out", type=Path, help="the folder for all_orig.pt, such as grads/JOB/dolly-ckpt105-adam/dim8192")
    less.add_argument("--dtype", choices=[*DTYPES], default="float32", help="of the tensors")
    less.add_argument("--qless_bits", type=int, choices=BITS, help="write QLESS's packed file instead")
    less.add_argument("--absmax", type=float, help="QLESS's scale over several folders; default: this store's own")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one folder."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "to-store":
        source = open_source(arguments.source)
        store = to_store(source, arguments.out, _origin(arguments, source), dtype=arguments.dtype)
        unusable = int((store.status != Status.OK).sum())
        print(f"{arguments.out}: {len(store):,} rows of {store.dim} from {source.path}, {unusable:,} of them unusable")
        return
    store = FeatureStore(arguments.store)
    if arguments.qless_bits is None:
        to_less(store, arguments.out, dtype=arguments.dtype)
        print(f"{arguments.out}: {len(store):,} rows of {store.dim}")
    else:
        file = to_qless(store, arguments.out, arguments.qless_bits, absmax=arguments.absmax)
        print(f"{file}: {len(store):,} rows of {store.dim}, {arguments.qless_bits} bits each")


if __name__ == "__main__":
    run_command(main)
