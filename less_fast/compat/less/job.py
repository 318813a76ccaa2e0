"""One run of ``get_info``: rows into hidden stores, shard by shard, then LESS's files, then the stores are gone."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from less_fast.compat.less.files import SIDECAR, excluded_rows, is_whole, read_sidecar, replaced_bytes, write_folder
from less_fast.compat.less.tokens import TokenSource
from less_fast.errors import LessFastError
from less_fast.extraction import device_kind, versions
from less_fast.features import Output
from less_fast.model.budget import auto_token_budget
from less_fast.model.load import fingerprint
from less_fast.shard_job import ShardJob
from less_fast.store import FeatureStore, StoreWriter
from less_fast.store.files import FolderLock, check_free_space, failed_write
from less_fast.store.manifest import differences

# Where unfinished work lies in the output folder, and where in there a store goes when it is no longer needed.
WORK_NAME = ".less_fast"
DONE_NAME = ".done"
# Rows that are computed, and kept, at a time; four of LESS's parts.
SHARD_SIZE = 640

logger = logging.getLogger("less_fast")


@dataclass(frozen=True)
class Run:
    """What all folders of a run share.

    ``extractor``: makes what computes the rows of several outputs in one pass. ``token_budget``: tokens a batch may
    have, or ``auto``.
    """

    model: nn.Module
    source: TokenSource
    extractor: Callable[[Sequence[Output]], Any]
    token_budget: int | str = "auto"
    progress: bool = True


@dataclass(frozen=True)
class Folder:
    """One finished folder: what its rows are, and the ``facts`` (JSON) of them that model and examples do not tell.

    ``name``: of the store in which the rows are gathered.
    """

    name: str
    path: Path
    output: Output
    facts: Mapping[str, Any]


@dataclass
class Work:
    """The hidden folder of unfinished work, while it is locked; ``used``: the stores to be removed at a good end.

    It may hold stores of other calls that were interrupted: other dims, or the losses.
    """

    path: Path
    used: list[str] = field(default_factory=list)

    def stores(self) -> set[str]:
        """The names of all stores in it."""
        return {entry.name for entry in self.path.iterdir() if entry.is_dir() and entry.name != DONE_NAME}


def write_folders(out: Path, folders: Sequence[Folder], prefix: str, run: Run) -> None:
    """Bring LESS's files into every folder; those that are there already stay, and an interrupted run goes on.

    Raises LessFastError where a folder holds other files than this run would write.
    """
    shared = shared_facts(run)
    wanted = [(folder, {**shared, **folder.facts}) for folder in folders]
    with working_folder(out) as work:
        missing = {folder.name for folder, facts in wanted if not _is_there(folder.path, facts)}
        stores = work.stores()
        # What was begun together is finished together: one output may have been reduced from another.
        needed = missing | stores if missing & stores else missing
        begun = [pair for pair in wanted if pair[0].name in needed]
        # Stores of whole folders go, unless another one may have been begun together with them.
        if (left := {folder.name for folder in folders} - needed) >= stores - needed:
            work.used += sorted(left & stores)
        if not missing:
            logger.warning("%s: made already, with the same settings; nothing is to be done", out)
            return
        for folder, _ in begun:
            _check_ours(folder.path)
        room = 0
        for folder in (folder for folder in folders if folder.name in missing):
            room += 16 * len(run.source) * folder.output.projection.dim  # parts, two tables, what one is joined from
            room -= replaced_bytes(folder.path, prefix)
        check_free_space(out, room)
        finished = compute(work, [(folder.name, folder.output, facts) for folder, facts in begun], run)
        for (folder, facts), store in zip(begun, finished):
            write_folder(
                folder.path,
                (block for _, block in store.blocks(SHARD_SIZE)),
                facts=facts,
                excluded=excluded_rows(store),
                rows=store.rows,
                prefix=prefix,
            )


def shared_facts(run: Run) -> dict[str, Any]:
    """What the rows of every folder of a run depend on, as JSON values."""
    dtype = str(next(run.model.parameters()).dtype).removeprefix("torch.")
    return {**fingerprint(run.model), **run.source.facts, "numerics": {"model_dtype": dtype}}


def compute(work: Work, wanted: Sequence[tuple[str, Output, Mapping[str, Any]]], run: Run) -> list[FeatureStore]:
    """A finished store in ``work`` for each (name, output, facts), there until the folder's block ends well."""
    extractor = run.extractor([output for _, output, _ in wanted])
    budget = run.token_budget
    if budget == "auto":
        sites = getattr(extractor, "sites", [])
        budget = auto_token_budget(run.model, sites, extractor.device, run.source.max_length)
    if not isinstance(budget, int) or budget < 1:
        raise LessFastError(f"token_budget is {budget!r}; expected 'auto' or a positive number of tokens")
    shared = {
        "device": device_kind(extractor.device),
        "token_budget": budget,
        "batches": extractor.batches.name,
        "made_together": [name for name, _, _ in wanted],
        "versions": versions(extractor.device),
    }
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                StoreWriter(
                    work.path / name,
                    {**facts, **shared},
                    run.source.rows,
                    dim=output.projection.dim,
                    dtype="float32",
                    shard_size=SHARD_SIZE,
                )
            )
            for name, output, facts in wanted
        ]
        ShardJob(extractor, len(run.source), run.source.encode, budget).run(writers, run.progress)
        stores = [writer.close() for writer in writers]
    work.used += [name for name, _, _ in wanted]
    _report(stores[0])
    return stores


@contextmanager
def working_folder(out: Path) -> Iterator[Work]:
    """The folder of unfinished work, locked; what was used goes when the block ends well, and else waits for the next.

    A store is moved before it is removed, so that what lies under its name is always whole. Raises LessFastError while
    another process holds the folder.
    """
    work, done = out / WORK_NAME, out / WORK_NAME / DONE_NAME
    lock = _lock(work)
    try:
        shutil.rmtree(done, ignore_errors=True)
        content = Work(work)
        yield content
        try:
            for name in content.used:
                done.mkdir(exist_ok=True)
                os.replace(work / name, done / name)
        except OSError as error:
            raise failed_write(work, error, "the files are finished; remove this folder") from error
        shutil.rmtree(done, ignore_errors=True)
    finally:
        lock.release()
        with suppress(OSError):
            work.rmdir()  # only where it is empty, which it is not while another process holds it


def _lock(work: Path) -> FolderLock:
    """Make the folder and lock it."""
    try:
        while True:
            work.mkdir(parents=True, exist_ok=True)
            try:
                return FolderLock(work)
            except FileNotFoundError:  # another process has ended, and removed the folder, between the two
                continue
    except OSError as error:
        raise failed_write(work, error, "nothing was written") from error


def _report(store: FeatureStore) -> None:
    truncated = sum(shard["facts"]["truncated"] for shard in store.manifest["shards"])
    if truncated:
        logger.warning("%d of %d examples were cut to their first tokens", truncated, len(store))
    excluded = excluded_rows(store)
    for reason in sorted(set(excluded.values())):
        rows = [row for row, why in excluded.items() if why == reason]
        first = ", ".join(store.rows.ids[row] for row in rows[:3])
        hint = " (a larger max_length may leave them some)" if reason == "no labels" else ""
        text = "%d of %d examples: %s%s; their rows are zeros and can't be selected (first: %s)"
        logger.warning(text, len(rows), len(store), reason, hint, first)


def _is_there(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the folder is whole; raises LessFastError where it was made with other facts."""
    if not is_whole(folder):
        return False
    sidecar = read_sidecar(folder)
    if changes := differences(sidecar.facts if sidecar else {}, dict(facts)):
        raise LessFastError(
            f"{folder}: was made with other settings (old -> new): {'; '.join(changes[:8])}; choose another folder"
        )
    return True


def _check_ours(folder: Path) -> None:
    """Raise LessFastError, before hours of work, where the folder holds another program's rows."""
    foreign = [] if (folder / SIDECAR).exists() else sorted(path.name for path in folder.glob("*.pt"))
    if foreign:
        raise LessFastError(
            f"{folder}: holds {foreign[0]}, which less_fast did not write, and its rows may be of another projection; "
            "choose another folder, or remove them"
        )
